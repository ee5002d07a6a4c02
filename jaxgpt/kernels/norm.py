"""LayerNorm and RMSNorm: float32 inside, the compute dtype out."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxgpt.types import Array


def layer_norm(
    x: Array, scale_D: Array, bias_D: Array | None, eps: float, dtype: DTypeLike
) -> Array:
    """(x - mean) / sqrt(variance + eps) * scale + bias over the last axis."""
    x = x.astype(jnp.float32)
    x = x - x.mean(-1, keepdims=True)
    return (
        rms_norm(x, scale_D, eps, jnp.float32).astype(dtype)
        if bias_D is None
        else (rms_norm(x, scale_D, eps, jnp.float32) + jnp.broadcast_to(bias_D, x.shape)).astype(
            dtype
        )
    )


def rms_norm(x: Array, scale_D: Array, eps: float, dtype: DTypeLike) -> Array:
    """x / sqrt(mean square + eps) * scale over the last axis."""
    x = x.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + eps)
    return (x * jnp.broadcast_to(scale_D, x.shape)).astype(dtype)
