"""Causal self-attention, and the key/value cache it reads and writes."""

from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxgpt import kernels
from jaxgpt.config import ModelConfig
from jaxgpt.kernels.platform import accumulator_dtype
from jaxgpt.model.layers import Linear, RMSNorm, residual_std, rotate
from jaxgpt.model.slots import attend_by_row
from jaxgpt.types import Array

Slots = tuple[Array, Array]  # keys and values, as in KVCache; of one layer where these are apart


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Keys and values of the tokens seen so far, in slots shared by all rows.

    One array for all layers, or a tuple of one per layer, without L, where the parameters of the
    layers stand apart too; a single row then needs no axis B either, which XLA would fold away,
    with a copy of all slots for every token.

    Rows are aligned on the right: row b's first token stands in slot `start_B[b]`, so that every
    row writes its next token into the same slot, `length`. The slots of a head lie together, as
    the products of a decoding step read them.
    """

    keys_LBKSH: Array | tuple[Array, ...]
    values_LBKSH: Array | tuple[Array, ...]
    length: Array  # slots written, a scalar
    start_B: Array  # empty slots before the row's first token
    # Nothing written yet: the first tokens then need to look only at each other. Static.
    fresh: bool = field(default=True, metadata={"static": True})

    @property
    def capacity(self) -> int:
        """S, the slots of a row."""
        return jax.tree.leaves(self.keys_LBKSH)[0].shape[-2]


class BlockInputs(NamedTuple):
    """What every block reads beside the residual stream."""

    rope: tuple[Array, Array] | None  # cos and sin, each [B, T, H/2]
    segments_BT: Array | None  # tokens attend within their segment; 0 is padding
    rng_B: Array | None  # dropout keys
    length: Array | None  # slots of the cache that were written before
    mask_BTS: Array | None  # slots of the cache that a token may see; None: a fresh cache
    first_row: Array | None = None  # of a SlotCache, whose rows have lengths of their own


class Attention(nn.Module):
    """softmax(q k^T / sqrt(H)) v per head.

    One code for three kinds: single-head attention (num_heads = 1), multi-head attention
    (arXiv:1706.03762; num_kv_heads = num_heads) and grouped-query attention (arXiv:2305.13245;
    each key/value head serves num_heads / num_kv_heads query heads).
    """

    cfg: ModelConfig

    @nn.compact
    def __call__(
        self, x_BTD: Array, inputs: BlockInputs, cache: Slots | None, place: Array | None
    ) -> tuple[Array, Slots | None]:
        cfg = self.cfg
        q_BTNH = self._heads("query", cfg.num_heads, x_BTD)
        k_BTKH = self._heads("key", cfg.kv_heads, x_BTD)
        v_BTKH = self._heads("value", cfg.kv_heads, x_BTD)
        if cfg.qk_norm:
            q_BTNH = RMSNorm(cfg.norm_eps, cfg.dtype, name="query_norm")(q_BTNH)
            k_BTKH = RMSNorm(cfg.norm_eps, cfg.dtype, name="key_norm")(k_BTKH)
        if inputs.rope is not None:
            q_BTNH, k_BTKH = rotate(q_BTNH, inputs.rope), rotate(k_BTKH, inputs.rope)
        q_BTNH, k_BTKH, v_BTKH = (a.astype(cfg.dtype) for a in (q_BTNH, k_BTKH, v_BTKH))

        if cache is not None and inputs.first_row is not None:
            assert inputs.length is not None
            out_BTNH, cache = attend_by_row(
                q_BTNH, k_BTKH, v_BTKH, cache, inputs.length, inputs.first_row,
                cfg.sliding_window or 0,
            )  # fmt: skip
            return self._output(out_BTNH), cache
        if cache is not None:
            assert inputs.length is not None
            write = partial(_write, place=place, length=inputs.length)
            cache = (write(cache[0], k_BTKH), write(cache[1], v_BTKH))
        if cache is None or inputs.mask_BTS is None:
            window = cfg.sliding_window or 0
            out_BTNH = kernels.attention(q_BTNH, k_BTKH, v_BTKH, inputs.segments_BT, window)
        else:
            out_BTNH = kernels.cached_attention(q_BTNH, *_read(cache, place), inputs.mask_BTS)

        return self._output(out_BTNH), cache

    def _output(self, out_BTNH: Array) -> Array:
        cfg = self.cfg
        out_BTF = kernels.by_columns(out_BTNH.reshape(*out_BTNH.shape[:2], -1))
        output = Linear(
            cfg.model_dim, cfg.bias == "all", cfg.dtype, residual_std(cfg), name="output"
        )
        return output(out_BTF)

    def _heads(self, name: str, count: int, x_BTD: Array) -> Array:
        width = self.cfg.head_width
        linear = Linear(count * width, self.cfg.bias != "none", self.cfg.dtype, name=name)
        return kernels.by_columns(linear(x_BTD)).reshape(*x_BTD.shape[:2], count, width)


def init_cache(
    cfg: ModelConfig,
    batch_size: int,
    capacity: int | None = None,
    start_B: Array | None = None,
    apart: bool = False,
) -> KVCache:
    """An empty cache of `capacity` slots (default: the context length)."""
    capacity = cfg.context_length if capacity is None else capacity
    rows = () if apart and batch_size == 1 else (batch_size,)
    shape = (*rows, cfg.kv_heads, capacity, cfg.head_width)
    # A CPU has no batched product of bfloat16 that sums in float32, and would widen the cache for
    # every token.
    dtype = accumulator_dtype(cfg.dtype)
    empty = lambda *layers: jnp.zeros((*layers, *shape), dtype)
    layers = range(cfg.num_layers)
    slots = lambda: tuple(empty() for _ in layers) if apart else empty(cfg.num_layers)
    start_B = jnp.zeros(batch_size, jnp.int32) if start_B is None else start_B
    return KVCache(slots(), slots(), jnp.int32(0), start_B)


def _write(slots: Array, new_BTKH: Array, place: Array | None, length: Array) -> Array:
    new_BKTH = new_BTKH.swapaxes(1, 2).astype(slots.dtype)
    if place is not None:
        return jax.lax.dynamic_update_slice(slots, new_BKTH[None], (place, 0, 0, length, 0))
    new = new_BKTH.reshape(*slots.shape[:-2], *new_BKTH.shape[-2:])
    return jax.lax.dynamic_update_slice(slots, new, (*(0,) * (slots.ndim - 2), length, 0))


def _read(cache: Slots, place: Array | None) -> Slots:
    """Keys and values of one layer, each [B, K, S, H]."""
    if place is None:
        return jax.tree.map(rows_first, cache)
    return jax.tree.map(lambda slots: jax.lax.dynamic_index_in_dim(slots, place, 0, False), cache)


def rows_first(slots: Array) -> Array:
    """Slots [..., B, K, S, H] of a cache whose single row may have no axis."""
    return slots[None] if slots.ndim == 3 else slots
