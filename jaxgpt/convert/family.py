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
MOST_LAYERS = 10_000  # of a pattern
LETTERS = {"sliding_attention": "L", "full_attention": "G"}  # of ModelConfig.layer_pattern

ACTIVATIONS = {  # ours -> theirs, the first of which is written
    "gelu": ("gelu",),
    "gelu_tanh": ("gelu_pytorch_tanh", "gelu_new", "gelu_fast"),
    "silu": ("silu", "swish"),
    "relu": ("relu",),
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
    rope_kinds: dict[str, str] = field(default_factory=dict)  # a type of RoPE that means another
    activations: dict[str, str] = field(default_factory=dict)  # a name that means another one
    written: dict[str, str] = field(default_factory=dict)  # our activation -> theirs, if another
    derived: Callable[[Mapping[str, Any], dict[str, Any]], dict[str, Any]] | None = None
    """Fields of ModelConfig that follow from config.json and the other fields."""
    stated: Callable[[ModelConfig, dict[str, Any]], dict[str, Any]] | None = None
    """The inverse: what config.json says besides, by the ModelConfig and the rest of it."""
    layers: Callable[[Mapping[str, Any], int], str] | None = None
    """The layers' letters, or a period of them, where config.json has no layer_types, by it and
    their number; None: the family has no windows by layer."""
    rope_local: tuple[str, float] | None = None  # see rope.read_by_layer
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
    theirs = _renamed(family, theirs)
    unsaid = {key: value for key, value in family.defaults.items() if theirs.get(key) is None}
    if theirs.get("rope_scaling"):  # an older place of the same table
        unsaid.pop("rope_parameters", None)
    theirs = theirs | unsaid
    own = {key for _, key, _ in family.settings}
    for key, value in (NEUTRAL | family.neutral).items():
        if key in own:
            continue
        if theirs.get(key) not in (None, value):
            refuse(key, theirs[key], f"jaxgpt's model has only {value}")
    ours = dict(family.fixed)
    for name, key, default in family.settings:
        ours[name] = _typed(name, key, theirs.get(key, default))
    ours["activation"] = _activation(family, theirs)
    if family.biases:
        ours["bias"] = _bias(family, theirs)
    context = ours["context_length"]
    if family.rope_local is not None:
        assert family.rope_base is not None
        ours |= rope.read_by_layer(theirs, family.rope_base, family.rope_local, context)
    elif family.rope_base is not None:
        share, kinds = family.rope_share, family.rope_kinds
        ours |= rope.read(theirs, family.rope_base, share, context, kinds)
    ours |= _layers(family, theirs, ours)
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
    theirs |= {
        key: theirs[key] or None for name, key, _ in family.settings if name.endswith("softcap")
    }
    for key in sorted(set().union(*family.biases.values())):
        theirs[key] = key in family.biases.get(cfg.bias, ())
    theirs |= family.neutral
    if family.rope_base is not None:
        by_layer = family.rope_local is not None
        theirs |= rope.write(resolved, family.rope_share is not None, by_layer)
    if family.layers is not None:
        windows = [cfg.of_layer(layer).sliding_window for layer in range(cfg.num_layers)]
        theirs["layer_types"] = [rope.LOCAL if window else rope.FULL for window in windows]
    return theirs if family.stated is None else theirs | family.stated(resolved, theirs)


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
        "embedding_scale": cfg.embedding_factor,
    }  # fmt: skip
    idle = [] if cfg.qk_norm else ["qk_norm_over"]
    if cfg.gate_limit:
        idle += ["activation"]
    if cfg.position != "learned":
        idle += ["position_offset"]
    if cfg.position != "rope":
        idle += ["rope_base", "rope_scaling", "rope_share", "rope_skip", "rope_pairs"]
    elif cfg.rope_skip > cfg.num_layers:
        idle += ["rope_skip"]
    if not cfg.num_experts:
        idle += [
            "experts_per_token", "normalize_expert_weights", "expert_capacity", "balance",
            "expert_bias", "router", "expert_groups", "expert_scale", "dense_layers",
        ]  # fmt: skip
    elif cfg.balance == "none":
        idle += ["balance"]  # how the experts were kept busy in training is no part of the function
    if not cfg.num_experts or cfg.expert_groups == 1:
        idle += ["groups_per_token"]
    if not cfg.shared_mlp_dim:
        idle += ["shared_gate"]
    if cfg.num_experts and cfg.dense_layers:
        stated["dense_mlp_dim"] = cfg.dense_mlp_dim or 4 * cfg.model_dim
    else:
        idle += ["dense_mlp_dim"]
    if not cfg.adapter_dim:
        idle += ["adapter_parallel"]
    default = ModelConfig()
    if cfg.layer_pattern:
        times = -(-cfg.num_layers // len(cfg.layer_pattern))
        letters = (cfg.layer_pattern * times)[: cfg.num_layers]
        stated |= _patterned(letters, vars(cfg))
    return dataclasses.replace(cfg, **stated, **{name: getattr(default, name) for name in idle})


def _renamed(family: Family, theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Every setting under its first name; two names may not say two things."""
    found: dict[str, Any] = {}
    for key, value in theirs.items():
        name = family.renamed.get(key, key)
        if found.setdefault(name, value) != value:
            refuse(key, value, f"is another name of {name}, which is {found[name]!r:.80}")
    return found


def _layers(family: Family, theirs: Mapping[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """The fields about layers that differ, by layer_types or the family's rule."""
    kinds, count = theirs.get("layer_types"), ours["num_layers"]
    if family.layers is None:
        if not isinstance(kinds or [], list) or any(kind != rope.FULL for kind in kinds or []):
            refuse("layer_types", kinds, "jaxgpt has only full_attention for this model_type")
        return {}
    if count > MOST_LAYERS:
        refuse("num_hidden_layers", count, f"must be {MOST_LAYERS:,} or less")
    if kinds is None:
        period = family.layers(theirs, count)
        letters = (period * count)[:count]
    else:
        known = isinstance(kinds, list) and all(
            isinstance(kind, str) and kind in LETTERS for kind in kinds
        )
        if not known or len(kinds) != count:
            refuse("layer_types", kinds, f"must name {' or '.join(LETTERS)} for {count} layers")
        letters = "".join(LETTERS[kind] for kind in kinds)
    if "L" in letters and ours["sliding_window"] is None:
        refuse("sliding_window", None, "must be a number, since there are layers with a window")
    return _patterned(letters, ours)


def _patterned(letters: str, ours: Mapping[str, Any]) -> dict[str, Any]:
    """Windows by layer in the shortest form, for layers with these letters."""
    found: dict[str, Any] = {"layer_pattern": "", "rope_local_base": None}
    local, base = ours["sliding_window"], ours.get("rope_local_base")
    if "L" not in letters:
        return found | {"sliding_window": None}
    if "G" not in letters:
        own = {} if base is None else {"rope_base": base, "rope_scaling": None}
        return found | own
    count = len(letters)
    repeats = lambda length: (letters[:length] * -(-count // length))[:count]
    length = next(n for n in range(1, count + 1) if repeats(n) == letters)
    alike = base is None or (base == ours["rope_base"] and ours["rope_scaling"] is None)
    return {
        "layer_pattern": letters[:length],
        "rope_local_base": None if alike else base,
        "sliding_window": local,
    }


def _typed(name: str, key: str, value: Any) -> Any:
    """The value, if it is of the field's type and of a sensible size."""
    if value is REQUIRED:
        raise ValueError(f"config.json: {key} is missing")
    default = getattr(ModelConfig(), name)
    if value is None and default is None:
        return None
    if value is None and name.endswith("softcap"):
        return 0.0
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
