"""What a family of models is, and its config.json as ModelConfig and back."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxgpt.config import ModelConfig
from jaxgpt.convert import rope
from jaxgpt.convert.rope import number, refuse
from jaxgpt.convert.table import Row

REQUIRED = object()  # a setting that config.json must state
LARGEST = 2**31 - 1

ACTIVATIONS = {  # ours -> theirs, the first of which is written
    "gelu": ("gelu",),
    "gelu_tanh": ("gelu_pytorch_tanh", "gelu_new", "gelu_fast"),
    "silu": ("silu", "swish"),
}
# Settings that change the function in ways the model does not have, with the value that does not.
NEUTRAL = {
    "quantization_config": None,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "is_causal": True,
    "attention_chunk_size": None,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "pruned_heads": {},
}
# What `transformers` keeps in config.json and no forward pass of a trained model reads.
INERT = """
    architectures auto_map dtype exported_by model_type name_or_path torch_dtype
    transformers_version _name_or_path _attn_implementation attn_implementation
    attention_dropout attention_probs_dropout_prob hidden_dropout_prob embd_pdrop resid_pdrop
    attn_pdrop initializer_range initializer_factor mup_init use_cache cache_implementation
    output_attentions output_hidden_states output_router_logits output_scores return_dict
    return_dict_in_generate router_aux_loss_coef router_jitter_noise router_z_loss_coef
    bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id decoder_start_token_id
    chunk_size_feed_forward cross_attention_hidden_size finetuning_task id2label is_decoder
    label2id num_labels prefix problem_type task_specific_params tokenizer_class torchscript
    tie_encoder_decoder use_bfloat16 tf_legacy_loss pretraining_tp reorder_and_upcast_attn n_ctx
    summary_type summary_use_proj summary_activation summary_proj_to_labels
    summary_first_dropout bad_words_ids begin_suppress_tokens suppress_tokens
    forced_bos_token_id forced_eos_token_id do_sample temperature top_k top_p typical_p
    num_beams num_beam_groups num_return_sequences diversity_penalty early_stopping
    length_penalty repetition_penalty encoder_no_repeat_ngram_size
    exponential_decay_length_penalty max_length min_length no_repeat_ngram_size
    remove_invalid_values unsloth_fixed unsloth_version
"""
# Fields of ModelConfig that only training reads: no family states them.
TRAINING = ("dropout", "balance_weight", "dtype", "remat")

Settings = tuple[tuple[str, str, Any], ...]  # (ours, theirs, the value when it is absent)


@dataclass(frozen=True)
class Family:
    """One `model_type` of Hugging Face: which settings and tensors of theirs are which of ours."""

    model_type: str
    architecture: str
    prefix: str  # of all tensors but the head's; bare transformer checkpoints leave it out
    fixed: dict[str, Any]  # fields of ModelConfig that all such models share
    settings: Settings
    activation: str  # their name of that setting
    table: tuple[Row, ...]
    rope_base: float | None = None  # when config.json states none; None: no rotary positions
    biases: dict[str, tuple[str, ...]] = field(default_factory=dict)  # ours -> theirs that are true
    neutral: dict[str, Any] = field(default_factory=dict)  # as NEUTRAL, for this family
    renamed: dict[str, str] = field(default_factory=dict)  # another name of a setting -> its name
    defaults: dict[str, Any] = field(default_factory=dict)  # of what `settings` does not hold
    inert: tuple[str, ...] = ()  # as INERT, for this family
    rope_share: float | None = None  # rotated share of a head, if unsaid; None: it is always whole
    activations: dict[str, str] = field(default_factory=dict)  # a name that means another one
    written: dict[str, str] = field(default_factory=dict)  # our activation -> theirs, if another
    derived: Callable[[Mapping[str, Any], dict[str, Any]], dict[str, Any]] | None = None
    """Fields of ModelConfig that follow from config.json and the other fields."""
    buffers: str = r"rotary_emb\.inv_freq$"  # tensors that are no parameters


def changed(settings: Settings, **others: tuple[str, Any] | None) -> Settings:
    """The settings of a related family: ours=(theirs, default) in place of one, or beside them.

    None leaves one out.
    """
    found = {ours: (theirs, default) for ours, theirs, default in settings} | others
    return tuple((ours, *told) for ours, told in found.items() if told is not None)


def read(family: Family, theirs: Mapping[str, Any]) -> ModelConfig:
    """The ModelConfig of a config.json.

    Raises:
        ValueError: a setting that the model does not have, by its name.
    """
    theirs = family.defaults | _renamed(family, theirs)
    for key, value in (NEUTRAL | family.neutral).items():
        if theirs.get(key) not in (None, value):
            refuse(key, theirs[key], f"jaxgpt's model has only {value}")
    kinds = theirs.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        refuse("layer_types", kinds, "jaxgpt's model has only full_attention")

    ours = dict(family.fixed)
    for name, key, default in family.settings:
        ours[name] = _typed(name, key, theirs.get(key, default))
    ours["activation"] = _activation(family, theirs)
    if family.biases:
        ours["bias"] = _bias(family, theirs)
    if family.rope_base is not None:
        ours |= rope.read(theirs, family.rope_base, family.rope_share, ours["context_length"])
    if family.derived is not None:
        ours |= family.derived(theirs, ours)
    return ModelConfig(**ours)


def unknown(family: Family, theirs: Mapping[str, Any]) -> list[str]:
    """Settings that neither this family nor `transformers` has: they change nothing."""
    known = {key for _, key, _ in family.settings} | {family.activation, "layer_types"}
    known |= set(INERT.split())
    known |= set(NEUTRAL) | set(family.neutral) | set(family.defaults) | set(family.inert)
    known |= set().union(*family.biases.values()) | set(family.renamed)
    known |= set(rope.KEYS if family.rope_base is not None else ())
    found = [key for key in theirs if key not in known]
    return found if family.rope_base is None else found + rope.unknown(theirs)


def write(family: Family, cfg: ModelConfig) -> dict[str, Any]:
    """The function-defining part of config.json. `differences` tells whether it says everything."""
    resolved = resolve(cfg)
    theirs: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        family.activation: family.written.get(cfg.activation, ACTIVATIONS[cfg.activation][0]),
    }
    theirs |= {key: getattr(resolved, name) for name, key, _ in family.settings}
    for key in sorted(set().union(*family.biases.values())):
        theirs[key] = key in family.biases.get(cfg.bias, ())
    theirs |= family.neutral
    if family.rope_base is not None:
        theirs |= rope.write(cfg, family.rope_share is not None)
    return theirs


def differences(family: Family, cfg: ModelConfig) -> list[str]:
    """Fields of ModelConfig that a model of this family cannot have as they are."""
    try:
        told = resolve(read(family, write(family, cfg)))
    except ValueError:  # its own rules, such as heads that divide the width
        told = ModelConfig(**family.fixed)
    names = unlike(told, resolve(cfg))
    if family.fixed.get("bias") == "all":  # zeros stand in for biases that the model lacks
        names = [name for name in names if name != "bias"]
    return names


def unlike(told: ModelConfig, asked: ModelConfig) -> list[str]:
    """Fields in which two resolved configs do not compute the same."""
    names = [f.name for f in dataclasses.fields(asked) if f.name not in TRAINING]
    return [name for name in names if getattr(told, name) != getattr(asked, name)]


def resolve(cfg: ModelConfig) -> ModelConfig:
    """The config with every derived value stated and every idle setting at its default."""
    stated: dict[str, Any] = {
        "num_kv_heads": cfg.kv_heads, "head_dim": cfg.head_width, "mlp_dim": cfg.mlp_width,
        "attention_scale": cfg.attention_scale or cfg.head_width**-0.5,
    }  # fmt: skip
    idle = [] if cfg.qk_norm else ["qk_norm_over"]
    if cfg.position != "rope":
        idle += ["rope_base", "rope_scaling", "rope_share", "rope_skip"]
    if not cfg.num_experts:
        idle += ["experts_per_token", "normalize_expert_weights", "expert_capacity", "balance"]
    elif cfg.balance == "none":
        idle += ["balance"]  # how the experts were kept busy in training is no part of the function
    if not cfg.adapter_dim:
        idle += ["adapter_parallel"]
    default = ModelConfig()
    return dataclasses.replace(cfg, **stated, **{name: getattr(default, name) for name in idle})


def _renamed(family: Family, theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Every setting under its first name; two names may not say two things."""
    found: dict[str, Any] = {}
    for key, value in theirs.items():
        name = family.renamed.get(key, key)
        if found.setdefault(name, value) != value:
            refuse(key, value, f"is another name of {name}, which is {found[name]!r:.80}")
    return found


def _typed(name: str, key: str, value: Any) -> Any:
    """The value, if it is of the field's type and of a sensible size."""
    if value is REQUIRED:
        raise ValueError(f"config.json: {key} is missing")
    default = getattr(ModelConfig(), name)
    if value is None and default is None:
        return None
    if name == "attention_scale":
        value = number(key, value)
    elif isinstance(default, bool):
        if not isinstance(value, bool):
            refuse(key, value, "must be true or false")
    elif isinstance(default, float):
        value = number(key, value)
    elif type(value) is not int or not 0 < value <= LARGEST:
        refuse(key, value, "must be a positive whole number")
    return value


def _activation(family: Family, theirs: Mapping[str, Any]) -> str:
    value = theirs.get(family.activation, ACTIVATIONS[family.fixed["activation"]][0])
    value = family.activations.get(value, value) if isinstance(value, str) else value
    for ours, names in ACTIVATIONS.items():
        if value in names:
            return ours
    known = ", ".join(name for names in ACTIVATIONS.values() for name in names)
    raise ValueError(f"config.json: {family.activation}={value!r:.80}: must be one of {known}")


def _bias(family: Family, theirs: Mapping[str, Any]) -> str:
    keys = sorted(set().union(*family.biases.values()))
    on = {key for key in keys if theirs.get(key, False)}
    for ours, names in family.biases.items():
        if on == set(names):
            return ours
    stated = ", ".join(f"{key}={key in on}" for key in keys)
    raise ValueError(f"config.json: {stated}: jaxgpt's model has these biases together or not")
