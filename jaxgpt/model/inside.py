"""What a forward pass computes on its way: the residual stream, attention's weights, the experts.

The modules are watched from outside (Flax's interceptors), so no layer has a flag for it, and what
is seen is what the layers themselves computed, adapters and quantised kernels included. Only the
softmax of attention is written again, since fast kernels never build its weights.

Axes of this file: A places between blocks (before the first, after each), J a token's experts.

Notes: chapter 3.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxgpt.config import ModelConfig
from jaxgpt.kernels.fast_attention import with_sinks
from jaxgpt.model import gpt
from jaxgpt.model.attention import Attention, BlockInputs, scale_queries
from jaxgpt.model.latent import LatentAttention, expanded, rotated
from jaxgpt.model.layers import make_norm, rotate
from jaxgpt.model.moe import MoE
from jaxgpt.types import Array, Params


class Inside(NamedTuple):
    """What `look` keeps of a batch of texts."""

    hidden_ABTD: Array  # the residual stream, before the final norm
    logits_BTV: Array
    q_LBTNH: Array  # queries and keys as they meet: normed, rotated and scaled
    k_LBSKH: Array
    expert_LBTJ: Array | None  # each token's experts, best first, -1: none; None without experts
    gate_LBTJ: Array | None  # their weights


def look(cfg: ModelConfig, params: Params, tokens_BT: Array) -> Inside:
    """Runs the model and keeps what passes between its parts."""
    seen: dict[str, Any] = {}  # of the block that is being traced

    def watch(
        call: Callable[..., Any], args: tuple, kwargs: dict, context: nn.module.InterceptorContext
    ) -> Any:
        module, out = context.module, call(*args, **kwargs)
        if context.method_name != "__call__":
            return out
        parent = type(module.parent)
        if issubclass(parent, (Attention, LatentAttention, MoE)):
            seen[f"{parent.__name__}/{module.name}"] = out
        elif isinstance(module, Attention):
            seen["q"], seen["k"] = _queries_and_keys(module.cfg, seen, args[1])
        elif isinstance(module, LatentAttention):
            seen["q"], seen["k"] = _expanded(module.cfg, seen, args[1])
        elif isinstance(module, MoE):
            _, seen["expert"], seen["gate"] = seen["MoE/router"]
        elif isinstance(module, gpt.Block):
            after_BTD, (_, slots) = out
            kept = {name: seen.get(name) for name in ("q", "k", "expert", "gate")}
            if cfg.num_experts and not module.cfg.num_experts:  # a dense layer before the mixtures
                none_BTJ = jnp.zeros((*after_BTD.shape[:2], cfg.experts_per_token))
                kept |= {"expert": none_BTJ.astype(int) - 1, "gate": none_BTJ}
            # What a block returns in the place of its router's statistics is stacked over layers.
            return after_BTD, ({**kept, "before": args[0], "after": after_BTD}, slots)
        return out

    with nn.intercept_methods(watch):
        output = gpt.apply(cfg, params, tokens_BT)
    found: Any = output.router
    hidden_ABTD = jnp.concatenate([found["before"][:1], found["after"]])
    logits_BTV = gpt.logits(cfg, params, output.hidden_BTD)
    return Inside(hidden_ABTD, logits_BTV, found["q"], found["k"], found["expert"], found["gate"])


def sinks(cfg: ModelConfig, params: Params, layer: int) -> Array | None:
    """The sinks [N] of one layer, if its heads have some."""
    if not cfg.attention_sinks:
        return None
    blocks = params["blocks"]
    alone = blocks.get(str(layer))  # layers stand apart, as for decoding
    return alone["attention"]["sink_bias"] if alone else blocks["attention"]["sink_bias"][layer]


def attention_weights(
    cfg: ModelConfig, q_BTNH: Array, k_BSKH: Array, sinks_N: Array | None = None
) -> Array:
    """softmax(q k^T / sqrt(H)) of one layer, `cfg.of_layer`, [B, N, T, S] in float32."""
    (B, T, N, H), (_, S, K, _) = q_BTNH.shape, k_BSKH.shape
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H).astype(jnp.float32)
    scores_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH.astype(jnp.float32)) * H**-0.5
    if cfg.attention_softcap:
        scores_BKGTS = cfg.attention_softcap * jnp.tanh(scores_BKGTS / cfg.attention_softcap)
    distance_TS = jnp.arange(T)[:, None] - jnp.arange(S)[None]
    visible_TS = (distance_TS >= 0) & (distance_TS < (cfg.sliding_window or T))
    scores_BKGTS = jnp.where(visible_TS[None, None, None], scores_BKGTS, -jnp.inf)
    weights_BKGTS = jax.nn.softmax(with_sinks(scores_BKGTS, sinks_N), axis=-1)[..., :S]
    return weights_BKGTS.reshape(B, N, T, S)


def lens(cfg: ModelConfig, params: Params, hidden_BTD: Array) -> Array:
    """The logits [B, T, V] that the head reads from a residual stream, after the final norm."""
    norm = make_norm(cfg, "final_norm")
    normed_BTD: Any = norm.clone(name=None).apply({"params": params["final_norm"]}, hidden_BTD)
    if cfg.logit_divisor != 1:
        normed_BTD = normed_BTD / cfg.logit_divisor
    return gpt.logits(cfg, params, normed_BTD)


def _queries_and_keys(
    cfg: ModelConfig, seen: dict[str, Array], inputs: BlockInputs
) -> tuple[Array, Array]:
    def heads(name: str) -> Array:
        projected_BTF = seen[f"Attention/{name}"]
        x_BTNH = projected_BTF.reshape(*projected_BTF.shape[:2], -1, cfg.head_width)
        x_BTNH = seen[f"Attention/{name}_norm"] if cfg.qk_norm else x_BTNH
        return x_BTNH if inputs.rope is None else rotate(x_BTNH, inputs.rope, cfg.rope_pairs)

    q_BTNH = scale_queries(cfg, heads("query"), inputs)
    return q_BTNH.astype(cfg.dtype), heads("key").astype(cfg.dtype)


def _expanded(cfg: ModelConfig, seen: dict[str, Array], inputs: BlockInputs) -> tuple[Array, Array]:
    """The same of latent attention."""
    name = "LatentAttention"
    assert cfg.latent is not None
    query = "query_up" if cfg.latent.query_dim else "query"
    q_BTNH, r_BT1H = rotated(cfg, seen[f"{name}/{query}"], seen[f"{name}/latent"], inputs)
    k_BTNH, _ = expanded(cfg, r_BT1H, seen[f"{name}/key_value"])
    return scale_queries(cfg, q_BTNH, inputs).astype(cfg.dtype), k_BTNH.astype(cfg.dtype)
