"""Mixtral: Llama with a mixture of experts whose chosen gates sum to one."""

from dataclasses import replace

from jaxgpt.convert import table
from jaxgpt.convert.family import changed
from jaxgpt.convert.llama import ATTENTION, ENDS, KV_HEADS, LAYER, SETTINGS, UNBIASED
from jaxgpt.convert.qwen3 import FUSED_EXPERTS

EXPERTS = table.rows("""
    moe/router/kernel  block_sparse_moe.gate.weight                 expert dim -> dim expert
    moe/router/kernel  mlp.gate.weight                              expert dim -> dim expert
    moe/gate/kernel    block_sparse_moe.experts.{expert}.w1.weight  mlp dim -> dim mlp
    moe/up/kernel      block_sparse_moe.experts.{expert}.w3.weight  mlp dim -> dim mlp
    moe/down/kernel    block_sparse_moe.experts.{expert}.w2.weight  dim mlp -> mlp dim
""", LAYER)  # fmt: skip

MIXTRAL = replace(
    UNBIASED,
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    settings=changed(
        SETTINGS,
        norm_eps=("rms_norm_eps", 1e-5),
        num_kv_heads=(KV_HEADS, 8),
        num_experts=("num_local_experts", 8),
        experts_per_token=("num_experts_per_tok", 2),
        sliding_window=("sliding_window", None),
    ),
    table=ENDS + ATTENTION + EXPERTS + FUSED_EXPERTS,
    rope_base=1e6,
    renamed={"num_experts": "num_local_experts"},
)
