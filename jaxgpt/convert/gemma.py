"""Gemma: Llama's tensors, with gated GELU, norms around 1 and embeddings times sqrt(dim).

Gemma 3 has norms before and after attention and MLP, query and key norms, and windows in five
layers of six, which have a base of RoPE of their own.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jaxgpt.config import ModelConfig
from jaxgpt.convert import table
from jaxgpt.convert.family import changed
from jaxgpt.convert.llama import (
    ENDS,
    FIXED,
    GATED_MLP,
    KV_HEADS,
    OTHER_BIAS,
    PROJECTIONS,
    QK_NORM,
    QKV_BIAS,
    SETTINGS,
    UNBIASED,
    every,
)
from jaxgpt.convert.rope import number

GEMMA = replace(
    UNBIASED,
    model_type="gemma",
    architecture="GemmaForCausalLM",
    fixed=FIXED | {"activation": "gelu_tanh", "norm_offset": 1.0},
    settings=changed(
        SETTINGS,
        tie_embeddings=("tie_word_embeddings", True),
        num_kv_heads=(KV_HEADS, 16),
        head_dim=("head_dim", 256),
    ),
    neutral={"attention_bias": False, "use_bidirectional_attention": None},
    inert=("hidden_activation",),
    activations={"gelu": "gelu_pytorch_tanh"},  # the first releases said so and meant this
    derived=lambda theirs, ours: {"embedding_scale": float(ours["model_dim"]) ** 0.5},
)

BOTH_NORMS = table.rows("""
    attention_norm/scale       input_layernorm.weight             dim
    attention_post_norm/scale  post_attention_layernorm.weight    dim
    mlp_norm/scale             pre_feedforward_layernorm.weight   dim
    mlp_post_norm/scale        post_feedforward_layernorm.weight  dim
""", "model.layers.{layer}.")  # fmt: skip


def _scales(theirs: Mapping[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    scalar = number("query_pre_attn_scalar", theirs.get("query_pre_attn_scalar", 256))
    return {"embedding_scale": float(ours["model_dim"]) ** 0.5, "attention_scale": scalar**-0.5}


def _stated(cfg: ModelConfig, theirs: dict[str, Any]) -> dict[str, Any]:
    """query_pre_attn_scalar, whose root divides the scores, must be a whole number.

    transformers wants a window also where no layer uses it.
    """
    assert cfg.attention_scale is not None  # resolved
    window = theirs["sliding_window"] or cfg.context_length
    return {"query_pre_attn_scalar": round(cfg.attention_scale**-2), "sliding_window": window}


# Windows in every other layer, and capped scores and logits.
GEMMA2 = replace(
    GEMMA,
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    fixed=GEMMA.fixed | {"norm_place": "both"},
    settings=changed(
        GEMMA.settings,
        num_kv_heads=(KV_HEADS, 4),
        sliding_window=("sliding_window", 4096),
        attention_softcap=("attn_logit_softcapping", 50.0),
        logit_softcap=("final_logit_softcapping", 30.0),
    ),
    activation="hidden_activation",
    activations={},
    table=ENDS + PROJECTIONS + QKV_BIAS + OTHER_BIAS[:1] + GATED_MLP + BOTH_NORMS,
    biases={"none": (), "attention": ("attention_bias",)},
    layers=lambda theirs, count: "LG",
    neutral={"use_bidirectional_attention": False},
    inert=("query_pre_attn_scalar",),
    derived=_scales,
    stated=_stated,
)

# The text model, by itself or in a directory that sees too. Such a directory leaves out whatever
# transformers has as a default.
GEMMA3 = replace(
    GEMMA,
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    fixed=GEMMA.fixed | {"norm_place": "both", "qk_norm": True},
    settings=changed(
        GEMMA.settings,
        vocab_size=("vocab_size", 262_208),
        context_length=("max_position_embeddings", 131_072),
        num_layers=("num_hidden_layers", 26),
        model_dim=("hidden_size", 2304),
        num_heads=("num_attention_heads", 8),
        num_kv_heads=(KV_HEADS, 4),
        mlp_dim=("intermediate_size", 9216),
        sliding_window=("sliding_window", 4096),
        logit_softcap=("final_logit_softcapping", None),
    ),
    activation="hidden_activation",
    activations={},
    table=ENDS + PROJECTIONS + QKV_BIAS + OTHER_BIAS[:1] + GATED_MLP + BOTH_NORMS + QK_NORM,
    biases={"none": (), "attention": ("attention_bias",)},
    rope_base=1e6,
    rope_local=("rope_local_base_freq", 1e4),
    layers=lambda theirs, count: every("sliding_window_pattern", theirs, 6),
    neutral={"use_bidirectional_attention": False},
    inert=(
        "query_pre_attn_scalar", "rope_local_base_freq", "sliding_window_pattern",
        "_sliding_window_pattern",
    ),
    derived=_scales,
    stated=_stated,
)  # fmt: skip
