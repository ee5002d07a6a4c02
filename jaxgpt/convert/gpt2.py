"""GPT-2: learned positions, LayerNorm, biases everywhere, query, key and value in one matrix."""

from jaxgpt.convert.family import REQUIRED, Family

QKV = tuple(f"blocks/attention/{name}" for name in ("query", "key", "value"))

# Conv1D keeps its weights as [in, out], like ours.
TABLE = (
    ("embed/embedding", "transformer.wte.weight", "vocab dim"),
    ("positions/embedding", "transformer.wpe.weight", "position dim"),
    ("blocks/attention_norm/scale", "transformer.h.{layer}.ln_1.weight", "dim"),
    ("blocks/attention_norm/bias", "transformer.h.{layer}.ln_1.bias", "dim"),
    (
        tuple(f"{name}/kernel" for name in QKV),
        "transformer.h.{layer}.attn.c_attn.weight",
        "dim (part heads width) -> part dim (heads width)",
    ),
    (
        tuple(f"{name}/bias" for name in QKV),
        "transformer.h.{layer}.attn.c_attn.bias",
        "(part heads width) -> part (heads width)",
    ),
    (
        "blocks/attention/output/kernel",
        "transformer.h.{layer}.attn.c_proj.weight",
        "(heads width) dim",
    ),
    ("blocks/attention/output/bias", "transformer.h.{layer}.attn.c_proj.bias", "dim"),
    ("blocks/mlp_norm/scale", "transformer.h.{layer}.ln_2.weight", "dim"),
    ("blocks/mlp_norm/bias", "transformer.h.{layer}.ln_2.bias", "dim"),
    ("blocks/mlp/up/kernel", "transformer.h.{layer}.mlp.c_fc.weight", "dim mlp"),
    ("blocks/mlp/up/bias", "transformer.h.{layer}.mlp.c_fc.bias", "mlp"),
    ("blocks/mlp/down/kernel", "transformer.h.{layer}.mlp.c_proj.weight", "mlp dim"),
    ("blocks/mlp/down/bias", "transformer.h.{layer}.mlp.c_proj.bias", "dim"),
    ("final_norm/scale", "transformer.ln_f.weight", "dim"),
    ("final_norm/bias", "transformer.ln_f.bias", "dim"),
    ("head/kernel", "lm_head.weight", "vocab dim -> dim vocab"),
)

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
