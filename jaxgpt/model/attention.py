"""Causal self-attention, and the key/value cache it reads and writes. Notes: chapters 3 and 10."""

from dataclasses import dataclass, field
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxgpt import kernels
from jaxgpt.config import ModelConfig
from jaxgpt.kernels.platform import accumulator_dtype
from jaxgpt.model.layers import INIT_STD, Linear, RMSNorm, parameter, residual_std, rotate
from jaxgpt.model.slots import attend_by_row
from jaxgpt.types import Array

Slots = tuple[Array, Array]  # the keys and values of one layer, as in KVCache


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Keys and values of the tokens seen so far, so that each new token is computed once.

    Rows are aligned on the right: row b's first token stands in slot `start_B[b]`, so that every
    row writes its next token into the same slot, `length`. Two rows with prompts of 3 and 5
    tokens and 8 slots, after one new token:

        slot      0 1 2 3 4 5 6 7
        row 0     . . a b c x . .     start 2, length 6
        row 1     a b c d e x . .     start 0

    The slots of a head lie together, as the products of a decoding step read them. A single row
    has no axis B: XLA:CPU folds an axis of length one away where the slots are read, and would
    copy all of them for every token (1.9 times the bytes of a step, by its own count).
    """

    keys: tuple[Array, ...]  # of each layer [B, K, S, H], or [K, S, H] of a single row
    values: tuple[Array, ...]
    length: Array  # slots written, a scalar
    start_B: Array  # empty slots before the row's first token
    # Nothing written yet: the first tokens then need to look only at each other. Static.
    fresh: bool = field(default=True, metadata={"static": True})

    @property
    def capacity(self) -> int:
        """S, the slots of a row."""
        return self.keys[0].shape[-2]

    def grown(self, keys: tuple, values: tuple, count: int) -> "KVCache":
        """The cache after `count` tokens of every row were written."""
        return KVCache(keys, values, self.length + count, self.start_B, fresh=False)


class BlockInputs(NamedTuple):
    """What every block reads beside the residual stream."""

    rope: tuple[Array, Array] | None  # cos and sin, each [B, T, H/2]
    segments_BT: Array | None  # tokens attend within their segment; 0 is padding
    rng_B: Array | None  # dropout keys
    length: Array | None  # slots of the cache that were written before
    mask_BTS: Array | None  # slots of the cache that a token may see; None: a fresh cache
    first_row: Array | None = None  # of a SlotCache, whose rows have lengths of their own
    growth_BT: Array | None = None  # factor of the queries by their position


class Attention(nn.Module):
    """softmax(q k^T / sqrt(H)) v per head.

    One code for three kinds: single-head attention (num_heads = 1), multi-head attention
    (arXiv:1706.03762; num_kv_heads = num_heads) and grouped-query attention (arXiv:2305.13245;
    each key/value head serves num_heads / num_kv_heads query heads).
    """

    cfg: ModelConfig

    @nn.compact
    def __call__(
        self, x_BTD: Array, inputs: BlockInputs, slots: Slots | None
    ) -> tuple[Array, Slots | None]:
        cfg = self.cfg
        q_BTNH = self._heads("query", cfg.num_heads, x_BTD)
        k_BTKH = self._heads("key", cfg.kv_heads, x_BTD)
        v_BTKH = self._heads("value", cfg.kv_heads, x_BTD)
        if cfg.qk_norm:
            q_BTNH, k_BTKH = self._norm("query_norm", q_BTNH), self._norm("key_norm", k_BTKH)
        if inputs.rope is not None:
            q_BTNH, k_BTKH = (rotate(x, inputs.rope, cfg.rope_pairs) for x in (q_BTNH, k_BTKH))
        q_BTNH = scale_queries(cfg, q_BTNH, inputs)
        # Rotation and norms ran in float32; the products of attention run in the compute type.
        q_BTNH, k_BTKH, v_BTKH = (
            checkpoint_name(a.astype(cfg.dtype), "qkv") for a in (q_BTNH, k_BTKH, v_BTKH)
        )
        sinks_N = None
        if cfg.attention_sinks:
            sinks_N = parameter(self, "sink_bias", INIT_STD, (cfg.num_heads,))
        out_BTNH, slots = attend(cfg, q_BTNH, k_BTKH, v_BTKH, inputs, slots, sinks_N)
        out_BTNH = checkpoint_name(out_BTNH, "attention")  # what model.remat keeps by name
        out_BTF = kernels.by_columns(out_BTNH.reshape(*x_BTD.shape[:2], -1))
        biased = cfg.bias in ("attention", "all")
        output = Linear(cfg.model_dim, biased, cfg.dtype, residual_std(cfg), name="output")
        return output(out_BTF), slots

    def _heads(self, name: str, count: int, x_BTD: Array) -> Array:
        width = self.cfg.head_width
        biased = self.cfg.bias in ("qkv", "attention", "all")
        linear = Linear(count * width, biased, self.cfg.dtype, name=name)
        return kernels.by_columns(linear(x_BTD)).reshape(*x_BTD.shape[:2], count, width)

    def _norm(self, name: str, x_BTNH: Array) -> Array:
        """Every head by itself, or all heads of a token as one vector (OLMo 2)."""
        cfg = self.cfg
        norm = RMSNorm(cfg.norm_eps, cfg.dtype, cfg.norm_offset, name=name)
        if cfg.qk_norm_over == "head":
            return norm(x_BTNH)
        return norm(x_BTNH.reshape(*x_BTNH.shape[:2], -1)).reshape(x_BTNH.shape)


def scale_queries(cfg: ModelConfig, q_BTNH: Array, inputs: BlockInputs) -> Array:
    """The queries, scaled so that the kernels, which divide by sqrt(H), give attention_scale."""
    width = q_BTNH.shape[-1]
    if cfg.attention_scale is not None or width != cfg.head_width:
        scale = cfg.attention_scale or cfg.head_width**-0.5
        q_BTNH = q_BTNH * (scale * width**0.5)
    if inputs.growth_BT is not None:
        q_BTNH = q_BTNH * inputs.growth_BT[..., None, None]
    return q_BTNH


def attend(
    cfg: ModelConfig,
    q_BTNH: Array,
    k_BTKH: Array,
    v_BTKH: Array,
    inputs: BlockInputs,
    slots: Slots | None,
    sinks_N: Array | None = None,
) -> tuple[Array, Slots | None]:
    """Attention's output [B, T, N, H], and the slots with the new keys and values.

    The queries read the keys of this call, or with a cache also those written before. Values of
    width 0 mean that the keys are the values, too.
    """
    window, how = cfg.sliding_window or 0, (cfg.attention_softcap, sinks_N)
    if slots is not None and inputs.first_row is not None:
        assert inputs.length is not None
        new = (q_BTNH, k_BTKH, v_BTKH)
        return attend_by_row(*new, slots, inputs.length, inputs.first_row, window, *how)
    if slots is not None:
        assert inputs.length is not None
        slots = (
            write_slots(slots[0], k_BTKH, inputs.length),
            write_slots(slots[1], v_BTKH, inputs.length),
        )
    # A prompt that fills an empty cache sees only itself: the fast attention of whole rows does.
    if slots is None or inputs.mask_BTS is None:
        segments_BT = inputs.segments_BT
        return kernels.attention(q_BTNH, k_BTKH, v_BTKH, segments_BT, window, *how), slots
    k_BKSH = rows_first(slots[0])
    v_BKSH = rows_first(slots[1]) if slots[1].shape[-1] else k_BKSH
    return kernels.cached_attention(q_BTNH, k_BKSH, v_BKSH, inputs.mask_BTS, *how), slots


def init_cache(
    cfg: ModelConfig, batch_size: int, capacity: int | None = None, start_B: Array | None = None
) -> KVCache:
    """An empty cache of `capacity` slots (default: the context length)."""
    capacity = cfg.context_length if capacity is None else capacity
    rows = () if batch_size == 1 else (batch_size,)
    heads, key_width, value_width = cfg.cached
    # A CPU has no batched product of bfloat16 that sums in float32, and would widen the cache for
    # every token.
    dtype = accumulator_dtype(cfg.dtype)
    empty = lambda width: tuple(
        jnp.zeros((*rows, heads, capacity, width), dtype) for _ in range(cfg.num_layers)
    )
    start_B = jnp.zeros(batch_size, jnp.int32) if start_B is None else start_B
    return KVCache(empty(key_width), empty(value_width), jnp.int32(0), start_B)


def write_slots(slots: Array, new_BTKH: Array, length: Array) -> Array:
    new_BKTH = new_BTKH.swapaxes(1, 2).astype(slots.dtype)
    new = new_BKTH.reshape(*slots.shape[:-2], *new_BKTH.shape[-2:])
    return jax.lax.dynamic_update_slice(slots, new, (*(0,) * (slots.ndim - 2), length, 0))


def rows_first(slots: Array) -> Array:
    """The slots [B, K, S, H] of a cache whose single row has no axis of its own."""
    return slots.reshape(-1, *slots.shape[-3:])
