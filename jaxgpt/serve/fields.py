"""The fields of a request: each is obeyed, or refused by its name."""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np

Check = Callable[[str, Any], Any]  # (its name, its value) -> the value to use

ROLES = ("system", "developer", "user", "assistant", "tool")
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


def read(
    value: Any, known: Mapping[str, Check], at: str = "", required: Sequence[str] = ()
) -> dict[str, Any]:
    """The fields of an object that are given and not null, each checked.

    Args:
        at: where the object stands in the body; empty: it is the body.
    """
    named = lambda name: f"{at}.{name[:80]}" if at else name[:80]
    if not isinstance(value, dict):
        refuse(at, value, "must be an object")
    for name in value:
        if name not in known:
            raise Refused(
                f"{named(name)}: is not a field that this server obeys; leave it out", named(name)
            )
    found = {
        name: known[name](named(name), inner) for name, inner in value.items() if inner is not None
    }
    for name in required:
        if name not in found:
            raise Refused(f"{named(name)}: is missing", named(name))
    return found


def fields(known: Mapping[str, Check], *required: str) -> Check:
    """An object of these fields."""
    return lambda name, value: read(value, known, name, required)


def each(check: Check, most: float = math.inf, least: int = 0) -> Check:
    """A list of so many values."""

    def checked(name: str, value: Any) -> list[Any]:
        if not isinstance(value, list) or not least <= len(value) <= most:
            top = "" if most == math.inf else f" and at most {most}"
            refuse(name, value, f"must be a list, of at least {least}{top}")
        return [check(f"{name}[{place}]", inner) for place, inner in enumerate(value)]

    return checked


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


def schema(name: str, value: Any) -> dict[str, Any]:
    """A JSON schema, which the grammar reads."""
    if not isinstance(value, dict):
        refuse(name, value, "must be a JSON schema, an object")
    return value


def one_of(*values: Any) -> Check:
    """One of these; with one value, a field whose default cannot be changed here."""

    def check(name: str, value: Any) -> Any:
        if not any(value == known and type(value) is type(known) for known in values):
            allowed = " or ".join([*map(json.dumps, values), "left out"])
            refuse(name, value, f"must be {allowed}")
        return value

    return check


def mark(name: str, value: Any) -> str:
    """A stop string."""
    return value if text(name, value) else refuse(name, value, "must not be empty")


def stops(name: str, value: Any) -> list[str]:
    """A string or a list of up to 16 strings."""
    return [mark(name, value)] if isinstance(value, str) else each(mark, 16)(name, value)


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


stream_options = fields({"include_usage": flag, "include_obfuscation": one_of(False)})


def response_format(name: str, value: Any) -> dict[str, Any]:
    """The type: text, json_object, or json_schema, then with its schema."""
    inner = fields({"name": text, "description": text, "strict": flag, "schema": schema}, "schema")
    kind = one_of("text", "json_object", "json_schema")
    found = read(value, {"type": kind, "json_schema": inner}, name, ["type"])
    if ("json_schema" in found) != (found["type"] == "json_schema"):
        raise Refused(
            f"{name}.json_schema: goes with the type json_schema, and with no other", name
        )
    return {"type": found["type"], **found.get("json_schema", {})}


def tools(name: str, value: Any) -> list[dict[str, Any]]:
    """Functions that may be called."""
    known = {"name": _tool_name, "description": text, "strict": flag, "parameters": schema}
    tool = fields(
        {"type": one_of("function"), "function": fields(known, "name")}, "type", "function"
    )
    empty = {"description": "", "parameters": {"type": "object", "properties": {}}}
    functions = [empty | found["function"] for found in each(tool, 128)(name, value)]
    if len({function["name"] for function in functions}) < len(functions):
        raise Refused(f"{name}: two functions have one name", name)
    return [{"type": "function", "function": function} for function in functions]


def tool_choice(name: str, value: Any) -> str | dict[str, Any]:
    """none, auto, required, or the name of a function in {"name": …}."""
    if not isinstance(value, dict):
        return one_of("none", "auto", "required")(name, value)
    known = {"type": one_of("function"), "function": fields({"name": text}, "name")}
    return read(value, known, name, ["type", "function"])["function"]


def _tool_name(name: str, value: Any) -> str:
    if not TOOL_NAME.fullmatch(text(name, value)):
        refuse(name, value, "must be 1 to 64 of a-z A-Z 0-9 _ -")
    return value


def _message(name: str, value: Any) -> dict[str, Any]:
    """One in OpenAI's form; what templates refuse is seen when they are rendered."""
    known: dict[str, Check] = {"role": one_of(*ROLES), "content": _content, "name": text}
    known |= dict.fromkeys(("refusal", "audio", "function_call"), one_of())
    role = value.get("role") if isinstance(value, dict) else None
    if role == "assistant":
        known |= {"tool_calls": _tool_calls, "reasoning_content": text, "annotations": one_of([])}
    if role == "tool":
        known |= {"tool_call_id": text}
    found = read(value, known, name, ["role"])
    found.pop("annotations", None)
    if "content" not in found and not found.get("tool_calls"):
        refuse(f"{name}.content", None, "must be text")
    return found


def _content(name: str, value: Any) -> str:
    """Text, or parts of text."""
    if isinstance(value, str):
        return value
    parts = each(fields({"type": one_of("text"), "text": text}, "type", "text"))(name, value)
    return "".join(part["text"] for part in parts)


def _arguments(name: str, value: Any) -> str:
    try:
        found = json.loads(text(name, value) or "{}")
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        refuse(name, value, "must be a JSON object in a string")
    return value


messages = each(_message, least=1)
_tool_calls = each(fields({
    "id": text, "type": one_of("function"), "index": whole(0),
    "function": fields({"name": text, "arguments": _arguments}, "name", "arguments"),
}, "function"))  # fmt: skip


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object has one key twice")
    return found
