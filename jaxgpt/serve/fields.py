"""The fields of a request: each is obeyed, or refused by its name."""

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import numpy as np

Check = Callable[[str, Any], Any]  # (its name, its value) -> the value to use

DEEPEST = 64  # levels of a JSON body: more crash recursive readers
TOOL_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")


class Refused(Exception):
    """A request that gets OpenAI's error object as its answer."""

    def __init__(
        self,
        message: str,
        param: str | None = None,
        status: int = 400,
        code: str | None = None,
        kind: str = "invalid_request_error",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def refuse(name: str, value: Any, fix: str) -> NoReturn:
    """Says which field has which value, and what it must be."""
    shown = json.dumps(value, ensure_ascii=True, default=str)
    shown = shown if len(shown) <= 80 else f"{shown[:80]}…"
    raise Refused(f"{name}={shown}: {fix}", name)


def parse(body: bytes) -> dict[str, Any]:
    """The JSON object of a body, without NaN, doubled keys or deep nesting."""
    try:
        bare = np.frombuffer(re.sub(rb'"(?:[^"\\]|\\.)*"', b" ", body + b" "), np.uint8)
        steps = np.isin(bare, list(b"[{")).astype(np.int8) - np.isin(bare, list(b"}]"))
        if np.cumsum(steps, dtype=np.int64).max() > DEEPEST:
            raise ValueError(f"nested more than {DEEPEST} levels deep")
        found = json.loads(body.decode(), parse_constant=_no_constant, object_pairs_hook=_once)
        json.dumps(found, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise Refused(f"the body is not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise Refused("the body must be a JSON object")
    return found


def read(body: Mapping[str, Any], known: Mapping[str, Check]) -> dict[str, Any]:
    """The fields that are given and not null, each checked."""
    for name in body:
        if name not in known:
            raise Refused(f"{name}: is not a field that this server obeys; leave it out", name)
    return {name: known[name](name, value) for name, value in body.items() if value is not None}


def number(low: float, high: float, above: bool = False) -> Check:
    """A number in [low, high], or in (low, high] if `above`."""

    def check(name: str, value: Any) -> float:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not (low < value if above else low <= value) or not value <= high:
            refuse(name, value, f"must be a number in {'(' if above else '['}{low:g}, {high:g}]")
        return float(value)

    return check


def whole(low: int, high: float = math.inf) -> Check:
    """A whole number."""

    def check(name: str, value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            top = "" if high == math.inf else f" and at most {high:,.0f}"
            refuse(name, value, f"must be a whole number, at least {low}{top}")
        return value

    return check


def flag(name: str, value: Any) -> bool:
    """true or false."""
    if not isinstance(value, bool):
        refuse(name, value, "must be true or false")
    return value


def text(name: str, value: Any) -> str:
    """A string."""
    if not isinstance(value, str):
        refuse(name, value, "must be a string")
    return value


def one_of(*values: Any) -> Check:
    """One of these; with one value, a field whose default cannot be changed here."""

    def check(name: str, value: Any) -> Any:
        if not any(value == known and type(value) is type(known) for known in values):
            refuse(name, value, f"must be {' or '.join(map(json.dumps, values))}, or left out")
        return value

    return check


def stops(name: str, value: Any) -> list[str]:
    """A string or a list of up to 16 strings."""
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list) or len(found) > 16 or not all(
        isinstance(mark, str) and mark for mark in found
    ):  # fmt: skip
        refuse(name, value, "must be a string or at most 16 strings, none of them empty")
    return found


def biases(most: int, vocab_size: int) -> Check:
    """Token ids, as the strings that JSON's keys are, to numbers in [-100, 100]."""

    def check(name: str, value: Any) -> dict[int, float]:
        if not isinstance(value, dict) or len(value) > most:
            refuse(name, value, f"must map at most {most} token ids to numbers")
        found = {}
        for token, bias in value.items():
            if not re.fullmatch(r"[0-9]{1,9}", token) or int(token) >= vocab_size:
                raise Refused(f"{name}: {token[:40]!r} is no token id under {vocab_size}", name)
            found[int(token)] = number(-100, 100)(f"{name}.{token}", bias)
        return found

    return check


def ids(name: str, value: Any, vocab_size: int) -> list[int]:
    """A list of token ids."""
    is_id = lambda i: isinstance(i, int) and not isinstance(i, bool) and 0 <= i < vocab_size
    if not isinstance(value, list) or not all(map(is_id, value)):
        raise Refused(f"{name}: must be a list of token ids from 0 to {vocab_size - 1}", name)
    return value


def stream_options(name: str, value: Any) -> dict[str, bool]:
    """{"include_usage": true}."""
    if not isinstance(value, dict):
        refuse(name, value, 'must be an object such as {"include_usage": true}')
    known = {"include_usage": flag, "include_obfuscation": one_of(False)}
    return read({f"{name}.{key}": v for key, v in value.items()},
                {f"{name}.{key}": check for key, check in known.items()})  # fmt: skip


def response_format(name: str, value: Any) -> dict[str, Any]:
    """text, json_object, or json_schema with its schema."""
    kinds = ("text", "json_object", "json_schema")
    if not isinstance(value, dict) or value.get("type") not in kinds:
        refuse(name, value, f"must be an object whose type is {', '.join(kinds)}")
    extra = value.keys() - {"type", "json_schema"}
    if extra or ("json_schema" in value) != (value["type"] == "json_schema"):
        raise Refused(
            f"{name}: json_schema goes with the type json_schema, and nothing else beside it", name
        )
    if value["type"] == "json_schema":
        inner = value["json_schema"]
        if not isinstance(inner, dict) or not isinstance(inner.get("schema"), dict):
            raise Refused(f"{name}.json_schema.schema: must be a JSON schema", name)
        known = {"name": text, "description": text, "strict": flag, "schema": lambda _, v: v}
        return {"type": "json_schema", **read(inner, known)}
    return value


def tools(name: str, value: Any) -> list[dict[str, Any]]:
    """Functions that may be called."""
    if not isinstance(value, list) or len(value) > 128:
        refuse(name, value, "must be a list of at most 128 functions")
    found = []
    for place, tool in enumerate(value):
        at = f"{name}[{place}]"
        if not isinstance(tool, dict) or tool.get("type") != "function":
            refuse(f"{at}.type", tool, "must be function")
        function = tool.get("function")
        if tool.keys() != {"type", "function"} or not isinstance(function, dict):
            raise Refused(f'{at}: must be {{"type": "function", "function": {{…}}}}', name)
        known = {
            "name": text, "description": text, "strict": flag,
            "parameters": lambda _, v: v,
        }  # fmt: skip
        function = read(function, known)
        if not TOOL_NAME.fullmatch(function.get("name", "")):
            refuse(
                f"{at}.function.name", function.get("name"), "must be 1 to 64 of a-z A-Z 0-9 _ -"
            )
        if not isinstance(function.get("parameters", {}), dict):
            refuse(f"{at}.function.parameters", function["parameters"], "must be a JSON schema")
        found.append({"type": "function", "function": {
            "description": "", "parameters": {"type": "object", "properties": {}}, **function,
        }})  # fmt: skip
    names = [tool["function"]["name"] for tool in found]
    if len(set(names)) < len(names):
        raise Refused(f"{name}: two functions have one name", name)
    return found


def tool_choice(name: str, value: Any) -> str | dict[str, Any]:
    """none, auto, required, or the name of a function in {"name": …}."""
    if value in ("none", "auto", "required"):
        return value
    function = value.get("function") if isinstance(value, dict) else None
    if not isinstance(function, dict) or value.get("type") != "function":
        refuse(name, value, "must be none, auto, required or a function to call")
    return {"name": text(f"{name}.function.name", function.get("name"))}


def messages(name: str, value: Any) -> list[dict[str, Any]]:
    """Conversations in OpenAI's form; what templates refuse is seen when they are rendered."""
    if not isinstance(value, list) or not value:
        refuse(name, value, "must be a list of messages, at least one")
    return [_message(f"{name}[{place}]", message) for place, message in enumerate(value)]


def _message(at: str, message: Any) -> dict[str, Any]:
    roles = ("system", "developer", "user", "assistant", "tool")
    if not isinstance(message, dict) or message.get("role") not in roles:
        refuse(at, message, f"must be an object whose role is one of {', '.join(roles)}")
    known: dict[str, Check] = {"role": text, "content": _content, "name": text}
    if message["role"] == "assistant":
        known |= {"tool_calls": _tool_calls, "reasoning_content": text, "annotations": one_of([])}
    if message["role"] == "tool":
        known |= {"tool_call_id": text}
    empty = dict.fromkeys(("refusal", "audio", "function_call"), one_of())
    try:
        found = read(message, known | empty)
    except Refused as error:
        inner = error.body["error"]
        raise Refused(f"{at}.{error}", f"{at}.{inner['param']}") from None
    found.pop("annotations", None)
    if "content" not in found and not found.get("tool_calls"):
        refuse(f"{at}.content", None, "must be text")
    return found


def _content(name: str, value: Any) -> str:
    """Text, or parts of text."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        refuse(name, value, "must be text, or a list of parts of text")
    for place, part in enumerate(value):
        is_text = isinstance(part, dict) and part.get("type") == "text"
        if not is_text or not isinstance(part.get("text"), str) or part.keys() > {"type", "text"}:
            refuse(f"{name}[{place}]", part, 'must be {"type": "text", "text": …}')
    return "".join(part["text"] for part in value)


def _tool_calls(name: str, value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        refuse(name, value, "must be a list of calls")
    for place, call in enumerate(value):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not all(
            isinstance(function.get(part), str) for part in ("name", "arguments")
        ):
            refuse(f"{name}[{place}].function", function, "must have a name and arguments")
        try:
            arguments = json.loads(function["arguments"] or "{}")
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            refuse(f"{name}[{place}].function.arguments", function["arguments"],
                   "must be a JSON object in a string")  # fmt: skip
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object has one key twice")
    return found
