"""What the page asks for beside OpenAI's API: the inside of models, tools, and the runs.

These requests have a thread of their own: the engine's answers neither wait for what they compute
and compile, nor change by it.
"""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from jaxgpt import inspect, language_model, rundir
from jaxgpt.checkpoint import Checkpoints
from jaxgpt.inspect import Inspection
from jaxgpt.language_model import LanguageModel
from jaxgpt.sampling.sample import Sampling, for_decoding
from jaxgpt.serve import drawing, fields, watch
from jaxgpt.serve.answers import Line, TextStream
from jaxgpt.serve.engine import Engine, Job, Token
from jaxgpt.serve.fields import Refused
from jaxgpt.tasks import tools

if TYPE_CHECKING:
    from jaxgpt.serve.app import Server

MOST_TOKENS = 2048  # of an inspected text: attention is shown as T * T bytes a head
MOST_SEEN = 4  # inspections that are kept for what the page asks about them next
MOST_SCORES = 1 << 26  # of the kept inspections together: 256 MB, of a large vocabulary one
MOST_OPENED = 2  # models of other runs that are kept
MOST_WRITTEN = 512  # tokens that a model beside the served one writes
RUN = "run:"  # begins the name of a model that is another run's newest checkpoint

EXPRESSION = {"type": "object", "required": ["expression"],
              "properties": {"expression": {"type": "string"}}}  # fmt: skip
DESCRIBED = {"calculator": "Computes an arithmetic expression exactly, such as (3 + 4) * 2."}


class Looker:
    """The models that may be looked into, and what was seen last."""

    def __init__(self, server: "Server") -> None:
        self.server, checkpoint = server, Path(server.cfg.checkpoint)
        self.is_run = rundir.is_run(checkpoint)
        self.runs = checkpoint.absolute().parent if self.is_run else Path("runs")
        self._opened: dict[str, tuple[int, LanguageModel]] = {}
        self._seen: dict[str, tuple[Inspection, LanguageModel]] = {}
        self._turn: anyio.CapacityLimiter | None = None

    async def apart(self, function: Callable[..., Any], *args: Any) -> Any:
        """Runs a function in the thread of such requests, one at a time."""
        if self.server.engine.mesh is not None:
            # Two programs at a time could each have some of the devices and wait for the others.
            return await self.server.on_device(partial(function, *args))
        if self._turn is None:
            self._turn = anyio.CapacityLimiter(1)
        return await anyio.to_thread.run_sync(partial(function, *args), limiter=self._turn)

    def about(self) -> dict[str, Any]:
        """What there is to talk to, to look into and to use."""
        server = self.server
        offered = [
            {"type": "function", "function": {
                "name": name, "description": DESCRIBED.get(name, ""), "parameters": EXPRESSION,
            }}
            for name in tools.TOOLS
        ]  # fmt: skip
        return {
            "served": server.name, "models": list(server.models),
            "context": server.engine.capacity, "chat": server.lm.chat_template is not None,
            # Our own models are taught to write calls as text, and read no list of tools.
            "tools": offered, "text_tools": self.is_run, "runs": watch.runs(self.runs),
        }  # fmt: skip

    def look(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """One model's view of a text, or two and how they differ."""
        names = [given.get("model", self.server.name), given.get("against")]
        found = [(name, *self.inspect({**given, "model": name})) for name in names if name]
        views = [drawing.view(seen, lm.tokenizer, name) for name, seen, lm in found]
        if len(found) == 1:
            return {"first": views[0]}
        compared = drawing.comparison(inspect.compare(found[0][1], found[1][1]))
        return {"first": views[0], "second": views[1], "comparison": compared}

    def inspect(self, given: Mapping[str, Any]) -> tuple[Inspection, LanguageModel]:
        """Kept from request to request: the page shows the layers of one text one by one."""
        name = given.get("model", self.server.name)
        lm, adapter, step = self._model(name)
        how = {k: given[k] for k in SAMPLING if k in given}
        read = [given[k] for k in ("text", "messages", "tokens") if k in given]
        if len(read) != 1:
            raise Refused("text: give one of text, messages and tokens", "text")
        key = json.dumps([name, step, read, how])
        if key not in self._seen:
            length = len(lm.encode(read[0])) if "text" in given else len(given.get("tokens", []))
            if length > MOST_TOKENS:
                raise Refused(f"text: has {length:,} tokens; at most {MOST_TOKENS:,} are drawn")
            self._seen[key] = lm.inspect(read[0], adapter, **how), lm
        self._seen[key] = self._seen.pop(key)  # the newest comes last
        room = MOST_SCORES // self._seen[key][0].logits_TV.size
        _keep_last(self._seen, max(1, min(MOST_SEEN, room)))
        return self._seen[key]

    def heads(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """How far each head is an induction head."""
        lm, adapter, _ = self._model(given.get("model", self.server.name))
        return {"scores": drawing.heads(lm.induction_scores(adapter))}

    def write(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """What a model writes on, of which no engine holds slots."""
        lm, adapter, step = self._model(given.get("model", self.server.name))
        how = {k: given[k] for k in SAMPLING if k in given}
        prompt = given.get("prompt", "")
        ids = lm.encode(prompt) or [lm.tokenizer.eos_id]
        settings = Sampling(min(given.get("max_tokens", 96), MOST_WRITTEN), **how)
        params = lm.params if adapter is None else lm.adapters[adapter]
        # An engine, whose settings are arrays: `lm.complete` would compile a program for each.
        engine = Engine(lm.config, params, 1, MOST_TOKENS, prefix_bytes=0)
        line, stops = Line(), frozenset(lm.stop_ids)
        job = Job(ids, settings, line, given.get("seed", 0), stop_ids=stops)
        job.check(lm.config, engine.capacity)
        engine.work_off(job)
        stream, *tokens = TextStream(lm.tokenizer, ids), *line.queue.queue
        text = "".join(stream.add(token.id) for token in tokens if isinstance(token, Token))
        return {"text": text + stream.rest(), "step": step}

    def _model(self, name: str) -> tuple[LanguageModel, str | None, int]:
        """A served model and its adapter, or a run's newest intact checkpoint; and its step."""
        server = self.server
        if name in server.models:
            return server.lm, None if name == server.name else name, 0
        path = watch.find(self.runs, name.removeprefix(RUN)) if name.startswith(RUN) else None
        newest = max(Checkpoints(path / "checkpoints").steps(), default=None) if path else None
        if path is None or newest is None:
            raise Refused(
                f"model={name[:80]}: is neither served nor a run with weights", "model", 404
            )
        if self._opened.get(name, (None,))[0] != newest:
            self._opened.pop(name, None)  # before the new one takes its memory
            lm = language_model.load(path, merged=True)
            lm.params = for_decoding(lm.config, lm.params, 1)
            self._opened[name] = newest, lm
        self._opened[name] = self._opened.pop(name)
        _keep_last(self._opened, MOST_OPENED)
        return self._opened[name][1], None, newest


SAMPLING: dict[str, fields.Check] = {
    "temperature": fields.number(0, 2), "top_p": fields.number(0, 1, above=True),
    "top_k": fields.whole(0), "min_p": fields.number(0, 0.999),
    "repetition_penalty": fields.number(0, 100, above=True),
}  # fmt: skip
TEXT: dict[str, fields.Check] = SAMPLING | {
    "model": fields.text, "text": fields.text, "messages": fields.messages,
    "tokens": partial(fields.ids, vocab_size=1 << 31),
}  # fmt: skip


async def page(server: "Server", request: Request) -> Response:
    """The page itself, which asks for an API key where one is needed."""
    return HTMLResponse(drawing.PAGE.read_text(encoding="utf-8"), headers={
        "X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY",
        "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache",
    })  # fmt: skip


def _lens(looker: Looker, given: Mapping[str, Any]) -> dict[str, Any]:
    found, lm = looker.inspect(given)
    return drawing.lens(found, lm.tokenizer)


def _attention(looker: Looker, given: Mapping[str, Any]) -> dict[str, Any]:
    layer = given.get("layer", 0)
    found, _ = looker.inspect({name: given[name] for name in given if name != "layer"})
    if layer >= found.config.num_layers:
        raise Refused(f"layer={layer}: the model has {found.config.num_layers}", "layer")
    return {"layer": layer, "weights": drawing.attention(found, layer)}


def _run(looker: Looker, given: Mapping[str, Any]) -> dict[str, Any]:
    """What a run has recorded since it was asked last."""
    name = given.get("name", "")
    path = watch.find(looker.runs, name)
    if path is None:
        raise Refused(f"name={name[:80]}: there is no such run", "name", 404)
    return watch.read(path, given.get("offset", 0))


def _tool(_: Looker, given: Mapping[str, Any]) -> dict[str, Any]:
    """What a tool gives: called by name, or by the end of a text."""
    if "name" not in given:
        names = given.get("names", list(tools.TOOLS))
        return {"result": tools.observe(given.get("text", ""), names)}
    arguments = fields.parse(given.get("arguments", "{}").encode() or b"{}")
    values = [value for value in arguments.values() if isinstance(value, str)]
    return {"result": tools.TOOLS[given["name"]](values[0] if values else "")}


async def _answer(
    known: Mapping[str, fields.Check],
    function: Callable[[Looker, Mapping[str, Any]], dict[str, Any]],
    computes: bool,
    server: "Server",
    request: Request,
    body: dict[str, Any],
) -> Response:
    looker, given = server.looker, fields.read(body, known)
    run = looker.apart if computes else anyio.to_thread.run_sync
    return JSONResponse(await run(function, looker, given))


_tools = fields.one_of(*tools.TOOLS)
MODEL: dict[str, fields.Check] = {"model": fields.text}
# Of each request its fields, what answers it, and whether that computes with a model.
ROUTES = {
    path: partial(_answer, *how)
    for path, how in {
        "/look": (TEXT | {"against": fields.text}, Looker.look, True),
        "/look/about": ({}, lambda looker, _: looker.about(), False),
        "/look/lens": (TEXT, _lens, True),
        "/look/attention": (TEXT | {"layer": fields.whole(0)}, _attention, True),
        "/look/heads": (MODEL, Looker.heads, True),
        "/look/write": (SAMPLING | MODEL | {
            "prompt": fields.text, "max_tokens": fields.whole(1), "seed": fields.whole(0, 2**31),
        }, Looker.write, True),
        "/look/run": ({"name": fields.text, "offset": fields.whole(0)}, _run, False),
        "/look/tool": ({
            "name": _tools, "arguments": fields.text, "text": fields.text,
            "names": fields.each(_tools),
        }, _tool, False),
    }.items()
}  # fmt: skip


def _keep_last(kept: dict[str, Any], most: int) -> None:
    for name in list(kept)[:-most]:
        del kept[name]
