"""Kernels of quantised blocks, as GGUF files have them, that are read as they lie.

The equations here decode the blocks and multiply. On a CPU `compiled.py` has a program for it that
reads 4 to 9 bits a weight and multiplies in float32, where equations would write 32 bits first.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.kernels import compiled
from jaxgpt.types import Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Blocks:
    """A kernel [D, F] whose output channels, or an embedding whose tokens, are rows of blocks.

    `rows` may have leading axes (layers). C bytes hold the D numbers of a row.
    """

    rows: Array  # [F, C] uint8
    kind: str = field(metadata={"static": True})  # as ggml calls it, such as Q8_0

    @property
    def width(self) -> int:
        """D, the numbers of a row."""
        form = FORMATS[self.kind]
        return self.rows.shape[-1] // form.bytes * form.numbers


class Format(NamedTuple):
    """One kind of block."""

    code: int  # ggml's number of it
    numbers: int
    bytes: int
    decode: Callable[[Array], Array]  # blocks [..., bytes] -> [..., numbers]


def decode(rows: Array, kind: str) -> Array:
    """The numbers [..., D] of rows [..., C], in float32."""
    form = FORMATS[kind]
    blocks = rows.reshape(*rows.shape[:-1], -1, form.bytes)
    return form.decode(blocks).reshape(*rows.shape[:-1], -1)


def dequantize(kernel: Blocks) -> Array:
    """The kernel [..., D, F] in float32."""
    return jnp.swapaxes(decode(kernel.rows, kernel.kind), -1, -2)


def quantize(kernel_DF: Array) -> Blocks:
    """A kernel [..., D, F], of which 32 divides D, in blocks of Q8_0: 8 bits and a shared scale."""
    rows = jnp.swapaxes(kernel_DF, -1, -2).astype(jnp.float32)
    blocks = rows.reshape(*rows.shape[:-1], -1, 32)
    scale = jnp.abs(blocks).max(-1, keepdims=True) / 127
    codes = jnp.round(blocks / jnp.where(scale > 0, scale, 1)).astype(jnp.int8)
    as_bytes = partial(jax.lax.bitcast_convert_type, new_dtype=jnp.uint8)
    halves = as_bytes(scale.astype(jnp.float16)).reshape(*scale.shape[:-1], 2)
    stored = jnp.concatenate([halves, as_bytes(codes)], axis=-1)
    return Blocks(stored.reshape(*rows.shape[:-1], -1), "Q8_0")


def linear(x: Array, rows_FC: Array, kind: str) -> Array:
    """x @ kernel over any leading axes of x, in float32: the equation."""
    return jnp.einsum("...D,FD->...F", x.astype(jnp.float32), decode(rows_FC, kind))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def on_cpu(x: Array, rows_FC: Array, kind: str) -> Array:
    """`linear` by our own program, if it can be had."""
    x_AD = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    if not compiled.load():
        return linear(x, rows_FC, kind)
    out = jax.ShapeDtypeStruct((len(x_AD), len(rows_FC)), jnp.float32)
    # Under `vmap` one product after the other: the program has two axes.
    product = jax.ffi.ffi_call(compiled.load(), out, vmap_method="sequential")
    y_AF = product(x_AD, rows_FC, kind=np.int64(FORMATS[kind].code))
    return y_AF.reshape(*x.shape[:-1], -1)


def _backward(kind: str, saved: tuple[Array, Array], g: Array) -> tuple[Array, np.ndarray]:
    """Blocks are frozen; what lies before them, such as another layer's LoRA, is not."""
    like_x, rows_FC = saved
    dx = g.astype(jnp.float32) @ decode(rows_FC, kind)
    return dx.astype(like_x.dtype), np.zeros(rows_FC.shape, jax.dtypes.float0)


on_cpu.defvjp(
    lambda x, rows_FC, kind: (on_cpu(x, rows_FC, kind), (jnp.zeros((), x.dtype), rows_FC)),
    _backward,
)


# ---- the block formats, as ggml-common.h of llama.cpp lays them out


def _half(two_bytes: Array) -> Array:
    """float32 [..., 1] of float16 as bytes [..., 2]."""
    number = jax.lax.bitcast_convert_type(two_bytes, jnp.float16)
    return number.astype(jnp.float32)[..., None]


def _signed(codes: Array) -> Array:
    return jax.lax.bitcast_convert_type(codes, jnp.int8).astype(jnp.float32)


def _halves(codes: Array) -> Array:
    """The lower four bits of all bytes, then the upper ones."""
    return jnp.concatenate([codes & 15, codes >> 4], axis=-1).astype(jnp.float32)


def _q4_0(b: Array) -> Array:
    return _half(b[..., :2]) * (_halves(b[..., 2:]) - 8)


def _q4_1(b: Array) -> Array:
    return _half(b[..., :2]) * _halves(b[..., 4:]) + _half(b[..., 2:4])


def _q8_0(b: Array) -> Array:
    return _half(b[..., :2]) * _signed(b[..., 2:])


def _q4_k(b: Array) -> Array:
    """Eight parts of 32 numbers, whose scales and offsets have six bits each."""
    first, second, third = jnp.split(b[..., 4:16], 3, axis=-1)
    whole = partial(jnp.concatenate, axis=-1)
    scales = whole([first & 63, third & 15 | first >> 6 << 4]).astype(jnp.float32)
    offsets = whole([second & 63, third >> 4 | second >> 6 << 4]).astype(jnp.float32)
    codes = _halves(b[..., 16:].reshape(*b.shape[:-1], 4, 32)).reshape(*b.shape[:-1], 8, 32)
    scale, offset = _half(b[..., :2]) * scales, _half(b[..., 2:4]) * offsets
    return (scale[..., None] * codes - offset[..., None]).reshape(*b.shape[:-1], 256)


def _q6_k(b: Array) -> Array:
    """16 parts of 16 numbers; four bits of a code stand in one place, two in another."""
    lead = b.shape[:-1]
    low = _halves(b[..., :128].reshape(*lead, 2, 64))  # [2, 128]
    high = b[..., 128:192].reshape(*lead, 2, 1, 32)
    shifts = jnp.arange(0, 8, 2, dtype=jnp.uint8).reshape((1,) * (high.ndim - 2) + (4, 1))
    upper = (high >> shifts & 3).astype(jnp.float32).reshape(*lead, 2, 128)
    codes = (low + 16 * upper - 32).reshape(*lead, 16, 16)
    scale = _half(b[..., 208:]) * _signed(b[..., 192:208])
    return (scale[..., None] * codes).reshape(*lead, 256)


FORMATS = {
    "Q4_0": Format(2, 32, 18, _q4_0),
    "Q4_1": Format(3, 32, 20, _q4_1),
    "Q8_0": Format(8, 32, 34, _q8_0),
    "Q4_K": Format(12, 256, 144, _q4_k),
    "Q6_K": Format(14, 256, 210, _q6_k),
}
