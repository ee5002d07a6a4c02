"""Qwen2 (biases on query, key and value) and Qwen3 (query and key norms), dense or MoE."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jaxgpt.config import ModelConfig
from jaxgpt.convert import table
from jaxgpt.convert.family import changed
from jaxgpt.convert.llama import (
    ATTENTION,
    ENDS,
    FIXED,
    GATED_MLP,
    KV_HEADS,
    LAYER,
    QK_NORM,
    QKV_BIAS,
    SETTINGS,
    UNBIASED,
)
from jaxgpt.convert.rope import refuse

# A fused form of the experts is what transformers 5 keeps in memory.
FUSED_EXPERTS = table.rows("""
    moe/{gate,up}/kernel  mlp.experts.gate_up_proj  expert (part mlp) dim -> part expert dim mlp
    moe/down/kernel       mlp.experts.down_proj     expert dim mlp -> expert mlp dim
""", LAYER)  # fmt: skip
EXPERTS = table.rows("""
    moe/router/kernel  mlp.gate.weight                        expert dim -> dim expert
    moe/gate/kernel    mlp.experts.{expert}.gate_proj.weight  mlp dim -> dim mlp
    moe/up/kernel      mlp.experts.{expert}.up_proj.weight    mlp dim -> dim mlp
    moe/down/kernel    mlp.experts.{expert}.down_proj.weight  dim mlp -> mlp dim
""", LAYER)  # fmt: skip
SHARED_EXPERT = table.rows("""
    moe/shared_gate/kernel  mlp.shared_expert_gate.weight       one dim -> dim one
    moe/shared/gate/kernel  mlp.shared_expert.gate_proj.weight  shared dim -> dim shared
    moe/shared/up/kernel    mlp.shared_expert.up_proj.weight    shared dim -> dim shared
    moe/shared/down/kernel  mlp.shared_expert.down_proj.weight  dim shared -> shared dim
""", LAYER)  # fmt: skip

EVERY_LAYER = {"decoder_sparse_step": 1, "mlp_only_layers": []}  # has a mixture
WINDOW = ("sliding_window", "max_window_layers")  # read only with use_sliding_window
NO_WINDOW = {"use_sliding_window": False}


def _windows(theirs: Mapping[str, Any], count: int) -> str:
    """All layers behind the first max_window_layers have the window, if it is used."""
    full = theirs.get("max_window_layers", 28)
    if type(full) is not int or full < 0:
        refuse("max_window_layers", full, "must be a whole number")
    full = min(full, count) if theirs.get("use_sliding_window") else count
    return "G" * full + "L" * (count - full)


def _used(theirs: Mapping[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    if ours["sliding_window"] and not theirs.get("use_sliding_window"):
        kinds = theirs.get("layer_types")
        refuse("layer_types", kinds, "has windows, but use_sliding_window is not true")
    return {}


def _stated(cfg: ModelConfig, theirs: dict[str, Any]) -> dict[str, Any]:
    return {"use_sliding_window": cfg.sliding_window is not None}


BY_LAYER: dict[str, Any] = {
    "layers": _windows, "derived": _used, "stated": _stated,
    "inert": ("max_window_layers", "use_sliding_window"),
}  # fmt: skip

QWEN2 = replace(
    UNBIASED,
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    fixed=FIXED | {"bias": "qkv"},
    settings=changed(
        SETTINGS, num_kv_heads=(KV_HEADS, 32), sliding_window=("sliding_window", 4096)
    ),
    table=ENDS + ATTENTION + QKV_BIAS + GATED_MLP,
    **BY_LAYER,
)

QWEN2_MOE = replace(
    UNBIASED,
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    settings=changed(
        SETTINGS,
        num_kv_heads=(KV_HEADS, 16),
        mlp_dim=("moe_intermediate_size", 1408),
        num_experts=("num_experts", 60),
        experts_per_token=("num_experts_per_tok", 4),
        normalize_expert_weights=("norm_topk_prob", False),
        shared_mlp_dim=("shared_expert_intermediate_size", 5632),
    ),
    table=ENDS + ATTENTION + QKV_BIAS + EXPERTS + FUSED_EXPERTS + SHARED_EXPERT,
    biases={"none": (), "qkv": ("qkv_bias",)},
    defaults={"qkv_bias": True},
    inert=(*WINDOW, "intermediate_size"),
    neutral=EVERY_LAYER | NO_WINDOW,
)

QWEN3 = replace(
    UNBIASED,
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    fixed=FIXED | {"qk_norm": True},
    settings=changed(
        SETTINGS,
        num_kv_heads=(KV_HEADS, 32),
        head_dim=("head_dim", 128),
        sliding_window=("sliding_window", 4096),
    ),
    table=ENDS + ATTENTION + QK_NORM + GATED_MLP,
    neutral={"attention_bias": False},
    **BY_LAYER,
)

# The text models of Qwen2-VL, Qwen2.5-VL and Qwen3-VL: where all is text, the three positions of
# their RoPE are one.
VISION_TEXTS = (
    *(
        replace(QWEN2, model_type=f"{name}_text", rope_base=1e6, settings=changed(
            QWEN2.settings, norm_eps=("rms_norm_eps", 1e-5), num_kv_heads=(KV_HEADS, 8),
        ))
        for name in ("qwen2_vl", "qwen2_5_vl")
    ),
    replace(
        QWEN3, model_type="qwen3_vl_text", rope_base=5e5,
        settings=changed(QWEN3.settings, sliding_window=None), layers=None, derived=None,
        stated=None, inert=(), neutral=QWEN3.neutral | NO_WINDOW,
    ),
)  # fmt: skip

QWEN3_MOE = replace(
    UNBIASED,
    fixed=QWEN3.fixed,
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    settings=changed(
        SETTINGS,
        num_kv_heads=(KV_HEADS, 4),
        mlp_dim=("moe_intermediate_size", 768),
        num_experts=("num_experts", 128),
        experts_per_token=("num_experts_per_tok", 8),
        normalize_expert_weights=("norm_topk_prob", False),
    ),
    table=ENDS + ATTENTION + QK_NORM + EXPERTS + FUSED_EXPERTS,
    renamed={"num_local_experts": "num_experts"},
    inert=(*WINDOW, "intermediate_size"),
    neutral=EVERY_LAYER | NO_WINDOW | {"attention_bias": False},
)
