"""GPT-NeoX (Pythia) and StarCoder2: LayerNorm, biases, a plain MLP and rotary positions."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jaxgpt.convert import table
from jaxgpt.convert.family import changed
from jaxgpt.convert.llama import (
    ATTENTION,
    ENDS,
    KV_HEADS,
    LAYER,
    OTHER_BIAS,
    QKV_BIAS,
    SETTINGS,
    UNBIASED,
)
from jaxgpt.convert.rope import refuse

FIXED = {"norm": "layernorm", "mlp": "plain", "position": "rope", "bias": "all"}
BLOCK = table.rows("""
    attention_norm/scale   input_layernorm.weight           dim
    attention_norm/bias    input_layernorm.bias             dim
    mlp_norm/scale         post_attention_layernorm.weight  dim
    mlp_norm/bias          post_attention_layernorm.bias    dim
    attention/{query,key,value}/kernel  attention.query_key_value.weight  \
        (heads part width) dim -> part dim (heads width)
    attention/{query,key,value}/bias  attention.query_key_value.bias  \
        (heads part width) -> part (heads width)
    attention/output/kernel  attention.dense.weight  dim (heads width) -> (heads width) dim
    attention/output/bias  attention.dense.bias             dim
    mlp/up/kernel          mlp.dense_h_to_4h.weight         mlp dim -> dim mlp
    mlp/up/bias            mlp.dense_h_to_4h.bias           mlp
    mlp/down/kernel        mlp.dense_4h_to_h.weight         dim mlp -> mlp dim
    mlp/down/bias          mlp.dense_4h_to_h.bias           dim
""", "gpt_neox.layers.{layer}.")  # fmt: skip
# The head has an older name beside today's.
AROUND = table.rows("""
    embed/embedding   gpt_neox.embed_in.weight          vocab dim
    final_norm/scale  gpt_neox.final_layer_norm.weight  dim
    final_norm/bias   gpt_neox.final_layer_norm.bias    dim
    head/kernel       lm_head.weight                    vocab dim -> dim vocab
    head/kernel       gpt_neox.embed_out.weight         vocab dim -> dim vocab
""")


def _whole_heads(theirs: Mapping[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """transformers has no head_dim here, but rotates by it where one is stated."""
    width = ours["model_dim"] // ours["num_heads"]
    if theirs.get("head_dim") not in (None, width):
        refuse("head_dim", theirs["head_dim"], f"must be {width}: hidden_size by heads")
    return {}


NEOX = replace(
    UNBIASED,
    model_type="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    prefix="gpt_neox.",
    fixed=FIXED | {"activation": "gelu"},
    settings=changed(
        SETTINGS,
        norm_eps=("layer_norm_eps", 1e-5),
        num_kv_heads=None,
        head_dim=None,
        parallel_residual=("use_parallel_residual", True),
    ),
    table=AROUND[:1] + BLOCK + AROUND[1:],
    rope_share=0.25,
    renamed={"rotary_pct": "partial_rotary_factor", "rotary_emb_base": "rope_theta"},
    neutral={"attention_bias": True},
    inert=("hidden_dropout", "classifier_dropout", "head_dim"),
    derived=_whole_heads,
    buffers=r"rotary_emb\.inv_freq$|\.attention\.(bias|masked_bias)$",
)

STARCODER2 = replace(
    UNBIASED,
    model_type="starcoder2",
    architecture="Starcoder2ForCausalLM",
    fixed=FIXED | {"activation": "gelu_tanh"},
    settings=changed(
        SETTINGS,
        norm_eps=("norm_epsilon", 1e-5),
        tie_embeddings=("tie_word_embeddings", True),
        num_kv_heads=(KV_HEADS, 2),
        sliding_window=("sliding_window", None),
    ),
    table=ENDS + ATTENTION + QKV_BIAS + OTHER_BIAS[:1] + table.rows("""
        attention_norm/bias  input_layernorm.bias           dim
        mlp_norm/bias        post_attention_layernorm.bias  dim
        mlp/up/kernel        mlp.c_fc.weight                mlp dim -> dim mlp
        mlp/up/bias          mlp.c_fc.bias                  mlp
        mlp/down/kernel      mlp.c_proj.weight              dim mlp -> mlp dim
        mlp/down/bias        mlp.c_proj.bias                dim
    """, LAYER) + (("final_norm/bias", "model.norm.bias", "dim"),),
    neutral={"use_bias": True},
    inert=("residual_dropout", "embedding_dropout"),
)  # fmt: skip
