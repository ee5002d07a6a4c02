"""GPT-2 and OPT: learned positions, LayerNorm, biases everywhere."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jaxgpt.convert import table
from jaxgpt.convert.family import REQUIRED, Family
from jaxgpt.convert.rope import refuse

# Query, key and value are one matrix. Conv1D keeps its weights as [in, out], like ours.
BLOCK = table.rows("""
    attention_norm/scale              ln_1.weight         dim
    attention_norm/bias               ln_1.bias           dim
    attention/{query,key,value}/kernel  attn.c_attn.weight  \
        dim (part heads width) -> part dim (heads width)
    attention/{query,key,value}/bias  attn.c_attn.bias    (part heads width) -> part (heads width)
    attention/output/kernel           attn.c_proj.weight  (heads width) dim
    attention/output/bias             attn.c_proj.bias    dim
    mlp_norm/scale                    ln_2.weight         dim
    mlp_norm/bias                     ln_2.bias           dim
    mlp/up/kernel                     mlp.c_fc.weight     dim mlp
    mlp/up/bias                       mlp.c_fc.bias       mlp
    mlp/down/kernel                   mlp.c_proj.weight   mlp dim
    mlp/down/bias                     mlp.c_proj.bias     dim
""", "transformer.h.{layer}.")  # fmt: skip
TABLE = table.rows("""
    embed/embedding      transformer.wte.weight  vocab dim
    positions/embedding  transformer.wpe.weight  position dim
""") + BLOCK + table.rows("""
    final_norm/scale  transformer.ln_f.weight  dim
    final_norm/bias   transformer.ln_f.bias    dim
    head/kernel       lm_head.weight           vocab dim -> dim vocab
""")  # fmt: skip

GPT2 = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    prefix="transformer.",
    fixed={
        "norm": "layernorm", "mlp": "plain", "position": "learned", "bias": "all",
        "activation": "gelu_tanh",
    },
    settings=(
        ("vocab_size", "vocab_size", REQUIRED),
        ("context_length", "n_positions", REQUIRED),
        ("num_layers", "n_layer", REQUIRED),
        ("model_dim", "n_embd", REQUIRED),
        ("num_heads", "n_head", REQUIRED),
        ("mlp_dim", "n_inner", None),
        ("norm_eps", "layer_norm_epsilon", 1e-5),
        ("tie_embeddings", "tie_word_embeddings", True),
    ),
    activation="activation_function",
    written={"gelu_tanh": "gelu_new"},
    table=TABLE,
    renamed={
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    },
    neutral={
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
    },
    buffers=r"\.attn\.(bias|masked_bias)$",  # the causal mask of old checkpoints
)  # fmt: skip

OPT_BLOCK = table.rows("""
    attention_norm/scale     self_attn_layer_norm.weight  dim
    attention_norm/bias      self_attn_layer_norm.bias    dim
    attention/query/kernel   self_attn.q_proj.weight    (heads width) dim -> dim (heads width)
    attention/query/bias     self_attn.q_proj.bias      (heads width)
    attention/key/kernel     self_attn.k_proj.weight    (heads width) dim -> dim (heads width)
    attention/key/bias       self_attn.k_proj.bias      (heads width)
    attention/value/kernel   self_attn.v_proj.weight    (heads width) dim -> dim (heads width)
    attention/value/bias     self_attn.v_proj.bias      (heads width)
    attention/output/kernel  self_attn.out_proj.weight  dim (heads width) -> (heads width) dim
    attention/output/bias    self_attn.out_proj.bias    dim
    mlp_norm/scale           final_layer_norm.weight    dim
    mlp_norm/bias            final_layer_norm.bias      dim
    mlp/up/kernel            fc1.weight                 mlp dim -> dim mlp
    mlp/up/bias              fc1.bias                   mlp
    mlp/down/kernel          fc2.weight                 dim mlp -> mlp dim
    mlp/down/bias            fc2.bias                   dim
""", "model.decoder.layers.{layer}.")  # fmt: skip
OPT_ENDS = table.rows("""
    embed/embedding      model.decoder.embed_tokens.weight      vocab dim
    positions/embedding  model.decoder.embed_positions.weight   position dim
    final_norm/scale     model.decoder.final_layer_norm.weight  dim
    final_norm/bias      model.decoder.final_layer_norm.bias    dim
""")


def _one_width(theirs: Mapping[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    width = theirs.get("word_embed_proj_dim")
    if width not in (None, ours["model_dim"]):
        refuse("word_embed_proj_dim", width, f"must be hidden_size={ours['model_dim']}")
    return {}


OPT = replace(
    GPT2,
    model_type="opt",
    architecture="OPTForCausalLM",
    prefix="model.",
    fixed=GPT2.fixed | {"activation": "relu", "position_offset": 2, "norm_eps": 1e-5},
    settings=(
        ("vocab_size", "vocab_size", REQUIRED),
        ("context_length", "max_position_embeddings", 2048),
        ("num_layers", "num_hidden_layers", REQUIRED),
        ("model_dim", "hidden_size", REQUIRED),
        ("num_heads", "num_attention_heads", REQUIRED),
        ("mlp_dim", "ffn_dim", 3072),
        ("tie_embeddings", "tie_word_embeddings", True),
    ),
    written={},
    table=OPT_ENDS + OPT_BLOCK + TABLE[-1:],
    renamed={},
    neutral={
        "do_layer_norm_before": True, "_remove_final_layer_norm": False, "enable_bias": True,
        "layer_norm_elementwise_affine": True,
    },
    inert=("dropout", "layerdrop", "init_std", "word_embed_proj_dim"),
    derived=_one_width,
    buffers="^$",
)  # fmt: skip
