"""Exact attention, a chunk of queries against a chunk of keys at a time, on any platform.

The softmax is gathered as the keys come (arXiv:2112.05682), so that a row of a million tokens
needs scores [B, N, C, C] and no more; the backward pass computes them again. Chunks that no query
may see are not visited. Both directions work on any two pieces of a row, which is what ring
attention asks of them.

Axes of this file: C queries of one chunk, M keys of one chunk, X chunks of queries.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxgpt.types import Array

CHUNK = 512
HIDDEN = -1e30  # a score, and a log-sum-exp, of nothing; -inf would give NaN in differences


class Piece(NamedTuple):
    """Consecutive tokens of a row."""

    first: Array | int  # place of the first one in the row
    segments_BT: Array | None


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def chunked_attention(
    q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, segments_BT: Array | None, window: int,
    softcap: float = 0.0, sinks_N: Array | None = None,
) -> Array:  # fmt: skip
    """Self-attention as `kernels.attention` defines it."""
    return _forward(q_BTNH, k_BTKH, v_BTKH, segments_BT, window, softcap, sinks_N)[0]


def _forward(
    q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, segments_BT: Array | None, window: int,
    softcap: float, sinks_N: Array | None,
) -> tuple[Array, tuple]:  # fmt: skip
    q_BKGTH, k_BKTH, v_BKTH, piece = _whole_chunks(q_BTNH, k_BTKH, v_BTKH, segments_BT)
    found = attend(q_BKGTH, k_BKTH, v_BKTH, piece, piece, window, softcap)
    out_BKGTH, norm_BKGT = sink(found, sinks_N)
    out_BTNH = tokens_first(out_BKGTH)[:, : q_BTNH.shape[1]].astype(q_BTNH.dtype)
    return out_BTNH, (q_BTNH, k_BTKH, v_BTKH, segments_BT, sinks_N, out_BTNH, norm_BKGT)


def _backward(window: int, softcap: float, saved: tuple, g_BTNH: Array) -> tuple:
    q_BTNH, k_BTKH, v_BTKH, segments_BT, sinks_N, out_BTNH, norm_BKGT = saved
    T, K, dtype = q_BTNH.shape[1], k_BTKH.shape[2], q_BTNH.dtype
    q_BKGTH, k_BKTH, v_BKTH, piece = _whole_chunks(q_BTNH, k_BTKH, v_BTKH, segments_BT)
    more = [(0, 0), (0, -T % chunk_size(T)), (0, 0), (0, 0)]
    g_BKGTH, out_BKGTH = (heads_first(jnp.pad(x, more), K) for x in (g_BTNH, out_BTNH))
    delta_BKGT = deltas(g_BKGTH, out_BKGTH)
    dq_BKGTH, dk_BKTH, dv_BKTH = pull(
        q_BKGTH, k_BKTH, v_BKTH, piece, piece, window, g_BKGTH, norm_BKGT, delta_BKGT, softcap
    )
    dk_BTKH, dv_BTKH = (x.swapaxes(1, 2)[:, :T].astype(dtype) for x in (dk_BKTH, dv_BKTH))
    dsinks_N = pull_sinks(sinks_N, norm_BKGT, delta_BKGT)
    return tokens_first(dq_BKGTH)[:, :T].astype(dtype), dk_BTKH, dv_BTKH, None, dsinks_N


chunked_attention.defvjp(_forward, _backward)


def attend(
    q_BKGTH: Array, k_BKSH: Array, v_BKSH: Array, queries: Piece, keys: Piece, window: int,
    softcap: float = 0.0,
) -> tuple[Array, Array]:  # fmt: skip
    """softmax(scores) v of one piece against another, and the log of the softmax's normaliser.

    Results against several pieces of keys are put together by `merge`.
    """
    B, K, G, T, H = q_BKGTH.shape
    C, M = chunk_size(T), chunk_size(k_BKSH.shape[2])

    def one_chunk(i: Array) -> tuple[Array, Array]:
        q_BKGCH = _take(q_BKGTH, i, C, 3)

        def see(j: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            out_BKGCH, max_BKGC, total_BKGC = state
            k_BKMH = _take(k_BKSH, j, M, 2)
            scores_BKGCM = _scores(q_BKGCH, k_BKMH, i, j, queries, keys, window, softcap)
            new_max_BKGC = jnp.maximum(max_BKGC, scores_BKGCM.max(-1))
            exp_BKGCM = jnp.exp(scores_BKGCM - new_max_BKGC[..., None])
            shrink_BKGC = jnp.exp(max_BKGC - new_max_BKGC)
            added_BKGCH = _dot(
                "BKGCM,BKMH->BKGCH", exp_BKGCM.astype(v_BKSH.dtype), _take(v_BKSH, j, M, 2)
            )
            return (
                out_BKGCH * shrink_BKGC[..., None] + added_BKGCH,
                new_max_BKGC,
                total_BKGC * shrink_BKGC + exp_BKGCM.sum(-1),
            )

        nothing = (
            jnp.zeros((B, K, G, C, H), jnp.float32),
            jnp.full((B, K, G, C), HIDDEN, jnp.float32),
            jnp.zeros((B, K, G, C), jnp.float32),
        )
        first, end = _visible(i, C, M, k_BKSH.shape[2], queries, keys, window)
        out_BKGCH, max_BKGC, total_BKGC = jax.lax.fori_loop(first, end, see, nothing)
        some_BKGC = jnp.where(total_BKGC > 0, total_BKGC, 1)
        return out_BKGCH / some_BKGC[..., None], max_BKGC + jnp.log(some_BKGC)

    out_XBKGCH, norm_XBKGC = jax.lax.map(one_chunk, jnp.arange(T // C))
    return _join(out_XBKGCH, 3), _join(norm_XBKGC, 3)


def merge(mine: tuple[Array, Array], other: tuple[Array, Array]) -> tuple[Array, Array]:
    """What `attend` gives for two pieces of keys together."""
    norm_BKGT = jnp.logaddexp(mine[1], other[1])
    parts = (out * jnp.exp(norm - norm_BKGT)[..., None] for out, norm in (mine, other))
    return sum(parts, jnp.float32(0)), norm_BKGT


def sink(found: tuple[Array, Array], sinks_N: Array | None) -> tuple[Array, Array]:
    """What `attend` gave, with a key more: each head's sink is its score, zero its value."""
    if sinks_N is None:
        return found
    out_BKGTH, norm_BKGT = found
    sinks_BKGT = jnp.broadcast_to(_by_head(sinks_N, norm_BKGT), norm_BKGT.shape)
    return merge(found, (jnp.zeros_like(out_BKGTH), sinks_BKGT))


def pull_sinks(sinks_N: Array | None, norm_BKGT: Array, delta_BKGT: Array) -> Array | None:
    """The sinks' gradient: their value is zero, so its cotangent is 0 - delta."""
    if sinks_N is None:
        return None
    weight_BKGT = jnp.exp(_by_head(sinks_N, norm_BKGT) - norm_BKGT)
    return -(weight_BKGT * delta_BKGT).sum((0, 3)).reshape(sinks_N.shape).astype(sinks_N.dtype)


def _by_head(sinks_N: Array, like_BKGT: Array) -> Array:
    return sinks_N.astype(jnp.float32).reshape(1, *like_BKGT.shape[1:3], 1)


def deltas(g_BKGTH: Array, out_BKGTH: Array) -> Array:
    """sum over keys of probability * its cotangent, which is that over H of out * its cotangent."""
    return (g_BKGTH.astype(jnp.float32) * out_BKGTH.astype(jnp.float32)).sum(-1)


def pull(
    q_BKGTH: Array,
    k_BKSH: Array,
    v_BKSH: Array,
    queries: Piece,
    keys: Piece,
    window: int,
    g_BKGTH: Array,
    norm_BKGT: Array,
    delta_BKGT: Array,
    softcap: float = 0.0,
) -> tuple[Array, Array, Array]:
    """Gradients of q, k and v from one piece against another, float32.

    Args:
        norm_BKGT: over all keys that the queries see, not only those of this piece.
    """
    T, dtype = q_BKGTH.shape[3], q_BKGTH.dtype
    C, M = chunk_size(T), chunk_size(k_BKSH.shape[2])

    def one_chunk(total: tuple[Array, Array], i: Array) -> tuple[tuple[Array, Array], Array]:
        q_BKGCH, g_BKGCH = _take(q_BKGTH, i, C, 3), _take(g_BKGTH, i, C, 3).astype(dtype)
        norm_BKGC1, delta_BKGC1 = (_take(x, i, C, 3)[..., None] for x in (norm_BKGT, delta_BKGT))

        def see(j: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            dq_BKGCH, dk_BKSH, dv_BKSH = state
            k_BKMH, v_BKMH = _take(k_BKSH, j, M, 2), _take(v_BKSH, j, M, 2)
            scores_BKGCM = _scores(q_BKGCH, k_BKMH, i, j, queries, keys, window, softcap)
            probs_BKGCM = jnp.exp(scores_BKGCM - norm_BKGC1)
            dprobs_BKGCM = _dot("BKGCH,BKMH->BKGCM", g_BKGCH, v_BKMH)
            dscores_BKGCM = probs_BKGCM * (dprobs_BKGCM - delta_BKGC1) * q_BKGTH.shape[-1] ** -0.5
            if softcap:  # the slope of tanh; hidden scores are far below -softcap
                slope_BKGCM = 1 - jnp.square(jnp.clip(scores_BKGCM / softcap, -1, 1))
                dscores_BKGCM = dscores_BKGCM * slope_BKGCM
            probs_BKGCM, dscores_BKGCM = probs_BKGCM.astype(dtype), dscores_BKGCM.astype(dtype)
            dq_BKGCH += _dot("BKGCM,BKMH->BKGCH", dscores_BKGCM, k_BKMH)
            dk_BKSH = _add(dk_BKSH, _dot("BKGCM,BKGCH->BKMH", dscores_BKGCM, q_BKGCH), j)
            dv_BKSH = _add(dv_BKSH, _dot("BKGCM,BKGCH->BKMH", probs_BKGCM, g_BKGCH), j)
            return dq_BKGCH, dk_BKSH, dv_BKSH

        first, end = _visible(i, C, M, k_BKSH.shape[2], queries, keys, window)
        start = (jnp.zeros(q_BKGCH.shape, jnp.float32), *total)
        dq_BKGCH, dk_BKSH, dv_BKSH = jax.lax.fori_loop(first, end, see, start)
        return (dk_BKSH, dv_BKSH), dq_BKGCH

    zeros_BKSH = jnp.zeros(k_BKSH.shape, jnp.float32)
    (dk_BKSH, dv_BKSH), dq_XBKGCH = jax.lax.scan(
        one_chunk, (zeros_BKSH, zeros_BKSH), jnp.arange(T // C)
    )
    return _join(dq_XBKGCH, 3), dk_BKSH, dv_BKSH


def heads_first(x_BTNH: Array, K: int) -> Array:
    """[B, T, N, H] -> [B, K, G, T, H]."""
    B, T, N, H = x_BTNH.shape
    return x_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)


def tokens_first(x_BKGTH: Array) -> Array:
    """[B, K, G, T, H] -> [B, T, N, H]."""
    B, K, G, T, H = x_BKGTH.shape
    return x_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, K * G, H)


def chunk_size(length: int) -> int:
    """CHUNK, or what divides a short or odd piece; `_whole_chunks` fills up where nothing does."""
    if length <= CHUNK:
        return length
    return next((c for c in range(CHUNK, CHUNK // 4 - 1, -1) if length % c == 0), CHUNK)


def _whole_chunks(
    q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, segments_BT: Array | None
) -> tuple[Array, Array, Array, Piece]:
    """Heads first, filled up to whole chunks of tokens that no real query sees."""
    T = q_BTNH.shape[1]
    fill = -T % chunk_size(T)
    if fill:
        more = [(0, 0), (0, fill), (0, 0), (0, 0)]
        q_BTNH, k_BTKH, v_BTKH = (jnp.pad(x, more) for x in (q_BTNH, k_BTKH, v_BTKH))
        if segments_BT is not None:
            segments_BT = jnp.pad(segments_BT, more[:2], constant_values=-1)
    q_BKGTH = heads_first(q_BTNH, k_BTKH.shape[2])
    return q_BKGTH, k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2), Piece(0, segments_BT)


def _scores(
    q_BKGCH: Array, k_BKMH: Array, i: Array, j: Array, queries: Piece, keys: Piece, window: int,
    softcap: float,
) -> Array:  # fmt: skip
    """Scaled scores of query chunk i against key chunk j, HIDDEN where masked."""
    C, M = q_BKGCH.shape[3], k_BKMH.shape[2]
    scores_BKGCM = _dot("BKGCH,BKMH->BKGCM", q_BKGCH, k_BKMH) * q_BKGCH.shape[-1] ** -0.5
    if softcap:
        scores_BKGCM = softcap * jnp.tanh(scores_BKGCM / softcap)
    ahead_CM = (queries.first + i * C + jnp.arange(C))[:, None] - (
        keys.first + j * M + jnp.arange(M)
    )[None]  # by how much the query is further on than the key
    allowed_BCM = (ahead_CM >= 0)[None]
    if window:
        allowed_BCM &= (ahead_CM < window)[None]
    if queries.segments_BT is not None and keys.segments_BT is not None:
        own_BC, their_BM = _take(queries.segments_BT, i, C, 1), _take(keys.segments_BT, j, M, 1)
        allowed_BCM &= own_BC[:, :, None] == their_BM[:, None]
    return jnp.where(allowed_BCM[:, None, None], scores_BKGCM, HIDDEN)


def _visible(
    i: Array, C: int, M: int, S: int, queries: Piece, keys: Piece, window: int
) -> tuple[Array, Array]:
    """The chunks of keys, from the first to before the end, of which chunk i may see something."""
    lowest = queries.first + i * C - keys.first  # as the keys' piece counts
    highest = lowest + C - 1
    first = jnp.maximum(0, (lowest - window + 1) // M) if window else 0
    return jnp.int32(first), jnp.int32(jnp.clip(highest // M + 1, 0, S // M))


_dot = partial(jnp.einsum, preferred_element_type=jnp.float32)


def _take(x: Array, index: Array, size: int, axis: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, index * size, size, axis)


def _add(total_BKSH: Array, part_BKMH: Array, j: Array) -> Array:
    M = part_BKMH.shape[2]
    new_BKMH = _take(total_BKSH, j, M, 2) + part_BKMH
    return jax.lax.dynamic_update_slice_in_dim(total_BKSH, new_BKMH, j * M, 2)


def _join(chunks: Array, axis: int) -> Array:
    """[X, ..., C, ...] -> [..., X * C, ...], where C is `axis` of a chunk."""
    moved = jnp.moveaxis(chunks, 0, axis)
    shape = moved.shape
    return moved.reshape(*shape[:axis], shape[axis] * shape[axis + 1], *shape[axis + 2 :])
