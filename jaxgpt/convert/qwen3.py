"""Qwen2 (biases on query, key and value) and Qwen3 (query and key norms), dense or MoE."""

from jaxgpt.convert.family import REQUIRED, Family
from jaxgpt.convert.llama import ATTENTION, ENDS, FIXED, GATED_MLP, LAYER, QKV_BIAS, SETTINGS

QK_NORM = (
    ("blocks/attention/query_norm/scale", LAYER + "self_attn.q_norm.weight", "width"),
    ("blocks/attention/key_norm/scale", LAYER + "self_attn.k_norm.weight", "width"),
)
# A fused form of the experts is what transformers 5 keeps in memory.
FUSED_EXPERTS = (
    (
        ("blocks/moe/gate/kernel", "blocks/moe/up/kernel"),
        LAYER + "mlp.experts.gate_up_proj",
        "expert (part mlp) dim -> part expert dim mlp",
    ),
    (
        "blocks/moe/down/kernel",
        LAYER + "mlp.experts.down_proj",
        "expert dim mlp -> expert mlp dim",
    ),
)
EXPERT = LAYER + "mlp.experts.{expert}."
EXPERTS = (
    ("blocks/moe/router/kernel", LAYER + "mlp.gate.weight", "expert dim -> dim expert"),
    ("blocks/moe/gate/kernel", EXPERT + "gate_proj.weight", "mlp dim -> dim mlp"),
    ("blocks/moe/up/kernel", EXPERT + "up_proj.weight", "mlp dim -> dim mlp"),
    ("blocks/moe/down/kernel", EXPERT + "down_proj.weight", "dim mlp -> mlp dim"),
)

EVERY_LAYER = {"decoder_sparse_step": 1, "mlp_only_layers": []}  # has a mixture
WINDOW = ("sliding_window", "max_window_layers")  # read only with use_sliding_window
SHARED_EXPERT = (
    (
        "blocks/moe/shared_gate/kernel",
        LAYER + "mlp.shared_expert_gate.weight",
        "one dim -> dim one",
    ),
    (
        "blocks/moe/shared/gate/kernel",
        LAYER + "mlp.shared_expert.gate_proj.weight",
        "shared dim -> dim shared",
    ),
    (
        "blocks/moe/shared/up/kernel",
        LAYER + "mlp.shared_expert.up_proj.weight",
        "shared dim -> dim shared",
    ),
    (
        "blocks/moe/shared/down/kernel",
        LAYER + "mlp.shared_expert.down_proj.weight",
        "dim shared -> shared dim",
    ),
)

QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    prefix="model.",
    fixed=FIXED | {"bias": "qkv"},
    settings=(
        *SETTINGS,
        ("num_kv_heads", "num_key_value_heads", 32),
        ("head_dim", "head_dim", None),
        ("mlp_dim", "intermediate_size", REQUIRED),
    ),
    activation="hidden_act",
    table=ENDS + ATTENTION + QKV_BIAS + GATED_MLP,
    rope_base=10000.0,
    inert=WINDOW,
    neutral={"use_sliding_window": False},
)

QWEN2_MOE = Family(
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    prefix="model.",
    fixed=FIXED,
    settings=(
        *SETTINGS,
        ("num_kv_heads", "num_key_value_heads", 16),
        ("head_dim", "head_dim", None),
        ("mlp_dim", "moe_intermediate_size", 1408),
        ("num_experts", "num_experts", 60),
        ("experts_per_token", "num_experts_per_tok", 4),
        ("normalize_expert_weights", "norm_topk_prob", False),
        ("shared_mlp_dim", "shared_expert_intermediate_size", 5632),
    ),
    activation="hidden_act",
    table=ENDS + ATTENTION + QKV_BIAS + EXPERTS + FUSED_EXPERTS + SHARED_EXPERT,
    rope_base=10000.0,
    biases={"none": (), "qkv": ("qkv_bias",)},
    defaults={"qkv_bias": True},
    inert=(*WINDOW, "intermediate_size"),
    neutral=EVERY_LAYER | {"use_sliding_window": False},
)

QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    prefix="model.",
    fixed=FIXED | {"qk_norm": True},
    settings=(
        *SETTINGS,
        ("num_kv_heads", "num_key_value_heads", 32),
        ("head_dim", "head_dim", 128),
        ("mlp_dim", "intermediate_size", REQUIRED),
    ),
    activation="hidden_act",
    table=ENDS + ATTENTION + QK_NORM + GATED_MLP,
    rope_base=10000.0,
    inert=WINDOW,
    neutral={"use_sliding_window": False, "attention_bias": False},
)

QWEN3_MOE = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    prefix="model.",
    fixed=FIXED | {"qk_norm": True},
    settings=(
        *SETTINGS,
        ("num_kv_heads", "num_key_value_heads", 4),
        ("head_dim", "head_dim", None),
        ("mlp_dim", "moe_intermediate_size", 768),
        ("num_experts", "num_experts", 128),
        ("experts_per_token", "num_experts_per_tok", 8),
        ("normalize_expert_weights", "norm_topk_prob", False),
    ),
    activation="hidden_act",
    table=ENDS + ATTENTION + QK_NORM + EXPERTS + FUSED_EXPERTS,
    rope_base=10000.0,
    renamed={"num_local_experts": "num_experts"},
    inert=(*WINDOW, "intermediate_size"),
    neutral=EVERY_LAYER | {"use_sliding_window": False, "attention_bias": False},
)
