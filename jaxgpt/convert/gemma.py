"""Gemma 1: Llama's tensors, with gated GELU, norms around 1 and embeddings times sqrt(dim)."""

from dataclasses import replace

from jaxgpt.convert.family import changed
from jaxgpt.convert.llama import FIXED, KV_HEADS, SETTINGS, UNBIASED

GEMMA = replace(
    UNBIASED,
    model_type="gemma",
    architecture="GemmaForCausalLM",
    fixed=FIXED | {"activation": "gelu_tanh", "norm_offset": 1.0},
    settings=changed(
        SETTINGS,
        tie_embeddings=("tie_word_embeddings", True),
        num_kv_heads=(KV_HEADS, 16),
        head_dim=("head_dim", 256),
    ),
    neutral={"attention_bias": False, "use_bidirectional_attention": None},
    inert=("hidden_activation",),
    activations={"gelu": "gelu_pytorch_tanh"},  # the first releases said so and meant this
    derived=lambda theirs, ours: {"embedding_scale": float(ours["model_dim"]) ** 0.5},
)
