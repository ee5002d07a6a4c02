"""Which columns and roles a data set has, and which of them are read: nothing goes in silence."""

import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from jaxgpt.config.checks import nearest

# What can be read, and the columns that public data sets hold it in, the usual one first.
COLUMNS: dict[str, tuple[str, ...]] = {
    "messages": ("messages", "conversations", "conversation", "dialog", "dialogue", "chat", "data"),
    "system": ("system", "system_prompt", "system_message"),
    "tools": ("tools", "functions"),
    "history": ("history",),
    "prompt": ("prompt", "instruction", "query", "question", "problem"),
    "input": ("input",),
    "context": ("context",),
    "text": ("text",),
    "answer": ("output", "completion", "response", "answer", "solution", "continuation"),
    "reasoning": ("reasoning_content", "reasoning", "thinking"),
    "chosen": ("chosen", "chosen_response"),
    "rejected": ("rejected", "rejected_response", "rejected_messages"),
    "response_0": ("response_0",),
    "response_1": ("response_1",),
    "better_response_id": ("better_response_id",),
    "label": ("label", "kto_tag"),
    "margin": ("margin",),
    "score_chosen": ("score_chosen",),
    "score_rejected": ("score_rejected",),
}
# Any of these columns' names says what is meant, as in {"instruction": "task"}.
TARGETS = {column: name for name, columns in COLUMNS.items() for column in (name, *columns)}
# What describes a row and answers nothing: left out without a warning.
HARMLESS = {
    "id", "idx", "index", "uuid", "prompt_id", "question_id", "conversation_id", "task_id",
    "row_id", "source", "category", "dataset", "origin", "task", "domain", "topic", "subject",
    "type", "lang", "language", "split", "meta", "metadata", "url", "license", "model",
    "timestamp", "created", "date", "difficulty", "tags",
}  # fmt: skip
# Of what data sets call the speaker, what chat templates call it.
ROLES = {
    **dict.fromkeys(("system", "developer", "user", "assistant", "tool"), ""),
    **dict.fromkeys(("human", "prompter", "customer"), "user"),
    **dict.fromkeys(
        ("gpt", "chatgpt", "bing", "bard", "claude", "bot", "chatbot", "model", "ai", "agent"),
        "assistant",
    ),
    **dict.fromkeys(("function_call", "tool_call", "function-call", "tool-call"), "tool_call"),
    **dict.fromkeys(
        ("observation", "function", "function_response", "function-response", "tool_response",
         "tool-response", "tool_result", "ipython"),
        "tool",
    ),
}  # fmt: skip
KNOWN = ("system", "developer", "user", "assistant", "tool", "tool_call")
EMPTY = (None, "", [], {})


class Columns:
    """What the rows of a data set hold, and what has become of it.

    Args:
        mapped: from what is read to the column that holds it; None, or "ignore", for a column
            that is to be left out.
        roles: from a speaker to one of KNOWN.
        setting: under which the two are set, as data; empty: they cannot be.

    Raises:
        ValueError: nothing of that name is read, or there is no such role.
    """

    def __init__(
        self,
        mapped: Mapping[str, str | None] | None = None,
        roles: Mapping[str, str] | None = None,
        setting: str = "data",
    ) -> None:
        self.setting, self.rows = setting, 0
        self.own: dict[str, str] = {}
        self.left_out: set[str] = set()
        for name, column in (mapped or {}).items():
            if column is None or column == "ignore":
                self.left_out.add(name)
            elif name in TARGETS:
                self.own[TARGETS[name]] = column
            else:
                raise ValueError(
                    f'{setting}.columns={{"{name}": "{column}"}}: {name!r} is nothing that is read '
                    f"({', '.join(COLUMNS)}){nearest(name, TARGETS)}"
                )
        self.roles = {name: role or name for name, role in ROLES.items()}
        for name, role in (roles or {}).items():
            if ROLES.get(role, role) not in (*KNOWN, ""):
                raise ValueError(
                    f'{setting}.roles={{"{name}": "{role}"}}: {role!r} is no role '
                    f"({', '.join(KNOWN)}){nearest(role, KNOWN)}"
                )
            self.roles[name.lower()] = ROLES.get(role) or role
        self.read: Counter[str] = Counter()
        self.unread: Counter[str] = Counter()
        self.seen: dict[str, None] = {}

    def candidates(self, name: str) -> list[str]:
        """The columns that may hold something, the likeliest first."""
        if name in self.own:
            return [self.own[name]]
        taken = {*self.own.values(), *self.left_out}
        return [column for column in COLUMNS[name] if column not in taken]

    def open(self, row: Any, where: str) -> "Row":
        """Raises ValueError unless the row is an object."""
        if not isinstance(row, dict):
            raise ValueError(f"{where}: must be an object, not {type(row).__name__}")
        self.seen.update(dict.fromkeys(row))
        return Row(row, where, self)

    def close(self, row: "Row", texts: Iterable[str]) -> None:
        """Counts what was read of a row; what repeats a text, or a column that was read, is."""
        self.rows += 1
        left = [name for name, value in row.values.items() if name not in row.taken]
        held = list(texts) + [row.values[name] for name in row.taken] if left else []
        for name, value in row.values.items():
            repeated = isinstance(value, (str, list)) and value and value in held
            if name in row.taken or repeated:
                self.read[name] += 1
            elif value not in EMPTY:
                self.unread[name] += 1

    def require_mapped(self) -> None:
        """Raises ValueError if a column that the user named is in no row."""
        for name, column in self.own.items():
            if column not in self.seen:
                raise ValueError(
                    f'{self.setting}.columns={{"{name}": "{column}"}}: no row has {column!r} (they '
                    f"have {', '.join(self.seen)}){nearest(column, self.seen)}"
                )

    def report(self, data: str) -> None:
        """Prints what was read and what was not, by name, and warns of what may be missed."""
        share = lambda name: f"{name} ({100 * self.unread[name] / max(self.rows, 1):.3g} %)"
        empty = [name for name in self.seen if not self.read[name] and not self.unread[name]]
        parts = [
            ("read", [name for name in self.seen if self.read[name]]),
            ("not read", [share(name) for name in self.seen if self.unread[name]]),
            ("always empty", empty),
        ]
        listed = "; ".join(f"{what}: {', '.join(found)}" for what, found in parts if found)
        print(f"{data}: {self.rows:,} rows; columns {listed}", file=sys.stderr)
        unknown = [n for n in self.unread if n not in HARMLESS and n not in self.left_out]
        if unknown:
            missed = f"{data}: not read, with their share of rows: {', '.join(map(share, unknown))}"
            if self.setting:
                first, option = unknown[0], f"--{self.setting}.columns"
                missed += f'; say what it is, such as {option} \'{{"context": "{first}"}}\''
                missed += f", or leave it out: {option} '{{\"{first}\": null}}'"
            print(f"warning: {missed}", file=sys.stderr)


class Row:
    """One row, which notes what was read of it."""

    def __init__(self, values: dict[str, Any], where: str, columns: Columns) -> None:
        self.values, self.where, self.columns = values, where, columns
        self.taken: set[str] = set()

    def take(self, name: str, *before: str) -> Any:
        """What the row holds of COLUMNS[name]; None where that is absent, null or empty.

        Args:
            before: columns to look into before the others.
        """
        for column in sorted(self.columns.candidates(name), key=lambda one: one not in before):
            if column in self.values:
                self.taken.add(column)
                if self.values[column] not in EMPTY:
                    return self.values[column]
        return None

    def look(self, name: str) -> Any:
        """The same, which does not count as read."""
        held = (self.values.get(column) for column in self.columns.candidates(name))
        return next((value for value in held if value not in EMPTY), None)

    def has(self, name: str) -> bool:
        return self.look(name) is not None

    @property
    def holds(self) -> str:
        """What the row has, for a message about what it lacks."""
        said = f"(it holds: {', '.join(self.values) or 'nothing'}"
        unread = next((name for name in self.values if name not in TARGETS), None)
        if unread is None or not self.columns.setting:
            return said + ")"
        option = f"--{self.columns.setting}.columns"
        return f'{said}; say what a column is, such as {option} \'{{"prompt": "{unread}"}}\')'

    def number(self, name: str) -> float | None:
        """A finite number; None where there is none."""
        value = self.take(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not _finite(value):
            raise ValueError(f"{self.where}: {name} must be a number, not {value!r:.40}")
        return float(value)


def _finite(value: float) -> bool:
    return abs(value) < 1e300  # NaN compares false; an int may be too long for a float
