"""Matrix products in which each row has its own expert's kernel: dropless mixture of experts.

    layout = group_rows(expert_AJ, num_experts)      # rows sorted by expert, once per layer
    rows_RD = gather(x_AD, layout)
    rows_RF = grouped_matmul(rows_RD, kernel_EDF, layout)    # as often as an expert has matrices
    y_AD = combine(rows_RD, gate_AJ, layout)

On CPUs and GPUs XLA makes of a ragged product every expert's product with every row, so there each
expert's rows are filled up to whole blocks, and each block is one dense product (on CPUs 2.7 to 5
times faster; on a GPU with eight experts 0.15 of the FLOPs, by count). TPUs and a GPU that decodes
multiply ragged groups; a TPU's gradient of the kernels is left to a kernel that comes with JAX.

Axes of this file: J choices of a token, Z = A * J choices of all tokens, R rows of the layout,
X blocks of C rows.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxgpt.kernels.platform import LANES, dot, lane_block, platform, transposed
from jaxgpt.types import Array

MOST_COPIED = 1 << 28  # numbers; as float32, in a gradient, a gigabyte


class Layout(NamedTuple):
    """Rows ordered by expert. A filling row belongs to no token and nobody reads it."""

    row_AJ: Array  # the row of a token's j-th choice
    choice_R: Array  # the other way: a * J + j, or A * J for a filling row
    expert_R: Array  # the expert that the row visits
    group_sizes_E: Array  # rows of each expert, filling included


def group_rows(expert_AJ: Array, num_experts: int, block: int | None = None) -> Layout:
    """Sorts the tokens' choices by expert; within an expert they keep their order.

    Args:
        block: an expert's rows are filled up to a multiple of this; None: as its products ask.
    """
    A, J = expert_AJ.shape
    choices = A * J
    block = block or _block_rows(choices, num_experts)
    # Only experts that have rows at all, at most `choices` of them, leave a block unfilled.
    rows = (choices + min(num_experts, choices) * (block - 1)) // block * block
    expert_Z = expert_AJ.reshape(-1)
    chosen_ZE = (expert_Z[:, None] == jnp.arange(num_experts)[None]).astype(int)
    rank_Z = jnp.take_along_axis(jnp.cumsum(chosen_ZE, axis=0), expert_Z[:, None], axis=1)[:, 0] - 1
    filled_E = -(-chosen_ZE.sum(0) // block) * block
    ends_E = jnp.cumsum(filled_E)
    row_Z = (ends_E - filled_E)[expert_Z] + rank_Z
    expert_R = jnp.searchsorted(ends_E, jnp.arange(rows), side="right")
    return Layout(
        row_AJ=row_Z.reshape(A, J),
        choice_R=jnp.full(rows, choices).at[row_Z].set(jnp.arange(choices)),
        expert_R=jnp.minimum(expert_R, num_experts - 1),
        group_sizes_E=filled_E,
    )


@jax.custom_vjp
def gather(x_AD: Array, layout: Layout) -> Array:
    """The tokens in the layout's rows; filling rows are zero."""
    token_R = layout.choice_R // layout.row_AJ.shape[1]
    return x_AD.at[token_R].get(mode="fill", fill_value=0)


# Each token has J rows and knows them: adding them up is a gather too, where autodiff would
# scatter, which is slow on CPU and adds in no fixed order on GPU.
gather.defvjp(
    lambda x_AD, layout: (gather(x_AD, layout), layout),
    lambda layout, g_RD: (g_RD[layout.row_AJ].sum(1), None),
)


@jax.custom_vjp
def combine(rows_RD: Array, gate_AJ: Array, layout: Layout) -> Array:
    """Each token's sum over its choices of gate times row."""
    return jnp.einsum("AJD,AJ->AD", rows_RD[layout.row_AJ], gate_AJ.astype(rows_RD.dtype))


def _combine_backward(saved: tuple[Array, Array, Layout], g_AD: Array) -> tuple[Array, Array, None]:
    rows_RD, gate_AJ, layout = saved
    gate_R = gate_AJ.reshape(-1).at[layout.choice_R].get(mode="fill", fill_value=0)
    drows_RD = gather(g_AD, layout) * gate_R[:, None].astype(g_AD.dtype)
    dgate_AJ = jnp.einsum("AJD,AD->AJ", rows_RD[layout.row_AJ], g_AD)
    return drows_RD.astype(rows_RD.dtype), dgate_AJ.astype(gate_AJ.dtype), None


combine.defvjp(
    lambda rows_RD, gate_AJ, layout: (
        combine(rows_RD, gate_AJ, layout),
        (rows_RD, gate_AJ, layout),
    ),
    _combine_backward,
)


def grouped_matmul(rows_RD: Array, kernel_EDF: Array, layout: Layout) -> Array:
    """Each row times its expert's kernel; float32 on CPU, the dtype of the rows elsewhere."""
    block = _block_rows(layout.row_AJ.size, len(kernel_EDF))
    if block == 1:
        ragged = ragged_matmul if platform() == "tpu" else jax.lax.ragged_dot
        return ragged(rows_RD, kernel_EDF.astype(rows_RD.dtype), layout.group_sizes_E)
    rows_XCD = rows_RD.reshape(-1, block, rows_RD.shape[-1])
    out_XCF = _block_matmul(rows_XCD, kernel_EDF, layout.expert_R[::block])
    return out_XCF.reshape(len(rows_RD), -1)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def ragged_matmul(
    rows_RD: Array, kernel_EDF: Array, group_sizes_E: Array, interpret: bool = False
) -> Array:
    """`jax.lax.ragged_dot`, whose kernels' gradient takes the products of each group only.

    Args:
        group_sizes_E: rows of each expert; those behind the last group belong to nobody.
        interpret: runs the gradient's kernel on any platform, slowly.
    """
    return jax.lax.ragged_dot(rows_RD, kernel_EDF, group_sizes_E)


def _ragged_backward(
    interpret: bool, saved: tuple[Array, Array, Array], g_RF: Array
) -> tuple[Array, Array, None]:
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    rows_RD, kernel_EDF, group_sizes_E = saved
    drows_RD = jax.lax.ragged_dot(g_RF, kernel_EDF.swapaxes(1, 2), group_sizes_E)
    fill = [(0, -len(rows_RD) % LANES), (0, 0)]
    rows_RD, g_RF = jnp.pad(rows_RD, fill), jnp.pad(g_RF, fill)
    blocks = (lane_block(len(rows_RD)), 512, 512)  # of rows, D and F
    dkernel_EDF = tgmm(
        rows_RD.T, g_RF, group_sizes_E.astype(jnp.int32), jnp.float32, blocks, interpret=interpret
    )
    return drows_RD, dkernel_EDF.astype(kernel_EDF.dtype), None


ragged_matmul.defvjp(
    lambda rows_RD, kernel_EDF, group_sizes_E, _: (
        jax.lax.ragged_dot(rows_RD, kernel_EDF, group_sizes_E),
        (rows_RD, kernel_EDF, group_sizes_E),
    ),
    _ragged_backward,
)


@jax.custom_vjp
def _block_matmul(rows_XCD: Array, kernel_EDF: Array, expert_X: Array) -> Array:
    return _block_forward(rows_XCD, kernel_EDF, expert_X)[0]


def _block_forward(
    rows_XCD: Array, kernel_EDF: Array, expert_X: Array
) -> tuple[Array, tuple[Array, ...]]:
    cast_EDF = kernel_EDF.astype(rows_XCD.dtype)

    def one(block: tuple[Array, Array]) -> Array:
        rows_CD, expert = block
        return dot("CD,DF->CF", rows_CD, cast_EDF[expert])

    like_kernel = jnp.zeros((), kernel_EDF.dtype)  # residuals must be arrays: this carries a dtype
    all_blocks = jax.vmap(one) if _at_once(expert_X, cast_EDF) else partial(jax.lax.map, one)
    return all_blocks((rows_XCD, expert_X)), (rows_XCD, cast_EDF, expert_X, like_kernel)


def _block_backward(saved: tuple[Array, ...], g_XCF: Array) -> tuple[Array, Array, None]:
    rows_XCD, cast_EDF, expert_X, like_kernel = saved

    def one(block: tuple[Array, ...]) -> tuple[Array, Array]:
        rows_DC, g_CF, expert = block
        drows_CD = dot("CF,DF->CD", g_CF, cast_EDF[expert]).astype(rows_DC.dtype)
        dkernel_DF = jnp.einsum("DC,CF->DF", rows_DC, g_CF, preferred_element_type=jnp.float32)
        return drows_CD, dkernel_DF

    def add(dkernel_EDF: Array, block: tuple[Array, ...]) -> tuple[Array, Array]:
        drows_CD, dkernel_DF = one(block)
        return dkernel_EDF.at[block[-1]].add(dkernel_DF), drows_CD

    blocks = (transposed(rows_XCD), g_XCF.astype(rows_XCD.dtype), expert_X)
    if _at_once(expert_X, cast_EDF):
        drows_XCD, dkernel_XDF = jax.vmap(one)(blocks)
        # A scatter would add in no fixed order.
        visits_XE = jax.nn.one_hot(expert_X, len(cast_EDF))
        dkernel_EDF = jnp.einsum("XE,XDF->EDF", visits_XE, dkernel_XDF, precision="highest")
    else:
        dkernel_EDF, drows_XCD = jax.lax.scan(add, jnp.zeros(cast_EDF.shape, jnp.float32), blocks)
    return drows_XCD, dkernel_EDF.astype(like_kernel.dtype), None


_block_matmul.defvjp(_block_forward, _block_backward)


def _at_once(expert_X: Array, kernel_EDF: Array) -> bool:
    """Whether one batched product takes all blocks, each with a copy of its expert's kernel.

    A GPU wastes its time on many small products, and its memory on copies of large kernels.
    """
    return platform() == "gpu" and len(expert_X) * kernel_EDF[0].size <= MOST_COPIED


def _block_rows(choices: int, num_experts: int) -> int:
    """Rows of a block: a power of two near a part of an expert's even share; 1: a ragged product.

    Small blocks fill fewer rows, large ones read the kernel less often. Eight keeps a product of
    one decoded token off the matrix-vector kernel (see `linear`). A GPU reads all experts for a
    few rows sooner than it copies those that they visit.
    """
    if platform() == "cpu":
        return min(128, max(8, 1 << (choices // (2 * num_experts)).bit_length()))
    share = choices // (8 * num_experts)
    return 1 << share.bit_length() if platform() == "gpu" and share >= 8 else 1
