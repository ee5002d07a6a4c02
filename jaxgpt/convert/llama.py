"""Llama, SmolLM2 and 3, Mistral, Granite: RMSNorm, rotary positions, grouped queries, SwiGLU."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxgpt.convert.family import REQUIRED, Family
from jaxgpt.convert.rope import refuse

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
    biases={
        "none": (),
        "attention": ("attention_bias",),
        "mlp": ("mlp_bias",),
        "all": ("attention_bias", "mlp_bias"),
    },
)

# Llama with four multipliers.
GRANITE = dataclasses.replace(
    LLAMA,
    model_type="granite",
    architecture="GraniteForCausalLM",
    settings=(
        *(setting for setting in LLAMA.settings if setting[0] != "head_dim"),
        ("embedding_scale", "embedding_multiplier", 1.0),
        ("residual_scale", "residual_multiplier", 1.0),
        ("attention_scale", "attention_multiplier", 1.0),
        ("logit_divisor", "logits_scaling", 1.0),
    ),
)


def _smollm3(theirs: Mapping[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """no_rope_layers has a 0 for every layer without positions; transformers reads it first."""
    listed, layers = theirs.get("no_rope_layers"), range(1, ours["num_layers"] + 1)
    every = lambda skip: [int(layer % skip != 0) for layer in layers]
    if listed is None or listed == every(ours["rope_skip"]):
        return {}
    if listed == [1] * len(layers):
        return {"rope_skip": 0}
    refuse("no_rope_layers", listed, "must leave out every n-th layer, by no_rope_layer_interval")


SMOLLM3 = dataclasses.replace(
    LLAMA,
    model_type="smollm3",
    architecture="SmolLM3ForCausalLM",
    settings=(
        *(setting for setting in SETTINGS if setting[0] != "tie_embeddings"),
        ("tie_embeddings", "tie_word_embeddings", True),
        ("num_kv_heads", "num_key_value_heads", 4),
        ("head_dim", "head_dim", None),
        ("mlp_dim", "intermediate_size", REQUIRED),
        ("rope_skip", "no_rope_layer_interval", 4),
    ),
    rope_base=2e6,
    neutral={"use_sliding_window": False},
    inert=("sliding_window", "max_window_layers", "no_rope_layers"),
    derived=_smollm3,
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
