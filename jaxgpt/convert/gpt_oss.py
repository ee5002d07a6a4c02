"""gpt-oss: attention sinks, windows in every other layer, experts with biases and a cut gate."""

from dataclasses import replace

from jaxgpt.convert import table
from jaxgpt.convert.family import changed
from jaxgpt.convert.llama import (
    ATTENTION,
    ENDS,
    FIXED,
    KV_HEADS,
    LAYER,
    OTHER_BIAS,
    QKV_BIAS,
    SETTINGS,
    UNBIASED,
)

# Gate and up lie in turns, and the experts' kernels as in our model.
EXPERTS = table.rows("""
    attention/sink_bias   self_attn.sinks                heads
    moe/router/kernel     mlp.router.weight              expert dim -> dim expert
    moe/router/bias       mlp.router.bias                expert
    moe/{gate,up}/kernel  mlp.experts.gate_up_proj  \
        expert dim (mlp part) -> part expert dim mlp
    moe/{gate,up}/bias    mlp.experts.gate_up_proj_bias  expert (mlp part) -> part expert mlp
    moe/down/kernel       mlp.experts.down_proj          expert mlp dim
    moe/down/bias         mlp.experts.down_proj_bias     expert dim
""", LAYER)  # fmt: skip

GPT_OSS = replace(
    UNBIASED,
    model_type="gpt_oss",
    architecture="GptOssForCausalLM",
    fixed=FIXED | {"attention_sinks": True, "expert_bias": True},
    settings=changed(
        SETTINGS,
        norm_eps=("rms_norm_eps", 1e-5),
        num_kv_heads=(KV_HEADS, 8),
        head_dim=("head_dim", 64),
        num_experts=("num_local_experts", 128),
        experts_per_token=("num_experts_per_tok", 4),
        sliding_window=("sliding_window", 128),
        gate_limit=("swiglu_limit", 7.0),
    ),
    table=ENDS + ATTENTION + QKV_BIAS + OTHER_BIAS[:1] + EXPERTS,
    rope_base=150_000.0,
    biases={"none": (), "attention": ("attention_bias",)},
    layers=lambda theirs, count: "LG",
    renamed={"num_experts": "num_local_experts"},
    neutral={"swiglu_alpha": 1.702},
    defaults={
        "attention_bias": True,
        "rope_parameters": {
            "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
            "truncate": False, "original_max_position_embeddings": 4096,
        },
    },
    inert=("experts_per_token", "initial_context_length"),  # other names in the released files
)  # fmt: skip
