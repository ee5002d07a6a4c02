"""Attention over a sequence that is cut over devices: keys and values travel round a ring.

Every device keeps its queries, and in as many steps as there are devices meets all keys (Ring
Attention, arXiv:2310.01889). Under a causal mask the device with the last tokens would do nearly
all the work; so for the time of this kernel each device holds one piece from the front of the
sequence and the matching one from its end, and all have the same to do.

With 4 devices a row is cut into 8 pieces, and each device holds a pair (`_pair`, `_unpair`):

    device              0       1       2       3
    arrives with      0 1     2 3     4 5     6 7      consecutive pieces
    works on          0 7     1 6     2 5     3 4      one of the front, one of the end

A query of piece n sees the keys of pieces 0 to n, so a pair has 1 + 8, 2 + 7, 3 + 6, 4 + 5 pieces
to look at: nine each. In step s device i looks at the keys of device i - s:

    step 0            0 7     1 6     2 5     3 4      its own
    step 1            3 4     0 7     1 6     2 5      those of its neighbour, and so on

What a piece of queries found in each piece of keys is put together by `chunked_attention.merge`.
The backward pass goes round once more, and the gradients of keys and values travel with them.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxgpt.kernels import chunked_attention as chunks
from jaxgpt.kernels.chunked_attention import Piece, attend, heads_first, merge, pull, tokens_first
from jaxgpt.types import Array


class Ring(NamedTuple):
    """The axis of the mesh along which the sequence is cut, and its size."""

    axis: str
    size: int


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def ring_attention(
    q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, segments_BT: Array | None, window: int, ring: Ring,
    softcap: float = 0.0, sinks_N: Array | None = None,
) -> Array:  # fmt: skip
    """Self-attention as `kernels.attention` defines it, on one device's positions."""
    return _forward(q_BTNH, k_BTKH, v_BTKH, segments_BT, window, ring, softcap, sinks_N)[0]


def _forward(
    q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, segments_BT: Array | None, window: int, ring: Ring,
    softcap: float, sinks_N: Array | None,
) -> tuple[Array, tuple]:  # fmt: skip
    _check(q_BTNH.shape[1], ring)
    q, k, v = (_pair(x, ring) for x in (q_BTNH, k_BTKH, v_BTKH))
    q = [heads_first(x, k_BTKH.shape[2]) for x in q]
    k, v = ([x.swapaxes(1, 2) for x in pieces] for pieces in (k, v))
    segments = None if segments_BT is None else _pair(segments_BT, ring)
    queries = _pieces(k, segments, 0, ring)

    def meet(keys: list[Piece], k: list[Array], v: list[Array]) -> list[Any]:
        """What each piece of queries finds in all pieces of keys that are here."""
        found = []
        for own, q_BKGTH in zip(queries, q, strict=True):
            parts = [
                attend(q_BKGTH, k[n], v[n], own, piece, window, softcap)
                for n, piece in enumerate(keys)
            ]
            found.append(parts[0] if len(parts) == 1 else merge(*parts))
        return found

    def step(state: tuple, distance: Array) -> tuple[tuple, None]:
        found, travelling = state
        travelling = _rotate(travelling, ring)
        k, v, segments = travelling
        new = meet(_pieces(k, segments, distance, ring), k, v)
        return ([merge(*pair) for pair in zip(found, new, strict=True)], travelling), None

    start = (meet(queries, k, v), (k, v, segments))
    (found, _), _ = jax.lax.scan(step, start, jnp.arange(1, ring.size))
    found = [chunks.sink(pair, sinks_N) for pair in found]
    outs = [out_BKGTH.astype(q_BTNH.dtype) for out_BKGTH, _ in found]
    saved = (q, k, v, segments, sinks_N, outs, [norm for _, norm in found])
    return _unpair([tokens_first(out) for out in outs], ring), saved


def _backward(window: int, ring: Ring, softcap: float, saved: tuple, g_BTNH: Array) -> tuple:
    q, k, v, segments, sinks_N, outs, norms = saved
    dtype = g_BTNH.dtype
    g = [heads_first(x, k[0].shape[1]) for x in _pair(g_BTNH, ring)]
    delta = [chunks.deltas(*pair) for pair in zip(g, outs, strict=True)]
    queries = _pieces(k, segments, 0, ring)
    zeros = partial(jax.tree.map, lambda x: jnp.zeros(x.shape, jnp.float32))

    def step(state: tuple, distance: Array) -> tuple[tuple, None]:
        dq, (k, v, segments, dk, dv) = state
        for n, piece in enumerate(_pieces(k, segments, distance, ring)):
            for m, own in enumerate(queries):
                changes = pull(
                    q[m], k[n], v[n], own, piece, window, g[m], norms[m], delta[m], softcap
                )
                places = ((dq, m), (dk, n), (dv, n))
                dq, dk, dv = (
                    [x + change if i == index else x for i, x in enumerate(total)]
                    for (total, index), change in zip(places, changes, strict=True)
                )
        return (dq, _rotate((k, v, segments, dk, dv), ring)), None

    start = (zeros(q), (k, v, segments, zeros(k), zeros(v)))
    (dq, (_, _, _, dk, dv)), _ = jax.lax.scan(step, start, jnp.arange(ring.size))
    dq_BTNH = _unpair([tokens_first(x).astype(dtype) for x in dq], ring)
    dk_BTKH, dv_BTKH = (
        _unpair([x.swapaxes(1, 2).astype(dtype) for x in total], ring) for total in (dk, dv)
    )
    of_pieces = [chunks.pull_sinks(sinks_N, *pair) for pair in zip(norms, delta, strict=True)]
    dsinks_N = jax.tree.map(lambda *parts: sum(parts), *of_pieces)
    return dq_BTNH, dk_BTKH, dv_BTKH, None, dsinks_N


ring_attention.defvjp(_forward, _backward)


def _check(length: int, ring: Ring) -> None:
    halves = length // 2 if length % 2 == 0 else length
    if any(piece % chunks.chunk_size(piece) for piece in (length, halves)):
        raise ValueError(
            f"mesh.{ring.axis}={ring.size}: leaves {length} positions to a device, which no chunk "
            f"of attention divides; make their number a multiple of {256 * ring.size}"
        )


def _pair(x: Array, ring: Ring) -> list[Array]:
    """From consecutive positions [B, T, ...] to a piece of the front and its match of the end.

    Counted in pieces, device i holds 2i and 2i + 1 and gets i and 2 size - 1 - i.
    """
    if x.shape[1] % 2:
        return [x]
    even, odd = (
        jax.lax.ppermute(half, ring.axis, ways)
        for half, ways in zip(jnp.split(x, 2, axis=1), _ways(ring), strict=True)
    )
    return _swap_if_odd(even, odd, ring)


def _unpair(pieces: list[Array], ring: Ring) -> Array:
    """The inverse of `_pair`: one array of consecutive positions."""
    if len(pieces) == 1:
        return pieces[0]
    streams = _swap_if_odd(pieces[0], pieces[1], ring)
    back = [[(to, source) for source, to in ways] for ways in _ways(ring)]
    halves = [jax.lax.ppermute(x, ring.axis, ways) for x, ways in zip(streams, back, strict=True)]
    return jnp.concatenate(halves, axis=1)


def _ways(ring: Ring) -> list[list[tuple[int, int]]]:
    """Who sends its first half, and who its second half, to whom."""
    home = lambda piece: piece if piece < ring.size else 2 * ring.size - 1 - piece
    return [[(i, home(2 * i + half)) for i in range(ring.size)] for half in (0, 1)]


def _swap_if_odd(first: Array, second: Array, ring: Ring) -> list[Array]:
    """Device i's front piece is number i: it arrives among the even pieces if i is even."""
    even = jax.lax.axis_index(ring.axis) % 2 == 0
    return [jnp.where(even, first, second), jnp.where(even, second, first)]


def _pieces(
    like: list[Array], segments: list[Array] | None, distance: Array | int, ring: Ring
) -> list[Piece]:
    """Where the keys `like` [B, K, S, H] stand that have travelled `distance` devices."""
    owner = (jax.lax.axis_index(ring.axis) - distance) % ring.size
    numbers = [owner, 2 * ring.size - 1 - owner][: len(like)]
    return [
        Piece(number * x.shape[2], None if segments is None else segments[n])
        for n, (number, x) in enumerate(zip(numbers, like, strict=True))
    ]


def _rotate(travelling: Any, ring: Ring) -> Any:
    """Everything one device further; after as many rotations as there are devices it is home."""
    ways = [(i, (i + 1) % ring.size) for i in range(ring.size)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, ring.axis, ways), travelling)
