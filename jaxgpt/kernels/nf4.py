"""NF4: weights in four bits, their scales in eight (QLoRA, arXiv:2305.14314), as bitsandbytes.

A kernel [D, F] is taken as torch's weight [F, D] and read row by row, each layer (and expert) on
its own. Every 64 numbers share a scale, their largest magnitude. The scales' own mean is taken
off, and each 256 of the rest share a second scale.

Axes of this file: C = D / 2 bytes of a row, S blocks, M groups of blocks.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.types import Array

BLOCK, GROUP = 64, 256

# Quantiles of the normal distribution, from bitsandbytes' table.
LEVELS = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
     -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
     0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
     0.7229568362236023, 1.0], np.float32,
)  # fmt: skip


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Nf4:
    """A quantised kernel; every field may have leading axes (layers, experts)."""

    packed: Array  # [F, C] uint8: two numbers each, the first in the high half
    scales: Array  # [S] uint8: a block's scale, as an index of `scale_levels`
    groups: Array  # [M] float32: what a group's scale_levels are multiplied by
    offset: Array  # float32: the mean of the scales


def scale_levels() -> np.ndarray:
    """The 256 numbers of an eight-bit scale: a sign, a decimal exponent, an even fraction.

    bitsandbytes' `create_dynamic_map` (arXiv:1511.04561).
    """
    positive = []
    for exponent in range(7):
        edges = np.linspace(0.1, 1, 2**exponent + 1, dtype=np.float32)
        positive.append(10.0 ** (exponent - 6) * (edges[:-1] + edges[1:]) / 2)
    half = np.concatenate(positive)
    return np.sort(np.concatenate([-half, [0.0], half, [1.0]])).astype(np.float32)


@jax.jit
def quantize(kernel_DF: Array) -> Nf4:
    """The codes of a kernel [..., D, F]."""
    *stack, D, F = kernel_DF.shape
    blocks = jnp.swapaxes(kernel_DF, -1, -2).astype(jnp.float32).reshape(*stack, -1, BLOCK)
    largest = jnp.abs(blocks).max(-1)
    # bitsandbytes multiplies by the reciprocal; dividing would round some numbers elsewhere.
    blocks = blocks * (1 / jnp.maximum(largest, 1e-38))[..., None]
    middles = ((LEVELS[:-1] + LEVELS[1:]) / 2).tolist()
    codes = sum((blocks > middle).astype(jnp.uint8) for middle in middles)
    codes = codes.reshape(*stack, F, D // 2, 2)  # type: ignore[union-attr]
    packed_FC = codes[..., 0] << 4 | codes[..., 1]

    offset = largest.mean(-1)
    centred = largest - offset[..., None]
    groups = _in_groups(centred)
    group_M = jnp.abs(groups).max(-1)
    groups = groups / jnp.maximum(group_M, 1e-38)[..., None]
    levels = scale_levels()
    scale = jnp.searchsorted((levels[:-1] + levels[1:]) / 2, groups).astype(jnp.uint8)
    scale_S = scale.reshape(*stack, -1)[..., : largest.shape[-1]]
    return Nf4(packed_FC, scale_S, group_M, offset)


def dequantize(kernel: Nf4) -> Array:
    """The kernel [..., D, F] in float32."""
    *stack, F, C = kernel.packed.shape
    scale = _in_groups(jnp.asarray(scale_levels())[kernel.scales]) * kernel.groups[..., None]
    scale_S = scale.reshape(*stack, -1)[..., : kernel.scales.shape[-1]]
    scale_S = scale_S + kernel.offset[..., None]
    halves = jnp.stack([kernel.packed >> 4, kernel.packed & 15], axis=-1)
    blocks = _look_up(halves.reshape(*stack, -1, BLOCK)) * scale_S[..., None]
    return jnp.swapaxes(blocks.reshape(*stack, F, 2 * C), -1, -2)


def _look_up(codes: Array) -> Array:
    """LEVELS[codes] as selections, which CPUs do sixteen at a time where they gather one by one."""
    numbers = jnp.full(codes.shape, LEVELS[0])
    for code, level in enumerate(LEVELS[1:].tolist(), start=1):
        numbers = jnp.where(codes == code, level, numbers)
    return numbers


def _in_groups(blocks_S: Array) -> Array:
    """[..., S] -> [..., M, 256], filled up with zeros."""
    *stack, S = blocks_S.shape
    filled = jnp.pad(blocks_S, [(0, 0)] * len(stack) + [(0, -S % GROUP)])
    return filled.reshape(*stack, -1, GROUP)
