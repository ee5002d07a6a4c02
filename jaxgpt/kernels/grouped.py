"""Matrix products in which each row has its own expert's kernel: dropless mixture of experts.

layout = group_rows(expert_NJ, num_experts)     # tokens sorted by expert, once per layer
rows_RD = gather(x_ND, layout)
... grouped_matmul(rows_RD, kernel_EDF, layout) # as often as the expert has matrices
y_ND = combine(rows_RD, gate_NJ, layout)
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxgpt.kernels.platform import accumulator_dtype
from jaxgpt.types import Array


class Layout(NamedTuple):
    """Rows ordered by expert; R >= N * J, some rows may be padding."""

    token_R: Array  # the token that a row holds
    expert_R: Array  # the expert that a row visits
    row_NJ: Array  # where a token's j-th choice went
    group_sizes_E: Array  # rows of each expert


def group_rows(expert_NJ: Array, num_experts: int) -> Layout:
    """Sorts the tokens' choices by expert."""
    expert_C = expert_NJ.reshape(-1)
    order_R = jnp.argsort(expert_C, stable=True)
    row_C = jnp.argsort(order_R, stable=True)
    return Layout(
        token_R=order_R // expert_NJ.shape[1],
        expert_R=expert_C[order_R],
        row_NJ=row_C.reshape(expert_NJ.shape),
        group_sizes_E=jnp.bincount(expert_C, length=num_experts),
    )


def gather(x_ND: Array, layout: Layout) -> Array:
    """The tokens' rows in the layout's order."""
    return x_ND[layout.token_R]


def grouped_matmul(rows_RD: Array, kernel_EDF: Array, layout: Layout) -> Array:
    """Each row times its expert's kernel; result as from `linear`."""
    return jax.lax.ragged_dot(
        rows_RD,
        kernel_EDF.astype(rows_RD.dtype),
        layout.group_sizes_E,
        preferred_element_type=accumulator_dtype(rows_RD.dtype),
    )


def combine(rows_RD: Array, gate_NJ: Array, layout: Layout) -> Array:
    """Each token's sum over its experts' rows, weighted by the gates."""
    return jnp.einsum("NJD,NJ->ND", rows_RD[layout.row_NJ], gate_NJ)
