"""What a compiled program holds, and what it moves: collectives and memory traffic.

The latter are read from its optimised HLO text. XLA's own cost analysis counts the body of a loop
once, so the layers of a scan, and the micro-batches, would be missing. Here everything is
multiplied by the trips of the loops around it.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

BITS = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "bf16": 16, "f16": 16,
    "s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64, "c64": 64, "c128": 128,
}  # fmt: skip
KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
# What moves nothing by itself, or is counted where its parts are.
FREE = {
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "conditional",
    "call", "after-all", "partition-id", "replica-id", "optimization-barrier", "domain", "iota",
    "all-gather-done", "all-reduce-done", "collective-permute-done", "copy-done", "slice-done",
    "async-done", "async-update", "async-start",
}  # fmt: skip
SLICES = {"dynamic-slice", "slice", "gather"}  # of their first operand they read a part
VMEM = "S(1)"  # in a layout: the buffer is in the TPU's on-chip memory

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
_CALLED = re.compile(
    r"(calls|body|condition|to_apply|branch_computations|called_computations)=(\{[^}]*\}|%[\w.\-]+)"
)


class Collective(NamedTuple):
    """One exchange between devices."""

    kind: str
    name: str  # where the program asked for it
    arrays: int  # exchanged together
    bytes: float  # that reach or leave one device, each time, around a ring
    group: int  # devices that take part
    loops: tuple[int, ...]  # trips of the loops around it, from the outermost

    @property
    def times(self) -> int:
        return math.prod(self.loops)

    @property
    def backward(self) -> bool:
        return "transpose(" in self.name


class Program(NamedTuple):
    """What one step does on each device."""

    collectives: list[Collective]
    memory_bytes: float  # read from and written to the device's memory


@dataclass
class _Instruction:
    name: str
    shape: str
    opcode: str
    operands: list[str]
    literal: int | None  # of a constant; a parameter's number
    attributes: str
    root: bool


@dataclass
class _Computation:
    name: str
    instructions: dict[str, _Instruction] = field(default_factory=dict)

    @property
    def root(self) -> _Instruction:
        return next(i for i in self.instructions.values() if i.root)


def read(text: str) -> Program:
    """The program of `compiled.as_text()`."""
    computations, entry = _parse(text)
    found: dict[tuple[str, str, str], Collective] = {}
    traffic = 0.0
    for computation, loops, caller in _walk(computations, entry, (), None):
        for instruction in computation.instructions.values():
            collective = _collective(instruction, loops, caller)
            if collective is not None:
                # TPUs cut an asynchronous collective into pieces that overlap with other work,
                # every one of which shows the whole: they share a channel and a name. A channel
                # alone is not enough, since all that were combined with others have the same.
                channel = re.search(r"channel_id=(\d+)", instruction.attributes)
                key = (
                    collective.kind,
                    channel[1] if channel else instruction.name,
                    collective.name,
                )
                if key not in found or found[key].times < collective.times:
                    found[key] = collective
            if caller is None:
                traffic += math.prod(loops) * _traffic(computations, computation, instruction)
    return Program(list(found.values()), traffic)


def total_bytes(sizes: Any, platform: str) -> float:
    """Bytes that a device holds while a program runs: arguments, results, temporaries, code.

    Args:
        sizes: `compiled.memory_analysis()`.
    """
    results = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    code = sizes.generated_code_size_in_bytes
    return sizes.argument_size_in_bytes + results + temporaries(sizes, platform) + code


def temporaries(sizes: Any, platform: str) -> float:
    """Bytes of what a program holds beside its arguments and results.

    Of a TPU's program the smaller of two sums: `temp_size` counts buffers that share their place
    apart (11.4 GB where 7.7 are laid out, seen with an 8B shape), the peak counts some on-chip
    memory. A CPU's peak is of the arguments only.
    """
    if platform != "tpu":
        return float(sizes.temp_size_in_bytes)
    results = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    others = sizes.peak_memory_in_bytes - sizes.argument_size_in_bytes - results
    return float(min(sizes.temp_size_in_bytes, others))


def num_bytes(shape: str, on_chip: bool = True) -> float:
    """Bytes of the arrays of an HLO shape.

    Args:
        on_chip: counts those that a TPU keeps in its on-chip memory too.
    """
    total = 0.0
    for dtype, dims, layout in _ARRAY.findall(shape):
        if on_chip or VMEM not in layout:
            bits = 8 if dtype.startswith("f8") else BITS.get(dtype, 0)
            total += math.prod(map(int, filter(None, dims.split(",")))) * bits / 8
    return total


def _parse(text: str) -> tuple[dict[str, _Computation], str]:
    computations: dict[str, _Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if current is None:
            head = _COMPUTATION.match(line)
            if head:
                current = computations[head[2]] = _Computation(head[2])
                entry = head[2] if head[1] else entry
        elif line == "}" or line.startswith("}, execution_thread="):  # kernels' metadata has braces
            current = None
        else:
            found = _INSTRUCTION.match(line)
            if found:
                instruction = _split(found[2], found[3], bool(found[1]))
                current.instructions[instruction.name] = instruction
    return computations, entry


def _split(name: str, rest: str, root: bool) -> _Instruction:
    """`shape opcode(operands), attributes`; a shape may be a tuple, which has parentheses too."""
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    inside = rest[opening + 1 : closing]
    operands = re.findall(r"%([\w.\-]+)", inside)
    literal = int(inside) if inside.isdigit() else None
    return _Instruction(name, shape, rest[:opening], operands, literal, rest[closing + 1 :], root)


def _closing(text: str, start: int) -> int:
    depth = 0
    for index in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[index], 0)
        if depth == 0:
            return index
    raise ValueError("HLO text with an open parenthesis")


def _walk(
    computations: Mapping[str, _Computation],
    name: str,
    loops: tuple[int, ...],
    caller: _Instruction | None,
) -> Iterator[tuple[_Computation, tuple[int, ...], _Instruction | None]]:
    """Every computation that runs, once for each place that calls it.

    Args:
        caller: the fusion, if the computation is one: it reads and writes memory as a whole.
    """
    computation = computations[name]
    yield computation, loops, caller
    for instruction in computation.instructions.values():
        called = _called(instruction)
        if instruction.opcode == "while":
            trips = _trips(computations, instruction, called)
            yield from _walk(computations, called["body"][0], (*loops, trips), caller)
            continue
        inside = caller
        if instruction.opcode in ("fusion", "custom-call"):
            inside = inside or instruction
        for role, names in called.items():
            if role == "to_apply" and instruction.opcode != "call":
                continue  # what adds two numbers of a reduction
            for name in names:
                yield from _walk(computations, name, loops, inside)


def _called(instruction: _Instruction) -> dict[str, list[str]]:
    called = defaultdict(list)
    for role, names in _CALLED.findall(instruction.attributes):
        called[role] += [name.strip(" %{}") for name in names.split(",")]
    return called


def _trips(
    computations: Mapping[str, _Computation], loop: _Instruction, called: dict[str, list[str]]
) -> int:
    """As XLA notes it, or the number that the loop's condition compares with."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
        return int(known[1])
    constants = [1]
    for computation, _, _ in _walk(computations, called["condition"][0], (), None):
        for instruction in computation.instructions.values():
            if instruction.opcode == "constant":
                constants.append(instruction.literal or 0)
    return max(constants)


def _collective(
    instruction: _Instruction, loops: tuple[int, ...], caller: _Instruction | None
) -> Collective | None:
    kind = instruction.opcode.removesuffix("-start")
    if kind not in KINDS:
        return None
    group = _group(instruction.attributes)
    size = num_bytes(instruction.shape)
    if instruction.opcode == "all-gather-start":  # (what goes in, what comes out)
        size *= group / (group + 1)
    elif instruction.opcode == "collective-permute-start":
        size = num_bytes(instruction.shape.split("}")[0] + "}")
    share = (group - 1) / group
    moved = {
        "all-gather": size * share,
        "all-reduce": 2 * size * share,
        "reduce-scatter": size * (group - 1),
        "all-to-all": size * share,
        "collective-permute": size,
    }[kind]
    attributes = instruction.attributes
    if kind == "all-reduce" and caller and "calls=%all-reduce-scatter" in caller.attributes:
        # A TPU's reduce-scatter: all-reduce and slice in one kernel.
        kind, moved, attributes = "reduce-scatter", size * share, caller.attributes
    named = re.search(r'op_name="([^"]*)"', attributes)
    arrays = len(_ARRAY.findall(instruction.shape))
    return Collective(kind, named[1] if named else "", arrays, moved, group, loops)


def _group(attributes: str) -> int:
    """How many devices a collective connects, in any of the four ways to write it."""
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", attributes)
    if listed:
        return listed[1].count(",") + 1
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]", attributes)
    if iota:
        return int(iota[2])
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes)
    if mesh:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part or sizes[axis]) for axis, part in parts)
    return 2  # a permutation


def _traffic(
    computations: Mapping[str, _Computation], computation: _Computation, instruction: _Instruction
) -> float:
    """Bytes between the chip and its memory: operands and results, parts where only parts count."""
    opcode, operands = instruction.opcode, instruction.operands
    if opcode in FREE:
        return 0
    shape_of = lambda name: computation.instructions[name].shape
    size = lambda shape: num_bytes(shape, on_chip=False)
    if opcode in SLICES:
        return size(instruction.shape) + min(size(instruction.shape), size(shape_of(operands[0])))
    if opcode == "dynamic-update-slice":
        return 2 * size(shape_of(operands[1]))
    if opcode == "copy-start":  # (destination, source, context)
        return size(instruction.shape)
    if opcode == "slice-start":  # ((source), piece, context)
        source = shape_of(operands[0])
        piece = num_bytes(instruction.shape) - num_bytes(source)
        return size(instruction.shape) - size(source) + (piece if size(source) else 0)
    if opcode != "fusion":
        return size(instruction.shape) + sum(size(shape_of(name)) for name in operands)
    inner = _body(computations, instruction)
    read = sum(
        _read_by_fusion(computations, inner, number, size(shape_of(name)))
        for number, name in enumerate(operands)
    )
    return read + _written_by_fusion(computations, inner, instruction.shape)


def _body(computations: Mapping[str, _Computation], fusion: _Instruction) -> _Computation:
    return computations[_called(fusion)["calls"][0]]


def _read_by_fusion(
    computations: Mapping[str, _Computation], inner: _Computation, number: int, whole: float
) -> float:
    """A parameter of which only slices are used is read in slices; one that is updated, or handed
    on as it is, not.
    """
    own = next(
        i for i in inner.instructions.values() if i.opcode == "parameter" and i.literal == number
    )
    parts = 0.0
    for user, operand in _users(computations, inner, own.name):
        first = user.operands[0] == operand
        if user.opcode in SLICES and first:
            parts += num_bytes(user.shape)
        elif user.opcode == "fusion":  # a collective's has others in it
            body = _body(computations, user)
            for place, name in enumerate(user.operands):
                if name == operand:
                    parts += _read_by_fusion(computations, body, place, whole)
        elif user.opcode != "tuple" and not (user.opcode == "dynamic-update-slice" and first):
            return whole
    return min(whole, parts)


def _users(
    computations: Mapping[str, _Computation], inner: _Computation, name: str
) -> Iterator[tuple[_Instruction, str]]:
    """What reads a value, seen through bitcasts and fusions of nothing else."""
    for user in inner.instructions.values():
        if name in user.operands:
            body = _body(computations, user).instructions if user.opcode == "fusion" else {}
            opcodes = {each.opcode for each in body.values()} or {user.opcode}
            if opcodes <= {"bitcast", "parameter"}:
                yield from _users(computations, inner, user.name)
            else:
                yield user, name


def _written_by_fusion(
    computations: Mapping[str, _Computation], inner: _Computation, shape: str
) -> float:
    """Every result, of which one that is updated in place is written in part."""
    parts = inner.root.operands if inner.root.opcode == "tuple" else [inner.root.name]
    sizes = [num_bytes(array.group(), on_chip=False) for array in _ARRAY.finditer(shape)]
    if len(parts) != len(sizes):  # tuples in tuples
        return sum(sizes)
    return sum(
        _written(computations, inner, name, size) for name, size in zip(parts, sizes, strict=True)
    )


def _written(
    computations: Mapping[str, _Computation], inner: _Computation, name: str, whole: float
) -> float:
    made = inner.instructions[name]
    while made.opcode == "bitcast":
        made = inner.instructions[made.operands[0]]
    if made.opcode == "parameter":
        return 0.0
    if made.opcode == "dynamic-update-slice":
        return min(whole, num_bytes(inner.instructions[made.operands[1]].shape))
    if made.opcode == "fusion":
        body = _body(computations, made)
        return _written(computations, body, body.root.name, whole)
    return whole
