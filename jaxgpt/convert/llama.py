"""Llama, SmolLM2 and Mistral: RMSNorm, rotary positions, grouped queries, SwiGLU."""

from jaxgpt.convert.family import REQUIRED, Family

LAYER = "model.layers.{layer}."

# Whatever follows Llama's layout shares these rows.
ENDS = (
    ("embed/embedding", "model.embed_tokens.weight", "vocab dim"),
    ("final_norm/scale", "model.norm.weight", "dim"),
    ("head/kernel", "lm_head.weight", "vocab dim -> dim vocab"),
)
ATTENTION = (
    ("blocks/attention_norm/scale", LAYER + "input_layernorm.weight", "dim"),
    (
        "blocks/attention/query/kernel",
        LAYER + "self_attn.q_proj.weight",
        "(heads width) dim -> dim (heads width)",
    ),
    (
        "blocks/attention/key/kernel",
        LAYER + "self_attn.k_proj.weight",
        "(kv_heads width) dim -> dim (kv_heads width)",
    ),
    (
        "blocks/attention/value/kernel",
        LAYER + "self_attn.v_proj.weight",
        "(kv_heads width) dim -> dim (kv_heads width)",
    ),
    (
        "blocks/attention/output/kernel",
        LAYER + "self_attn.o_proj.weight",
        "dim (heads width) -> (heads width) dim",
    ),
    ("blocks/mlp_norm/scale", LAYER + "post_attention_layernorm.weight", "dim"),
)
QKV_BIAS = (
    ("blocks/attention/query/bias", LAYER + "self_attn.q_proj.bias", "(heads width)"),
    ("blocks/attention/key/bias", LAYER + "self_attn.k_proj.bias", "(kv_heads width)"),
    ("blocks/attention/value/bias", LAYER + "self_attn.v_proj.bias", "(kv_heads width)"),
)
GATED_MLP = (
    ("blocks/mlp/gate/kernel", LAYER + "mlp.gate_proj.weight", "mlp dim -> dim mlp"),
    ("blocks/mlp/up/kernel", LAYER + "mlp.up_proj.weight", "mlp dim -> dim mlp"),
    ("blocks/mlp/down/kernel", LAYER + "mlp.down_proj.weight", "dim mlp -> mlp dim"),
)
OTHER_BIAS = (
    ("blocks/attention/output/bias", LAYER + "self_attn.o_proj.bias", "dim"),
    ("blocks/mlp/gate/bias", LAYER + "mlp.gate_proj.bias", "mlp"),
    ("blocks/mlp/up/bias", LAYER + "mlp.up_proj.bias", "mlp"),
    ("blocks/mlp/down/bias", LAYER + "mlp.down_proj.bias", "dim"),
)

FIXED = {"norm": "rmsnorm", "mlp": "gated", "position": "rope", "activation": "silu"}
SETTINGS = (
    ("vocab_size", "vocab_size", REQUIRED),
    ("context_length", "max_position_embeddings", REQUIRED),
    ("num_layers", "num_hidden_layers", REQUIRED),
    ("model_dim", "hidden_size", REQUIRED),
    ("num_heads", "num_attention_heads", REQUIRED),
    ("norm_eps", "rms_norm_eps", 1e-6),
    ("tie_embeddings", "tie_word_embeddings", False),
)

LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    prefix="model.",
    fixed=FIXED,
    settings=(
        *SETTINGS,
        ("num_kv_heads", "num_key_value_heads", None),
        ("head_dim", "head_dim", None),
        ("mlp_dim", "intermediate_size", REQUIRED),
    ),
    activation="hidden_act",
    table=ENDS + ATTENTION + QKV_BIAS + GATED_MLP + OTHER_BIAS,
    rope_base=10000.0,
    biases={"none": (), "all": ("attention_bias", "mlp_bias")},
)

# Without a window it is written as Llama, which computes the same.
MISTRAL = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    prefix="model.",
    fixed=FIXED,
    settings=(
        *SETTINGS,
        ("num_kv_heads", "num_key_value_heads", 8),
        ("head_dim", "head_dim", None),
        ("mlp_dim", "intermediate_size", REQUIRED),
        ("sliding_window", "sliding_window", 4096),
    ),
    activation="hidden_act",
    table=ENDS + ATTENTION + GATED_MLP,
    rope_base=10000.0,
)
