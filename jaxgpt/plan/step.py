"""One setting, compiled: what a step takes of each device."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh

from jaxgpt import machine, metrics, optim, sharding, train, tree
from jaxgpt.config import RunConfig
from jaxgpt.machine import Chip
from jaxgpt.plan import flops, program
from jaxgpt.plan.program import Collective
from jaxgpt.train import Stage

Outline = Callable[[RunConfig], Stage]  # a stage of shapes, for any of its settings


class TooLarge(Exception):
    """The compiler found that the step does not fit.

    Args:
        needed: bytes of each device; of which it has `available`.
    """

    def __init__(self, needed: float, available: float) -> None:
        super().__init__(f"{needed / 1e9:.2f} GB of {available / 1e9:.2f}")
        self.needed, self.available = needed, available


@dataclass(frozen=True)
class Memory:
    """Bytes of one device; `total` is what it holds at most."""

    parameters: float  # trained ones
    moments: float
    other_state: float  # averages, carry, step
    frozen: float
    batch: float
    gradients: float
    activations: float  # and all other temporaries
    output: float  # beside the state, which takes the old one's place
    program: float

    @property
    def total(self) -> float:
        return sum(vars(self).values())


@dataclass(frozen=True)
class Step:
    """What a step is and needs; memory, traffic and exchanges are of one device."""

    micro_batches: int
    remat: str
    devices: int
    parameters: int
    trained: int
    tokens: int
    flops_per_token: float  # of the model, as MFU counts them
    flops: float  # of all devices, recomputation and other networks included
    memory: Memory
    memory_traffic: float
    collectives: list[Collective]
    num_layers: int

    @property
    def exchanged(self) -> float:
        return sum(c.bytes * c.times for c in self.collectives)

    def in_layers(self, kind: str, backward: bool) -> int:
        """Arrays that a layer exchanges in one of its directions."""
        return sum(
            c.arrays
            for c in self.collectives
            if c.kind == kind and c.loops[-1:] == (self.num_layers,) and c.backward == backward
        )

    def seconds(self, chip: Chip) -> tuple[float, float]:
        """Estimated time if products, memory and exchanges overlap wholly, and not at all."""
        parts = (
            self.flops / self.devices / chip.flops,
            self.memory_traffic / chip.bandwidth,
            self.exchanged / chip.link,
        )
        return max(parts), sum(parts)


def compile_step(outline: Outline, cfg: RunConfig, mesh: Mesh) -> Step:
    """Compiles the train step for the devices of `mesh`, without data or weights.

    Raises:
        TooLarge: a compiler that knows the device's memory refuses.
        ValueError: a shape that the mesh does not divide.
    """
    check_rows(cfg, mesh)
    with jax.set_mesh(mesh):
        stage = outline(cfg)
        optimizer = optim.make_optimizer(cfg.optim, cfg.train.steps)
        trainable, frozen = tree.partition(stage.params, stage.trainable)
        make = partial(train.make_state, optimizer=optimizer, ema=cfg.optim.ema > 0)
        state, frozen = (
            placed(shapes, sharding.shardings(mesh, shapes))
            for shapes in (jax.eval_shape(make, trainable, stage.carry), frozen)
        )
        rows = {name: sharding.row_sharding(mesh, a.shape) for name, a in stage.batch.items()}
        batch = placed(stage.batch, rows)
        traced = train.jit_step(stage, cfg, mesh, optimizer, state).trace(state, frozen, batch)
        held = _held(state, frozen, batch)
        try:
            compiled = traced.lower().compile()
        except jax.errors.JaxRuntimeError as error:
            raise _too_large(error, mesh) from None
    seen = program.read(compiled.as_text())
    return Step(
        micro_batches=cfg.train.micro_batches,
        remat=cfg.model.remat,
        devices=mesh.size,
        parameters=tree.count(stage.params),
        trained=tree.count(trainable),
        tokens=math.prod(stage.batch["tokens"].shape),
        flops_per_token=metrics.flops_per_token(cfg.model, stage.batch["tokens"].shape[-1]),
        flops=flops.count(traced.jaxpr),
        memory=_memory(held, compiled.memory_analysis(), mesh.devices.flat[0].platform),
        memory_traffic=seen.memory_bytes,
        collectives=seen.collectives,
        num_layers=cfg.model.num_layers - cfg.model.dense_layers,  # of the scan
    )


def check_rows(cfg: RunConfig, mesh: Mesh) -> None:
    """Raises ValueError unless every micro-batch has as many rows for every device."""
    sharding.check_rows(mesh, cfg.train.batch_size)
    rows = cfg.train.batch_size // cfg.train.micro_batches
    ways = math.prod(mesh.shape[axis] for axis in sharding.ROWS)
    if rows % ways:
        raise ValueError(
            f"train.micro_batches={cfg.train.micro_batches}: leaves {rows} rows, which mesh "
            f"{'*'.join(sharding.ROWS)}={ways} does not divide; use fewer, or a larger batch"
        )


def placed(arrays: Any, places: Any) -> Any:
    """The shapes of arrays, each at its place."""
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        arrays,
        places,
    )


def _held(state: train.TrainState, frozen: Any, batch: Any) -> dict[str, float]:
    """Bytes on each device of what goes into a step."""
    moments = num_bytes(state.opt_state)
    return {
        "parameters": num_bytes(state.params),
        "moments": moments,
        "other_state": num_bytes(state) - num_bytes(state.params) - moments,
        "frozen": num_bytes(frozen),
        "batch": num_bytes(batch),
    }


def num_bytes(arrays: Any) -> float:
    """Bytes of each device's share of a tree of placed shapes."""
    share = lambda leaf: math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return float(sum(map(share, jax.tree.leaves(arrays))))


def _memory(held: dict[str, float], sizes: Any, platform: str) -> Memory:
    """The compiler's sum, by kind: what it pads beyond what we count is among the activations."""
    temporaries = program.temporaries(sizes, platform)
    gradients = min(held["parameters"], temporaries)
    padding = sizes.argument_size_in_bytes - sum(held.values())
    return Memory(
        **held,
        gradients=gradients,
        activations=temporaries - gradients + padding,
        output=sizes.output_size_in_bytes - sizes.alias_size_in_bytes,
        program=sizes.generated_code_size_in_bytes,
    )


def _too_large(error: Exception, mesh: Mesh) -> Exception:
    """TooLarge, if that is what the compiler says; what it calls temporaries has the arguments in
    it, as its buffer assignment shows.
    """
    text = str(error)
    gigabytes = r"([\d.]+)([KMG])"
    found = re.search(rf"Used {gigabytes} of {gigabytes}", text) or re.search(
        rf"\({gigabytes}\) exceeds available HBM \({gigabytes}\)", text
    )
    if "RESOURCE_EXHAUSTED" not in text:
        return error
    if found is None:
        chip = machine.chip(mesh.devices.flat[0])
        available = chip.memory if chip else math.inf
        return TooLarge(math.nan, available)
    size = lambda number, unit: float(number) * 2 ** {"K": 10, "M": 20, "G": 30}[unit]
    return TooLarge(size(*found.groups()[:2]), size(*found.groups()[2:]))
