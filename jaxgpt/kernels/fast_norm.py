"""LayerNorm and RMSNorm: float32 inside, the compute dtype out.

Their own backward passes keep the input and one or two numbers a row; autodiff would keep
several arrays of the input's size.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxgpt.kernels.platform import platform, separate
from jaxgpt.types import Array


def layer_norm(
    x: Array, scale_D: Array, bias_D: Array | None, eps: float, dtype: DTypeLike
) -> Array:
    """(x - mean) / sqrt(variance + eps) * scale + bias, over the last axis."""
    return _norm(x, scale_D, bias_D, eps, dtype, True)


def rms_norm(x: Array, scale_D: Array, eps: float, dtype: DTypeLike) -> Array:
    """x / sqrt(mean square + eps) * scale, over the last axis (arXiv:1910.07467)."""
    return _norm(x, scale_D, None, eps, dtype, False)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _norm(
    x: Array, scale_D: Array, bias_D: Array | None, eps: float, dtype: DTypeLike, center: bool
) -> Array:
    return _forward(x, scale_D, bias_D, eps, dtype, center)[0]


def _forward(
    x: Array, scale_D: Array, bias_D: Array | None, eps: float, dtype: DTypeLike, center: bool
) -> tuple[Array, tuple[Array | None, ...]]:
    wide = x.astype(jnp.float32)
    mean = wide.mean(-1) if center else None
    centered = wide if mean is None else wide - mean[..., None]
    inverse = jax.lax.rsqrt(_variance(wide, mean, centered) + eps)
    out = centered * inverse[..., None] * _row(scale_D, x)
    if bias_D is not None:
        out = out + _row(bias_D, x)
    return out.astype(dtype), (x, scale_D, bias_D, mean, inverse)


def _backward(
    eps: float, dtype: DTypeLike, center: bool, saved: tuple[Array, ...], g: Array
) -> tuple[Array, Array, Array | None]:
    x, scale_D, bias_D, mean, inverse = separate(saved)
    g = g.astype(jnp.float32)
    wide = x.astype(jnp.float32)
    normed = (wide - mean[..., None] if center else wide) * inverse[..., None]
    dnormed = g * _row(scale_D, x)
    dx = dnormed - normed * (dnormed * normed).mean(-1, keepdims=True)
    if center:
        dx = dx - dnormed.mean(-1, keepdims=True)
    leading = tuple(range(x.ndim - 1))
    dscale_D = (g * normed).sum(leading).astype(scale_D.dtype)
    dbias_D = None if bias_D is None else g.sum(leading).astype(bias_D.dtype)
    return (dx * inverse[..., None]).astype(x.dtype), dscale_D, dbias_D


_norm.defvjp(_forward, _backward)


def _variance(wide: Array, mean: Array | None, centered: Array) -> Array:
    """The mean square of `centered`; on a GPU in the same pass over memory as the mean."""
    if platform() != "gpu" or mean is None:
        return jnp.square(centered).mean(-1)
    # As flax's LayerNorm: what cancels is small, since a row's mean is not far from 0.
    return jnp.maximum(jnp.square(wide).mean(-1) - jnp.square(mean), 0.0)


def _row(vector_D: Array, like: Array) -> Array:
    """The vector in float32 as the last axis of an array of the rank of `like`."""
    return vector_D.astype(jnp.float32).reshape((1,) * (like.ndim - 1) + (-1,))
