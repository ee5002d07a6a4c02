"""int8 kernels for decoding on a CPU, which round what they multiply to int8, too.

A row's few large entries would leave the others a handful of int8's steps. So rows and kernel are
first multiplied by an orthogonal matrix, which spreads every entry over all and leaves the product
as it was (QuaRot, arXiv:2404.00456). It is the Kronecker product of a Hadamard matrix and, where
the size is no power of two, a cosine transform, both with random signs: O + I multiplications for
an entry, where a matrix of any other kind would take D and undo the gain.

Axes of this file: D = O * I, the sizes of the outer and the inner matrix; P is O once more.
"""

from dataclasses import dataclass
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.kernels.fast_linear import on_rows
from jaxgpt.types import Array

LARGEST = 127
LARGEST_HADAMARD = 64


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Int8Rows:
    """A rotated kernel, codes * scale; either field may have leading axes (layers).

    Output channels come first: of XLA:CPU's int8 products only that one does not widen them.
    """

    codes: Array  # [F, D] int8
    scale: Array  # [F]


def quantize(kernel_DF: Array) -> Int8Rows:
    """The codes of a kernel [..., D, F]."""
    rows_FD = jnp.swapaxes(kernel_DF, -1, -2).astype(jnp.float32)
    return Int8Rows(*round_rows(_rotate(rows_FD, *_factors(rows_FD.shape[-1]))))


def dequantize(kernel: Int8Rows) -> Array:
    """The kernel [..., D, F] in float32, rotated back."""
    rows_FD = kernel.codes * kernel.scale[..., None]
    outer_OO, inner_II = _factors(rows_FD.shape[-1])
    return jnp.swapaxes(_rotate(rows_FD, outer_OO.T, inner_II.T), -1, -2)


def product(x_BTD: Array, kernel: Int8Rows) -> Array:
    """x @ kernel over any leading axes, in float32."""
    x_AD = x_BTD.reshape(-1, x_BTD.shape[-1]).astype(jnp.float32)
    codes_AD, step_A = round_rows(_rotate(x_AD, *_factors(x_AD.shape[-1])))
    dot = lambda rows_AD: jnp.einsum(
        "AD,FD->AF", rows_AD, kernel.codes, preferred_element_type=jnp.int32
    )
    out_AF = on_rows(dot, codes_AD).astype(jnp.float32) * step_A[:, None] * kernel.scale[None]
    return out_AF.reshape(*x_BTD.shape[:-1], -1)


def round_rows(x: Array) -> tuple[Array, Array]:
    """int8 codes of rows [..., D], the largest of each 127, and the steps [...] between them."""
    largest = jnp.abs(x).max(-1)
    step = jnp.where(largest > 0, largest, 1) / LARGEST
    return jnp.round(x / step[..., None]).astype(jnp.int8), step


def _rotate(x: Array, outer_OO: np.ndarray, inner_II: np.ndarray) -> Array:
    """Rows [..., D] times the Kronecker product of the two."""
    x_AOI = x.reshape(-1, len(outer_OO), len(inner_II)) @ inner_II
    return jnp.einsum("AOI,OP->API", x_AOI, outer_OO).reshape(x.shape)


@cache
def _factors(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Orthogonal matrices [O, O] and [I, I], the same at every call; all entries of like size."""
    from scipy import fft, linalg  # here: a sixth of the time that importing a model takes

    inner = min(size & -size, LARGEST_HADAMARD)  # the largest power of two that divides size
    outer = size // inner
    cosines_OO = fft.dct(np.eye(outer), norm="ortho")
    hadamard_II = linalg.hadamard(inner) / inner**0.5
    # Without the signs the mean of a row would gather in one entry.
    draw = np.random.default_rng(0).choice
    outer_OO, inner_II = (
        draw([-1.0, 1.0], len(matrix))[:, None] * matrix for matrix in (cosines_OO, hadamard_II)
    )
    return outer_OO.astype(np.float32), inner_II.astype(np.float32)
