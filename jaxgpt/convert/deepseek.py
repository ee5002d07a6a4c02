"""DeepSeek-V2 and V3, GLM-4.7-Flash: latent attention, shared experts, and dense layers first."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jaxgpt.config import Latent, ModelConfig
from jaxgpt.convert import table
from jaxgpt.convert.family import LARGEST, changed
from jaxgpt.convert.llama import ENDS, GATED_MLP, KV_HEADS, LAYER, NORMS, SETTINGS, UNBIASED
from jaxgpt.convert.qwen3 import EXPERTS, FUSED_EXPERTS
from jaxgpt.convert.rope import number, refuse

BOTH = NORMS + table.rows("""
    attention/query_latent/kernel  self_attn.q_a_proj.weight  \
        query_latent dim -> dim query_latent
    attention/query_norm/scale     self_attn.q_a_layernorm.weight  query_latent
    attention/query_up/kernel      self_attn.q_b_proj.weight  \
        (heads width) query_latent -> query_latent (heads width)
    attention/query/kernel         self_attn.q_proj.weight  (heads width) dim -> dim (heads width)
    attention/latent/kernel        self_attn.kv_a_proj_with_mqa.weight  stored dim -> dim stored
    attention/latent_norm/scale    self_attn.kv_a_layernorm.weight  latent
    attention/key_value/kernel     self_attn.kv_b_proj.weight  \
        (heads pair) latent -> latent (heads pair)
    attention/output/kernel        self_attn.o_proj.weight  dim (heads value) -> (heads value) dim
""", LAYER)  # fmt: skip
SHARED = table.rows("""
    moe/shared/gate/kernel  mlp.shared_experts.gate_proj.weight  shared dim -> dim shared
    moe/shared/up/kernel    mlp.shared_experts.up_proj.weight    shared dim -> dim shared
    moe/shared/down/kernel  mlp.shared_experts.down_proj.weight  dim shared -> shared dim
""", LAYER)  # fmt: skip
CORRECTION = table.rows("""
    moe/router/choice_bias  mlp.gate.e_score_correction_bias  expert
""", LAYER)  # fmt: skip
TABLE = ENDS + BOTH + EXPERTS + FUSED_EXPERTS + SHARED + table.of_dense_layers(BOTH + GATED_MLP)
OWN = (
    "kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim",
    "n_shared_experts", "n_group", "topk_group", "first_k_dense_replace", KV_HEADS, "qk_head_dim",
    "num_nextn_predict_layers", "aux_loss_alpha", "seq_aux", "ep_size",
)  # fmt: skip


def _whole(theirs: Mapping[str, Any], key: str, usual: int, least: int = 1) -> int:
    value = theirs.get(key)
    value = usual if value is None else value
    if type(value) is not int or not least <= value <= LARGEST:
        refuse(key, value, f"must be a whole number from {least} on")
    return value


def _attention(theirs: Mapping[str, Any], ours: dict[str, Any], usual: Mapping[str, int]) -> dict:
    """Latent attention; a family's own defaults are `usual`."""
    whole = lambda key: _whole(theirs, key, usual[key])
    heads = theirs.get(KV_HEADS)
    if heads not in (None, ours["num_heads"]):
        refuse(KV_HEADS, heads, f"must be num_attention_heads={ours['num_heads']}")
    if ours["rope_scaling"] is not None and ours["rope_scaling"].kind == "longrope":
        refuse("rope_parameters.rope_type", "longrope", "not with latent attention")
    unsaid = theirs.get("q_lora_rank", usual["q_lora_rank"]) is None
    latent = Latent(
        dim=whole("kv_lora_rank"), query_dim=0 if unsaid else whole("q_lora_rank"),
        rope_dim=whole("qk_rope_head_dim"), value_dim=whole("v_head_dim"),
    )  # fmt: skip
    width = whole("qk_nope_head_dim") + latent.rope_dim
    found = {"latent": latent, "head_dim": width}
    rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
    if ours["rope_scaling"] is not None and rope.get("mscale_all_dim"):
        weight = number("rope_parameters.mscale_all_dim", rope["mscale_all_dim"])
        found["attention_scale"] = _scale(width, weight, ours["rope_scaling"].factor)
    return found


def _scale(width: int, weight: float, factor: float) -> float:
    """YaRN's second factor, which stands in the scores and not in RoPE's tables."""
    grown = 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0
    return width**-0.5 * grown * grown


def _mixture(theirs: Mapping[str, Any], ours: dict[str, Any], shared: int, dense: int) -> dict:
    return {
        "shared_mlp_dim": _whole(theirs, "n_shared_experts", shared) * ours["mlp_dim"],
        "dense_layers": _whole(theirs, "first_k_dense_replace", dense, 0),
    }


def _interleaved(theirs: Mapping[str, Any]) -> dict[str, Any]:
    pairs = theirs.get("rope_interleave", True)
    if pairs not in (None, True, False):
        refuse("rope_interleave", pairs, "must be true or false")
    return {"rope_pairs": "neighbours" if pairs else "halves"}


def _stated(cfg: ModelConfig, theirs: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `_attention` and `_mixture`."""
    latent = cfg.latent or Latent()
    scaling, rope = cfg.rope_scaling, theirs["rope_parameters"]
    if scaling is not None and cfg.attention_scale and scaling.factor > 1:
        grown = math.sqrt(cfg.attention_scale * cfg.head_width**0.5)
        weight = round((grown - 1) / (0.1 * math.log(scaling.factor)), 9)
        rope = rope | ({"mscale_all_dim": weight} if weight > 0 else {})
    return {
        "rope_parameters": rope, "kv_lora_rank": latent.dim, "v_head_dim": latent.value_dim,
        "q_lora_rank": latent.query_dim or None, "qk_rope_head_dim": latent.rope_dim,
        "qk_nope_head_dim": cfg.head_width - latent.rope_dim, KV_HEADS: cfg.num_heads,
        "n_shared_experts": cfg.shared_mlp_dim // cfg.mlp_width,
        "first_k_dense_replace": cfg.dense_layers, "n_group": cfg.expert_groups,
        "topk_group": cfg.groups_per_token,
        "intermediate_size": cfg.dense_mlp_dim or cfg.mlp_width,  # of no layer, if none is dense
    }  # fmt: skip


V3 = {"kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64, "v_head_dim": 128,
      "qk_nope_head_dim": 128}  # fmt: skip


def _v3(theirs: Mapping[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    groups = {
        "expert_groups": _whole(theirs, "n_group", 8),
        "groups_per_token": _whole(theirs, "topk_group", 4),
    }
    mixture = _mixture(theirs, ours, 1, 3)
    return _attention(theirs, ours, V3) | mixture | groups | _interleaved(theirs)


DEEPSEEK3 = replace(
    UNBIASED,
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    fixed=UNBIASED.fixed | {"router": "sigmoid", "shared_gate": False},
    settings=changed(
        SETTINGS,
        head_dim=None,
        num_kv_heads=None,
        mlp_dim=("moe_intermediate_size", 2048),
        dense_mlp_dim=("intermediate_size", 18432),
        num_experts=("n_routed_experts", 256),
        experts_per_token=("num_experts_per_tok", 8),
        normalize_expert_weights=("norm_topk_prob", True),
        expert_scale=("routed_scaling_factor", 2.5),
    ),
    table=TABLE + CORRECTION,
    renamed={
        "num_local_experts": "n_routed_experts", "num_mtp_layers": "num_nextn_predict_layers",
        "head_dim": "qk_rope_head_dim",
    },
    neutral={
        "attention_bias": False, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
        "moe_layer_freq": 1,
    },
    inert=(*OWN, "rope_interleave"),
    derived=_v3,
    stated=lambda cfg, theirs: _stated(cfg, theirs) | {
        "rope_interleave": cfg.rope_pairs == "neighbours", "num_nextn_predict_layers": 0,
    },
    # Layers behind the last one predict further tokens; transformers leaves them out, too.
    buffers=r"rotary_emb\.inv_freq$|^model\.layers\.61\.",
)  # fmt: skip


def _glm(theirs: Mapping[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """mlp_layer_types says which layers are dense."""
    count, kinds = ours["num_layers"], theirs.get("mlp_layer_types")
    kinds = ["dense"] + ["sparse"] * (count - 1) if kinds is None else kinds
    dense = kinds.count("dense") if isinstance(kinds, list) else 0
    if kinds != ["dense"] * dense + ["sparse"] * (count - dense):
        refuse("mlp_layer_types", kinds, f"must have dense layers first, then sparse ones: {count}")
    usual = {"n_group": 1, "topk_group": 1, "first_k_dense_replace": dense}
    own = V3 | {"q_lora_rank": 768, "v_head_dim": 256, "qk_nope_head_dim": 192}
    theirs = {**usual, **theirs, "first_k_dense_replace": dense}
    return _v3(theirs, ours) | _attention(theirs, ours, own)


# The same function; without other defaults it is written as DeepSeek-V3.
GLM4_LITE = replace(
    DEEPSEEK3,
    model_type="glm4_moe_lite",
    architecture="Glm4MoeLiteForCausalLM",
    settings=changed(
        DEEPSEEK3.settings,
        norm_eps=("rms_norm_eps", 1e-5),
        mlp_dim=("moe_intermediate_size", 1536),
        dense_mlp_dim=("intermediate_size", 10240),
        num_experts=("n_routed_experts", 64),
        experts_per_token=("num_experts_per_tok", 4),
        expert_scale=("routed_scaling_factor", 1.8),
    ),
    inert=(*DEEPSEEK3.inert, "mlp_layer_types"),
    derived=_glm,
    buffers=r"rotary_emb\.inv_freq$|^model\.layers\.47\.",
)


def _v2(theirs: Mapping[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    method, groups = theirs.get("topk_method", "greedy"), {}
    if method == "group_limited_greedy":
        groups = {
            "expert_groups": _whole(theirs, "n_group", 1),
            "groups_per_token": _whole(theirs, "topk_group", 1),
        }
    elif method != "greedy":
        refuse("topk_method", method, "must be greedy or group_limited_greedy")
    return _attention(theirs, ours, V3) | _mixture(theirs, ours, 2, 0) | groups


DEEPSEEK2 = replace(
    DEEPSEEK3,
    model_type="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    fixed=UNBIASED.fixed
    | {"shared_gate": False, "rope_pairs": "neighbours", "normalize_expert_weights": False},
    settings=changed(
        DEEPSEEK3.settings,
        mlp_dim=("moe_intermediate_size", 1407),
        dense_mlp_dim=("intermediate_size", 11008),
        num_experts=("n_routed_experts", 64),
        normalize_expert_weights=None,
        expert_scale=("routed_scaling_factor", 1.0),
    ),
    table=TABLE,
    renamed={"num_experts": "n_routed_experts", "head_dim": "qk_rope_head_dim"},
    neutral={
        "attention_bias": False, "mlp_bias": False, "norm_topk_prob": False,
        "scoring_func": "softmax", "moe_layer_freq": 1,
    },
    inert=(*OWN, "topk_method"),
    derived=_v2,
    stated=lambda cfg, theirs: _stated(cfg, theirs) | {
        "topk_method": "greedy" if cfg.expert_groups == 1 else "group_limited_greedy"
    },
    buffers=r"rotary_emb\.inv_freq$",
)  # fmt: skip
