"""GPT-2: learned positions, LayerNorm, biases everywhere, query, key and value in one matrix."""

from jaxgpt.convert import table
from jaxgpt.convert.family import REQUIRED, Family

# Conv1D keeps its weights as [in, out], like ours.
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
