"""x @ kernel in the compute dtype, with a backward pass that stays on XLA:CPU's fast products."""

import jax.numpy as jnp

from jaxgpt.kernels.platform import accumulator_dtype
from jaxgpt.types import Array


def linear(x_BTD: Array, kernel_DF: Array) -> Array:
    """x @ kernel over any leading axes; float32 on CPU, the dtype of x on accelerators."""
    return jnp.matmul(
        x_BTD, kernel_DF.astype(x_BTD.dtype), preferred_element_type=accumulator_dtype(x_BTD.dtype)
    )
