"""A key/value cache whose rows have lengths of their own, for a batch that requests join and leave.

A row's numbers never depend on the other rows. Attention reads the cache block by block up to the
longest row, and a block that a row may not see changes nothing in it, to the bit: its weights are
zero, and its largest score is no larger than the one before.

Axes of this file: Q queries of one key head. Notes: chapter 10.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxgpt.config import ModelConfig
from jaxgpt.kernels.platform import accumulator_dtype
from jaxgpt.types import Array

BLOCK = 128  # slots read at a time; the capacity is a multiple of it
HIDDEN = -1e30  # the score of a slot that may not be seen: finite, so that no row becomes NaN


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SlotCache:
    """Keys and values, one array per layer; row b's tokens stand in its first `length_B[b]` slots.

    The tokens of a call continue the rows `first_row`, `first_row` + 1, … of the arrays, so that a
    prompt is read into its row without a copy of it.
    """

    keys: tuple[Array, ...]  # of each layer [rows, K, S, H]
    values: tuple[Array, ...]
    length_B: Array  # of the rows that the call continues
    first_row: Array

    @property
    def capacity(self) -> int:
        """S, the slots of a row."""
        return self.keys[0].shape[-2]

    def grown(self, keys: tuple, values: tuple, count: int) -> "SlotCache":
        """The cache after `count` tokens of every row were written."""
        return SlotCache(keys, values, self.length_B + count, self.first_row)


def init_slots(cfg: ModelConfig, num_rows: int, capacity: int) -> SlotCache:
    """An empty cache of at least `capacity` slots a row."""
    capacity = -(-capacity // BLOCK) * BLOCK
    heads, key_width, value_width = cfg.cached
    dtype = accumulator_dtype(cfg.dtype)  # as in attention.init_cache
    empty = lambda width: tuple(
        jnp.zeros((num_rows, heads, capacity, width), dtype) for _ in range(cfg.num_layers)
    )
    lengths_B = jnp.zeros(num_rows, jnp.int32)
    return SlotCache(empty(key_width), empty(value_width), lengths_B, jnp.int32(0))


def attend_by_row(
    q_BTNH: Array,
    k_BTKH: Array,
    v_BTKH: Array,
    cache: tuple[Array, Array],
    length_B: Array,
    first_row: Array,
    window: int = 0,
    softcap: float = 0.0,
    sinks_N: Array | None = None,
) -> tuple[Array, tuple[Array, Array]]:
    """Writes new keys and values behind each row's own, and lets the queries read the row.

    Args:
        cache: keys and values of one layer, each [rows, K, S, H].
        window: tokens see only tokens fewer than this many places away; 0: all.
        softcap, sinks_N: as in `kernels.attention`.
    """
    cache = (_write(cache[0], k_BTKH, length_B, first_row),
             _write(cache[1], v_BTKH, length_B, first_row))  # fmt: skip
    values = cache[1] if v_BTKH.shape[-1] else cache[0]  # without a width they are the keys
    (B, T, N, H), (_, K, S, _) = q_BTNH.shape, cache[0].shape
    index_BT = length_B[:, None] + jnp.arange(T)[None]
    q_BKGTH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    # The queries that share a head are rows of one product: XLA:CPU would copy operands for more.
    q_BKQH = q_BKGTH.reshape(B, K, -1, H).astype(cache[0].dtype)
    index_BQ = jnp.tile(index_BT, (1, N // K))

    def read(number: Array, so_far: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        largest_BKQ, sum_BKQ, out_BKQH = so_far
        place = (first_row, 0, number * BLOCK, 0)
        k_BKSH, v_BKSH = (
            jax.lax.dynamic_slice(x, place, (B, K, BLOCK, H)) for x in (cache[0], values)
        )
        key_S = number * BLOCK + jnp.arange(BLOCK)
        seen_BQS = key_S[None, None] <= index_BQ[..., None]
        if window:
            seen_BQS &= key_S[None, None] > index_BQ[..., None] - window
        seen_BKQS = seen_BQS[:, None]
        scores_BKQS = jnp.einsum(
            "BKQH,BKSH->BKQS", q_BKQH, k_BKSH, preferred_element_type=jnp.float32
        )
        scores_BKQS = scores_BKQS * H**-0.5
        if softcap:
            scores_BKQS = softcap * jnp.tanh(scores_BKQS / softcap)
        scores_BKQS = jnp.where(seen_BKQS, scores_BKQS, HIDDEN)
        new_BKQ = jnp.maximum(largest_BKQ, scores_BKQS.max(-1))
        weights_BKQS = jnp.where(seen_BKQS, jnp.exp(scores_BKQS - new_BKQ[..., None]), 0)
        kept_BKQ = jnp.exp(largest_BKQ - new_BKQ)
        read_BKQH = jnp.einsum(
            "BKQS,BKSH->BKQH", weights_BKQS.astype(v_BKSH.dtype), v_BKSH,
            preferred_element_type=jnp.float32,
        )  # fmt: skip
        sum_BKQ = sum_BKQ * kept_BKQ + weights_BKQS.sum(-1)
        return new_BKQ, sum_BKQ, out_BKQH * kept_BKQ[..., None] + read_BKQH

    first = jnp.maximum(index_BT.min() - window + 1, 0) // BLOCK if window else 0
    end = jnp.minimum(index_BT.max(), S - 1) // BLOCK + 1
    heads = q_BKQH.shape[:3]
    begin = (jnp.full(heads, HIDDEN), jnp.zeros(heads), jnp.zeros((*heads, H)))
    if sinks_N is not None:  # a key of value zero, seen by all before the first
        sinks_KQ = jnp.repeat(sinks_N.astype(jnp.float32).reshape(K, -1), T, axis=1)
        begin = (jnp.broadcast_to(sinks_KQ[None], heads), jnp.ones(heads), begin[2])
    _, sum_BKQ, out_BKQH = jax.lax.fori_loop(first, end, read, begin)
    out_BKGTH = (out_BKQH / sum_BKQ[..., None]).reshape(B, K, N // K, T, H)
    return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H).astype(q_BTNH.dtype), cache


def _write(slots: Array, new_BTKH: Array, length_B: Array, first_row: Array) -> Array:
    new_BKTH = new_BTKH.swapaxes(1, 2).astype(slots.dtype)
    for row, new_KTH in enumerate(new_BKTH):  # one scatter would go through a copy
        place = (first_row + row, 0, length_B[row], 0)
        slots = jax.lax.dynamic_update_slice(slots, new_KTH[None], place)
    return slots
