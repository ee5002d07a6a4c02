"""Llama, SmolLM2 and 3, Mistral, Granite: RMSNorm, rotary positions, grouped queries, SwiGLU."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jaxgpt.convert import table
from jaxgpt.convert.family import MOST_LAYERS, REQUIRED, Family, changed
from jaxgpt.convert.rope import number, refuse

LAYER = "model.layers.{layer}."

# Whatever follows Llama's layout shares these rows.
ENDS = table.rows("""
    embed/embedding   model.embed_tokens.weight  vocab dim
    final_norm/scale  model.norm.weight          dim
    head/kernel       lm_head.weight             vocab dim -> dim vocab
""")
PROJECTIONS = table.rows("""
    attention/query/kernel   self_attn.q_proj.weight  (heads width) dim -> dim (heads width)
    attention/key/kernel     self_attn.k_proj.weight  (kv_heads width) dim -> dim (kv_heads width)
    attention/value/kernel   self_attn.v_proj.weight  (kv_heads width) dim -> dim (kv_heads width)
    attention/output/kernel  self_attn.o_proj.weight  dim (heads width) -> (heads width) dim
""", LAYER)  # fmt: skip
NORMS = table.rows("""
    attention_norm/scale  input_layernorm.weight           dim
    mlp_norm/scale        post_attention_layernorm.weight  dim
""", LAYER)  # fmt: skip
ATTENTION = NORMS + PROJECTIONS
QK_NORM = table.rows("""
    attention/query_norm/scale  self_attn.q_norm.weight  width
    attention/key_norm/scale    self_attn.k_norm.weight  width
""", LAYER)  # fmt: skip
QKV_BIAS = table.rows("""
    attention/query/bias  self_attn.q_proj.bias  (heads width)
    attention/key/bias    self_attn.k_proj.bias  (kv_heads width)
    attention/value/bias  self_attn.v_proj.bias  (kv_heads width)
""", LAYER)  # fmt: skip
GATED_MLP = table.rows("""
    mlp/gate/kernel  mlp.gate_proj.weight  mlp dim -> dim mlp
    mlp/up/kernel    mlp.up_proj.weight    mlp dim -> dim mlp
    mlp/down/kernel  mlp.down_proj.weight  dim mlp -> mlp dim
""", LAYER)  # fmt: skip
OTHER_BIAS = table.rows("""
    attention/output/bias  self_attn.o_proj.bias  dim
    mlp/gate/bias          mlp.gate_proj.bias     mlp
    mlp/up/bias            mlp.up_proj.bias       mlp
    mlp/down/bias          mlp.down_proj.bias     dim
""", LAYER)  # fmt: skip

FIXED = {"norm": "rmsnorm", "mlp": "gated", "position": "rope", "activation": "silu"}
KV_HEADS = "num_key_value_heads"
SETTINGS = (
    ("vocab_size", "vocab_size", REQUIRED),
    ("context_length", "max_position_embeddings", REQUIRED),
    ("num_layers", "num_hidden_layers", REQUIRED),
    ("model_dim", "hidden_size", REQUIRED),
    ("num_heads", "num_attention_heads", REQUIRED),
    ("norm_eps", "rms_norm_eps", 1e-6),
    ("tie_embeddings", "tie_word_embeddings", False),
    ("num_kv_heads", KV_HEADS, None),
    ("head_dim", "head_dim", None),
    ("mlp_dim", "intermediate_size", REQUIRED),
)

LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    prefix="model.",
    fixed=FIXED,
    settings=SETTINGS,
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
# Whatever has Llama's settings and no such biases.
UNBIASED = replace(LLAMA, table=ENDS + ATTENTION + GATED_MLP, biases={})

# Llama with four multipliers.
GRANITE = replace(
    LLAMA,
    model_type="granite",
    architecture="GraniteForCausalLM",
    settings=changed(
        SETTINGS,
        head_dim=None,
        embedding_scale=("embedding_multiplier", 1.0),
        residual_scale=("residual_multiplier", 1.0),
        attention_scale=("attention_multiplier", 1.0),
        logit_divisor=("logits_scaling", 1.0),
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


SMOLLM3 = replace(
    LLAMA,
    model_type="smollm3",
    architecture="SmolLM3ForCausalLM",
    settings=changed(
        SETTINGS,
        tie_embeddings=("tie_word_embeddings", True),
        num_kv_heads=(KV_HEADS, 4),
        rope_skip=("no_rope_layer_interval", 4),
    ),
    rope_base=2e6,
    neutral={"use_sliding_window": False},
    inert=("sliding_window", "max_window_layers", "no_rope_layers"),
    derived=_smollm3,
)


def every(key: str, theirs: Mapping[str, Any], usual: int) -> str:
    """A period of layers of which the last sees all tokens, as long as config.json says."""
    length = theirs.get(key)
    length = usual if length is None else length
    if type(length) is not int or not 0 < length <= MOST_LAYERS:
        refuse(key, length, "must be a positive whole number")
    return "L" * (length - 1) + "G"


# Without a window it is written as Llama, which computes the same.
MISTRAL = replace(
    UNBIASED,
    model_type="mistral",
    architecture="MistralForCausalLM",
    settings=changed(SETTINGS, num_kv_heads=(KV_HEADS, 8), sliding_window=("sliding_window", 4096)),
)
# Ministral 8B: Mistral with windows by layer.
MINISTRAL = replace(
    MISTRAL,
    model_type="ministral",
    architecture="MinistralForCausalLM",
    layers=lambda theirs, count: "G" if theirs.get("sliding_window", 4096) is None else "L",
)


def _growing(theirs: Mapping[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """Queries that grow with their position."""
    rope = theirs.get("rope_scaling") or theirs.get("rope_parameters") or {}
    growth, scaling = rope.get("llama_4_scaling_beta"), ours["rope_scaling"]
    if scaling is None or scaling.kind != "yarn" or growth is None:
        refuse("rope_parameters", rope, "must be of type yarn, with llama_4_scaling_beta")
    growth = 0.0 if growth == 0 else number("rope_parameters.llama_4_scaling_beta", growth)
    return {"rope_scaling": replace(scaling, query_growth=growth)}


# The language model of Ministral 3.
MINISTRAL3 = replace(
    MISTRAL,
    model_type="ministral3",
    architecture="Ministral3ForCausalLM",
    settings=changed(
        MISTRAL.settings,
        norm_eps=("rms_norm_eps", 1e-5),
        head_dim=("head_dim", 128),
        sliding_window=("sliding_window", None),
    ),
    defaults={
        "rope_parameters": {
            "type": "yarn", "rope_theta": 1e6, "factor": 16.0, "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 16384, "mscale": 1.0, "llama_4_scaling_beta": 0.1,
        }
    },
    derived=_growing,
    stated=lambda cfg, theirs: {
        "rope_parameters": theirs["rope_parameters"]
        | {"llama_4_scaling_beta": cfg.rope_scaling.query_growth if cfg.rope_scaling else None}
    },
)  # fmt: skip

# Rotation of neighbours in place of halves; biases everywhere or nowhere.
ERNIE45 = replace(
    LLAMA,
    model_type="ernie4_5",
    architecture="Ernie4_5ForCausalLM",
    fixed=FIXED | {"rope_pairs": "neighbours"},
    settings=changed(
        SETTINGS,
        norm_eps=("rms_norm_eps", 1e-5),
        tie_embeddings=("tie_word_embeddings", True),
        num_kv_heads=(KV_HEADS, 2),
        head_dim=("head_dim", 128),
    ),
    rope_base=5e5,
    biases={"none": (), "all": ("use_bias",)},
)
SEED_OSS = replace(
    LLAMA,
    model_type="seed_oss",
    architecture="SeedOssForCausalLM",
    settings=changed(SETTINGS, num_kv_heads=(KV_HEADS, 8), head_dim=("head_dim", 128)),
    biases={
        "none": (),
        "qkv": ("attention_bias",),
        "attention": ("attention_bias", "attention_out_bias"),
        "mlp": ("mlp_bias",),
        "all": ("attention_bias", "attention_out_bias", "mlp_bias"),
    },
    defaults={"attention_bias": True},
    inert=("residual_dropout",),
)
