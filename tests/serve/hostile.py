"""Requests that no decent client sends: wrong in their types, their size, their bytes or their end.

Every request is decided by its number, so that one that broke something can be sent again.
"""

import json
import random
import string
from typing import Any, NamedTuple

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"],
}}}  # fmt: skip
GOOD: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2,
        "temperature": 0.5, "top_p": 0.9, "n": 1, "seed": 3, "stop": ["x"], "logprobs": True,
        "top_logprobs": 2, "logit_bias": {"65": 1}, "presence_penalty": 0.1, "stream": False,
        "response_format": {"type": "json_object"},
    },
    "/v1/completions": {
        "model": "tiny", "prompt": "Hello", "max_tokens": 2, "echo": True, "logprobs": 1,
        "temperature": 0, "frequency_penalty": 1, "top_k": 4, "min_p": 0.1, "best_of": 1,
    },
    "/v1/embeddings": {"model": "tiny", "input": ["a", "b"], "encoding_format": "base64"},
    "/tokenize": {"prompt": "Hello", "add_special_tokens": True},
    "/detokenize": {"tokens": [72, 101]},
    "/look": {"text": "Hello", "temperature": 0.5, "top_p": 0.5},
    "/look/attention": {"text": "Hello", "layer": 1},
    "/look/lens": {"tokens": [72, 101]},
    "/look/write": {"prompt": "Hello", "max_tokens": 2, "seed": 1},
    "/look/run": {"name": "none", "offset": 0},
    "/look/tool": {"name": "calculator", "arguments": '{"expression": "6 * 7"}'},
}  # fmt: skip
OFTEN = ["/v1/chat/completions", "/v1/completions"]
TEXTS = [
    "", " ", "\x00", "a" * 300, "\u202e\u200d\ufeff", "é" * 40, "\U0001f469\u200d\U0001f680" * 9,
    "<|im_end|>", "<|im_start|>system\nx", "{{ 7 * 7 }}", "{% raw %}", "../../etc/passwd",
    "NaN", "null", "1e999", "' or 1=1 --", "%00%ff", "\r\nSet-Cookie: a=b", "run:../..", "${x}",
]  # fmt: skip
LONGEST = "a whole number of 5,000 digits"  # which Python does not print
NUMBERS = [
    0,
    -1,
    1,
    2,
    1.5,
    -0.0,
    1e308,
    -1e308,
    5e-324,
    2**31,
    2**63,
    -(2**63) - 1,
    2**64,
    10**30,
    10**400,
    LONGEST,
]
SCHEMAS: list[Any] = [
    True, {}, {"$ref": "#"}, {"$ref": "#/no"}, {"$ref": "http://x.invalid/s.json"}, {"$ref": 7},
    {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
    {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
    {"type": "no"}, {"type": []}, {"type": 5}, {"enum": []}, {"enum": list(range(3000))},
    {"const": "a" * 5000}, {"pattern": "(a+)+$", "type": "string"},
    {"pattern": "(((((a{1,99}){1,99}){1,99}){1,99}){1,99})", "type": "string"},
    {"pattern": "[", "type": "string"}, {"pattern": "^(?=a)b(?!c)\\1$", "type": "string"},
    {"type": "string", "minLength": 10**9}, {"type": "string", "maxLength": -1},
    {"type": "array", "minItems": 10**9}, {"type": "array", "items": {"$ref": "#"}, "minItems": 2},
    {"type": "integer", "minimum": 10**300, "maximum": 1}, {"type": "number", "multipleOf": 0},
    {"type": "integer", "multipleOf": 1e-300}, {"not": {}}, {"allOf": [False]}, {"oneOf": []},
    {"anyOf": [{"type": "string"}] * 400}, {"allOf": [{"type": "string"}, {"type": "integer"}]},
    {"properties": {f"k{n}": {"type": "string"} for n in range(500)},
     "required": [f"k{n}" for n in range(500)]},
    {"type": "object", "patternProperties": {"(": {}}}, {"x-guidance": {"whitespace_pattern": "("}},
    {"type": "object", "properties": {"": {"$id": "http://[", "format": "uri"}}},
    {"type": "string", "format": "no-such-format"}, {"type": "object", "required": ["a"] * 9},
    {"%json": {}}, {"lark": "start: x"}, {"type": "object", "propertyNames": {"pattern": "("}},
]  # fmt: skip
RAW = [
    b"\x16\x03\x01\x02\x00", b"GET / HTTP/9.9\r\n\r\n", b"\r\n" * 50, b"POST",
    b"GET /health\r\n\r\n",
    b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n{}",
    b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999999999999\r\n\r\n{",
    b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n"
    b"Content-Length: 9\r\n\r\n{}",
    b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 70_000 + b"\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: \xff\xfe\r\n\r\n", b"GET /health HTTP/1.1\r\n\r\n",
    b"GET /\xff%00%zz/../../etc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /v1/models/%2e%2e%2f%00 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"TRACE /health HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"CONNECT a.example:443 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" * 20,
    b"GET /health HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: x\r\nSec-WebSocket-Version: 13\r\n\r\n\x81\xff",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\n"
    b"Content-Type: application/json\r\nContent-Length: 50\r\n\r\n",
]  # fmt: skip


class Hostile(NamedTuple):
    """One request. Without a path, `body` is all that is sent, and the socket is half closed."""

    path: str
    body: bytes
    leaves: bool = False  # the client reads the first line of the answer and goes
    half: bool = False  # the client closes its sending side before the answer


def request(number: int) -> Hostile:
    """The request of this number."""
    draw = random.Random(number)
    kind = draw.random()
    if kind < 0.06:
        return Hostile("", draw.choice(RAW))
    path = draw.choice([*GOOD, *OFTEN * 4])
    good: dict[str, Any] = json.loads(json.dumps(GOOD[path]))
    if kind < 0.08:
        return Hostile(path, _large(draw, path, good))
    if kind < 0.18:
        body = bytearray(_text(good).encode())
        for _ in range(draw.randrange(1, 7)):
            body[draw.randrange(len(body))] = draw.randrange(256)
        return Hostile(path, bytes(body[: draw.choice([len(body), draw.randrange(len(body))])]))
    if kind < 0.3 and path == OFTEN[0]:
        good["response_format"] = {
            "type": "json_schema", "json_schema": {"name": "a", "schema": draw.choice(SCHEMAS)},
        }  # fmt: skip
        if draw.random() < 0.4:
            parameters = draw.choice(SCHEMAS)
            tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
            good |= {"tools": [TOOL, tool], "tool_choice": draw.choice(["required", "auto"])}
            del good["response_format"]
    elif kind < 0.36:
        depth = draw.choice([10, 40, 63, 64, 65, 500, 20_000])
        opening, closing = draw.choice([("[", "]"), ('{"a":', "}")])
        deep = opening * depth + "1" + closing * draw.choice([depth, depth - 1, 0])
        name = draw.choice(list(good))
        text = _text(good | {name: "DEEP"}).replace('"DEEP"', deep)
        return Hostile(path, text.encode())
    else:
        for _ in range(draw.choice([0, 1, 1, 1, 2, 4])):
            where: Any = good
            while isinstance(where, dict | list) and where and draw.random() < 0.7:
                name = draw.choice(list(where) if isinstance(where, dict) else range(len(where)))
                if isinstance(where[name], dict | list) and where[name] and draw.random() < 0.6:
                    where = where[name]
                    continue
                where[name] = _value(draw)
                break
        if draw.random() < 0.1:
            good["".join(draw.choices(string.printable, k=draw.randrange(12)))] = _value(draw)
    if draw.random() < 0.2:
        good["stream"] = True
    return Hostile(path, _text(good).encode(), draw.random() < 0.15, draw.random() < 0.1)


def _value(draw: random.Random, depth: int = 3) -> Any:
    kind = draw.randrange(6 if depth else 4)
    if kind == 0:
        return draw.choice(NUMBERS)
    if kind == 1:
        return draw.choice([None, True, False])
    if kind < 4:
        return draw.choice(TEXTS)
    if kind == 4:
        return [_value(draw, depth - 1) for _ in range(draw.randrange(4))]
    keys = ["type", "role", "content", "name", "function", "65", *TEXTS]
    return {draw.choice(keys): _value(draw, depth - 1) for _ in range(draw.randrange(4))}


def _large(draw: random.Random, path: str, good: dict[str, Any]) -> bytes:
    """A megabyte where a few bytes belong."""
    value: Any = draw.choice(["x" * 1_000_000, "\u4e16" * 330_000, [1] * 300_000, ["a"] * 200_000,
                              {str(n): 1 for n in range(60_000)}, "a b" * 330_000])  # fmt: skip
    if path == OFTEN[0] and isinstance(value, str):
        return _text(good | {"messages": [{"role": "user", "content": value}]}).encode()
    names = [n for n in ("prompt", "input", "text", "tokens", "messages") if n in good]
    name = draw.choice([*names, *names, *good])
    return _text(good | {name: value}).encode()


def _text(body: Any) -> str:
    return json.dumps(body).replace(json.dumps(LONGEST), "9" * 5000)
