"""What a family of models is, and its config.json as ModelConfig and back."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxgpt.config import ModelConfig, RopeScaling
from jaxgpt.convert.table import Row

REQUIRED = object()  # a setting that config.json must state
LARGEST = 2**31 - 1

ACTIVATIONS = {  # ours -> theirs, the first of which is written
    "gelu": ("gelu",),
    "gelu_tanh": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"),
    "silu": ("silu", "swish"),
}
# Settings that change the function in ways the model does not have, with the value that does not.
NEUTRAL = {
    "quantization_config": None,
    "partial_rotary_factor": 1.0,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
}
# Fields of ModelConfig that only training reads: no family states them.
TRAINING = ("dropout", "balance_weight", "dtype", "remat")


@dataclass(frozen=True)
class Family:
    """One `model_type` of Hugging Face: which settings and tensors of theirs are which of ours."""

    model_type: str
    architecture: str
    prefix: str  # of all tensors but the head's; bare transformer checkpoints leave it out
    fixed: dict[str, Any]  # fields of ModelConfig that all such models share
    settings: tuple[tuple[str, str, Any], ...]  # (ours, theirs, the value when it is absent)
    activation: str  # their name of that setting
    table: tuple[Row, ...]
    rope_base: float | None = None  # when config.json states none; None: no rotary positions
    biases: dict[str, tuple[str, ...]] = field(default_factory=dict)  # ours -> theirs that are true
    neutral: dict[str, Any] = field(default_factory=dict)  # as NEUTRAL, for this family
    renamed: dict[str, str] = field(default_factory=dict)  # another name of a setting -> its name
    defaults: dict[str, Any] = field(
        default_factory=dict
    )  # of settings that `settings` does not hold
    buffers: str = r"rotary_emb\.inv_freq$"  # tensors that are no parameters


def read(family: Family, theirs: Mapping[str, Any]) -> ModelConfig:
    """The ModelConfig of a config.json.

    Raises:
        ValueError: a setting that the model does not have, by its name.
    """
    theirs = {family.renamed.get(key, key): value for key, value in theirs.items()}
    theirs = family.defaults | theirs
    for key, value in (NEUTRAL | family.neutral).items():
        if theirs.get(key) not in (None, value):
            _refuse(key, theirs[key], f"jaxgpt's model has only {value}")
    kinds = theirs.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        _refuse("layer_types", kinds, "jaxgpt's model has only full_attention")

    ours = dict(family.fixed)
    for name, key, default in family.settings:
        ours[name] = _typed(name, key, theirs.get(key, default))
    ours["activation"] = _activation(family, theirs)
    if family.biases:
        ours["bias"] = _bias(family, theirs)
    if family.rope_base is not None:
        ours["rope_base"], ours["rope_scaling"] = _rope(theirs, family.rope_base)
    return ModelConfig(**ours)


def write(family: Family, cfg: ModelConfig) -> dict[str, Any]:
    """The function-defining part of config.json. `differences` tells whether it says everything."""
    resolved = resolve(cfg)
    theirs: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        family.activation: ACTIVATIONS[cfg.activation][0],
    }
    theirs |= {key: getattr(resolved, name) for name, key, _ in family.settings}
    for key in sorted(set().union(*family.biases.values())):
        theirs[key] = key in family.biases.get(cfg.bias, ())
    theirs |= family.neutral
    if family.rope_base is not None:
        theirs |= _write_rope(cfg)
    return theirs


def differences(family: Family, cfg: ModelConfig) -> list[str]:
    """Fields of ModelConfig that a model of this family cannot have as they are."""
    try:
        told = resolve(read(family, write(family, cfg)))
    except ValueError:  # its own rules, such as heads that divide the width
        told = ModelConfig(**family.fixed)
    asked = resolve(cfg)
    names = [f.name for f in dataclasses.fields(cfg) if f.name not in TRAINING]
    if family.fixed.get("bias") == "all":  # zeros stand in for biases that the model lacks
        names.remove("bias")
    return [name for name in names if getattr(told, name) != getattr(asked, name)]


def resolve(cfg: ModelConfig) -> ModelConfig:
    """The config with every derived value stated and every idle setting at its default."""
    stated: dict[str, Any] = {
        "num_kv_heads": cfg.kv_heads, "head_dim": cfg.head_width, "mlp_dim": cfg.mlp_width,
    }  # fmt: skip
    idle = []
    if cfg.position != "rope":
        idle += ["rope_base", "rope_scaling"]
    if not cfg.num_experts:
        idle += ["experts_per_token", "normalize_expert_weights", "expert_capacity", "balance"]
    elif cfg.balance == "none":
        idle += ["balance"]  # how the experts were kept busy in training is no part of the function
    if not cfg.adapter_dim:
        idle += ["adapter_parallel"]
    default = ModelConfig()
    return dataclasses.replace(cfg, **stated, **{name: getattr(default, name) for name in idle})


def _refuse(key: str, value: Any, reason: str) -> None:
    raise ValueError(f"config.json: {key}={value!r:.80}: {reason}")


def _typed(name: str, key: str, value: Any) -> Any:
    """The value, if it is of the field's type and of a sensible size."""
    if value is REQUIRED:
        raise ValueError(f"config.json: {key} is missing")
    default = getattr(ModelConfig(), name)
    if value is None and default is None:
        return None
    if isinstance(default, bool):
        if not isinstance(value, bool):
            _refuse(key, value, "must be true or false")
    elif isinstance(default, float):
        value = _number(key, value)
    elif type(value) is not int or not 0 < value <= LARGEST:
        _refuse(key, value, "must be a positive whole number")
    return value


def _number(key: str, value: Any) -> float:
    if type(value) not in (int, float) or not 0 < value < LARGEST:
        _refuse(key, value, "must be a positive number")
    return float(value)


def _activation(family: Family, theirs: Mapping[str, Any]) -> str:
    value = theirs.get(family.activation, ACTIVATIONS[family.fixed["activation"]][0])
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


def _rope(theirs: Mapping[str, Any], default: float) -> tuple[float, RopeScaling | None]:
    """transformers 5 has rope_parameters; before, rope_theta stood beside rope_scaling."""
    key = "rope_parameters" if theirs.get("rope_parameters") else "rope_scaling"
    rope = theirs.get(key) or {}
    if not isinstance(rope, dict):
        _refuse(key, rope, "must be a table of settings")
    base = rope.get("rope_theta", theirs.get("rope_theta", default))
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        _refuse(f"{key}.partial_rotary_factor", rope["partial_rotary_factor"], "must be 1")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return _number("rope_theta", base), None
    if kind != "llama3":
        _refuse(f"{key}.rope_type", kind, "jaxgpt's model has default and llama3")
    number = lambda name: _number(f"{key}.{name}", rope.get(name))
    return _number("rope_theta", base), RopeScaling(
        number("factor"), number("low_freq_factor"), number("high_freq_factor"),
        int(number("original_max_position_embeddings")),
    )  # fmt: skip


def _write_rope(cfg: ModelConfig) -> dict[str, Any]:
    """Both forms, so that readers older than transformers 5 find theirs."""
    scaling, rope = cfg.rope_scaling, {"rope_type": "default", "rope_theta": cfg.rope_base}
    if scaling is not None:
        rope |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_context,
        }
    older = {"rope_theta": cfg.rope_base, "rope_scaling": None if scaling is None else rope}
    return {**older, "rope_parameters": rope}
