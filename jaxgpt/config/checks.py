"""What settings must hold, said in one line that names the setting, its value and the fix."""

import difflib
from collections.abc import Iterable
from typing import Any


def require(holds: bool, setting: str, value: Any, fix: str) -> None:
    if not holds:
        raise ValueError(f"{setting}={value}: {fix}")


def at_least(section: str, cfg: Any, **least: float) -> None:
    for name, bound in least.items():
        value = getattr(cfg, name)
        fix = f"must be {bound} or more"
        setting = f"{section}.{name}" if section else name
        require(value is None or value >= bound, setting, value, fix)


def nearest(word: str, words: Iterable[str]) -> str:
    """The end of a message about a word that is none of these: which one may be meant."""
    found = difflib.get_close_matches(word.lower(), list(words), 1)
    return f"; did you mean {found[0]!r}?" if found else ""
