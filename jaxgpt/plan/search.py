"""The setting that fits and is fastest by estimate: fewest micro-batches, least recomputation."""

import dataclasses
import math
import sys
from bisect import bisect_left
from collections.abc import Sequence

from jax.sharding import Mesh

from jaxgpt import machine, sharding
from jaxgpt.config import RunConfig
from jaxgpt.machine import Chip
from jaxgpt.plan.step import Outline, Step, TooLarge, compile_step

REMAT = ("none", "dots", "qkv", "attention", "full")  # from most memory to most computation
# What a step may fill of a device: the rest is for evaluation, fragments and, on a CPU, the
# program itself. A TPU's compiler leaves out its own reserve.
USABLE = 0.9


class Tried:
    """Settings compiled so far; each once."""

    def __init__(self, outline: Outline, cfg: RunConfig, mesh: Mesh) -> None:
        self._outline, self._cfg, self._mesh = outline, cfg, mesh
        self.chip = planned_chip(cfg, mesh)
        self._found: dict[tuple[int, str], Step | TooLarge] = {}

    def __call__(self, micro_batches: int, remat: str) -> Step | TooLarge:
        key = (micro_batches, remat)
        if key not in self._found:
            cfg = with_setting(self._cfg, micro_batches, remat)
            # A minute each for a large model: somebody waits.
            print(f"compiling {micro_batches} micro-batches, remat {remat}: ", file=sys.stderr,
                  end="", flush=True)  # fmt: skip
            try:
                step = compile_step(self._outline, cfg, self._mesh)
                self._found[key] = self._weigh(step)
            except TooLarge as error:
                self._found[key] = error
            print(_in_words(self._found[key]), file=sys.stderr)
        return self._found[key]

    def _weigh(self, step: Step) -> Step | TooLarge:
        room = usable(self.chip)
        return step if step.memory.total <= room else TooLarge(step.memory.total, room)

    def smallest(self) -> TooLarge:
        """The refusal that was nearest to fitting."""
        refused = [found for found in self._found.values() if isinstance(found, TooLarge)]
        return min(refused, key=lambda error: error.needed)


def _in_words(found: Step | TooLarge) -> str:
    if isinstance(found, Step):
        return f"{found.memory.total / 1e9:.2f} GB a device"
    return f"does not fit ({found})"


def planned_chip(cfg: RunConfig, mesh: Mesh) -> Chip | None:
    """What a device can do and hold: one of the mesh, or the one that a plan names."""
    name = getattr(cfg, "chip", "")
    return machine.data_sheet(name) if name else machine.chip(mesh.devices.flat[0])


def usable(chip: Chip | None) -> float:
    """Bytes that a step may fill; an unknown device is taken at its word."""
    return USABLE * chip.memory if chip else math.inf


def with_setting(cfg: RunConfig, micro_batches: int, remat: str) -> RunConfig:
    """The config with what the search decides."""
    return dataclasses.replace(
        cfg,
        train=dataclasses.replace(cfg.train, micro_batches=micro_batches),
        model=dataclasses.replace(cfg.model, remat=remat),
    )


def search(outline: Outline, cfg: RunConfig, mesh: Mesh) -> Step:
    """The fastest by estimate of the settings that fit.

    Raises:
        ValueError: none does, saying by how much; or the mesh divides no batch.
    """
    tried, fitting, fewest = Tried(outline, cfg, mesh), [], 0
    counts = divisions(cfg.train.batch_size, mesh)
    # Every choice needs less memory than the one before it: the first that fits is soon found.
    fits = lambda remat: isinstance(tried(counts[-1], remat), Step)
    first = (
        0 if largest_micro_batch(tried, "none", counts) else bisect_left(REMAT, True, 1, key=fits)
    )
    for remat in REMAT[first:]:
        # More recomputation pays only where it allows fewer micro-batches.
        allowed = counts[:fewest] if fitting else counts
        step = largest_micro_batch(tried, remat, allowed, fewest - 1 if fitting else 0)
        if step is not None:
            fitting.append(step)
            fewest = counts.index(step.micro_batches)
            if fewest == 0:
                break
    if not fitting:
        raise ValueError(_does_not_fit(cfg, mesh, tried.smallest(), counts[-1]))
    chip = tried.chip
    # Halfway between all work overlapping and none.
    return min(fitting, key=lambda step: sum(step.seconds(chip)) if chip else step.micro_batches)


def as_given(outline: Outline, cfg: RunConfig, mesh: Mesh) -> Step:
    """The step with the settings of the config.

    Raises:
        ValueError: it does not fit, saying by how much.
    """
    found = Tried(outline, cfg, mesh)(cfg.train.micro_batches, cfg.model.remat)
    if isinstance(found, Step):
        return found
    missing = (found.needed - found.available) / 1e9
    raise ValueError(
        f"train.micro_batches={cfg.train.micro_batches}, model.remat={cfg.model.remat}: lacks "
        f"{missing:.1f} GB a device of {found.available / 1e9:.1f}; use fit=auto"
    )


def divisions(batch_size: int, mesh: Mesh) -> list[int]:
    """Numbers of micro-batches whose rows the devices divide, ascending."""
    sharding.check_rows(mesh, batch_size)
    rows = batch_size // math.prod(mesh.shape[axis] for axis in sharding.ROWS)
    return [parts for parts in range(1, rows + 1) if rows % parts == 0]


def largest_micro_batch(
    tried: Tried, remat: str, counts: Sequence[int], guess: int = 0
) -> Step | None:
    """The step with the fewest micro-batches that fits; None if none does.

    What does not fit tells how far away it is, since activations shrink with the micro-batch and
    the rest stays. So few of the settings are compiled.

    Args:
        guess: index of the count to begin with.
    """
    best, low, high = None, 0, len(counts)  # below low none fits, from high on all do
    refused: list[tuple[int, TooLarge]] = []
    while low < high:
        found = tried(counts[guess], remat)
        if isinstance(found, Step):
            best, high = found, guess
            guess = (low + high) // 2
        else:
            refused.append((counts[guess], found))
            low = guess + 1
            wanted = _enough(refused)
            first = next((n for n, count in enumerate(counts) if count >= wanted), len(counts))
            guess = max(low, min(first, high - 1))
    return best


def _enough(refused: list[tuple[int, TooLarge]]) -> float:
    """How many micro-batches should fit, going by the last two that did not.

    One alone could be activations as a whole.
    """
    (parts, error), earlier = refused[-1], refused[-2:-1]
    activations = error.needed * parts
    for more, larger in earlier:
        activations = (larger.needed - error.needed) / (1 / more - 1 / parts)
    room = error.available - (error.needed - activations / parts)
    return activations / room if room > 0 else math.inf


def _does_not_fit(cfg: RunConfig, mesh: Mesh, nearest: TooLarge, parts: int) -> str:
    missing = (nearest.needed - nearest.available) / 1e9
    narrower = "optim.moments=bfloat16, " if cfg.optim.moments == "float32" else ""
    return (
        f"model.num_layers={cfg.model.num_layers}, model.model_dim={cfg.model.model_dim}: does not "
        f"fit {mesh.size} x {mesh.devices.flat[0].device_kind} with any setting; the nearest, "
        f"{parts} micro-batches of whole rematerialisation, lacks {missing:.1f} GB a device of "
        f"{nearest.available / 1e9:.1f}; use more devices for mesh.fsdp (now "
        f"{mesh.shape['fsdp']}) or mesh.tensor ({mesh.shape['tensor']}), {narrower}a shorter "
        "model.context_length or a smaller model"
    )
