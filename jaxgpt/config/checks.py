"""What settings must hold: ranges stand in their types, and every refusal is one line.

rank: Count = 16    refuses 0 with "peft.rank=0: must be 1 or more"
"""

import difflib
import functools
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any

from jaxgpt import files


@dataclass(frozen=True)
class Rule:
    """What one value must hold, beside its type.

    Args:
        shown: in `--help`.
        problem: value -> what is wrong with it, or "".
    """

    shown: str
    problem: Callable[[Any], str]

    def __repr__(self) -> str:
        return self.shown


def minimum(bound: int) -> Rule:
    """Finite numbers from `bound` on."""
    text = f"{bound} or more"
    return Rule(text, lambda value: "" if bound <= value < math.inf else f"must be {text}")


def within(interval: str) -> Rule:
    """Numbers of an interval, written as in mathematics: [0, 1) holds 0 and not 1."""
    low, high = map(float, interval[1:-1].split(","))

    def problem(value: float) -> str:
        above = low <= value if interval[0] == "[" else low < value
        below = value <= high if interval[-1] == "]" else value < high
        return "" if above and below else f"must be in {interval}"

    return Rule(f"in {interval}", problem)


def _pattern_problem(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        return f"is no regular expression ({error})"
    return ""


_positive = Rule("positive", lambda value: "" if 0 < value < math.inf else "must be positive")
Count = Annotated[int, minimum(1)]
Amount = Annotated[int, minimum(0)]
Positive = Annotated[float, _positive]
Weight = Annotated[float, minimum(0)]
Share = Annotated[float, within("[0, 1]")]
BelowOne = Annotated[float, within("[0, 1)")]
Pattern = Annotated[str, Rule("regular expression", _pattern_problem)]
FilePath = Annotated[str, Rule("path", files.problem)]  # of this machine, or of a store
ModelPath = Annotated[str, Rule("path or org/name", files.model_problem)]  # or of the Hub
Paths = list[FilePath] | FilePath


def check(section: str, cfg: Any) -> None:
    """Raises ValueError at the first setting that does not hold what its type says.

    Args:
        section: of the settings in `cfg`, as in train.steps; "": they have none.
    """
    for name, hint in _hints(type(cfg)).items():
        for rule, value in _rules(hint, getattr(cfg, name)):
            if problem := rule.problem(value):
                raise ValueError(f"{section}{'.' if section else ''}{name}={value}: {problem}")


def require(holds: bool, setting: str, value: Any, fix: str) -> None:
    """Raises ValueError with the setting, its value and the fix, unless it holds."""
    if not holds:
        raise ValueError(f"{setting}={value}: {fix}")


def at_least(section: str, cfg: Any, **least: float) -> None:
    """Raises ValueError if a setting is below its bound; None passes."""
    for name, bound in least.items():
        value = getattr(cfg, name)
        setting = f"{section}.{name}" if section else name
        require(value is None or value >= bound, setting, value, f"must be {bound} or more")


def nearest(word: str, words: Iterable[str]) -> str:
    """The end of a message about an unknown word: the most similar of `words`, or nothing."""
    found = difflib.get_close_matches(word.lower(), list(words), 1)
    return f"; did you mean {found[0]!r}?" if found else ""


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind, include_extras=True)


def _rules(hint: Any, value: Any) -> Iterator[tuple[Rule, Any]]:
    """Every rule in a type, with the part of the value that it is for."""
    kind, inner = typing.get_origin(hint), typing.get_args(hint)
    if kind is Annotated and not isinstance(value, list | dict | None):
        yield from ((rule, value) for rule in hint.__metadata__ if isinstance(rule, Rule))
    elif kind is list and isinstance(value, list):
        yield from (found for item in value for found in _rules(inner[0], item))
    elif kind is dict and isinstance(value, dict):  # its keys are checked, and its values
        for part, items in zip(inner, (value.keys(), value.values()), strict=True):
            yield from (found for item in items for found in _rules(part, item))
    elif kind in (typing.Union, types.UnionType):
        yield from (found for part in inner for found in _rules(part, value))
