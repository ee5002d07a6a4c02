"""The engine behind the conversion tables.

A row pairs a parameter of ours with a tensor of theirs, and says how their axes become ours:

    ("blocks/attention/query/kernel", "model.layers.{layer}.self_attn.q_proj.weight",
     "(heads width) dim -> dim (heads width)")

The pattern is einops' language. Every axis has a size that follows from ModelConfig, so that a row
knows their tensor's shape and serves both directions. `{layer}` and `{expert}` are the leading
axes of our stacked arrays. Where one tensor of theirs holds several parameters of ours, the row
names them all, and the pattern has a `part` axis; or, where they are not alike, an axis that
is their sum, as in "(heads+kv_heads+kv_heads width) dim".
"""

import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import jax
import numpy as np

from jaxgpt import tree
from jaxgpt.config import ModelConfig
from jaxgpt.model import gpt
from jaxgpt.types import Params

Row = tuple[str | tuple[str, ...], str, str]
Shape = tuple[int, ...]
Place = Callable[[str, np.ndarray], Any]  # (parameter's name, host array) -> device array

ALIGNMENT = 64  # JAX takes a host array on the CPU without copying when it is aligned to this


class Source(Protocol):
    """Tensors by name, read one at a time."""

    @property
    def shapes(self) -> Mapping[str, Shape]: ...

    def read(self, name: str) -> np.ndarray: ...


def rows(text: str, layer: str = "") -> tuple[Row, ...]:
    """Rows as text, one a line, with two blanks or more between the columns:

        attention/query/kernel  self_attn.q_proj.weight  (heads width) dim -> dim (heads width)

    Parameters of ours that one tensor holds stand in braces: attention/{query,key,value}/bias.

    Args:
        layer: how the names of a layer's tensors begin. The rows are then about one block.
    """
    found: list[Row] = []
    for line in text.strip().splitlines():
        ours, theirs, pattern = re.split(r" {2,}", line.strip())
        ours = f"blocks/{ours}" if layer else ours
        several = re.search(r"\{(.*)\}", ours)
        names = several and tuple(ours.replace(several[0], part) for part in several[1].split(","))
        found.append((ours if names is None else names, layer + theirs, pattern))
    return tuple(found)


def of_dense_layers(table: tuple[Row, ...]) -> tuple[Row, ...]:
    """The rows for the layers in front that have no mixture (ModelConfig.dense_layers)."""
    own = lambda name: name.replace("blocks/", "dense_blocks/", 1)
    return tuple(
        (own(ours) if isinstance(ours, str) else tuple(map(own, ours)), theirs,
         re.sub(r"\bmlp\b", "dense", pattern))
        for ours, theirs, pattern in table
    )  # fmt: skip


def rearrange(array: np.ndarray, pattern: str, sizes: Mapping[str, int]) -> np.ndarray:
    """einops.rearrange where every axis has a size: "(a b) c -> c (a b)"."""
    left, right = _sides(pattern)
    old, new = list(itertools.chain(*left)), list(itertools.chain(*right))
    flat = array.reshape([sizes[axis] for axis in old])
    return flat.transpose([old.index(axis) for axis in new]).reshape(_shape(right, sizes))


def inverse(pattern: str) -> str:
    """The pattern that undoes this one."""
    return " -> ".join(reversed(pattern.split(" -> ")))


def their_shape(pattern: str, sizes: Mapping[str, int]) -> Shape:
    """The shape of the tensor on the pattern's left side."""
    return _shape(_sides(pattern)[0], sizes)


def sizes(cfg: ModelConfig, parts: int = 1) -> dict[str, int]:
    """Every axis that a pattern may name."""
    return {
        "vocab": cfg.vocab_size, "position": cfg.context_length + cfg.position_offset,
        "dim": cfg.model_dim,
        "heads": cfg.num_heads, "kv_heads": cfg.kv_heads, "width": cfg.head_width,
        "half": cfg.head_width // 2, "two": 2, "mlp": cfg.mlp_width, "expert": cfg.num_experts,
        "shared": cfg.shared_mlp_dim, "one": 1, "part": parts,
        "dense": cfg.dense_mlp_dim or 4 * cfg.model_dim,
    } | ({} if cfg.latent is None else {
        "latent": cfg.latent.dim, "query_latent": cfg.latent.query_dim,
        "stored": cfg.latent.dim + cfg.latent.rope_dim, "value": cfg.latent.value_dim,
        "pair": cfg.head_width - cfg.latent.rope_dim + cfg.latent.value_dim,
    })  # fmt: skip


def parameter_shapes(cfg: ModelConfig) -> dict[str, Shape]:
    """Name and shape of every parameter of the model, which is not built."""
    params = jax.eval_shape(lambda rng: gpt.init(cfg, rng), jax.random.key(0))
    return {name: leaf.shape for name, leaf in tree.flatten(params).items()}


def parameters(row: Row) -> tuple[str, ...]:
    """Our parameters that a row is about."""
    return (row[0],) if isinstance(row[0], str) else row[0]


def pieces(row: Row, cfg: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Their tensors of one row, each with its place in our stacked arrays."""
    _, name, _ = row
    dense = any(name.startswith("dense_") for name in parameters(row))
    first, end = (0, cfg.dense_layers) if dense else (cfg.dense_layers, cfg.num_layers)
    layers = range(first, end) if "{layer}" in name else (None,)
    experts = range(cfg.num_experts) if "{expert}" in name else (None,)
    # Lazily, and so without itertools.product: a hostile config may ask for 10^9 layers.
    for layer in layers:
        for expert in experts:
            place = None if layer is None else layer - first
            index = tuple(i for i in (place, expert) if i is not None)
            yield name.format(layer=layer, expert=expert), index


def select(
    table: tuple[Row, ...], ours: Mapping[str, Any], present: Any = (), layer: int = 0
) -> list[Row]:
    """The rows that together hold each of our parameters once.

    Of several rows for one parameter, the first whose tensor is `present` in that layer, else the
    first of all.
    """
    first = {"layer": layer, "expert": 0}
    ordered = sorted(table, key=lambda row: row[1].format(**first) not in present)  # stable
    chosen, covered = [], set()
    for row in ordered:
        names = set(parameters(row))
        if names and names <= ours.keys() and not names & covered:
            chosen.append(row)
            covered |= names
    assert covered == ours.keys(), f"no row of the table for {sorted(ours.keys() - covered)}"
    return sorted(chosen, key=table.index)


def read(
    table: tuple[Row, ...],
    cfg: ModelConfig,
    source: Source,
    place: Place | None = None,
    dtype: str = "float32",
    stored: Callable[[Row], Any] | None = None,
) -> Params:
    """Our parameters from their tensors; all names and shapes are checked before any is read.

    The memory needed is that of the model and of one tensor: every parameter is allocated once,
    filled tensor by tensor and placed before the next one begins.

    Args:
        stored: what takes the place of a row's parameter as it is; None: it is read and placed.

    Raises:
        ValueError: tensors are missing, left over, or of another shape.
    """
    place = place or (lambda _, array: jax.device_put(array))
    ours = parameter_shapes(cfg)
    rows = select(table, ours, source.shapes, cfg.dense_layers)
    _check(rows, cfg, source)
    placed: dict[str, Any] = {}
    for row in rows:
        names = parameters(row)
        if stored is not None and (kept := stored(row)) is not None:
            placed[names[0]] = kept
            continue
        axes = sizes(cfg, len(names))
        arrays = [aligned(ours[name], dtype) for name in names]
        for theirs, index in pieces(row, cfg):
            _fill(arrays, index, split(source.read(theirs), row, axes))
        placed |= {name: place(name, a) for name, a in zip(names, arrays, strict=True)}
        del arrays  # where `place` has copied them, they make room for the next
    return tree.nest(placed)


def write(
    table: tuple[Row, ...], cfg: ModelConfig, params: Params
) -> Iterator[tuple[str, np.ndarray]]:
    """Their tensors from our parameters, one at a time."""
    leaves = tree.flatten(params)
    for row in select(table, leaves):
        names = parameters(row)
        axes = sizes(cfg, len(names))
        arrays = [np.asarray(leaves[name]) for name in names]
        for theirs, index in pieces(row, cfg):
            block = [array[index] for array in arrays]
            yield theirs, np.ascontiguousarray(join(block, row, axes))


def split(tensor: np.ndarray, row: Row, sizes: Mapping[str, int]) -> list[np.ndarray]:
    """Our parameters, of one layer and expert, from their one tensor."""
    count, pattern = len(parameters(row)), row[2]
    if "+" not in pattern:
        found = rearrange(tensor, pattern, sizes)
        return list(found) if count > 1 else [found]
    own = [_of_part(pattern, part) for part in range(count)]
    ends = np.cumsum([their_shape(pattern, sizes)[0] for pattern in own])
    cut = np.split(tensor, ends[:-1])
    return [rearrange(part, pattern, sizes) for part, pattern in zip(cut, own, strict=True)]


def join(parts: list[np.ndarray], row: Row, sizes: Mapping[str, int]) -> np.ndarray:
    """The inverse of `split`."""
    pattern = row[2]
    if "+" not in pattern:
        whole = np.stack(parts) if len(parts) > 1 else parts[0]
        return rearrange(whole, inverse(pattern), sizes)
    back = [inverse(_of_part(pattern, part)) for part in range(len(parts))]
    return np.concatenate([rearrange(x, p, sizes) for x, p in zip(parts, back, strict=True)])


def _of_part(pattern: str, part: int) -> str:
    """The pattern of one of several parameters that lie behind each other in their first axis."""
    return re.sub(r"\w+\+[\w+]+", lambda axis: axis[0].split("+")[part], pattern)


def _fill(arrays: list[np.ndarray], index: tuple[int, ...], parts: list[np.ndarray]) -> None:
    """A function of its own, so that a tensor is gone before the next one is read."""
    for array, part in zip(arrays, parts, strict=True):
        array[index] = part


def _check(rows: list[Row], cfg: ModelConfig, source: Source) -> None:
    """Compares names and shapes, up to a few faults: a hostile config may ask for millions."""
    wanted: set[str] = set()
    missing, misshapen = [], []
    for row in rows:
        shape = their_shape(row[2], sizes(cfg, len(parameters(row))))
        for theirs, _ in pieces(row, cfg):
            wanted.add(theirs)
            found = source.shapes.get(theirs)
            if found is None:
                missing.append(theirs)
            elif tuple(found) != shape:
                misshapen.append(f"{theirs} is {list(found)} instead of {list(shape)}")
            if len(missing) + len(misshapen) > 8:
                break
    leftover = sorted(set(source.shapes) - wanted) if not missing else []
    for problem, names in (
        ("the weights lack tensors that the config asks for", missing),
        ("the weights have shapes that the config does not ask for", misshapen),
        ("the weights hold tensors that jaxgpt has no place for", leftover),
    ):
        if names:
            more = ", …" if len(names) > 8 else ""
            raise ValueError(f"{problem}: {', '.join(names[:8])}{more}")


def by_row(pattern: str, inward: str) -> str | None:
    """The pattern of rows that are taken whole, their inner axis renamed, of "F D -> D F"; "F D".

    None, where the pattern does something else with them.
    """
    old, new = map(list, _sides(pattern))
    if len(old) != 2 or ((len(new) != 2 or new[0] != old[1]) and " -> " in pattern):
        return None
    outward = old[0] if " -> " not in pattern else new[1]
    return f"({' '.join(old[0])}) {inward} -> ({' '.join(outward)}) {inward}"


def _sides(pattern: str) -> tuple[list[list[str]], list[list[str]]]:
    """Both sides as groups of axes; a pattern without an arrow changes nothing."""
    left, _, right = pattern.partition(" -> ")
    groups = lambda side: [group.strip("()").split() for group in re.findall(r"\(.*?\)|\w+", side)]
    return groups(left), groups(right or left)


def _shape(groups: list[list[str]], sizes: Mapping[str, int]) -> Shape:
    size = lambda axis: sum(sizes[part] for part in axis.split("+"))
    return tuple(math.prod(map(size, group)) for group in groups)


def aligned(shape: Shape, dtype: str) -> np.ndarray:
    """An empty array that JAX takes without a copy."""
    size = math.prod(shape) * jax.numpy.dtype(dtype).itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(jax.numpy.dtype(dtype)).reshape(shape)
