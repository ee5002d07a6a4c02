"""Tiny random models of every family, made with transformers, for the comparison tests."""

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the reference extra is not installed")
transformers = pytest.importorskip("transformers", reason="the reference extra is not installed")

VOCAB, CONTEXT = 61, 96
# No two axes are of one length, so that a swapped pair cannot pass.
SHAPE: dict[str, Any] = dict(
    vocab_size=VOCAB, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=CONTEXT,
    bos_token_id=None, eos_token_id=None,
)  # fmt: skip
GPT2: dict[str, Any] = dict(
    vocab_size=VOCAB, n_positions=CONTEXT, n_embd=24, n_layer=2, n_head=4, bos_token_id=None,
    eos_token_id=None,
)  # fmt: skip
LLAMA3 = dict(
    rope_type="llama3", rope_theta=1000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=32,
)  # fmt: skip

CONFIGS = {
    "gpt2": lambda t: t.GPT2Config(**GPT2),
    "gpt2-untied-erf": lambda t: t.GPT2Config(
        **GPT2, n_inner=56, activation_function="gelu", tie_word_embeddings=False
    ),
    "llama": lambda t: t.LlamaConfig(**SHAPE, rope_parameters=LLAMA3),
    "llama-tied-biases": lambda t: t.LlamaConfig(
        **SHAPE, head_dim=8, attention_bias=True, mlp_bias=True, tie_word_embeddings=True
    ),
    "mistral": lambda t: t.MistralConfig(**SHAPE, head_dim=8, sliding_window=7),
    "qwen2": lambda t: t.Qwen2Config(**SHAPE),
    "qwen2_moe": lambda t: t.Qwen2MoeConfig(
        **SHAPE, num_experts=5, num_experts_per_tok=2, moe_intermediate_size=20,
        shared_expert_intermediate_size=28
    ),
    "qwen3": lambda t: t.Qwen3Config(**SHAPE, head_dim=8, tie_word_embeddings=True),
    "qwen3_moe": lambda t: t.Qwen3MoeConfig(
        **SHAPE, head_dim=8, num_experts=5, num_experts_per_tok=3, moe_intermediate_size=20
    ),
    "qwen3_moe-normalized": lambda t: t.Qwen3MoeConfig(
        **SHAPE, num_experts=5, num_experts_per_tok=2, moe_intermediate_size=20, norm_topk_prob=True
    ),
    "mixtral": lambda t: t.MixtralConfig(**SHAPE, num_local_experts=5),
}  # fmt: skip

NEOX = {key: value for key, value in SHAPE.items() if key != "num_key_value_heads"}
YARN = dict(rope_type="yarn", rope_theta=1000.0, factor=3.0, original_max_position_embeddings=32)
PLAIN = dict(pad_token_id=None)  # else its embedding is zero
# Three settings each of the families that are Llama or GPT-2 with something else in them.
CONFIGS |= {
    "llama-attention-biases": lambda t: t.LlamaConfig(**SHAPE, attention_bias=True),
    "llama-mlp-biases": lambda t: t.LlamaConfig(**SHAPE, mlp_bias=True),
    "granite": lambda t: t.GraniteConfig(
        **SHAPE, embedding_multiplier=3.0, logits_scaling=2.5, residual_multiplier=0.4,
        attention_multiplier=0.3,
    ),
    "granite-tied": lambda t: t.GraniteConfig(
        **SHAPE, tie_word_embeddings=True, logits_scaling=0.5, attention_bias=True
    ),
    "granite-yarn": lambda t: t.GraniteConfig(
        **SHAPE, residual_multiplier=0.7, rope_parameters=YARN
    ),
    "smollm3": lambda t: t.SmolLM3Config(**SHAPE, **PLAIN, no_rope_layer_interval=2),
    "smollm3-deep": lambda t: t.SmolLM3Config(
        **SHAPE | {"num_hidden_layers": 5}, **PLAIN, tie_word_embeddings=False
    ),
    "smollm3-everywhere": lambda t: t.SmolLM3Config(
        **SHAPE, **PLAIN, no_rope_layers=[1, 1], attention_bias=True
    ),
    "gemma": lambda t: t.GemmaConfig(**SHAPE, **PLAIN, head_dim=8),
    "gemma-wide": lambda t: t.GemmaConfig(
        **SHAPE | {"num_key_value_heads": 1}, **PLAIN, head_dim=10
    ),
    "gemma-untied": lambda t: t.GemmaConfig(
        **SHAPE, **PLAIN, head_dim=6, tie_word_embeddings=False, rope_parameters=YARN
    ),
    "olmo2": lambda t: t.Olmo2Config(**SHAPE, **PLAIN),
    "olmo2-tied": lambda t: t.Olmo2Config(**SHAPE, **PLAIN, tie_word_embeddings=True),
    "olmo2-one": lambda t: t.Olmo2Config(
        **SHAPE | {"num_key_value_heads": 1}, **PLAIN, rope_parameters=LLAMA3
    ),
    "gpt_neox": lambda t: t.GPTNeoXConfig(
        **NEOX | {"hidden_size": 32},
        rope_parameters=dict(rope_type="default", rope_theta=1e3, partial_rotary_factor=0.5),
    ),
    "gpt_neox-serial": lambda t: t.GPTNeoXConfig(
        **NEOX, use_parallel_residual=False,
        rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=1.0),
    ),
    "gpt_neox-quarter": lambda t: t.GPTNeoXConfig(
        **NEOX | {"hidden_size": 64}, tie_word_embeddings=True
    ),
    "starcoder2": lambda t: t.Starcoder2Config(**SHAPE),
    "starcoder2-window": lambda t: t.Starcoder2Config(**SHAPE, sliding_window=7),
    "starcoder2-untied": lambda t: t.Starcoder2Config(
        **SHAPE, tie_word_embeddings=False, hidden_act="gelu"
    ),
}  # fmt: skip


WINDOW = dict(sliding_window=7)  # shorter than the texts
HALF = dict(rope_type="default", rope_theta=1e3, partial_rotary_factor=0.5)
LONG = HALF | dict(rope_type="longrope", short_factor=[1.0, 1.3], long_factor=[1.5, 4.0])
DEEP = SHAPE | {"num_hidden_layers": 5}
PATTERN = ["sliding_attention", "sliding_attention", "full_attention"]
BY_LAYER = {
    "full_attention": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4},
    "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
}  # fmt: skip
# Layers that differ, norms on both sides, projections in one tensor, neighbours that rotate.
NEWEST = {
    "gemma3_text": lambda t: t.Gemma3TextConfig(
        **SHAPE | {"num_hidden_layers": 7}, **PLAIN, **WINDOW, head_dim=8, query_pre_attn_scalar=11
    ),
    "gemma3_text-scaled": lambda t: t.Gemma3TextConfig(
        **DEEP, **PLAIN, **WINDOW, head_dim=8, layer_types=(PATTERN * 2)[:5],
        rope_parameters=BY_LAYER, attention_bias=True,
    ),
    "gemma3_text-untied": lambda t: t.Gemma3TextConfig(
        **SHAPE | {"num_key_value_heads": 1}, **PLAIN, **WINDOW, head_dim=10,
        layer_types=["full_attention", "sliding_attention"], tie_word_embeddings=False,
    ),
    "gemma2": lambda t: t.Gemma2Config(**DEEP, **PLAIN, **WINDOW, head_dim=8),
    "gemma2-capped": lambda t: t.Gemma2Config(
        **SHAPE, **PLAIN, **WINDOW, head_dim=10, query_pre_attn_scalar=3,
        attn_logit_softcapping=2.0, final_logit_softcapping=5.0, attention_bias=True,
    ),
    "gemma2-untied": lambda t: t.Gemma2Config(
        **SHAPE | {"num_key_value_heads": 1}, **PLAIN, **WINDOW, head_dim=8,
        attn_logit_softcapping=None, final_logit_softcapping=None, tie_word_embeddings=False,
        layer_types=PATTERN[1:][::-1],
    ),
    "olmo3": lambda t: t.Olmo3Config(**DEEP, **PLAIN, **WINDOW),
    "olmo3-yarn": lambda t: t.Olmo3Config(
        **SHAPE, **PLAIN, **WINDOW, layer_types=PATTERN[1:], tie_word_embeddings=True,
        rope_parameters={"full_attention": YARN},
    ),
    "olmo3-local": lambda t: t.Olmo3Config(
        **SHAPE, **PLAIN, **WINDOW, layer_types=PATTERN[:2], rope_parameters=BY_LAYER
    ),
    "exaone4": lambda t: t.Exaone4Config(**DEEP, **WINDOW),
    "exaone4-full": lambda t: t.Exaone4Config(
        **SHAPE, sliding_window=None, layer_types=["full_attention"] * 2, rope_parameters=LLAMA3
    ),
    "exaone4-tied": lambda t: t.Exaone4Config(
        **SHAPE, **WINDOW, layer_types=PATTERN[1:], tie_word_embeddings=True
    ),
    "ministral": lambda t: t.MinistralConfig(
        **DEEP, **WINDOW, head_dim=8, layer_types=(PATTERN * 2)[:5]
    ),
    "ministral-wide": lambda t: t.MinistralConfig(
        **SHAPE, **WINDOW, head_dim=10, layer_types=["full_attention", "sliding_attention"],
        rope_parameters=YARN,
    ),
    "ministral-tied": lambda t: t.MinistralConfig(
        **DEEP, **WINDOW, head_dim=6, layer_types=PATTERN[1:] * 2 + PATTERN[:1],
        tie_word_embeddings=True,
    ),
    "ministral3": lambda t: t.Ministral3Config(
        **SHAPE, **PLAIN, head_dim=8, rope_parameters=YARN | {"llama_4_scaling_beta": 0.4}
    ),
    "ministral3-window": lambda t: t.Ministral3Config(
        **SHAPE, **PLAIN, **WINDOW, head_dim=8,
        rope_parameters=YARN | {"llama_4_scaling_beta": 0.1, "mscale": 1.0, "mscale_all_dim": 1.0},
    ),
    "ministral3-tied": lambda t: t.Ministral3Config(
        **SHAPE, **PLAIN, head_dim=6, tie_word_embeddings=True,
        rope_parameters=YARN | {"llama_4_scaling_beta": 0.3, "factor": 2.0},
    ),
    "qwen2-windows": lambda t: t.Qwen2Config(
        **DEEP, **WINDOW, use_sliding_window=True, max_window_layers=2
    ),
    "qwen3-windows": lambda t: t.Qwen3Config(
        **DEEP, **WINDOW, use_sliding_window=True, head_dim=8, layer_types=(PATTERN * 2)[:5]
    ),
    "phi3": lambda t: t.Phi3Config(
        **SHAPE | {"hidden_size": 32}, **PLAIN, **WINDOW, rope_parameters=HALF
    ),
    "phi3-long": lambda t: t.Phi3Config(
        **SHAPE | {"hidden_size": 32}, **PLAIN, tie_word_embeddings=True,
        original_max_position_embeddings=32, rope_parameters=LONG,
    ),
    "phi3-whole": lambda t: t.Phi3Config(**SHAPE, **PLAIN),
    "glm": lambda t: t.GlmConfig(**SHAPE, **PLAIN, head_dim=8),
    "glm-tied": lambda t: t.GlmConfig(
        **SHAPE, **PLAIN, head_dim=8, attention_bias=False, tie_word_embeddings=True
    ),
    "glm-whole": lambda t: t.GlmConfig(
        **SHAPE, **PLAIN, head_dim=6, rope_parameters=YARN | {"partial_rotary_factor": 1.0}
    ),
    "glm4": lambda t: t.Glm4Config(**SHAPE, **PLAIN, head_dim=8),
    "glm4-tied": lambda t: t.Glm4Config(
        **SHAPE, **PLAIN, head_dim=12, attention_bias=False, tie_word_embeddings=True
    ),
    "glm4-whole": lambda t: t.Glm4Config(
        **SHAPE, **PLAIN, head_dim=6, rope_parameters=HALF | {"partial_rotary_factor": 1.0}
    ),
    "ernie4_5": lambda t: t.Ernie4_5Config(**SHAPE, **PLAIN, head_dim=8),
    "ernie4_5-biases": lambda t: t.Ernie4_5Config(
        **SHAPE, **PLAIN, head_dim=6, use_bias=True, tie_word_embeddings=False
    ),
    "ernie4_5-one": lambda t: t.Ernie4_5Config(
        **SHAPE | {"num_key_value_heads": 1}, **PLAIN, head_dim=10, rope_parameters=LLAMA3
    ),
    "seed_oss": lambda t: t.SeedOssConfig(**SHAPE, **PLAIN, head_dim=8),
    "seed_oss-biases": lambda t: t.SeedOssConfig(
        **SHAPE, **PLAIN, head_dim=6, attention_out_bias=True, mlp_bias=True
    ),
    "seed_oss-tied": lambda t: t.SeedOssConfig(
        **SHAPE, **PLAIN, head_dim=8, attention_bias=False, tie_word_embeddings=True,
        rope_parameters=YARN,
    ),
}  # fmt: skip
# Mixtures with more to them: sinks, biases, a cut gate; latent attention, routers in groups.
EXPERTS = dict(num_local_experts=5, num_experts_per_tok=2)
NEWEST |= {
    "gpt_oss": lambda t: t.GptOssConfig(
        **DEEP, **PLAIN, **WINDOW, **EXPERTS, head_dim=8, rope_parameters=YARN | {"truncate": False}
    ),
    "gpt_oss-limit": lambda t: t.GptOssConfig(
        **SHAPE, **PLAIN, **WINDOW, **EXPERTS, head_dim=6, swiglu_limit=0.4, attention_bias=False,
        tie_word_embeddings=True, rope_parameters=YARN,
    ),
    "gpt_oss-one": lambda t: t.GptOssConfig(
        **DEEP | {"num_key_value_heads": 1}, **PLAIN, **WINDOW, num_local_experts=4, head_dim=10,
        num_experts_per_tok=1, layer_types=(PATTERN * 2)[:5], rope_parameters=LLAMA3,
    ),
}  # fmt: skip
LATENT = SHAPE | dict(
    num_key_value_heads=4, kv_lora_rank=14, q_lora_rank=18, qk_rope_head_dim=6, qk_nope_head_dim=10,
    v_head_dim=8, n_routed_experts=6, num_experts_per_tok=2, moe_intermediate_size=20,
    num_hidden_layers=3,
)  # fmt: skip
NEWEST |= {
    "deepseek_v3": lambda t: t.DeepseekV3Config(
        **LATENT, **PLAIN, n_group=3, topk_group=2, first_k_dense_replace=1, num_mtp_layers=0,
    ),
    "deepseek_v3-halves": lambda t: t.DeepseekV3Config(
        **LATENT | {"q_lora_rank": None, "v_head_dim": 20}, **PLAIN, n_group=1, topk_group=1,
        first_k_dense_replace=0, rope_interleave=False, norm_topk_prob=False, n_shared_experts=2,
        num_mtp_layers=0, rope_parameters=YARN | {"mscale": 1.0, "mscale_all_dim": 0.7},
    ),
    "deepseek_v3-tied": lambda t: t.DeepseekV3Config(
        **LATENT, **PLAIN, n_group=2, topk_group=1, first_k_dense_replace=2, num_mtp_layers=0,
        tie_word_embeddings=True, rope_parameters=YARN,
    ),
    "deepseek_v2": lambda t: t.DeepseekV2Config(
        **LATENT | {"q_lora_rank": None}, **PLAIN, first_k_dense_replace=1,
        rope_parameters=YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
    ),
    "deepseek_v2-groups": lambda t: t.DeepseekV2Config(
        **LATENT, **PLAIN, topk_method="group_limited_greedy", n_group=3, topk_group=2,
        routed_scaling_factor=1.7,
    ),
    "deepseek_v2-tied": lambda t: t.DeepseekV2Config(
        **LATENT | {"qk_rope_head_dim": 4}, **PLAIN, first_k_dense_replace=2, n_shared_experts=1,
        tie_word_embeddings=True,
    ),
    "glm4_moe_lite": lambda t: t.Glm4MoeLiteConfig(**LATENT, **PLAIN),
    "glm4_moe_lite-scaled": lambda t: t.Glm4MoeLiteConfig(
        **LATENT | {"v_head_dim": 16}, **PLAIN, mlp_layer_types=["sparse"] * 3, n_group=3,
        topk_group=1, rope_parameters=YARN, norm_topk_prob=False,
    ),
    "glm4_moe_lite-tied": lambda t: t.Glm4MoeLiteConfig(
        **LATENT, **PLAIN, mlp_layer_types=["dense", "dense", "sparse"], tie_word_embeddings=True
    ),
}  # fmt: skip
OPT = {key: NEOX[key] for key in NEOX if key != "intermediate_size"} | dict(
    ffn_dim=40, num_hidden_layers=3
)
NEWEST |= {
    "opt": lambda t: t.OPTConfig(**OPT, **PLAIN),
    "opt-untied": lambda t: t.OPTConfig(
        **OPT | {"num_attention_heads": 3}, **PLAIN, tie_word_embeddings=False
    ),
    "opt-gelu": lambda t: t.OPTConfig(
        **OPT | {"num_attention_heads": 2}, **PLAIN, activation_function="gelu"
    ),
}  # fmt: skip
CONFIGS |= NEWEST


def build(name: str) -> Any:
    """The model with every parameter random: fresh norms and biases would hide mistakes."""
    model = transformers.AutoModelForCausalLM.from_config(
        CONFIGS[name](transformers), attn_implementation="eager"
    )
    return randomize(model).eval()


def randomize(model: Any) -> Any:
    """The model with other numbers: fresh ones are alike, or zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in tensors(model):
            noise = 0.2 * torch.randn(parameter.shape, generator=generator)
            around_one = ("norm" in key or "ln_" in key) and key.endswith("weight")
            added = "gemma" in model.config.model_type  # whose norms add it
            around_one = around_one and not added
            parameter.copy_(noise + around_one)
    return model


def tensors(model: Any) -> list[tuple[str, Any]]:
    """Parameters, and what corrects a router's choice, which no gradient moves."""
    buffers = ((k, b) for k, b in model.named_buffers() if k.endswith("correction_bias"))
    return [*model.named_parameters(), *buffers]


def open_hf(path: Any) -> Any:
    """What transformers makes of a directory."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        path, attn_implementation="eager"
    ).eval()


def logits(model: Any, tokens_BT: np.ndarray) -> np.ndarray:
    """float32 scores of a transformers model."""
    with torch.no_grad():
        return model(torch.as_tensor(tokens_BT)).logits.float().numpy()


def tokens(rows: int = 2, length: int = CONTEXT) -> np.ndarray:
    return np.random.default_rng(1).integers(0, VOCAB, (rows, length))
