"""Gemma 1: Llama's tensors, with gated GELU, norms around 1 and embeddings times sqrt(dim)."""

from jaxgpt.convert.family import REQUIRED, Family
from jaxgpt.convert.llama import ATTENTION, ENDS, FIXED, GATED_MLP, SETTINGS

GEMMA = Family(
    model_type="gemma",
    architecture="GemmaForCausalLM",
    prefix="model.",
    fixed=FIXED | {"activation": "gelu_tanh", "norm_offset": 1.0},
    settings=(
        *(setting for setting in SETTINGS if setting[0] != "tie_embeddings"),
        ("tie_embeddings", "tie_word_embeddings", True),
        ("num_kv_heads", "num_key_value_heads", 16),
        ("head_dim", "head_dim", 256),
        ("mlp_dim", "intermediate_size", REQUIRED),
    ),
    activation="hidden_act",
    table=ENDS + ATTENTION + GATED_MLP,
    rope_base=10000.0,
    neutral={"attention_bias": False, "use_bidirectional_attention": None},
    inert=("hidden_activation",),
    activations={"gelu": "gelu_pytorch_tanh"},  # the first releases said so and meant this
    derived=lambda theirs, ours: {"embedding_scale": float(ours["model_dim"]) ** 0.5},
)
