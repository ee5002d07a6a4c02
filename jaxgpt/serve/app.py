"""OpenAI's API over the engine, and what stands in front of it: keys, limits, errors."""

import asyncio
import base64
import hmac
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import anyio.to_thread
import jax
import numpy as np
from sse_starlette import EventSourceResponse
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from jaxgpt.config import ServeConfig
from jaxgpt.language_model import LanguageModel
from jaxgpt.sampling import slots
from jaxgpt.sampling.sample import Sampling
from jaxgpt.serve import fields, look, replies
from jaxgpt.serve.answers import Answer
from jaxgpt.serve.chats import Chats
from jaxgpt.serve.engine import Busy, Engine, Failed, Job
from jaxgpt.serve.fields import Refused
from jaxgpt.serve.metrics import Metrics

MOST_ANSWERS = 128  # to one request, over all its prompts
COLDEST = 1e-5  # a temperature under which nothing but the likeliest token is drawn
GET, POST = ["GET"], ["POST"]


class Server:
    """What the routes share: the model, the engine that runs it, and the settings."""

    def __init__(self, cfg: ServeConfig, lm: LanguageModel, engine: Engine) -> None:
        self.cfg, self.lm, self.engine = cfg, lm, engine
        self.name = Path(cfg.checkpoint).name or cfg.checkpoint
        self.models = {self.name: 0, **{n: i for i, n in enumerate(lm.adapters, 1)}}
        if self.name in lm.adapters:
            raise ValueError(f"adapter={self.name}: is the checkpoint's own name; take another")
        self.chats = Chats(lm, self.name)
        self.metrics = Metrics(engine)
        self.looker = look.Looker(self)
        self.created = int(time.time())
        self.fingerprint = f"jax_{jax.__version__}"  # other versions may write other bits
        vocab_size = lm.config.vocab_size
        self.common: dict[str, fields.Check] = {
            "model": self._model, "stream": fields.flag,
            "stream_options": fields.stream_options, "n": fields.whole(1, MOST_ANSWERS),
            "max_tokens": fields.whole(0), "temperature": fields.number(0, 2),
            "top_p": fields.number(0, 1, above=True), "top_k": fields.whole(0, 2**31 - 1),
            "min_p": fields.number(0, 0.999), "seed": fields.whole(-(2**63), 2**63 - 1),
            "stop": fields.stops, "presence_penalty": fields.number(-2, 2),
            "frequency_penalty": fields.number(-2, 2),
            "repetition_penalty": fields.number(0, 100, above=True),
            "logit_bias": fields.biases(slots.MOST_BIASES, vocab_size), "user": fields.text,
        }  # fmt: skip
        self.chat_fields = self.common | {
            "messages": fields.messages, "max_completion_tokens": fields.whole(1),
            "logprobs": fields.flag, "top_logprobs": fields.whole(0, slots.NUM_TOP),
            "response_format": fields.response_format, "tools": fields.tools,
            "tool_choice": fields.tool_choice, "parallel_tool_calls": fields.flag,
            "store": fields.one_of(False), "modalities": fields.one_of(["text"]),
            "service_tier": fields.one_of("auto", "default"),
        }  # fmt: skip
        self.text_fields = self.common | {
            "prompt": self._prompts, "echo": fields.flag, "suffix": fields.one_of(""),
            "logprobs": fields.whole(0, slots.NUM_TOP), "best_of": fields.whole(1, MOST_ANSWERS),
        }  # fmt: skip

    async def on_device(self, function: Callable[[], Any]) -> Any:
        """Runs a function in the thread that owns the device, between two of its steps."""
        return await asyncio.wrap_future(self.engine.call(function))

    def _model(self, name: str, value: Any) -> str:
        if fields.text(name, value) not in self.models:
            known = ", ".join(self.models)
            raise Refused(
                f"model={value[:80]}: is not served here ({known})", name, 404, "model_not_found"
            )
        return value

    def _prompts(self, name: str, value: Any) -> list[str | list[int]]:
        """A text, texts, token ids, or lists of them; as a list of prompts."""
        if isinstance(value, str):
            return [value]
        if isinstance(value, list) and value and not isinstance(value[0], str | list):
            return [fields.ids(name, value, self.lm.config.vocab_size)]
        if not isinstance(value, list) or not 1 <= len(value) <= MOST_ANSWERS:
            fields.refuse(name, value, "must be a text, token ids, or a list of these")
        return [
            prompt if isinstance(prompt, str)
            else fields.ids(f"{name}[{place}]", prompt, self.lm.config.vocab_size)
            for place, prompt in enumerate(value)
        ]  # fmt: skip


def build(server: Server) -> Starlette:
    """The application."""
    cfg = server.cfg
    local = ["localhost", "127.0.0.1", "[::1]", cfg.host]
    middleware = [
        # A page of another site must not reach a server of this machine by a name of its own.
        Middleware(TrustedHostMiddleware, allowed_hosts=local if _is_local(cfg.host) else ["*"]),
    ]
    if cfg.cors:
        middleware.append(
            Middleware(
                CORSMiddleware, allow_origins=cfg.cors, allow_methods=["*"], allow_headers=["*"]
            )
        )
    route = lambda path, endpoint, methods: Route(path, partial(endpoint, server), methods=methods)
    app = Starlette(
        routes=[
            route("/health", _health, GET),
            route("/metrics", _metrics, GET),
            route("/v1/models", _models, GET),
            route("/v1/models/{name:path}", _model, GET),
            route("/v1/chat/completions", _guarded(_chat), POST),
            route("/v1/completions", _guarded(_complete), POST),
            route("/v1/embeddings", _guarded(_embed), POST),
            route("/tokenize", _guarded(_tokenize), POST),
            route("/detokenize", _guarded(_detokenize), POST),
            route("/", look.page, GET),
            *[route(path, _guarded(endpoint), POST) for path, endpoint in look.ROUTES.items()],
        ],
        middleware=middleware,
        exception_handlers={Refused: _refused, HTTPException: _http_error, Exception: _broken},  # type: ignore[dict-item]
    )
    app.state.server = server
    return app


def _is_local(host: str) -> bool:
    return host in ("127.0.0.1", "localhost", "::1")


def _guarded(
    endpoint: Callable[[Server, Request, dict[str, Any]], Awaitable[Response]],
) -> Callable[[Server, Request], Awaitable[Response]]:
    """Checks who asks, reads the body within its limits, and lets the endpoint answer."""

    async def guarded(server: Server, request: Request) -> Response:
        check_access(server, request)
        if request.headers.get("content-type", "").split(";")[0].strip() != "application/json":
            raise Refused("content-type: must be application/json", status=415)
        body = fields.parse(await _body(server, request))
        try:
            with server.metrics.timed(request.url.path):
                return await endpoint(server, request, body)
        except ValueError as error:
            raise Refused(str(error)) from error
        except Busy as error:
            raise Refused(
                f"{error}; try again", status=429, code="rate_limit_exceeded",
                kind="rate_limit_error", headers={"Retry-After": "1"},
            ) from error  # fmt: skip
        except Failed as error:
            raise Refused(str(error), status=503, kind="server_error") from error

    return guarded


def check_access(server: Server, request: Request) -> None:
    """Raises Refused for a wrong key, and for a page of another origin."""
    cfg, origin = server.cfg, request.headers.get("origin")
    if origin and origin not in cfg.cors and "*" not in cfg.cors:
        own = origin.partition("://")[2]
        if own != request.headers.get("host"):
            raise Refused(f"origin={origin[:80]}: is not allowed (--cors)", status=403)
    if not cfg.api_key:
        return
    given = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
    if not any([hmac.compare_digest(given, key.encode()) for key in cfg.api_key]):
        raise Refused(
            "the API key is missing or wrong", status=401, code="invalid_api_key",
            kind="authentication_error", headers={"WWW-Authenticate": "Bearer"},
        )  # fmt: skip


async def _body(server: Server, request: Request) -> bytes:
    most, found = server.cfg.max_body, bytearray()
    try:
        async with asyncio.timeout(server.cfg.body_seconds):
            async for part in request.stream():
                found += part
                if len(found) > most:
                    raise Refused(f"the body is larger than {most:,} bytes", status=413)
    except TimeoutError:
        raise Refused("the body did not arrive in time", status=408) from None
    return bytes(found)


async def _refused(_: Request, error: Refused) -> Response:
    return JSONResponse(error.body, error.status, error.headers)


async def _http_error(request: Request, error: HTTPException) -> Response:
    message = f"{request.method} {request.url.path[:80]}: {error.detail}"
    refused = Refused(message, status=error.status_code, headers=error.headers)
    return await _refused(request, refused)


async def _broken(request: Request, error: Exception) -> Response:
    name = type(error).__name__
    refused = Refused(f"{name}: see the server's log", status=500, kind="server_error")
    return await _refused(request, refused)


async def _health(server: Server, _: Request) -> Response:
    if not server.engine.alive:
        refused = Refused("the engine has stopped", status=503, kind="server_error")
        return JSONResponse(refused.body, 503)
    rows = server.engine.rows
    free, waiting = rows.count(None), len(server.engine.waiting)
    return JSONResponse({"status": "ok", "slots": len(rows), "free": free, "waiting": waiting})


async def _metrics(server: Server, request: Request) -> Response:
    check_access(server, request)
    return Response(server.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _described(server: Server, name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": server.created, "owned_by": "jaxgpt"}


async def _models(server: Server, request: Request) -> Response:
    check_access(server, request)
    data = [_described(server, name) for name in server.models]
    return JSONResponse({"object": "list", "data": data})


async def _model(server: Server, request: Request) -> Response:
    check_access(server, request)
    name = request.path_params["name"]
    return JSONResponse(_described(server, server._model("model", name)))


async def _chat(server: Server, request: Request, body: dict[str, Any]) -> Response:
    given = fields.read(body, server.chat_fields, required=["messages"])
    if "max_tokens" in given and "max_completion_tokens" in given:
        raise Refused("max_tokens: goes not beside max_completion_tokens", "max_tokens")
    if given.get("top_logprobs") is not None and not given.get("logprobs"):
        raise Refused("top_logprobs: needs logprobs true", "top_logprobs")
    most = given.get("max_completion_tokens", given.get("max_tokens"))
    plan = await _in_thread(server.chats.plan, given)
    how = _sampling(given, server.engine.capacity if most is None else most)
    tops = bool(given.get("top_logprobs"))
    answers = _answers(server, given, [plan.prompt], how, tops, grammar=plan.grammar)
    maker = replies.Chat(server, given, answers, plan.reader)
    return await _respond(server, request, given, answers, maker)


async def _complete(server: Server, request: Request, body: dict[str, Any]) -> Response:
    given = fields.read(body, server.text_fields, required=["prompt"])
    if given.get("best_of", given.get("n", 1)) != given.get("n", 1):
        raise Refused("best_of: must be equal to n", "best_of")
    prompts = await _encoded(server, given["prompt"], [server.lm.tokenizer.eos_id])
    how = _sampling(given, given.get("max_tokens", 16))
    scored = bool(given.get("echo")) and given.get("logprobs") is not None
    answers = _answers(server, given, prompts, how, bool(given.get("logprobs")), scored)
    maker = replies.Text(server, given, answers)
    return await _respond(server, request, given, answers, maker)


async def _embed(server: Server, request: Request, body: dict[str, Any]) -> Response:
    dim = server.lm.config.model_dim
    known = {
        "model": server._model, "input": server._prompts, "user": fields.text,
        "encoding_format": fields.one_of("float", "base64"), "dimensions": fields.one_of(dim),
        "pooling": fields.one_of("mean", "last"),
    }  # fmt: skip
    given = fields.read(body, known, required=["input"])
    prompts = await _encoded(server, given["input"])
    how = Sampling(0, temperature=0.0, top_p=1.0)
    answers = _answers(server, given, prompts, how, False, scored=True)
    await _finish(server, request, answers)
    data = []
    for index, answer in enumerate(answers):
        assert answer.hidden_2D is not None
        place = 1 if given.get("pooling") == "last" else 0
        vector_D = answer.hidden_2D[place].astype(np.float32)
        as_text = given.get("encoding_format") == "base64"
        shown = base64.b64encode(vector_D.tobytes()).decode() if as_text else vector_D.tolist()
        data.append({"object": "embedding", "index": index, "embedding": shown})
    count = sum(map(len, prompts))
    usage = {"prompt_tokens": count, "total_tokens": count}
    model = given.get("model", server.name)
    return JSONResponse({"object": "list", "data": data, "model": model, "usage": usage})


async def _tokenize(server: Server, _: Request, body: dict[str, Any]) -> Response:
    known = {
        "model": server._model, "prompt": fields.text, "content": fields.text,
        "add_special_tokens": fields.flag, "messages": fields.messages, "tools": fields.tools,
    }  # fmt: skip
    given = fields.read(body, known)
    if len(given.keys() & {"prompt", "content", "messages"}) != 1:
        raise Refused("prompt: give one of prompt, content and messages", "prompt")
    if "messages" in given:
        tokens = (await _in_thread(server.chats.plan, given)).prompt
    else:
        text: str = given["prompt"] if "prompt" in given else given["content"]
        plain = partial(server.lm.tokenizer.encode, text, allow_special=True)
        whole = partial(server.lm.encode, text)
        tokens = await _in_thread(whole if given.get("add_special_tokens", True) else plain)
    found = {"tokens": tokens, "count": len(tokens), "max_model_len": server.engine.capacity}
    return JSONResponse(found)


async def _detokenize(server: Server, _: Request, body: dict[str, Any]) -> Response:
    ids = partial(fields.ids, vocab_size=server.lm.config.vocab_size)
    given = fields.read(body, {"model": server._model, "tokens": ids}, required=["tokens"])
    return JSONResponse({"prompt": server.lm.tokenizer.decode(given["tokens"])})


async def _encoded(
    server: Server, prompts: Sequence[Any], empty: Sequence[int] = ()
) -> list[list[int]]:
    """Ids of texts; `empty` are those of an empty one."""
    encode = lambda p: server.lm.encode(p) or [*empty] if isinstance(p, str) else p
    return await _in_thread(lambda: [encode(prompt) for prompt in prompts])


def _sampling(given: Mapping[str, Any], most: int) -> Sampling:
    heat = given.get("temperature", 1.0)
    return Sampling(
        most, heat if heat > COLDEST else 0.0, given.get("top_p", 1.0), given.get("top_k", 0),
        given.get("min_p", 0.0), given.get("repetition_penalty", 1.0),
    )  # fmt: skip


def _answers(
    server: Server,
    given: Mapping[str, Any],
    prompts: Sequence[Sequence[int]],
    how: Sampling,
    tops: bool,
    scored: bool = False,
    grammar: Callable[[int], Any] | None = None,
) -> list[Answer]:
    """Queues a job for every answer to every prompt."""
    n = given.get("n", 1)
    if n * len(prompts) > MOST_ANSWERS:
        raise Refused(f"n={n}: more than {MOST_ANSWERS} answers to one request", "n")
    seed = given["seed"] if "seed" in given else secrets.randbits(63)
    answers = []
    for prompt in prompts:
        room = server.engine.capacity - len(prompt)
        for number in range(n):
            answer = Answer(server.lm.tokenizer, given.get("stop", []))
            answer.job = Job(
                prompt, how, answer, seed, number, given.get("presence_penalty", 0.0),
                given.get("frequency_penalty", 0.0), given.get("logit_bias", {}),
                server.models[given.get("model", server.name)],
                frozenset(server.lm.stop_ids), tops, scored,
                grammar and grammar(min(how.max_new_tokens, room)),
                hasty=bool(given.get("stream")),
                deadline=time.monotonic() + server.cfg.request_seconds,
            )  # fmt: skip
            answer.job.check(server.lm.config, server.engine.capacity)
            answers.append(answer)
    server.engine.submit([answer.job for answer in answers])
    return answers


async def _respond(
    server: Server,
    request: Request,
    given: Mapping[str, Any],
    answers: list[Answer],
    maker: "replies.Chat | replies.Text",
) -> Response:
    if given.get("stream"):
        return _Stream(server, answers, _events(server, given, answers, maker))
    return JSONResponse(maker.whole(await _finish(server, request, answers)))


class _Stream(EventSourceResponse):
    """Events; the jobs end with the response, whoever ended it and however early."""

    def __init__(self, server: Server, answers: list[Answer], events: AsyncIterator[Any]) -> None:
        super().__init__(events, sep="\n", send_timeout=server.cfg.send_seconds)
        self._server, self._answers = server, answers

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            for answer in self._answers:
                self._server.engine.cancel(answer.job)


async def _finish(server: Server, request: Request, answers: list[Answer]) -> list[list[Any]]:
    """All that the answers will be; their jobs end early if nobody waits any more."""

    async def collect(answer: Answer) -> list[Any]:
        deltas = [await answer.next()]
        while deltas[-1].finish is None:
            deltas.append(await answer.next())
        _require_answer(server, deltas[-1].finish)
        return deltas

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    work = asyncio.gather(*map(collect, answers))
    watch = asyncio.ensure_future(gone())
    try:
        await asyncio.wait([work, watch], return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise Refused("the client has gone", status=499)
        return await work
    finally:
        watch.cancel()
        work.cancel()
        for answer in answers:
            server.engine.cancel(answer.job)


async def _events(
    server: Server,
    given: Mapping[str, Any],
    answers: list[Answer],
    maker: "replies.Chat | replies.Text",
) -> AsyncIterator[dict[str, str]]:
    """The parts of a stream, as they come, whichever answer they belong to."""
    queue: asyncio.Queue[tuple[Answer, Any]] = asyncio.Queue()

    async def follow(answer: Answer) -> None:
        finish = None
        while finish is None:
            delta = await answer.next()
            finish = delta.finish
            queue.put_nowait((answer, delta))

    followers = [asyncio.ensure_future(follow(answer)) for answer in answers]
    try:
        going = len(answers)
        while going:
            answer, delta = await queue.get()
            _require_answer(server, delta.finish)
            for part in maker.parts(answer, delta):
                yield {"data": json.dumps(part)}
            going -= delta.finish is not None
        if given.get("stream_options", {}).get("include_usage"):
            yield {"data": json.dumps(maker.last())}
        yield {"data": "[DONE]"}
    except Refused as error:
        yield {"data": json.dumps(error.body)}
    finally:
        for follower in followers:
            follower.cancel()


def _require_answer(server: Server, finish: str | None) -> None:
    """Raises Refused where an answer ended without one."""
    if finish == "timeout":
        raise Refused("the request took too long", status=408, code="timeout", kind="server_error")
    if finish == "error" and server.engine.alive:
        raise Refused("the answer failed: see the server's log", status=500, kind="server_error")
    if finish in ("error", "cancelled"):
        raise Refused("the engine has stopped", status=503, kind="server_error")


async def _in_thread(function: Callable[..., Any], *args: Any) -> Any:
    """What may take a while, such as reading a long text, must not stop the others."""
    return await anyio.to_thread.run_sync(partial(function, *args))
