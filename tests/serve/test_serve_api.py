"""The API as OpenAI's own client sees it, against a real server process."""

import base64
import json
import random
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from urllib.parse import urlparse

import httpx
import psutil
import pytest
from serving import idle

openai = pytest.importorskip("openai")
from openai.types import CreateEmbeddingResponse  # noqa: E402
from openai.types.chat import ChatCompletion, ChatCompletionChunk  # noqa: E402

ASK = [{"role": "user", "content": "Hello"}]
CITY = {
    "type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city", "days"], "additionalProperties": False,
}  # fmt: skip
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": CITY}},
         {"type": "function", "function": {"name": "noon"}}]  # fmt: skip


@pytest.fixture(scope="module")
def address(served):
    return served[0]


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def chat(client):
    return lambda **how: client.chat.completions.create(
        **{"model": "tiny", "messages": ASK, "max_tokens": 24, "temperature": 0} | how
    )


@pytest.fixture
def post(address):
    return lambda path, body: httpx.post(f"{address}{path}", json=body, timeout=60)


def strict(kind, found):
    """The object is of OpenAI's type, which by itself checks nothing."""
    return kind.model_validate(json.loads(found.model_dump_json(exclude_unset=True)), strict=True)


def test_a_streamed_answer_is_the_whole_answer(chat):
    whole = chat(logprobs=True, top_logprobs=3)
    strict(ChatCompletion, whole)
    parts = list(
        chat(logprobs=True, top_logprobs=3, stream=True, stream_options={"include_usage": True})
    )
    for part in parts:
        strict(ChatCompletionChunk, part)
    *parts, last = parts
    assert last.choices == [] and last.usage == whole.usage
    assert all(part.usage is None and len(part.choices) == 1 for part in parts)
    text = "".join(part.choices[0].delta.content or "" for part in parts)
    assert text == whole.choices[0].message.content != ""
    tokens = [t for p in parts if p.choices[0].logprobs for t in p.choices[0].logprobs.content]
    assert tokens == whole.choices[0].logprobs.content and len(tokens) == 24
    assert all(len(token.top_logprobs) == 3 for token in tokens)
    assert all(token.top_logprobs[0].logprob == token.logprob for token in tokens)  # greedy
    assert parts[0].choices[0].delta.role == "assistant"
    assert parts[-1].choices[0].finish_reason == whole.choices[0].finish_reason == "length"
    assert whole.usage.completion_tokens == 24


def test_the_seed_decides_and_several_answers_differ(chat):
    how = {"temperature": 1, "n": 3, "seed": 11}
    first, again, other = chat(**how), chat(**how), chat(**{**how, "seed": 12})
    texts = lambda found: [choice.message.content for choice in found.choices]
    assert texts(first) == texts(again) != texts(other)
    assert len(set(texts(first))) == 3 and [c.index for c in first.choices] == [0, 1, 2]


@pytest.mark.parametrize(("start", "stop"), [(3, 4), (3, 9), (0, 1)])
def test_a_stop_string_ends_the_text_before_it_also_across_tokens(chat, start, stop):
    whole = chat().choices[0].message.content
    mark = whole[start:stop]
    expected = whole[: whole.index(mark)]
    found = chat(stop=[mark, "never to be seen"])
    assert found.choices[0].message.content == expected
    assert found.choices[0].finish_reason == "stop"
    streamed = chat(stop=mark, stream=True)
    assert "".join(part.choices[0].delta.content or "" for part in streamed) == expected


def test_settings_reach_the_tokens(chat):
    text = lambda **how: chat(**how).choices[0].message.content
    assert text(logit_bias={"65": 100}) == "A" * 24
    assert text(logit_bias={"65": 100}, max_completion_tokens=5, max_tokens=None) == "A" * 5
    assert len(set(text(logit_bias={"65": 9}, presence_penalty=2, frequency_penalty=2))) > 1
    plain = text()
    assert text(temperature=1, extra_body={"top_k": 1}) == plain
    assert (
        text(temperature=1, top_p=1e-6) == plain == text(temperature=1, extra_body={"min_p": 0.99})
    )
    assert text(extra_body={"repetition_penalty": 50.0}) != plain
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    assert text(messages=[{"role": "user", "content": parts}]) == plain
    assert text(messages=[{"role": "system", "content": "x"}, *ASK]) != plain


def test_completions_have_the_scores_that_harnesses_need(client, post):
    prompt = list(b"The cat sat")
    ask = lambda **how: client.completions.create(
        **{"model": "tiny", "prompt": [prompt, "The cat sat"], "temperature": 0} | how
    )
    scored = ask(max_tokens=0, echo=True, logprobs=2)
    one, two = (choice.logprobs for choice in scored.choices)
    assert one == two and one.token_logprobs[0] is None and len(one.tokens) == 11
    assert "".join(one.tokens) == "The cat sat" == scored.choices[0].text
    assert one.text_offset == list(range(11))
    written = ask(max_tokens=4, echo=True, logprobs=2)
    assert written.choices[0].logprobs.token_logprobs[:11] == one.token_logprobs
    top = written.choices[0].logprobs.top_logprobs[-1]
    assert max(top.values()) == written.choices[0].logprobs.token_logprobs[-1]
    parts = list(ask(max_tokens=4, echo=True, logprobs=2, stream=True, prompt=[prompt]))
    streamed = [score for part in parts for score in part.choices[0].logprobs.token_logprobs]
    assert streamed == written.choices[0].logprobs.token_logprobs
    # the log-probability of a token that is written is that of the token that is read
    text = prompt + list(ask(max_tokens=1, prompt=prompt).choices[0].text.encode())
    again = ask(prompt=[text], max_tokens=0, echo=True, logprobs=1).choices[0].logprobs
    own = ask(prompt=[prompt], max_tokens=1, logprobs=1).choices[0].logprobs
    if len(text) == 12:  # a byte that is a character
        assert again.token_logprobs[-1] == pytest.approx(own.token_logprobs[0], rel=1e-4)
    # a harness leaves the last token out, so one that ends the answer must be there, too
    ended = ask(max_tokens=1, echo=True, logprobs=1, prompt=[prompt], logit_bias={"256": 100})
    assert ended.choices[0].finish_reason == "stop" and ended.choices[0].text == "The cat sat"
    assert ended.choices[0].logprobs.token_logprobs[:11] == one.token_logprobs
    assert len(ended.choices[0].logprobs.tokens) == 12 and ended.usage.completion_tokens == 0
    assert ask(max_tokens=0).choices[0].text == ""
    assert ask(prompt=["a", "b"], n=2, temperature=1).choices[3].index == 3


def test_embeddings_are_means_or_last_states(client, post):
    ask = lambda **how: client.embeddings.create(**{"model": "tiny", "input": ["cat", "dog"]} | how)
    plain, coded = ask(encoding_format="float"), ask()  # the client asks for base64 by itself
    strict(CreateEmbeddingResponse, plain)
    assert len(plain.data[0].embedding) == 24 and plain.usage.prompt_tokens == 6
    assert plain.data[0].embedding == pytest.approx(coded.data[0].embedding, rel=1e-6)
    raw = post("/v1/embeddings", {"input": "cat", "encoding_format": "base64"}).json()
    packed = base64.b64decode(raw["data"][0]["embedding"])
    assert list(struct.unpack("<24f", packed)) == plain.data[0].embedding
    last = ask(extra_body={"pooling": "last"}, encoding_format="float").data[0].embedding
    assert last != plain.data[0].embedding


def test_models_and_tokens(client, post):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    found = post("/tokenize", {"prompt": "héllo"}).json()
    assert found["tokens"] == list("héllo".encode()) and found["count"] == 6
    assert post("/detokenize", {"tokens": found["tokens"]}).json() == {"prompt": "héllo"}
    asked = post("/tokenize", {"messages": ASK}).json()["count"]
    assert asked > 5


def test_json_and_forced_calls_are_valid_even_from_an_untrained_model(chat):
    jsonschema = pytest.importorskip("jsonschema")
    for seed in range(3):
        how = {"temperature": 1, "seed": seed, "max_tokens": 600}
        form = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY}}
        found = chat(response_format=form, **how).choices[0]
        jsonschema.validate(json.loads(found.message.content), CITY)
        assert found.finish_reason == "stop"
        found = chat(response_format={"type": "json_object"}, **how).choices[0]
        assert isinstance(json.loads(found.message.content), dict)
        for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
            found = chat(tools=TOOLS, tool_choice=choice, **how).choices[0]
            assert found.finish_reason == "tool_calls" and found.message.content is None
            for call in found.message.tool_calls:
                schema = CITY if call.function.name == "weather" else {"type": "object"}
                jsonschema.validate(json.loads(call.function.arguments), schema)
            streamed = list(chat(tools=TOOLS, tool_choice=choice, stream=True, **how))
            deltas = [d for p in streamed for d in p.choices[0].delta.tool_calls or []]
            text = "".join(d.function.arguments for d in deltas)
            assert text == "".join(c.function.arguments for c in found.message.tool_calls)
            assert streamed[-1].choices[0].finish_reason == "tool_calls"


def test_a_conversation_with_calls_goes_on(chat):
    function = {"name": "weather", "arguments": '{"city": "Rome", "days": 2}'}
    call = {"id": "call_1", "type": "function", "function": function}
    said = [*ASK, {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "call_1", "content": "sunny"}]  # fmt: skip
    found = chat(messages=said, tools=TOOLS, max_tokens=3)
    assert found.usage.prompt_tokens > chat(max_tokens=3).usage.prompt_tokens


def form(schema: dict) -> dict:
    return {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}


ENDLESS = {"type": "object", "required": ["a"], "properties": {"a": {"$ref": "#"}}}
REFUSED = {
    "temperature": [-1, 3, "hot", True, 1e999], "top_p": [0, 1.5], "top_k": [-1, 1.5],
    "max_tokens": [-1, 2.5, "9", [1]], "n": [0, 1000, "1"], "seed": [1.5, 10**30],
    "stop": ["", [""], 5, ["a"] * 17, {}], "logit_bias": [{"x": 1}, {"9999": 1}, {"1": 101}, [1]],
    "presence_penalty": [-3, None.__class__.__name__], "stream": ["yes", 1],
    "logprobs": [5], "top_logprobs": [2, 21, -1], "tools": [{}, [{}], [TOOLS[0], TOOLS[0]]],
    "tool_choice": ["auto", "any", {"type": "function"}], "model": ["other", 7],
    "response_format": [
        {"type": "xml"}, {"type": "json_schema"}, "json", form({"$ref": "#/no"}),
        form({"type": "no"}), form(ENDLESS),
    ],
    "messages": [[], "Hi", [{}], [{"role": "king", "content": ""}], [{"role": "user"}],
                 [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
                 [{"role": "user", "content": 5}], [{"role": "user", "content": "a", "mood": 1}],
                 [{"role": "user", "content": "\ud800"}]],
    "service_tier": ["flex"], "store": [True], "modalities": [["audio"]], "foo": [1],
    "functions": [[]], "parallel_tool_calls": ["no"], "stream_options": [{"x": True}, 1],
    "user": [5], "reasoning_effort": ["high"], "suffix": ["x"],
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_field_that_is_not_obeyed_is_refused_by_its_name(address, name):
    for value in REFUSED[name]:
        body = {"messages": ASK, "max_tokens": 2, name: value}
        found = httpx.post(
            f"{address}/v1/chat/completions", content=json.dumps(body),
            headers={"content-type": "application/json"}, timeout=60,
        )  # fmt: skip
        assert found.status_code in (400, 404), (name, value, found.text)
        error = found.json()["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert name in error["message"] or "JSON" in error["message"], error
        assert value == 1e999 or "\\ud800" in json.dumps(value) or name in error["param"], error


@pytest.mark.parametrize(
    "name", ["temperature", "seed", "stop", "tools", "n", "logit_bias", "stream"]
)
def test_null_means_the_default(post, name):
    body = {"messages": ASK, "max_tokens": 2, name: None}
    assert post("/v1/chat/completions", body).status_code == 200


def test_long_prompts_are_refused_and_never_cut(client, chat):
    with pytest.raises(openai.BadRequestError, match="1,024"):
        client.completions.create(model="tiny", prompt="x" * 1024)
    assert client.completions.create(model="tiny", prompt="x" * 1023).usage.completion_tokens == 1
    with pytest.raises(openai.BadRequestError):
        chat(messages=[{"role": "user", "content": "x" * 1_000_000}])


def test_whatever_bytes_arrive_the_server_answers(address):
    url = urlparse(address)
    draw = random.Random(0)
    good = json.dumps({"messages": ASK, "max_tokens": 1}).encode()
    bodies = [
        b"", b"[]", b"null", b"{", b"\xff\xfe", b'{"a": NaN}', b'{"a": 1, "a": 2}', b"[" * 9000,
        b'{"messages":' * 5000, b'{"n": 1' + b"0" * 9000 + b"}", good[:-3], b"\x00" * 100,
    ]  # fmt: skip
    for _ in range(60):
        broken = bytearray(good)
        for _ in range(draw.randrange(1, 6)):
            broken[draw.randrange(len(broken))] = draw.randrange(256)
        bodies.append(bytes(broken))
    with httpx.Client(base_url=address, timeout=60) as client:
        paths = [
            "/v1/chat/completions",
            "/v1/completions",
            "/v1/embeddings",
            "/tokenize",
            "/detokenize",
        ]
        for number, body in enumerate(bodies):
            found = client.post(
                paths[number % 5], content=body, headers={"content-type": "application/json"}
            )
            assert 200 <= found.status_code < 500, (body[:99], found.text)
            assert found.status_code == 200 or "message" in found.json()["error"]
        for found in (client.get("/nothing"), client.post("/health"),
                      client.post(paths[0], content=good),  # of no content type
                      client.post(paths[0], json={}, headers={"origin": "http://evil"}),
                      client.get("/health", headers={"host": "evil"})):  # fmt: skip
            assert 400 <= found.status_code < 500
    cut = (
        b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: 99\r\n\r\n{"
    )
    for raw in (b"\x16\x03\x01", b"GET / HTTP/9.9\r\n\r\n", cut):
        with socket.create_connection((url.hostname, url.port), timeout=10) as half:
            half.sendall(raw)
            half.shutdown(socket.SHUT_WR)
    assert idle(address)


def test_clients_that_leave_free_their_slots_and_the_others_get_their_bits(served, client):
    """64 at a time, of mixed lengths: a quarter leaves, and a few read slowly."""
    address, memory = served[0], psutil.Process(served[1].pid).memory_info
    ask = lambda seed, **more: client.completions.create(
        model="tiny", prompt="word " * (1 + 7 * seed % 40), seed=seed, temperature=1,
        max_tokens=10 + seed % 50, **more,
    )  # fmt: skip
    staying = [seed for seed in range(64) if seed % 4 != 1]
    alone = {seed: ask(seed).choices[0].text for seed in staying}
    before = memory().rss

    def leave(seed: int) -> None:
        with ask(seed, stream=True) as parts:
            next(iter(parts))

    def vanish(seed: int) -> None:
        body = {"prompt": "x", "seed": seed, "max_tokens": 400}
        with suppress(httpx.TimeoutException):
            httpx.post(f"{address}/v1/completions", json=body, timeout=0.3)

    def slowly(seed: int) -> str:
        text = ""
        for part in ask(seed, stream=True):
            text += part.choices[0].text
            time.sleep(0.05)
        return text

    def one(seed: int) -> str | None:
        if seed % 4 == 1:
            (leave if seed % 8 == 1 else vanish)(seed)
            return None
        return slowly(seed) if seed % 16 == 2 else ask(seed).choices[0].text

    with ThreadPoolExecutor(64) as pool:
        found = dict(enumerate(pool.map(one, range(64))))
    assert {seed: found[seed] for seed in alone} == alone
    assert idle(address)
    assert memory().rss - before < 60e6
    lines = httpx.get(f"{address}/metrics").text.splitlines()
    counts = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert float(counts["jaxgpt_compiled_programs_total"]) == 0
    assert float(counts['jaxgpt_finished_total{reason="cancelled"}']) > 0
    assert threading.active_count() < 200
