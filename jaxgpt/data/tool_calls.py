"""How a model's template writes calls of tools, and how they are read from what the model writes.

The form is found by rendering calls with names and arguments that nothing else has. It decides the
grammar of forced calls, and what a stream of text is searched for.
"""

import json
import re
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxgpt.data import chat
from jaxgpt.data.chat import Format

NAME = re.compile(r"[a-zA-Z0-9_-]+")


class Style(NamedTuple):
    """begin NAME middle ARGUMENTS (between NAME middle ARGUMENTS)* end."""

    begin: str
    middle: str
    between: str
    end: str


HERMES = Style(
    '<tool_call>\n{"name": "', '", "arguments": ',
    '}\n</tool_call>\n<tool_call>\n{"name": "', "}\n</tool_call>",
)  # fmt: skip


def style_of(form: Format) -> Style | None:
    """The form in which the template writes calls; None if it writes none, or in no such form."""
    asked = [{"role": "user", "content": "?"}]
    names, arguments = ("probe_one", "probe_two"), ({"key_one": "a"}, {"key_two": "b"})
    calls = [
        {"id": f"call0000{n}", "type": "function", "function": {"name": name, "arguments": given}}
        for n, (name, given) in enumerate(zip(names, arguments, strict=True))
    ]
    try:
        before = chat.render(form, asked)
        said = {"role": "assistant", "content": "", "tool_calls": calls}
        whole = chat.render(form, [*asked, said], add_generation_prompt=False)
    except ValueError:
        return None
    if not whole.startswith(before) or any(whole.count(name) != 1 for name in names):
        return None
    text = whole[len(before) :]
    ends = tuple(form.tokenizer.special)
    text = text.rstrip()
    while text.endswith(ends):
        text = text[: -len(next(end for end in ends if text.endswith(end)))].rstrip()
    spans = [
        _object_after(text, text.index(n) + len(n), a)
        for n, a in zip(names, arguments, strict=True)
    ]
    if None in spans:
        return None
    (first, first_end), (second, second_end) = spans  # type: ignore[misc]
    one, two = (text.index(name) for name in names)
    middle = text[one + len(names[0]) : first]
    if middle != text[two + len(names[1]) : second]:
        return None  # it numbers its calls, or so
    begin = text[:one].lstrip()
    if not begin:
        return None  # nothing tells a call from text
    return Style(begin, middle, text[first_end:two], text[second_end:])


def lists_tools(form: Format) -> bool:
    """Whether the template tells the model which tools there are."""
    tool = {"type": "function", "function": {
        "name": "probe_one", "description": "", "parameters": {"type": "object", "properties": {}},
    }}  # fmt: skip
    try:
        return "probe_one" in chat.render(form, [{"role": "user", "content": "?"}], tools=[tool])
    except ValueError:
        return False


class Reader:
    """Takes text as it comes, and gives deltas of a message: content, or calls.

    White space does not count where the form is compared with the text.
    """

    def __init__(self, style: Style | None, names: Sequence[str], several: bool = True) -> None:
        self._style, self._names, self._several = style, names, several
        self._text = ""
        self._state = "content"
        self._blank = True  # nothing but white space so far
        self._depth, self._in_string, self._escaped = 0, False, False
        self.calls = 0

    def add(self, text: str) -> list[dict[str, Any]]:
        """What the text means as far as that is known."""
        self._text += text
        found: list[dict[str, Any]] = []
        while self._step(found):
            pass
        return [delta for delta in found if delta]

    def rest(self) -> list[dict[str, Any]]:
        """What was held back, at the end: text, unless it is the end of a call."""
        if self._state == "content" and (not self.calls or self._text.strip()):
            return [{"content": self._text}] if self._text else []
        return []

    def _step(self, found: list[dict[str, Any]]) -> bool:
        """One step; whether there may be another."""
        if not self._text:
            return False
        return {"content": self._content, "arguments": self._arguments, "after": self._after}[
            self._state
        ](found)

    def _content(self, found: list[dict[str, Any]]) -> bool:
        style = self._style
        if style is None or (self.calls and not self._several):
            found.append({"content": self._text} if not self.calls else {})
            self._text = ""
            return False
        raw = style.begin[0] in "{["  # JSON alone is a call only where an answer begins
        for at, char in enumerate(self._text):
            if char != style.begin[0] or (
                raw and not (self._blank and not self._text[:at].strip())
            ):
                continue
            end = self._match_call(self._text[at:], style.begin)
            if end == -1:
                continue
            self._show(found, self._text[:at])
            self._text = self._text[at:]
            if end is None:
                return False
            self._begin_call(found, end)
            return True
        kept = len(self._text) - len(self._text.rstrip()) if self.calls or self._blank else 0
        ready = len(self._text) - kept
        self._show(found, self._text[:ready])
        self._text = self._text[ready:]
        return False

    def _show(self, found: list[dict[str, Any]], text: str) -> None:
        if text and not (self.calls and not text.strip()):
            self._blank = self._blank and not text.strip()
            found.append({"content": text})

    def _match_call(self, text: str, begin: str) -> int | None:
        """Where the arguments begin; None: not there yet; -1: this is no call."""
        end = _match(text, begin)
        if end is None or end < 0:
            return end
        name = NAME.match(text, end)
        if name is None:
            return None if end == len(text) else -1
        if name.end() == len(text):
            return None if any(n.startswith(name[0]) for n in self._names) else -1
        assert self._style is not None
        if name[0] not in self._names:
            return -1
        self._name = name[0]
        middle = _match(text[name.end() :], self._style.middle)
        if middle is None or middle < 0:
            return middle
        start = name.end() + middle
        blank = len(text[start:]) - len(text[start:].lstrip())
        if start + blank == len(text):
            return None
        return start + blank if text[start + blank] == "{" else -1

    def _begin_call(self, found: list[dict[str, Any]], end: int) -> None:
        found.append({"tool_calls": [{
            "index": self.calls, "id": f"call_{uuid.uuid4().hex[:24]}", "type": "function",
            "function": {"name": self._name, "arguments": ""},
        }]})  # fmt: skip
        self.calls += 1
        self._text, self._state = self._text[end:], "arguments"
        self._depth, self._in_string, self._escaped = 0, False, False

    def _arguments(self, found: list[dict[str, Any]]) -> bool:
        for at, char in enumerate(self._text):
            if self._in_string:
                self._in_string = char != '"' or self._escaped
                self._escaped = char == "\\" and not self._escaped
                continue
            self._in_string = char == '"'
            self._depth += (char in "{[") - (char in "}]")
            if self._depth == 0:
                self._give_arguments(found, at + 1)
                self._state = "after"
                return True
        self._give_arguments(found, len(self._text))
        return False

    def _give_arguments(self, found: list[dict[str, Any]], end: int) -> None:
        call = {"index": self.calls - 1, "function": {"arguments": self._text[:end]}}
        found.append({"tool_calls": [call]})
        self._text = self._text[end:]

    def _after(self, found: list[dict[str, Any]]) -> bool:
        """Another call, or the end of the calls."""
        assert self._style is not None
        another = self._match_call(self._text, self._style.between) if self._several else -1
        if another is not None and another >= 0:
            self._begin_call(found, another)
            return True
        end = _match(self._text, self._style.end)
        if another is None or end is None:
            return False
        self._text, self._state = self._text[max(end, 0) :], "content"
        return True


def with_list(messages: Sequence[Any], tools: Sequence[Mapping[str, Any]]) -> list[Any]:
    """A conversation whose system prompt says which tools there are."""
    if tools:
        listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
        told = (
            "You may call functions. These are their signatures:\n<tools>\n" + listed
            + "\n</tools>\nFor each call write:\n<tool_call>\n"
            '{"name": <function name>, "arguments": <object>}\n</tool_call>'
        )  # fmt: skip
        first = messages[0]
        if first["role"] in ("system", "developer"):
            told, messages = f"{first['content']}\n\n{told}", messages[1:]
        messages = [{"role": "system", "content": told}, *messages]
    return list(messages)


def as_text(messages: Sequence[Any], tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A conversation with tools for a template that knows of none: all of it in words."""
    found: list[dict[str, Any]] = []
    message: dict[str, Any]
    for message in with_list(messages, tools):
        if message["role"] == "tool":
            content = f"<tool_response>\n{message['content']}\n</tool_response>"
            message = {"role": "user", "content": content}
        for call in message.get("tool_calls", []):
            function = call["function"]
            given = json.loads(function["arguments"] or "{}")
            shown = json.dumps({"name": function["name"], "arguments": given}, ensure_ascii=False)
            content = f"{message.get('content') or ''}\n<tool_call>\n{shown}\n</tool_call>"
            message = {"role": "assistant", "content": content.lstrip(), "tool_calls": []}
        found.append({k: v for k, v in message.items() if k != "tool_calls" or v})
    return found


def _object_after(text: str, start: int, value: Any) -> tuple[int, int] | None:
    """Where a JSON object of this value stands."""
    for at in range(start, len(text)):
        if text[at] == "{":
            try:
                found, end = json.JSONDecoder().raw_decode(text, at)
            except ValueError:
                continue
            return (at, end) if found == value else None
    return None


def _match(text: str, expected: str) -> int | None:
    """Where `expected` ends at the beginning of a text; None: too short to say; -1: nowhere."""
    at = 0
    for char in expected:
        if char.isspace():
            continue
        while at < len(text) and text[at].isspace():
            at += 1
        if at == len(text):
            return None
        if text[at] != char:
            return -1
        at += 1
    return at
