"""OLMo 2: norms after attention and MLP, and over all heads of queries and keys together."""

from dataclasses import replace

from jaxgpt.convert import table
from jaxgpt.convert.family import changed
from jaxgpt.convert.llama import ATTENTION, ENDS, FIXED, GATED_MLP, LAYER, SETTINGS, UNBIASED

NORMS = table.rows("""
    attention_norm/scale        post_attention_layernorm.weight    dim
    mlp_norm/scale              post_feedforward_layernorm.weight  dim
    attention/query_norm/scale  self_attn.q_norm.weight            (heads width)
    attention/key_norm/scale    self_attn.k_norm.weight            (kv_heads width)
""", LAYER)  # fmt: skip

OLMO2 = replace(
    UNBIASED,
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    fixed=FIXED | {"norm_place": "after", "qk_norm": True, "qk_norm_over": "width"},
    settings=changed(SETTINGS, norm_eps=("rms_norm_eps", 1e-5)),
    table=ENDS + tuple(row for row in ATTENTION if "norm" not in row[0]) + GATED_MLP + NORMS,
    neutral={"attention_bias": False},
)
