"""OLMo 2: norms after attention and MLP, and over all heads of queries and keys together."""

from jaxgpt.convert.family import REQUIRED, Family
from jaxgpt.convert.llama import ATTENTION, ENDS, FIXED, GATED_MLP, LAYER, SETTINGS

NORMS = (
    ("blocks/attention_norm/scale", LAYER + "post_attention_layernorm.weight", "dim"),
    ("blocks/mlp_norm/scale", LAYER + "post_feedforward_layernorm.weight", "dim"),
    ("blocks/attention/query_norm/scale", LAYER + "self_attn.q_norm.weight", "(heads width)"),
    ("blocks/attention/key_norm/scale", LAYER + "self_attn.k_norm.weight", "(kv_heads width)"),
)

OLMO2 = Family(
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    prefix="model.",
    fixed=FIXED | {"norm_place": "after", "qk_norm": True, "qk_norm_over": "width"},
    settings=(
        *(setting for setting in SETTINGS if setting[0] != "norm_eps"),
        ("norm_eps", "rms_norm_eps", 1e-5),
        ("num_kv_heads", "num_key_value_heads", None),
        ("head_dim", "head_dim", None),
        ("mlp_dim", "intermediate_size", REQUIRED),
    ),
    activation="hidden_act",
    table=ENDS + tuple(row for row in ATTENTION if "norm" not in row[0]) + GATED_MLP + NORMS,
    rope_base=10000.0,
    neutral={"attention_bias": False},
)
