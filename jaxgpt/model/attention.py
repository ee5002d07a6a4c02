"""Causal self-attention, and the key/value cache it reads and writes."""

from dataclasses import dataclass, field
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxgpt.config import ModelConfig
from jaxgpt.kernels.attention import attention, cached_attention
from jaxgpt.model.layers import Linear, RMSNorm, residual_std, rotate
from jaxgpt.types import Array

Slots = tuple[Array, Array]  # keys and values, each [L, B, S, K, H]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Keys and values of the tokens seen so far, in slots shared by all rows.

    One array for all layers, or a tuple of one per layer, each with L = 1, where the parameters
    of the layers stand apart too.

    Rows are aligned on the right: row b's first token stands in slot `start_B[b]`, so that every
    row writes its next token into the same slot, `length`.
    """

    keys_LBSKH: Array | tuple[Array, ...]
    values_LBSKH: Array | tuple[Array, ...]
    length: Array  # slots written, a scalar
    start_B: Array  # empty slots before the row's first token
    # Nothing written yet: the first tokens then need to look only at each other. Static.
    fresh: bool = field(default=True, metadata={"static": True})

    @property
    def capacity(self) -> int:
        """S, the slots of a row."""
        return jax.tree.leaves(self.keys_LBSKH)[0].shape[2]


class BlockInputs(NamedTuple):
    """What every block reads beside the residual stream."""

    rope: tuple[Array, Array] | None  # cos and sin, each [B, T, H/2]
    segments_BT: Array | None  # tokens attend within their segment; 0 is padding
    rng_B: Array | None  # dropout keys
    length: Array | None  # slots of the cache that were written before
    mask_BTS: Array | None  # slots of the cache that a token may see; None: a fresh cache


class Attention(nn.Module):
    """softmax(q k^T / sqrt(H)) v per head.

    One code for three kinds: single-head attention (num_heads = 1), multi-head attention
    (arXiv:1706.03762; num_kv_heads = num_heads) and grouped-query attention (arXiv:2305.13245;
    each key/value head serves num_heads / num_kv_heads query heads).
    """

    cfg: ModelConfig

    @nn.compact
    def __call__(
        self, x_BTD: Array, inputs: BlockInputs, cache: Slots | None, place: Array | int
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

        if cache is not None:
            start = (place, 0, inputs.length, 0, 0)
            cache = (_write(cache[0], k_BTKH, start), _write(cache[1], v_BTKH, start))
        if cache is None or inputs.mask_BTS is None:
            out_BTNH = attention(
                q_BTNH,
                k_BTKH,
                v_BTKH,
                segments_BT=inputs.segments_BT,
                window=cfg.sliding_window or 0,
            )
        else:
            k_BSKH, v_BSKH = (jax.lax.dynamic_index_in_dim(c, place, 0, False) for c in cache)
            out_BTNH = cached_attention(q_BTNH, k_BSKH, v_BSKH, inputs.mask_BTS)

        out_BTF = out_BTNH.reshape(*x_BTD.shape[:2], -1)
        output = Linear(
            cfg.model_dim, cfg.bias == "all", cfg.dtype, residual_std(cfg), name="output"
        )
        return output(out_BTF), cache

    def _heads(self, name: str, count: int, x_BTD: Array) -> Array:
        width = self.cfg.head_width
        linear = Linear(count * width, self.cfg.bias != "none", self.cfg.dtype, name=name)
        return linear(x_BTD).reshape(*x_BTD.shape[:2], count, width)


def init_cache(
    cfg: ModelConfig,
    batch_size: int,
    capacity: int | None = None,
    start_B: Array | None = None,
    apart: bool = False,
) -> KVCache:
    """An empty cache of `capacity` slots (default: the context length)."""
    capacity = cfg.context_length if capacity is None else capacity
    layers = 1 if apart else cfg.num_layers
    shape = (layers, batch_size, capacity, cfg.kv_heads, cfg.head_width)
    empty = lambda: jnp.zeros(shape, cfg.dtype)
    slots = lambda: tuple(empty() for _ in range(cfg.num_layers)) if apart else empty()
    start_B = jnp.zeros(batch_size, jnp.int32) if start_B is None else start_B
    return KVCache(slots(), slots(), jnp.int32(0), start_B)


def _write(slots_LBSKH: Array, new_BTKH: Array, start: tuple) -> Array:
    return jax.lax.dynamic_update_slice(
        slots_LBSKH, new_BTKH[None].astype(slots_LBSKH.dtype), start
    )
