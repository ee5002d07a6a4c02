"""Kernels of quantised blocks, as GGUF files have them, that are read as they lie.

The equations here decode the blocks and multiply. On a CPU `compiled.py` has a program for it that
reads 4 to 9 bits a weight and multiplies in float32, where equations would write 32 bits first.

Axes of this file: C bytes of a row's blocks; U tiles of LANES rows; I lanes.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.kernels import compiled
from jaxgpt.types import Array

LANES = 16  # also in blocks.cc: of so many rows the bytes stand beside each other


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Blocks:
    """A kernel [D, F] whose output channels, or an embedding whose tokens, are rows of blocks.

    `tiles` may have leading axes (layers). Byte c of row u * LANES + i is tiles[u, c, i].
    """

    tiles: Array  # [U, C, I] uint8
    kind: str = field(metadata={"static": True})  # as ggml calls it, such as Q8_0

    @property
    def width(self) -> int:
        """D, the numbers of a row."""
        form = FORMATS[self.kind]
        return self.tiles.shape[-2] // form.bytes * form.numbers

    @property
    def count(self) -> int:
        """F, the rows."""
        return self.tiles.shape[-3] * LANES


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
    return jnp.swapaxes(table(kernel), -1, -2)


def table(kernel: Blocks) -> Array:
    """The rows [..., F, D] in float32."""
    rows = jnp.swapaxes(kernel.tiles, -1, -2)
    return decode(rows.reshape(*rows.shape[:-3], kernel.count, -1), kernel.kind)


def take(kernel: Blocks, index: Array) -> Array:
    """Some of the rows, in float32: [..., D] for an index [...]; zeros where it is negative."""
    tiles, lane = kernel.tiles[index // LANES], (index % LANES)[..., None, None]
    rows = jnp.take_along_axis(tiles, lane, axis=-1)[..., 0]
    return jnp.where(index[..., None] < 0, 0, decode(rows, kernel.kind))


def tiled(rows: np.ndarray | Array) -> Any:
    """Rows [..., F, C], of which LANES divides F, as tiles [..., U, C, I]."""
    *lead, F, C = rows.shape
    return rows.reshape(*lead, F // LANES, LANES, C).swapaxes(-1, -2)


def quantize(kernel_DF: Array) -> Blocks:
    """A kernel [..., D, F] in blocks of Q8_0, which have eight bits a number and a shared scale.

    32 divides D, and LANES divides F.
    """
    rows = jnp.swapaxes(kernel_DF, -1, -2).astype(jnp.float32)
    blocks = rows.reshape(*rows.shape[:-1], -1, 32)
    scale = jnp.abs(blocks).max(-1, keepdims=True) / 127
    codes = jnp.round(blocks / jnp.where(scale > 0, scale, 1)).astype(jnp.int8)
    as_bytes = partial(jax.lax.bitcast_convert_type, new_dtype=jnp.uint8)
    halves = as_bytes(scale.astype(jnp.float16)).reshape(*scale.shape[:-1], 2)
    stored = jnp.concatenate([halves, as_bytes(codes)], axis=-1)
    return Blocks(tiled(stored.reshape(*rows.shape[:-1], -1)), "Q8_0")


def linear(x: Array, tiles_UCI: Array, kind: str) -> Array:
    """x @ kernel over any leading axes of x, in float32: the equation."""
    return x.astype(jnp.float32) @ dequantize(Blocks(tiles_UCI, kind))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def on_cpu(x: Array, tiles_UCI: Array, kind: str) -> Array:
    """`linear` by our own program, if it can be had."""
    x_AD = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    if not compiled.load():
        return linear(x, tiles_UCI, kind)
    out = jax.ShapeDtypeStruct((len(x_AD), len(tiles_UCI) * LANES), jnp.float32)
    # Under `vmap` one product after the other: the program has two axes.
    product = jax.ffi.ffi_call(compiled.load(), out, vmap_method="sequential")
    y_AF = product(x_AD, tiles_UCI, kind=np.int64(FORMATS[kind].code))
    return y_AF.reshape(*x.shape[:-1], -1)


def _backward(kind: str, saved: tuple[Array, Array], g: Array) -> tuple[Array, np.ndarray]:
    """Blocks are frozen; what lies before them, such as another layer's LoRA, is not."""
    like_x, tiles_UCI = saved
    dx = g.astype(jnp.float32) @ table(Blocks(tiles_UCI, kind))
    return dx.astype(like_x.dtype), np.zeros(tiles_UCI.shape, jax.dtypes.float0)


on_cpu.defvjp(
    lambda x, tiles, kind: (on_cpu(x, tiles, kind), (jnp.zeros((), x.dtype), tiles)),
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
