"""Exact attention for XLA:CPU: one block of queries at a time, against the keys it can see.

Three things make it fast, none of which changes the result:

- Blocks above the diagonal are never computed. With four blocks of queries:

        keys      0  1  2  3
        block 0   ◣  .  .  .      ◣ half masked, ■ all seen, . never computed
        block 1   ■  ◣  .  .
        block 2   ■  ■  ◣  .      ten of sixteen squares, which are six products of a block of
        block 3   ■  ■  ■  ◣      queries with all the keys up to its own end

- Scores are laid out keys first, so that none of the six products of a step has a transposed
  left operand (see `platform.transposed`).
- For short sequences the probabilities are kept for the backward pass, not computed twice.

Axes of this file: C the queries of a block of all G query heads that share a key head.
"""

import math
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

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
    out_BTNH: Array
    probs: list[Array] | None  # exp(score - max), keys first, one array a block
    max: list[Array]
    total: list[Array]


class _Block(NamedTuple):
    """Consecutive queries, and the keys that they may see."""

    start: int
    stop: int
    first: int  # the first key; the last one stands with the last query


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def blocked_attention(
    q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, segments_BT: Array | None, window: int
) -> Array:
    """Self-attention as `kernels.attention` defines it."""
    return _forward(q_BTNH, k_BSKH, v_BSKH, segments_BT, window)[0]


def _forward(
    q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, segments_BT: Array | None, window: int
) -> tuple[Array, _Saved]:
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BKGTH = _heads_first(q_BTNH).reshape(B, K, N // K, T, H)
    k_BKSH, v_BKSH = _heads_first(k_BSKH), _heads_first(v_BSKH)
    v_BKHS = transposed(v_BKSH)
    outs, probs, maxima, totals = [], [], [], []
    for block in _blocks(T, window):
        scores_BKSC = _scores(q_BKGTH, k_BKSH, segments_BT, block, window)
        max_BK1C = scores_BKSC.max(-2, keepdims=True)
        exp_BKSC = jnp.exp(scores_BKSC - max_BK1C)
        total_BK1C = exp_BKSC.sum(-2, keepdims=True)
        probs_BKSC = exp_BKSC.astype(q_BTNH.dtype)
        seen_BKHS = v_BKHS[..., block.first : block.stop]
        out_BKHC = _dot("BKHS,BKSC->BKHC", seen_BKHS, probs_BKSC) / total_BK1C
        outs.append(out_BKHC.reshape(B, K, H, N // K, block.stop - block.start))
        probs.append(probs_BKSC)
        maxima.append(max_BK1C)
        totals.append(total_BK1C)
    out_BKHGT = jax.lax.optimization_barrier(jnp.concatenate(outs, -1).astype(q_BTNH.dtype))
    out_BTNH = out_BKHGT.transpose(0, 4, 1, 3, 2).reshape(B, T, N, H)
    # By this name model.remat keeps what the backward pass would run all of the above for.
    out_BTNH, maxima, totals = checkpoint_name((out_BTNH, maxima, totals), "attention")
    kept = probs if T <= LONGEST_KEPT else None
    return out_BTNH, _Saved(q_BKGTH, k_BKSH, v_BKSH, segments_BT, out_BTNH, kept, maxima, totals)


def _backward(
    window: int, saved: _Saved, g_BTNH: Array
) -> tuple[Array, Array, Array, Array | None]:
    q_BKGTH, k_BKSH, v_BKSH, segments_BT, out_BTNH, *_ = saved
    B, K, G, T, H = q_BKGTH.shape
    dtype = q_BKGTH.dtype
    g_BKGTH = g_BTNH.reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4).astype(jnp.float32)
    # Summed in the layout that both arrives in: over heads, XLA:CPU takes ten times as long.
    delta_BTN = (g_BTNH.astype(jnp.float32) * out_BTNH.astype(jnp.float32)).sum(-1)
    delta_BKGT = delta_BTN.reshape(B, T, K, G).transpose(0, 2, 3, 1)
    k_BKHS = transposed(k_BKSH)
    blocks = _blocks(T, window)
    dqs, dks, dvs = [], [], []
    for i, block in enumerate(blocks):
        seen = slice(block.first, block.stop)
        if saved.probs is None:
            scores_BKSC = _scores(q_BKGTH, k_BKSH, segments_BT, block, window)
            probs_BKSC = jnp.exp(scores_BKSC - saved.max[i]).astype(dtype)
        else:
            probs_BKSC = saved.probs[i]
        # The probabilities lack the division by their sum: divide the cotangent instead.
        g_BKCH = _queries(g_BKGTH, block) / jnp.swapaxes(saved.total[i], -1, -2)
        g_BKCH = jax.lax.optimization_barrier(g_BKCH.astype(dtype))
        delta_BK1C = _queries(delta_BKGT[..., None], block).swapaxes(-1, -2) / saved.total[i]
        dprobs_BKSC = _dot("BKSH,BKCH->BKSC", v_BKSH[:, :, seen], g_BKCH)
        dscores_BKSC = (probs_BKSC * (dprobs_BKSC - delta_BK1C) * H**-0.5).astype(dtype)
        dq_BKHC = _dot("BKHS,BKSC->BKHC", k_BKHS[..., seen], dscores_BKSC)
        dqs.append(dq_BKHC.reshape(B, K, H, G, block.stop - block.start))
        dks.append(_dot("BKSC,BKCH->BKSH", dscores_BKSC, _queries(q_BKGTH, block)))
        dvs.append(_dot("BKSC,BKCH->BKSH", probs_BKSC, g_BKCH))
    dq_BKHGT = jax.lax.optimization_barrier(jnp.concatenate(dqs, -1).astype(dtype))
    dq_BTNH = dq_BKHGT.transpose(0, 4, 1, 3, 2).reshape(B, T, K * G, H)
    dk_BKSH, dv_BKSH = jax.lax.optimization_barrier(
        (_sum_over_blocks(blocks, dks).astype(dtype), _sum_over_blocks(blocks, dvs).astype(dtype))
    )
    return dq_BTNH, dk_BKSH.transpose(0, 2, 1, 3), dv_BKSH.transpose(0, 2, 1, 3), None


blocked_attention.defvjp(_forward, _backward)

_dot = partial(jnp.einsum, preferred_element_type=jnp.float32)


def _heads_first(x_BTNH: Array) -> Array:
    """[B, N, T, H], as a copy.

    The barriers here and above keep XLA from folding the change of layout into the products: it
    would widen them to float32, or compile a bf16 form that has no kernel (`UNIMPLEMENTED
    DotThunk` when there is a single block). This one stands between two halves, see `transposed`.
    """
    B, T, N, H = x_BTNH.shape
    tile = math.gcd(T, 32)
    tiles = x_BTNH.reshape(B, T // tile, tile, N, H).transpose(0, 3, 1, 2, 4)
    return jax.lax.optimization_barrier(tiles).reshape(B, N, T, H)


def _blocks(T: int, window: int) -> list[_Block]:
    """Blocks of queries; the keys of a window begin and end where some block does."""
    rows = 64 if T <= 256 else 128
    blocks = []
    for start in range(0, T, rows):
        stop = min(start + rows, T)
        first = max(0, start - window + 1) // rows * rows if window else 0
        blocks.append(_Block(start, stop, first))
    return blocks


def _queries(x_BKGTH: Array, block: _Block) -> Array:
    """A block's rows of all the heads that share keys, [B, K, C, H]."""
    B, K, _, _, H = x_BKGTH.shape
    return x_BKGTH[:, :, :, block.start : block.stop].reshape(B, K, -1, H)


def _scores(
    q_BKGTH: Array, k_BKSH: Array, segments_BT: Array | None, block: _Block, window: int
) -> Array:
    """Scaled, masked scores of a block's queries against the keys they can see, keys first."""
    start, stop, first = block
    B, K, G, _, H = q_BKGTH.shape
    scores_BKSC = _dot("BKSH,BKCH->BKSC", k_BKSH[:, :, first:stop], _queries(q_BKGTH, block))
    ahead_ST = jnp.arange(start, stop)[None] - jnp.arange(first, stop)[:, None]
    allowed_BST = (ahead_ST >= 0)[None]
    if window:
        allowed_BST &= (ahead_ST < window)[None]
    if segments_BT is not None:
        allowed_BST &= segments_BT[:, first:stop, None] == segments_BT[:, None, start:stop]
    split_BKSGT = (scores_BKSC * H**-0.5).reshape(B, K, stop - first, G, stop - start)
    split_BKSGT = jnp.where(allowed_BST[:, None, :, None], split_BKSGT, -1e30)
    return split_BKSGT.reshape(scores_BKSC.shape)


def _sum_over_blocks(blocks: list[_Block], parts: list[Array]) -> Array:
    """Adds up arrays, each over the keys that its block sees."""
    edges = sorted({edge for block in blocks for edge in (block.first, block.stop)})
    spans = [
        sum(
            part[:, :, low - block.first : high - block.first]
            for block, part in zip(blocks, parts, strict=True)
            if block.first <= low and high <= block.stop
        )
        for low, high in pairwise(edges)
    ]
    return jnp.concatenate(spans, 2)
