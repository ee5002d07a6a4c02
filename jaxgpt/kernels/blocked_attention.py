"""Exact attention for XLA:CPU: one block of queries at a time, against the keys it can see.

Three things make it fast, none of which changes the result:

- Blocks above the diagonal are never computed.
- Scores are laid out keys first, so that none of the six products of a step has a transposed
  left operand (see `platform.transposed`).
- For short sequences the probabilities are kept for the backward pass, not computed twice.

Axes besides those of STYLE.md: C is the queries of a block, G query heads of `rows` each.
"""

from functools import partial
from itertools import pairwise
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxgpt.kernels.platform import transposed
from jaxgpt.types import Array

# Beyond this many tokens the kept probabilities (about N * T bytes a token and layer in bf16)
# outgrow a block's other activations.
LONGEST_KEPT = 1024


class _Saved(NamedTuple):
    """What the backward pass reads: head-major inputs, and each block's softmax."""

    q_BKGTH: Array
    k_BKSH: Array
    v_BKSH: Array
    segments_BT: Array | None
    out_BKGTH: Array
    probs: list[Array] | None  # exp(score - max), keys first, one array a block
    max: list[Array]
    total: list[Array]


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def blocked_attention(
    q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, segments_BT: Array | None, causal: bool
) -> Array:
    """Self-attention as `attention.attention` defines it."""
    return _forward(q_BTNH, k_BSKH, v_BSKH, segments_BT, causal)[0]


def _forward(
    q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, segments_BT: Array | None, causal: bool
) -> tuple[Array, _Saved]:
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    # The barriers here and below keep XLA from folding the change of layout into the products: it
    # would widen them to float32, or compile a bf16 form that has no kernel (`UNIMPLEMENTED
    # DotThunk` when there is a single block).
    q_BKGTH, k_BKSH, v_BKSH = jax.lax.optimization_barrier(
        (
            q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4),
            k_BSKH.transpose(0, 2, 1, 3),
            v_BSKH.transpose(0, 2, 1, 3),
        )
    )
    v_BKHS = transposed(v_BKSH)
    outs, probs, maxima, totals = [], [], [], []
    for block in _blocks(T, causal):
        start, stop, seen = block
        scores_BKSC = _scores(q_BKGTH, k_BKSH, segments_BT, block, causal)
        max_BK1C = scores_BKSC.max(-2, keepdims=True)
        exp_BKSC = jnp.exp(scores_BKSC - max_BK1C)
        total_BK1C = exp_BKSC.sum(-2, keepdims=True)
        probs_BKSC = exp_BKSC.astype(q_BTNH.dtype)
        out_BKHC = _dot("BKHS,BKSC->BKHC", v_BKHS[..., :seen], probs_BKSC) / total_BK1C
        outs.append(out_BKHC.reshape(B, K, H, N // K, stop - start))
        probs.append(probs_BKSC)
        maxima.append(max_BK1C)
        totals.append(total_BK1C)
    out_BKHGT = jax.lax.optimization_barrier(jnp.concatenate(outs, -1).astype(q_BTNH.dtype))
    saved = _Saved(
        q_BKGTH, k_BKSH, v_BKSH, segments_BT, out_BKHGT.transpose(0, 1, 3, 4, 2),
        probs if T <= LONGEST_KEPT else None, maxima, totals,
    )  # fmt: skip
    return out_BKHGT.transpose(0, 4, 1, 3, 2).reshape(B, T, N, H), saved


def _backward(
    causal: bool, saved: _Saved, g_BTNH: Array
) -> tuple[Array, Array, Array, Array | None]:
    q_BKGTH, k_BKSH, v_BKSH, segments_BT, out_BKGTH, *_ = saved
    B, K, G, T, H = q_BKGTH.shape
    dtype = q_BKGTH.dtype
    g_BKGTH = g_BTNH.reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4).astype(jnp.float32)
    delta_BKGT = (g_BKGTH * out_BKGTH.astype(jnp.float32)).sum(-1)
    k_BKHS = transposed(k_BKSH)
    blocks = _blocks(T, causal)
    dqs, dks, dvs = [], [], []
    for i, block in enumerate(blocks):
        start, stop, seen = block
        if saved.probs is None:
            scores_BKSC = _scores(q_BKGTH, k_BKSH, segments_BT, block, causal)
            probs_BKSC = jnp.exp(scores_BKSC - saved.max[i]).astype(dtype)
        else:
            probs_BKSC = saved.probs[i]
        # The probabilities lack the division by their sum: divide the cotangent instead.
        g_BKCH = _queries(g_BKGTH, block) / jnp.swapaxes(saved.total[i], -1, -2)
        g_BKCH = jax.lax.optimization_barrier(g_BKCH.astype(dtype))
        delta_BK1C = _queries(delta_BKGT[..., None], block).swapaxes(-1, -2) / saved.total[i]
        dprobs_BKSC = _dot("BKSH,BKCH->BKSC", v_BKSH[:, :, :seen], g_BKCH)
        dscores_BKSC = (probs_BKSC * (dprobs_BKSC - delta_BK1C) * H**-0.5).astype(dtype)
        dq_BKHC = _dot("BKHS,BKSC->BKHC", k_BKHS[..., :seen], dscores_BKSC)
        dqs.append(dq_BKHC.reshape(B, K, H, G, stop - start))
        dks.append(_dot("BKSC,BKCH->BKSH", dscores_BKSC, _queries(q_BKGTH, block)))
        dvs.append(_dot("BKSC,BKCH->BKSH", probs_BKSC, g_BKCH))
    dq_BKHGT = jax.lax.optimization_barrier(jnp.concatenate(dqs, -1).astype(dtype))
    dq_BTNH = dq_BKHGT.transpose(0, 4, 1, 3, 2).reshape(B, T, K * G, H)
    dk_BKSH, dv_BKSH = jax.lax.optimization_barrier(
        (_sum_over_blocks(dks).astype(dtype), _sum_over_blocks(dvs).astype(dtype))
    )
    return dq_BTNH, dk_BKSH.transpose(0, 2, 1, 3), dv_BKSH.transpose(0, 2, 1, 3), None


blocked_attention.defvjp(_forward, _backward)

_dot = partial(jnp.einsum, preferred_element_type=jnp.float32)


def _blocks(T: int, causal: bool) -> list[tuple[int, int, int]]:
    """(first query, end of queries, number of keys seen) of each block of queries."""
    rows = 64 if T <= 256 else 128
    stops = [min(start + rows, T) for start in range(0, T, rows)]
    return [(i * rows, stop, stop if causal else T) for i, stop in enumerate(stops)]


def _queries(x_BKGTH: Array, block: tuple[int, int, int]) -> Array:
    """A block's rows of all the heads that share keys, [B, K, C, H]."""
    start, stop, _ = block
    B, K, _, _, H = x_BKGTH.shape
    return x_BKGTH[:, :, :, start:stop].reshape(B, K, -1, H)


def _scores(
    q_BKGTH: Array,
    k_BKSH: Array,
    segments_BT: Array | None,
    block: tuple[int, int, int],
    causal: bool,
) -> Array:
    """Scaled, masked scores of a block's queries against the keys they can see, keys first."""
    start, stop, seen = block
    B, K, G, _, H = q_BKGTH.shape
    scores_BKSC = _dot("BKSH,BKCH->BKSC", k_BKSH[:, :, :seen], _queries(q_BKGTH, block))
    allowed_BST = jnp.ones((1, seen, stop - start), bool)
    if causal:
        allowed_BST &= (jnp.arange(seen)[:, None] <= jnp.arange(start, stop)[None])[None]
    if segments_BT is not None:
        allowed_BST &= segments_BT[:, :seen, None] == segments_BT[:, None, start:stop]
    split_BKSGT = (scores_BKSC * H**-0.5).reshape(B, K, seen, G, stop - start)
    split_BKSGT = jnp.where(allowed_BST[:, None, :, None], split_BKSGT, -1e30)
    return split_BKSGT.reshape(scores_BKSC.shape)


def _sum_over_blocks(parts: list[Array]) -> Array:
    """Adds up arrays over the first keys: a causal block's part ends with the last key it sees."""
    edges = sorted({0, *(part.shape[2] for part in parts)})
    spans = [
        sum(part[:, :, low:high] for part in parts if part.shape[2] >= high)
        for low, high in pairwise(edges)
    ]
    return jnp.concatenate(spans, 2)
