"""GPT-NeoX (Pythia) and StarCoder2: LayerNorm, biases, a plain MLP and rotary positions."""

from jaxgpt.convert.family import REQUIRED, Family
from jaxgpt.convert.gpt2 import QKV
from jaxgpt.convert.llama import ATTENTION, ENDS, LAYER, OTHER_BIAS, QKV_BIAS, SETTINGS

FIXED = {"norm": "layernorm", "mlp": "plain", "position": "rope", "bias": "all"}
NEOX_LAYER = "gpt_neox.layers.{layer}."
NORMS = (
    ("blocks/attention_norm", "input_layernorm"),
    ("blocks/mlp_norm", "post_attention_layernorm"),
)
BIASED_NORMS = tuple((f"{ours}/bias", LAYER + f"{theirs}.bias", "dim") for ours, theirs in NORMS)

NEOX = Family(
    model_type="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    prefix="gpt_neox.",
    fixed=FIXED | {"activation": "gelu"},
    settings=(
        *(setting for setting in SETTINGS if setting[0] != "norm_eps"),
        ("norm_eps", "layer_norm_eps", 1e-5),
        ("mlp_dim", "intermediate_size", REQUIRED),
        ("parallel_residual", "use_parallel_residual", True),
    ),
    activation="hidden_act",
    table=(
        ("embed/embedding", "gpt_neox.embed_in.weight", "vocab dim"),
        *((f"{ours}/{leaf}", f"{NEOX_LAYER}{theirs}.{name}", "dim")
          for ours, theirs in NORMS for leaf, name in (("scale", "weight"), ("bias", "bias"))),
        (
            tuple(f"{name}/kernel" for name in QKV),
            NEOX_LAYER + "attention.query_key_value.weight",
            "(heads part width) dim -> part dim (heads width)",
        ),
        (
            tuple(f"{name}/bias" for name in QKV),
            NEOX_LAYER + "attention.query_key_value.bias",
            "(heads part width) -> part (heads width)",
        ),
        (
            "blocks/attention/output/kernel",
            NEOX_LAYER + "attention.dense.weight",
            "dim (heads width) -> (heads width) dim",
        ),
        ("blocks/attention/output/bias", NEOX_LAYER + "attention.dense.bias", "dim"),
        ("blocks/mlp/up/kernel", NEOX_LAYER + "mlp.dense_h_to_4h.weight", "mlp dim -> dim mlp"),
        ("blocks/mlp/up/bias", NEOX_LAYER + "mlp.dense_h_to_4h.bias", "mlp"),
        ("blocks/mlp/down/kernel", NEOX_LAYER + "mlp.dense_4h_to_h.weight", "dim mlp -> mlp dim"),
        ("blocks/mlp/down/bias", NEOX_LAYER + "mlp.dense_4h_to_h.bias", "dim"),
        ("final_norm/scale", "gpt_neox.final_layer_norm.weight", "dim"),
        ("final_norm/bias", "gpt_neox.final_layer_norm.bias", "dim"),
        ("head/kernel", "lm_head.weight", "vocab dim -> dim vocab"),
        ("head/kernel", "gpt_neox.embed_out.weight", "vocab dim -> dim vocab"),  # its older name
    ),
    rope_base=10000.0,
    rope_share=0.25,
    renamed={"rotary_pct": "partial_rotary_factor", "rotary_emb_base": "rope_theta"},
    neutral={"attention_bias": True},
    inert=("hidden_dropout", "classifier_dropout"),
    buffers=r"rotary_emb\.inv_freq$|\.attention\.(bias|masked_bias)$",
)  # fmt: skip

STARCODER2 = Family(
    model_type="starcoder2",
    architecture="Starcoder2ForCausalLM",
    prefix="model.",
    fixed=FIXED | {"activation": "gelu_tanh"},
    settings=(
        *(s for s in SETTINGS if s[0] not in ("norm_eps", "tie_embeddings")),
        ("norm_eps", "norm_epsilon", 1e-5),
        ("tie_embeddings", "tie_word_embeddings", True),
        ("num_kv_heads", "num_key_value_heads", 2),
        ("head_dim", "head_dim", None),
        ("mlp_dim", "intermediate_size", REQUIRED),
        ("sliding_window", "sliding_window", None),
    ),
    activation="hidden_act",
    table=(
        *ENDS, ("final_norm/bias", "model.norm.bias", "dim"), *ATTENTION, *BIASED_NORMS, *QKV_BIAS,
        OTHER_BIAS[0],
        ("blocks/mlp/up/kernel", LAYER + "mlp.c_fc.weight", "mlp dim -> dim mlp"),
        ("blocks/mlp/up/bias", LAYER + "mlp.c_fc.bias", "mlp"),
        ("blocks/mlp/down/kernel", LAYER + "mlp.c_proj.weight", "dim mlp -> mlp dim"),
        ("blocks/mlp/down/bias", LAYER + "mlp.c_proj.bias", "dim"),
    ),
    rope_base=10000.0,
    neutral={"use_bias": True},
    inert=("residual_dropout", "embedding_dropout"),
)  # fmt: skip
