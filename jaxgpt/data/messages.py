"""Messages as people write them: checked, and in the one form that chat templates read.

Every field of a message is kept. A field that is null equals one that is absent.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

Message = Mapping[str, Any]  # {"role": "user", "content": "…"}

THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # three names of one field
THOUGHT = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)


class Arguments(dict):
    """A call's arguments: an object which, written as text, is JSON.

    Some templates print the arguments with `tojson`, others put them in a text as they are.
    """

    def __str__(self) -> str:
        return json.dumps(self, ensure_ascii=False)

    def __radd__(self, other: str) -> str:
        return other + str(self)

    def __add__(self, other: str) -> str:
        return str(self) + other


def prepare(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages without null fields, and with the arguments of calls as objects.

    Raises:
        ValueError: one of them has no role, no content, or a field of another form.
    """
    if isinstance(messages, str | Mapping) or not messages:
        raise ValueError(
            'messages must be a list such as [{"role": "user", "content": "Hello"}] with at least '
            "one entry"
        )
    return [_prepared(message, number) for number, message in enumerate(messages)]


def weight(message: Message) -> int:
    """0: the message is read, not learned."""
    return int(message.get("weight", 1))


def thought(message: Message) -> str:
    """What the assistant thought, as it stands before its answer: <think>…</think>, or nothing."""
    for name in THOUGHTS:
        if isinstance(message.get(name), str) and message[name].strip():
            inside = message[name].strip("\n")
            return f"<think>\n{inside}\n</think>\n\n"
    content = message.get("content")
    found = THOUGHT.match(content) if isinstance(content, str) else None
    return found[0].lstrip() if found and found[1].strip() else ""


def called(message: Message) -> list[str]:
    """Names of the tools that the message calls."""
    return [call.get("function", call).get("name", "") for call in message.get("tool_calls") or ()]


def joined(message: Message, place: str) -> dict[str, Any]:
    """The message whose content is one text, where it is a list of texts."""
    content = message.get("content")
    if not isinstance(content, list):
        return dict(message)
    texts = [part if isinstance(part, str) else part.get("text") for part in content]
    for part, text in zip(content, texts, strict=True):
        if not isinstance(text, str):
            raise ValueError(
                f"{place}: the chat template reads text, not a part such as {part!r:.60}"
            )
    return {**message, "content": "".join(texts)}


def _prepared(message: Any, number: int) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ValueError(f'message {number} must be {{"role": …, "content": …}}')
    place = f"message {number} ({message['role']})"
    found = {name: value for name, value in message.items() if value is not None}
    if found.get("weight", 1) not in (0, 1):
        raise ValueError(
            f"{place}: weight={found['weight']!r:.40} must be 0 (read, not learned) or 1"
        )
    if "function_call" in found and "tool_calls" not in found:  # OpenAI's older form of one call
        found["tool_calls"] = [{"type": "function", "function": found["function_call"]}]
    if "tool_calls" in found:
        if not isinstance(found["tool_calls"], list):
            raise ValueError(f"{place}: tool_calls={found['tool_calls']!r:.40} must be a list")
        found["tool_calls"] = [_call(call, place) for call in found["tool_calls"]]
    speaks = found.get("tool_calls") or any(name in found for name in THOUGHTS)
    content = found.get("content", "" if speaks else None)
    parts = content if isinstance(content, list) else []
    if not isinstance(content, str) and not (
        parts and all(isinstance(part, str | Mapping) for part in parts)
    ):
        raise ValueError(f"{place}: content must be text, not {content!r:.40}")
    return found


def _call(call: Any, place: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError(
            f'{place}: a call must be {{"function": {{"name": …, "arguments": …}}}}, not '
            f"{call!r:.60}"
        )
    given = function.get("arguments")
    arguments = given
    if isinstance(given, str):
        try:
            arguments = json.loads(given)
        except ValueError:
            arguments = None
    if not isinstance(arguments, Mapping) and given is not None:
        raise ValueError(
            f"{place}: the arguments of {function['name']} must be an object, or the text of one "
            f"in JSON, not {given!r:.60}"
        )
    whole = {**function, "arguments": Arguments(arguments or {})}
    if "function" not in call:
        return whole
    return {name: value for name, value in call.items() if value is not None} | {"function": whole}
