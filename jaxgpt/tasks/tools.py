"""Tools by name: of ours, or functions of the user's own (my.py:lookup).

A turn calls one by its end, which is `name(argument)` or, as many models write it,
`<tool_call>{"name": "lookup", "arguments": {"city": "Oslo"}}</tool_call>`. What the tool gives is
the observation. An argument of the first form that is a JSON object gives keywords, too.
"""

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from jaxgpt.config import own
from jaxgpt.tasks import calculator

# What a model's wrong arguments raise, which the model is told; anything else ends the run.
MISTAKES = (TypeError, ValueError, LookupError, ArithmeticError)
_CALL = re.compile(r"<tool_call>\s*(\{.*\})\s*</tool_call>$", re.DOTALL)

TOOLS: dict[str, Callable[[str], str]] = {"calculator": calculator.calculate}


def check(names: Sequence[str]) -> tuple[str, ...]:
    """The names, if we have such tools.

    Raises:
        ValueError: there is no such tool.
    """
    names = (names,) if isinstance(names, str) else tuple(names)
    for name in names:
        if own.is_named(name):
            own.function("tools", name)
        elif name not in TOOLS:
            raise ValueError(
                f"tools={name}: must be one of {', '.join(TOOLS)}, or FILE.py:NAME of your own"
            )
    return names


def observe(text: str, names: Sequence[str]) -> str | None:
    """What the tool gives that a turn calls; None if it calls none of these."""
    stripped = text.rstrip()
    if found := _CALL.search(stripped):
        return _by_json(found[1].rpartition("<tool_call>")[2], names)
    if not stripped.endswith(")"):
        return None
    # The last call counts: what stands before it may be a thought.
    called = {own.called(name): name for name in names}
    start, word = max(((stripped.rfind(f"{word}("), word) for word in called), default=(-1, ""))
    before = stripped[start - 1 : start]
    if start < 0 or before.isalnum() or before == "_":
        return None
    argument = stripped[start + len(word) + 1 : -1]
    if word in TOOLS:
        return TOOLS[word](argument)
    return _call(called[word], _read(argument))


def _by_json(text: str, names: Sequence[str]) -> str | None:
    """The call that a JSON object {name, arguments} describes."""
    given, called = _read(text), {own.called(name): name for name in names}
    word = given.get("name") if isinstance(given, dict) else None
    if word not in called:
        return None
    arguments = given.get("arguments", {})  # type: ignore[union-attr]
    if word in TOOLS:  # which take one text, whatever it is called
        values = [*arguments.values()] if isinstance(arguments, dict) else [arguments]
        return TOOLS[word](str(values[0]) if values else "")
    return _call(called[word], arguments)


def _call(name: str, argument: Any) -> str:
    """What a function of the user's own gives, as text."""
    function = own.function("tools", name)
    try:
        found = function(**argument) if isinstance(argument, dict) else function(argument)
    except MISTAKES as error:
        return f"error: {type(error).__name__}: {error}"
    return found if isinstance(found, str) else json.dumps(found, default=str)


def _read(text: str) -> Any:
    """An object where the text is one in JSON, else the text."""
    try:
        found = json.loads(text)
    except ValueError:
        return text
    return found if isinstance(found, dict) else text
