"""Multi-head latent attention: what a token leaves for later ones is one narrow vector.

Of the stream x, with heads n (arXiv:2405.04434, section 2.1):

    c = norm(x W_c)                              the latent, of which keys and values are made
    r = rotate(x W_r)                            one key for all heads, which carries the position
    k_n = [c W_n^K, r]       v_n = c W_n^V
    q_n = [x W_n^Q, rotate(x W_n^R)]             or of norm(x W_q), a latent of the queries

A cache holds [c, r] alone. Against it the products are taken in another order: the query
[q W_n^K^T, rotate(…)] meets [c, r] itself, as of one head, and W_n^V comes after the sum over
tokens: q (c W^K)^T = (q W^K^T) c^T.

Axes of this file: C the latent, M the latent and the rotated key behind it.

Notes: chapter 3.
"""

from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxgpt import weights
from jaxgpt.config import ModelConfig
from jaxgpt.model.attention import BlockInputs, Slots, attend, scale_queries, write_slots
from jaxgpt.model.layers import Linear, RMSNorm, residual_std, rotate
from jaxgpt.types import Array

NORM_EPS = 1e-6  # of the latents' norms, whatever ModelConfig.norm_eps is


class LatentAttention(nn.Module):
    """softmax(q k^T / sqrt(H)) v per head, of keys and values that one latent makes."""

    cfg: ModelConfig

    @nn.compact
    def __call__(
        self, x_BTD: Array, inputs: BlockInputs, slots: Slots | None
    ) -> tuple[Array, Slots | None]:
        cfg, latent = self.cfg, self.cfg.latent
        assert latent is not None
        linear = partial(Linear, use_bias=False, dtype=cfg.dtype)
        norm = partial(RMSNorm, NORM_EPS, cfg.dtype)

        read_BTD = x_BTD
        if latent.query_dim:
            read_BTD = norm(name="query_norm")(linear(latent.query_dim, name="query_latent")(x_BTD))
        name = "query_up" if latent.query_dim else "query"
        q_BTF = linear(cfg.num_heads * cfg.head_width, name=name)(read_BTD)
        both_BTM = linear(latent.dim + latent.rope_dim, name="latent")(x_BTD)
        c_BTC = norm(name="latent_norm")(both_BTM[..., : latent.dim])
        q_BTNH, r_BT1H = rotated(cfg, q_BTF, both_BTM, inputs)

        columns = cfg.num_heads * (cfg.head_width - latent.rope_dim + latent.value_dim)
        expand = linear(columns, name="key_value")
        # A prompt that fills an empty cache sees only itself, as in `attend`.
        if slots is None or (inputs.mask_BTS is None and inputs.first_row is None):
            out_BTNH = _attend_expanded(cfg, q_BTNH, r_BT1H, expand(c_BTC), inputs)
            if slots is not None:
                assert inputs.length is not None
                stored_BT1M = jnp.concatenate((c_BTC[:, :, None], r_BT1H), axis=-1)
                slots = (write_slots(slots[0], stored_BT1M, inputs.length), slots[1])
        else:
            kernel_CF = weights.dense(expand.variables["params"]["kernel"])
            kernel_CNF = kernel_CF.reshape(latent.dim, cfg.num_heads, -1).astype(cfg.dtype)
            stored_BT1M = jnp.concatenate((c_BTC[:, :, None], r_BT1H), axis=-1)
            out_BTNH, slots = _attend_absorbed(cfg, q_BTNH, stored_BT1M, kernel_CNF, inputs, slots)
        output = linear(cfg.model_dim, std=residual_std(cfg), name="output")
        return output(out_BTNH.reshape(*x_BTD.shape[:2], -1)), slots


def rotated(
    cfg: ModelConfig, q_BTF: Array, both_BTM: Array, inputs: BlockInputs
) -> tuple[Array, Array]:
    """Queries [B, T, N, H], whose last rope_dim entries are rotated, and the heads' rotated key."""
    assert cfg.latent is not None
    q_BTNH = q_BTF.reshape(*q_BTF.shape[:2], cfg.num_heads, cfg.head_width)
    plain, r_BT1H = cfg.head_width - cfg.latent.rope_dim, both_BTM[:, :, None, cfg.latent.dim :]
    if inputs.rope is None:
        return q_BTNH, r_BT1H
    turned_BTNH = rotate(q_BTNH[..., plain:], inputs.rope, cfg.rope_pairs)
    q_BTNH = jnp.concatenate((q_BTNH[..., :plain], turned_BTNH), axis=-1)
    return q_BTNH, rotate(r_BT1H, inputs.rope, cfg.rope_pairs)


def expanded(cfg: ModelConfig, r_BT1H: Array, kv_BTF: Array) -> tuple[Array, Array]:
    """Keys [B, T, N, H] and values [B, T, N, value_dim] of every head."""
    assert cfg.latent is not None
    kv_BTNH = kv_BTF.reshape(*kv_BTF.shape[:2], cfg.num_heads, -1)
    plain = cfg.head_width - cfg.latent.rope_dim
    r_BTNH = jnp.broadcast_to(r_BT1H, (*kv_BTNH.shape[:3], cfg.latent.rope_dim))
    k_BTNH = jnp.concatenate((kv_BTNH[..., :plain], r_BTNH.astype(kv_BTNH.dtype)), axis=-1)
    return k_BTNH, kv_BTNH[..., plain:]


def _attend_expanded(
    cfg: ModelConfig, q_BTNH: Array, r_BT1H: Array, kv_BTF: Array, inputs: BlockInputs
) -> Array:
    assert cfg.latent is not None
    heads = (q_BTNH, *expanded(cfg, r_BT1H, kv_BTF))
    # The programs of attention know one width: zeros fill up the narrower of keys and values.
    width = max(cfg.head_width, cfg.latent.value_dim)
    q_BTNH, k_BTNH, v_BTNH = (
        jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, width - x.shape[-1]))) for x in heads
    )
    q_BTNH = scale_queries(cfg, q_BTNH, inputs)
    q_BTNH, k_BTNH, v_BTNH = (
        checkpoint_name(x.astype(cfg.dtype), "qkv") for x in (q_BTNH, k_BTNH, v_BTNH)
    )
    out_BTNH, _ = attend(cfg, q_BTNH, k_BTNH, v_BTNH, inputs, None)
    return checkpoint_name(out_BTNH[..., : cfg.latent.value_dim], "attention")


def _attend_absorbed(
    cfg: ModelConfig, q_BTNH: Array, stored_BT1M: Array, kernel_CNF: Array, inputs: BlockInputs,
    slots: Slots,
) -> tuple[Array, Slots | None]:  # fmt: skip
    assert cfg.latent is not None
    plain = cfg.head_width - cfg.latent.rope_dim
    to_key_CNH, to_value_CNH = kernel_CNF[..., :plain], kernel_CNF[..., plain:]
    q_BTNC = jnp.einsum("BTNH,CNH->BTNC", q_BTNH[..., :plain].astype(cfg.dtype), to_key_CNH)
    q_BTNM = jnp.concatenate((q_BTNC, q_BTNH[..., plain:].astype(q_BTNC.dtype)), axis=-1)
    q_BTNM = scale_queries(cfg, q_BTNM, inputs).astype(cfg.dtype)
    stored_BT1M = stored_BT1M.astype(cfg.dtype)
    # Values are a part of the keys, and the cache has them once.
    out_BTNM, slots_now = attend(cfg, q_BTNM, stored_BT1M, stored_BT1M[..., :0], inputs, slots)
    out_BTNC = out_BTNM[..., : cfg.latent.dim].astype(cfg.dtype)
    return jnp.einsum("BTNC,CNH->BTNH", out_BTNC, to_value_CNH), slots_now
