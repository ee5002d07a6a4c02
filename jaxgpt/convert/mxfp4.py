"""MXFP4: blocks of 32 numbers of four bits with a power of two in common.

OCP Microscaling Formats 1.0, as gpt-oss stores the kernels of its experts: `NAME_blocks`, two
numbers a byte, the first one in its lower half, and `NAME_scales`, exponents plus 127.
"""

import ml_dtypes
import numpy as np

_POSITIVE = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
CODES = np.array([*_POSITIVE, *(-x for x in map(float, _POSITIVE))], np.float32)


def shape(blocks: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of what `decode` makes of blocks of this shape."""
    experts, outward, groups, half = blocks
    return experts, groups * half * 2, outward


def decode(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Kernels [experts, inward, outward] of blocks [experts, outward, groups, 16], in bfloat16,
    which holds every such number."""
    found = np.empty(shape(blocks.shape), ml_dtypes.bfloat16)
    for expert, (own, exponents) in enumerate(zip(blocks, scales, strict=True)):
        codes = np.stack([own & 15, own >> 4], axis=-1)
        values = np.ldexp(CODES[codes], exponents.astype(np.int32)[..., None, None] - 127)
        found[expert] = values.reshape(len(own), -1).T
    return found
