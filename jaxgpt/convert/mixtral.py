"""Mixtral: Llama with a mixture of experts whose chosen gates sum to one."""

from jaxgpt.convert.family import REQUIRED, Family
from jaxgpt.convert.llama import ATTENTION, ENDS, FIXED, LAYER, SETTINGS
from jaxgpt.convert.qwen3 import FUSED_EXPERTS

EXPERT = LAYER + "block_sparse_moe.experts.{expert}."
EXPERTS = (
    (
        "blocks/moe/router/kernel",
        LAYER + "block_sparse_moe.gate.weight",
        "expert dim -> dim expert",
    ),
    ("blocks/moe/router/kernel", LAYER + "mlp.gate.weight", "expert dim -> dim expert"),
    ("blocks/moe/gate/kernel", EXPERT + "w1.weight", "mlp dim -> dim mlp"),
    ("blocks/moe/up/kernel", EXPERT + "w3.weight", "mlp dim -> dim mlp"),
    ("blocks/moe/down/kernel", EXPERT + "w2.weight", "dim mlp -> mlp dim"),
)

MIXTRAL = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    prefix="model.",
    fixed=FIXED,
    settings=(
        *(setting for setting in SETTINGS if setting[0] != "norm_eps"),
        ("norm_eps", "rms_norm_eps", 1e-5),
        ("num_kv_heads", "num_key_value_heads", 8),
        ("head_dim", "head_dim", None),
        ("mlp_dim", "intermediate_size", REQUIRED),
        ("num_experts", "num_local_experts", 8),
        ("experts_per_token", "num_experts_per_tok", 2),
        ("sliding_window", "sliding_window", None),
    ),
    activation="hidden_act",
    table=ENDS + ATTENTION + EXPERTS + FUSED_EXPERTS,
    rope_base=1e6,
    renamed={"num_experts": "num_local_experts"},
)
