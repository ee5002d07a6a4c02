"""What a server will need: the memory of weights and slots, and how many slots fit."""

from typing import Any, NamedTuple

import jax
import psutil

from jaxgpt import peft
from jaxgpt.config import ModelConfig, ServeConfig
from jaxgpt.kernels.platform import accumulator_dtype, platform
from jaxgpt.metrics import short
from jaxgpt.model import gpt
from jaxgpt.sampling import slots
from jaxgpt.sampling.sample import for_decoding
from jaxgpt.types import Params

# Of the process beside its arrays, measured on a CPU: Python, JAX and a tokenizer; the compiled
# programs of one layer.
PROCESS, PROGRAMS = 330_000_000, 9_000_000


class Serving(NamedTuple):
    """Bytes on one device."""

    weights: int
    token: int  # keys and values of one token
    slot: int  # what a slot needs beside them
    kept: int  # beginnings of prompts, at most
    process: int  # none on an accelerator, where it is not in the device's memory
    available: int

    def total(self, num_slots: int, context: int) -> int:
        """All of it, by the slots and their tokens."""
        slots_need = num_slots * (self.slot + context * self.token)
        return self.weights + slots_need + self.kept + self.process

    def fitting(self, context: int) -> int:
        """How many slots of `context` tokens there is memory for."""
        free = self.available - self.total(0, 0)
        return max(free // (self.slot + context * self.token), 0)


def serving(cfg: ServeConfig, model: ModelConfig, devices: dict[str, int]) -> Serving:
    """Counted from shapes; `devices` are those along the axes data and tensor."""

    def weights(rng: jax.Array) -> Params:
        params = gpt.init(model, rng)
        params = peft.quantize_int8(params) if cfg.quantize == "int8" else params
        return for_decoding(model, params, cfg.slots)

    ways = devices.get("data", 1), devices.get("tensor", 1)
    # The one vector of latent attention is whole on each device that `tensor` cuts the heads over.
    apart = ways[1] if model.cached[0] % ways[1] == 0 else 1
    one_slot = jax.eval_shape(lambda: slots.init_state(model, 1, 0))
    return Serving(
        _bytes(jax.eval_shape(weights, jax.random.key(0))) // ways[1],
        token_bytes(model) // apart // ways[0], _bytes(one_slot) // ways[0],
        cfg.prefix_cache << 20,
        PROCESS + model.num_layers * PROGRAMS if platform() == "cpu" else 0,
        available_memory(),
    )  # fmt: skip


def token_bytes(cfg: ModelConfig) -> int:
    """Keys and values of one token in all layers."""
    width = accumulator_dtype(cfg.dtype).itemsize
    heads, key, value = cfg.cached
    return cfg.num_layers * heads * (key + value) * width


def available_memory() -> int:
    """Free bytes of the first device; of the machine, where a device has no memory of its own."""
    stats = jax.devices()[0].memory_stats() or {}
    free = stats.get("bytes_limit", 0) - stats.get("bytes_in_use", 0)
    return free if free > 0 else psutil.virtual_memory().available


def as_json(cfg: ServeConfig, plan: Serving, model: ModelConfig, context: int) -> dict[str, Any]:
    """Everything by name; slots that fit by their tokens."""
    return {
        **{f"{name}_bytes": value for name, value in plan._asdict().items()},
        "slots": cfg.slots, "context": context, "total_bytes": plan.total(cfg.slots, context),
        "fitting_slots": {n: plan.fitting(n) for n in _contexts(model.context_length, context)},
    }  # fmt: skip


def describe(cfg: ServeConfig, plan: Serving, model: ModelConfig, context: int) -> str:
    """The plan in words."""
    total = plan.total(cfg.slots, context)
    fits = "fits" if total <= plan.available else "does not fit"
    cache = cfg.slots * (plan.slot + context * plan.token)
    rows = [
        ("weights", plan.weights, f"{model.dtype}{', int8' if cfg.quantize == 'int8' else ''}"),
        ("slots", cache, f"{cfg.slots} of {context:,} tokens, {short(plan.token)}B a token"),
        ("beginnings", plan.kept, "of prompts that are kept, at most (--prefix_cache)"),
        ("process", plan.process, "Python, JAX and compiled programs, about"),
        ("in all", total, f"{fits} into the {short(plan.available)}B that are free here"),
    ]
    lines = [f"{name:>12} {short(size):>8}B  {what}" for name, size, what in rows if size]
    fitting = ", ".join(
        f"{plan.fitting(n):,} of {n:,} tokens" for n in _contexts(model.context_length, context)
    )
    return "\n".join([*lines, f"Slots that fit: {fitting}."])


def _contexts(longest: int, asked: int) -> list[int]:
    """The context that is asked for, and a few others."""
    return sorted({asked, *(n for n in (512, 2048, 8192, 32768) if n < longest), longest})


def _bytes(arrays: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(arrays))
