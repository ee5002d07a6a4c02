"""Where the program will run, and what that means for compiling it."""

from functools import cache

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxgpt.types import Array


def platform() -> str:
    """ "cpu", "gpu" or "tpu": that of the ambient mesh (`jax.set_mesh`), else JAX's default.

    Asked while tracing. A mesh may name devices that are not here (ahead-of-time compilation for
    a TPU slice on a CPU machine), so it comes first.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    name = jax.default_backend() if device is None else device.platform
    return {"cuda": "gpu", "rocm": "gpu"}.get(name, name)


def accumulator_dtype(dtype: DTypeLike) -> jnp.dtype:
    """What a product of `dtype` operands is returned in.

    XLA:CPU has bf16 x bf16 -> float32 as a native product and widens all others; accelerators
    accumulate in float32 anyway and would only write twice the bytes.
    """
    return jnp.dtype(jnp.float32) if platform() == "cpu" else jnp.dtype(dtype)


def layer_unroll(num_layers: int, remat: bool, quantized: bool) -> int:
    """How many layers of the scan to unroll.

    All on CPU, where a rolled loop runs at 0.77x to 0.86x. Except with remat or quantised
    kernels: XLA:CPU then hoists what each layer recomputes and the memory that they save is gone.
    """
    return num_layers if platform() == "cpu" and not remat and not quantized else 1


def compiler_options() -> dict[str, str]:
    """Options for `jax.jit(compiler_options=...)`; 512-bit vectors double erf and tanh on CPU."""
    return _known_options() if platform() == "cpu" else {}


@cache
def _known_options() -> dict[str, str]:
    options = {"xla_cpu_prefer_vector_width": "512"}
    try:
        jax.jit(lambda x: x, compiler_options=options).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:  # an XLA without this option
        return {}
    return options


def dot(spec: str, x: Array, y: Array) -> Array:
    """Einsum of two arrays of one dtype, accumulated and returned as `accumulator_dtype` says."""
    return jnp.einsum(spec, x, y, preferred_element_type=accumulator_dtype(x.dtype))
