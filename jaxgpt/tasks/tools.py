"""Tools by name. A turn that ends in `name(argument)` calls one, which gives the observation."""

from collections.abc import Callable, Sequence

from jaxgpt.tasks import calculator

TOOLS: dict[str, Callable[[str], str]] = {"calculator": calculator.calculate}


def check(names: Sequence[str]) -> tuple[str, ...]:
    """The names, if we have such tools.

    Raises:
        ValueError: there is no such tool.
    """
    for name in (names,) if isinstance(names, str) else names:
        if name not in TOOLS:
            raise ValueError(f"tools={name}: must be one of {', '.join(TOOLS)}")
    return (names,) if isinstance(names, str) else tuple(names)


def observe(text: str, names: Sequence[str]) -> str | None:
    """What the tool gives that a turn calls; None if it calls none of these."""
    stripped = text.rstrip()
    if not stripped.endswith(")"):
        return None
    # The last call counts: what stands before it may be a thought.
    start, name = max(((stripped.rfind(f"{name}("), name) for name in names), default=(-1, ""))
    before = stripped[start - 1 : start]
    if start < 0 or before.isalnum() or before == "_":
        return None
    return TOOLS[name](stripped[start + len(name) + 1 : -1])
