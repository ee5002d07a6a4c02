"""Phi-3, Phi-4, GLM-4: Llama whose projections stand behind one another in one tensor."""

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
    LAYER,
    NORMS,
    PROJECTIONS,
    QKV_BIAS,
    SETTINGS,
    UNBIASED,
)
from jaxgpt.convert.rope import refuse

FUSED_QKV = table.rows("""
    attention/{query,key,value}/kernel  self_attn.qkv_proj.weight  \
        (heads+kv_heads+kv_heads width) dim -> dim (heads+kv_heads+kv_heads width)
""", LAYER) + PROJECTIONS[-1:]  # fmt: skip
FUSED_MLP = table.rows("""
    mlp/{gate,up}/kernel  mlp.gate_up_proj.weight  (part mlp) dim -> part dim mlp
""", LAYER) + GATED_MLP[-1:]  # fmt: skip


def _checked(theirs: Mapping[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    if (scaling := ours["rope_scaling"]) and scaling.kind != "longrope":
        refuse("rope_parameters.rope_type", scaling.kind, "must be default or longrope")
    return {}


def _original(cfg: ModelConfig, theirs: dict[str, Any]) -> dict[str, Any]:
    """transformers reads the context of the first training beside the table of RoPE, too."""
    key = "original_max_position_embeddings"
    return {key: theirs["rope_parameters"].get(key, cfg.context_length)}


# Phi-4 and Phi-4-mini are of this type, too.
PHI3 = replace(
    UNBIASED,
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    settings=changed(
        SETTINGS,
        context_length=("max_position_embeddings", 4096),
        norm_eps=("rms_norm_eps", 1e-5),
        head_dim=None,
        sliding_window=("sliding_window", None),
    ),
    table=ENDS + NORMS + FUSED_QKV + FUSED_MLP,
    rope_share=1.0,
    rope_kinds={"su": "longrope", "yarn": "longrope"},
    defaults={"original_max_position_embeddings": 4096},
    neutral={
        "attention_bias": False, "mlp_bias": False, "lm_head_bias": False, "full_attn_mod": 1,
    },
    inert=("interpolate_factor",),
    derived=_checked,
    stated=_original,
)  # fmt: skip

GLM = replace(
    UNBIASED,
    model_type="glm",
    architecture="GlmForCausalLM",
    fixed=FIXED | {"rope_pairs": "neighbours"},
    settings=changed(
        SETTINGS,
        norm_eps=("rms_norm_eps", 1.5625e-7),
        num_kv_heads=(KV_HEADS, 2),
        head_dim=("head_dim", 128),
    ),
    table=ENDS + NORMS + PROJECTIONS + QKV_BIAS + FUSED_MLP,
    rope_share=0.5,
    biases={"none": (), "qkv": ("attention_bias",)},
    defaults={"attention_bias": True},
)
# GLM with norms behind attention and MLP, too.
GLM4 = replace(
    GLM,
    model_type="glm4",
    architecture="Glm4ForCausalLM",
    fixed=GLM.fixed | {"norm_place": "both"},
    table=GLM.table
    + table.rows("""
        attention_post_norm/scale  post_self_attn_layernorm.weight  dim
        mlp_post_norm/scale        post_mlp_layernorm.weight        dim
    """, LAYER),
)  # fmt: skip
