"""The sampler, compiled from shapes for devices that need not be here."""

import inspect
from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh

from jaxgpt import sharding
from jaxgpt.config import ModelConfig
from jaxgpt.model import gpt
from jaxgpt.plan.step import placed
from jaxgpt.sampling.sample import Sampling, decode, for_decoding, prefill


def compile_sampler(
    cfg: ModelConfig, mesh: Mesh, rows: int, prompt: int, settings: Sampling
) -> tuple[Any, Any]:
    """The compiled programs that read prompts and that write the tokens of one scan.

    Args:
        prompt: tokens of each prompt; the cache has room for the whole context.
    """
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(lambda: {"policy": gpt.init(cfg, jax.random.key(0))})
        params = placed(shapes, sharding.shardings(mesh, shapes))["policy"]
        arrange = partial(for_decoding, cfg, num_rows=rows)
        weights, _ = _compiled(arrange, params)
        row = lambda *shape: jax.ShapeDtypeStruct(
            shape, "int32", sharding=sharding.row_sharding(mesh, shape)
        )
        # Unwrapped: a program may not bring options of its own into another.
        read = lambda weights, tokens_BT, start_B: inspect.unwrap(prefill)(
            cfg, weights, tokens_BT, start_B, cfg.context_length, settings
        )
        state, reads = _compiled(read, weights, row(rows, prompt), row(rows))
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))
        rng_B = placed(keys, sharding.row_sharding(mesh, (rows,)))
        stops = jax.ShapeDtypeStruct((1,), "int32", sharding=sharding.replicated(mesh))
        write = lambda weights, state, rng_B, stops: inspect.unwrap(decode)(
            cfg, weights, state, rng_B, stops, settings
        )
        _, writes = _compiled(write, weights, state, rng_B, stops, donate=1)
    return reads, writes


def _compiled(function: Any, *arrays: Any, donate: tuple | int = ()) -> tuple[Any, Any]:
    """The shapes of the results where the program leaves them, and the program."""
    program = jax.jit(function, donate_argnums=donate).lower(*arrays).compile()
    return placed(jax.eval_shape(function, *arrays), program.output_shardings), program
