"""The settings of rotary positions in config.json, as transformers reads and writes them."""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NoReturn

from jaxgpt.config import ModelConfig, RopeScaling

LARGEST = 2**31 - 1
TABLES = ("rope_scaling", "rope_parameters")  # of transformers 4 and 5
KEYS = (*TABLES, "rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
SETTINGS = """
    rope_type type rope_theta partial_rotary_factor factor original_max_position_embeddings
    attention_factor beta_fast beta_slow mscale mscale_all_dim truncate low_freq_factor
    high_freq_factor short_factor long_factor llama_4_scaling_beta max_position_embeddings
"""
FULL, LOCAL = "full_attention", "sliding_attention"  # tables of their own, where layers differ
# What each kind states: theirs -> ours.
ORIGINAL = {"factor": "factor", "original_max_position_embeddings": "original_context"}
KINDS = {
    "linear": {"factor": "factor"},
    "dynamic": {"factor": "factor"},
    "llama3": ORIGINAL | {name: name for name in ("low_freq_factor", "high_freq_factor")},
    "yarn": ORIGINAL
    | {name: name for name in ("attention_factor", "beta_fast", "beta_slow", "truncate")},
    "longrope": ORIGINAL
    | {"attention_factor": "attention_factor"}
    | {"short_factor": "short_factors", "long_factor": "long_factors"},
}


def read(
    theirs: Mapping[str, Any],
    base: float,
    share: float | None,
    context: int,
    kinds: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Any]:
    """The fields of ModelConfig about RoPE.

    transformers 5 has rope_parameters; before, rope_theta stood beside rope_scaling.

    Args:
        base: theta where nothing states it.
        share: of each head that is rotated where nothing states it; None: always the whole.
        context: max_position_embeddings.
        kinds: a rope_type that means another one.

    Raises:
        ValueError: a kind of scaling that the model does not have, or two tables that differ.
    """
    found = []
    for key in TABLES:
        rope = theirs.get(key) or {}
        if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
            refuse(key, rope, "must be one table of settings, for all layers")
        if rope:
            kind = rope.get("rope_type", rope.get("type"))
            if isinstance(kind, str) and kind in kinds:
                rope = rope | {"rope_type": kinds[kind]}
            found.append(_Table(theirs, rope, key, context).fields(base, share))
    if not found:
        return _Table(theirs, {}, TABLES[1], context).fields(base, share)
    if found[0] != found[-1]:
        old, new = (theirs[key] for key in TABLES)
        refuse(
            TABLES[0], old, f"differs from rope_parameters={new!r:.200}; write what holds into "
            "rope_parameters and remove rope_scaling",
        )  # fmt: skip
    return found[0]


def read_by_layer(
    theirs: Mapping[str, Any], base: float, local: tuple[str, float], context: int
) -> dict[str, Any]:
    """`read` for families whose local layers have a table of their own.

    Args:
        local: an older name of the local layers' theta, and its value where nothing states it.
    """
    tables, scaling = theirs.get(TABLES[1]) or {}, theirs.get(TABLES[0]) or {}
    if not isinstance(tables, dict) or set(tables) - {FULL, LOCAL}:
        refuse(TABLES[1], tables, f"must be two tables, {FULL} and {LOCAL}")
    full, own = tables.get(FULL) or {}, tables.get(LOCAL) or {}
    for key, rope in ((TABLES[0], scaling), (TABLES[1], full), (TABLES[1], own)):
        if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
            refuse(key, rope, "must be a table of settings")
    # Beside the tables only the global layers' theta is read.
    without = {key: value for key, value in theirs.items() if key not in KEYS[2:]}
    of_full = without | {key: theirs[key] for key in KEYS[2:4] if key in theirs}
    found = _Table(of_full, full | scaling, TABLES[1], context).fields(base, None)
    usual = theirs.get(local[0], local[1])
    of_local = _Table(without, own, f"{TABLES[1]}.{LOCAL}", context).fields(usual, None)
    if of_local == found:
        return found
    if of_local["rope_scaling"] is not None:
        refuse(f"{TABLES[1]}.{LOCAL}", own, f"must be of the default type, or as {FULL}")
    return found | {"rope_local_base": of_local["rope_base"]}


def write(cfg: ModelConfig, partial: bool, by_layer: bool) -> dict[str, Any]:
    """What transformers 5 writes.

    Args:
        by_layer: local layers have a table of their own.
    """
    if by_layer:
        plain = {"rope_type": "default", "rope_theta": cfg.rope_local_base}
        full = write(cfg, partial, False)["rope_parameters"]
        return {TABLES[1]: {FULL: full, LOCAL: full if cfg.rope_local_base is None else plain}}
    scaling, rope = cfg.rope_scaling, {"rope_type": "default", "rope_theta": cfg.rope_base}
    if partial:
        rope["partial_rotary_factor"] = cfg.rope_share
    if scaling is None:
        return {"rope_parameters": rope}
    own = {key: getattr(scaling, name) for key, name in KINDS[scaling.kind].items()}
    stated = {key: list(value) if isinstance(value, tuple) else value for key, value in own.items()}
    found: dict[str, Any] = {"rope_parameters": rope | {"rope_type": scaling.kind} | stated}
    if scaling.kind == "dynamic":  # for which there is no other place
        found["max_position_embeddings"] = scaling.original_context
    return found


def unknown(theirs: Mapping[str, Any]) -> list[str]:
    """Entries of the tables that no kind of scaling has."""
    found = [(key, dict(theirs[key])) for key in TABLES if theirs.get(key)]
    for key, rope in found[:]:
        found += [(f"{key}.{kind}", rope.pop(kind) or {}) for kind in (FULL, LOCAL) if kind in rope]
    return [f"{key}.{name}" for key, rope in found for name in rope if name not in SETTINGS.split()]


def refuse(key: str, value: Any, reason: str) -> NoReturn:
    """Raises the ValueError for a setting of config.json."""
    raise ValueError(f"config.json: {key}={value!r:.80}: {reason}")


def number(key: str, value: Any) -> float:
    """A setting that must be a positive number."""
    if type(value) not in (int, float) or not 0 < value < LARGEST:
        refuse(key, value, "must be a positive number")
    return float(value)


class _Table:
    """One table of settings."""

    def __init__(self, theirs: Mapping[str, Any], rope: Mapping[str, Any], key: str, context: int):
        self.theirs, self.rope, self.key, self.context = theirs, rope, key, context

    def fields(self, base: float, usual: float | None) -> dict[str, Any]:
        base = self.rope.get("rope_theta", self.theirs.get("rope_theta", base))
        share = self.rope.get("partial_rotary_factor", self.theirs.get("partial_rotary_factor"))
        share = (usual or 1.0) if share is None else number("partial_rotary_factor", share)
        if share != 1 and usual is None:
            refuse(f"{self.key}.partial_rotary_factor", share, "must be 1 for this model_type")
        kind = self.rope.get("rope_type", self.rope.get("type", "default"))
        found = {"rope_base": number("rope_theta", base), "rope_share": share}
        if kind == "default":
            return found | {"rope_scaling": None}
        if not isinstance(kind, str) or kind not in KINDS:
            known = ", ".join(("default", *KINDS))
            refuse(f"{self.key}.rope_type", kind, f"jaxgpt's model has {known}")
        scaling = RopeScaling(kind=kind, **getattr(self, f"_{kind}")())  # type: ignore[arg-type]
        if kind in ("dynamic", "yarn"):  # what the factor is for, whatever the file still says
            longer = int(scaling.factor * scaling.original_context)
            found["context_length"] = max(self.context, longer)
        return found | {"rope_scaling": scaling}

    def _linear(self) -> dict[str, Any]:
        return {"factor": self._number("factor")}

    def _dynamic(self) -> dict[str, Any]:
        return {"factor": self._number("factor"), "original_context": self.context}

    def _llama3(self) -> dict[str, Any]:
        names = ("factor", "low_freq_factor", "high_freq_factor")
        return self._original() | {name: self._number(name) for name in names}

    def _yarn(self) -> dict[str, Any]:
        original = self._original()
        factor = self._number("factor", self.context / original["original_context"])
        # The paper's; with both mscale and mscale_all_dim, DeepSeek's.
        scale = lambda weight: 1 + 0.1 * weight * math.log(factor) if factor > 1 else 1.0
        both = [self.rope.get("mscale"), self.rope.get("mscale_all_dim")]
        paper = scale(1)
        if all(both):
            over, under = (number(f"{self.key}.mscale", weight) for weight in both)
            paper = scale(over) / scale(under)
        truncate = self.rope.get("truncate", True)
        if not isinstance(truncate, bool):
            refuse(f"{self.key}.truncate", truncate, "must be true or false")
        return original | {
            "factor": factor,
            "attention_factor": self._number("attention_factor", paper),
            "beta_fast": self._number("beta_fast", 32.0),
            "beta_slow": self._number("beta_slow", 1.0),
            "truncate": truncate,
        }

    def _longrope(self) -> dict[str, Any]:
        original = self._original()
        length = original["original_context"]
        if length == 1:
            refuse(f"{self.key}.original_max_position_embeddings", 1, "must be 2 or more")
        factor = self._number("factor", self.context / length)
        paper = math.sqrt(1 + math.log(factor) / math.log(length)) if factor > 1 else 1.0
        return original | {
            "factor": max(factor, 1.0),
            "attention_factor": self._number("attention_factor", paper),
            "short_factors": self._numbers("short_factor"),
            "long_factors": self._numbers("long_factor"),
        }

    def _original(self) -> dict[str, Any]:
        key = "original_max_position_embeddings"
        value = self.theirs.get(key) or self.rope.get(key) or self.context
        found = int(number(f"{self.key}.{key}", value))
        return {
            "original_context": found or refuse(f"{self.key}.{key}", value, "must be 1 or more")
        }

    def _number(self, name: str, default: float | None = None) -> float:
        value = self.rope.get(name)
        return number(f"{self.key}.{name}", default if value is None else value)

    def _numbers(self, name: str) -> tuple[float, ...]:
        values = self.rope.get(name)
        if not isinstance(values, list):
            refuse(f"{self.key}.{name}", values, "must be a list of numbers")
        return tuple(number(f"{self.key}.{name}", value) for value in values)  # type: ignore
