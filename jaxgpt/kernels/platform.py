"""Where the program will run, and what that means for how it is written and compiled."""

import contextlib
from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxgpt.types import Array

LANES = 128  # a TPU's vector width: the blocks of its kernels are multiples of it
MOST_UNROLLED = 32  # layers, on a GPU: the time to compile grows with them


# What `use` asks for. JAX keeps the programs of each value apart, as it does for its own contexts.
_asked = jax.make_user_context("fast")


def use(kernels: str) -> contextlib.AbstractContextManager:
    """A context in which programs are written with "plain" equations, the "fast" ones, or as for
    another platform: "cpu", "gpu" or "tpu", to look at its program, not to run it.
    """
    return _asked(kernels)


def platform() -> str:
    """ "plain", if `use` asks for it; else "cpu", "gpu" or "tpu", for which programs are written.

    That is the platform of the ambient mesh (`jax.set_mesh`), else JAX's default. Asked while
    tracing. A mesh may name devices that are not here (ahead-of-time compilation for a TPU slice on
    a CPU machine), so it comes first.
    """
    if _asked.value != "fast":
        return _asked.value
    device = jax.sharding.get_abstract_mesh().abstract_device
    name = jax.default_backend() if device is None else device.platform
    return {"cuda": "gpu", "rocm": "gpu"}.get(name, name)


def accumulator_dtype(dtype: DTypeLike) -> jnp.dtype:
    """The dtype in which a product of `dtype` operands is returned.

    XLA:CPU has bf16 x bf16 -> float32 as one product and widens the operands of all others;
    accelerators accumulate in float32 anyway and would only write twice the bytes.
    """
    return jnp.dtype(jnp.float32) if platform() == "cpu" else jnp.dtype(dtype)


def dot(spec: str, x: Array, y: Array) -> Array:
    """Einsum of two arrays of one dtype, returned as `accumulator_dtype` says."""
    return jnp.einsum(spec, x, y, preferred_element_type=accumulator_dtype(x.dtype))


def transposed(x: Array) -> Array:
    """The last two axes swapped; half-precision numbers of a CPU as a copy.

    XLA folds a plain transpose into the product that reads it. That is best in float32, where the
    copies alone cost GPT-2 124M a quarter of its step. But XLA:CPU has no fast bf16 product with a
    transposed left operand (370 against 870 GFLOP/s), so the copy must stay. XLA may not move
    anything across an optimization barrier, which stands in the middle of the transpose:

        x [rows, columns]
        reshape, move   [columns, tiles, tile]   written to memory here, tile by tile
        -- barrier --
        reshape         [columns, rows]          the same memory, read by the product

    Before the whole transpose it would let XLA fold it into the product; behind it the copy would
    read one number at a time.
    """
    if platform() != "cpu" or x.dtype == jnp.float32:
        return jnp.swapaxes(x, -1, -2)
    *batch, rows, columns = x.shape
    tile = next((t for t in (128, 64, 32, 16, 8) if rows % t == 0 and rows > t), rows)
    tiles = jnp.moveaxis(x.reshape(*batch, rows // tile, tile, columns), -1, -3)
    return jax.lax.optimization_barrier(tiles).reshape(*batch, columns, rows)


def separate(saved: Any) -> Any:
    """What a backward pass recomputes from, kept from being merged with the forward pass.

    Where the layers are unrolled into one program, XLA finds the same tanh or normalised row in the
    forward and in the backward pass. It would compute it once and keep it in float32 until then,
    which moves more bytes than computing it again from the input. A TPU has its layers in a loop,
    whose passes cannot be merged.
    """
    return saved if platform() == "tpu" else jax.lax.optimization_barrier(saved)


def lane_block(length: int) -> int:
    """The largest block of up to 512 that divides a multiple of LANES."""
    return next(size for size in (512, 256, LANES) if length % size == 0)


def layer_unroll(num_layers: int, remat: bool, quantized: bool) -> int:
    """How many layers of the scan over layers to unroll.

    All of them on CPU, where a rolled loop runs at 0.77x to 0.86x, and of small models on a GPU,
    where it copies what it saves for the backward pass (GPT-2 124M: a tenth of the step). But not
    with remat or quantised kernels: XLA:CPU then hoists what each layer should compute anew, and
    the memory they save is gone. One at a time elsewhere, for the sake of compile time.
    """
    unrolls = platform() == "cpu" or (platform() == "gpu" and num_layers <= MOST_UNROLLED)
    return num_layers if unrolls and not remat and not quantized else 1


def compiler_options() -> dict[str, Any]:
    """Options for `jax.jit(compiler_options=...)`: 512-bit vectors double erf and tanh on CPU.

    A TPU's compiler would turn the large products of FSDP into loops of permutes (seen with GPT-2
    124M); without that, each gradient of a kernel is one reduce-scatter. On a GPU cuBLAS adds the
    biases inside its products, which it does not where it is one candidate beside Triton, nor
    where queries and keys are merged into one product, at the price of copies.
    """
    if platform() == "tpu":
        return {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}
    if platform() == "gpu":
        return {"xla_gpu_enable_triton_gemm": False, "xla_gpu_dot_merger_threshold_mb": 0}
    return _known_options() if platform() == "cpu" else {}


def jit(function: Callable[..., Any], **how: Any) -> Callable[..., Any]:
    """`jax.jit(function, **how)`, with `compiler_options` if it runs on a CPU.

    Which of the two is seen at a call: JAX must not look for devices while a module is imported.
    """
    programs = cache(
        lambda name: jax.jit(
            function, compiler_options=compiler_options() if name == "cpu" else None, **how
        )
    )

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return programs(platform())(*args, **kwargs)

    return call


@cache
def _known_options() -> dict[str, Any]:
    options = {"xla_cpu_prefer_vector_width": "512"}
    try:
        jax.jit(lambda x: x, compiler_options=options).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:  # an XLA that no longer has the option
        return {}
    return options
