"""Answers in the form of OpenAI's objects, whole or part by part."""

import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxgpt.data.tool_calls import Reader
from jaxgpt.serve.answers import Answer, Delta
from jaxgpt.serve.engine import Token

if TYPE_CHECKING:
    from jaxgpt.serve.app import Server


class _Reply:
    """What chats and completions share."""

    kind = prefix = ""

    def __init__(self, server: "Server", given: Mapping[str, Any], answers: Sequence[Answer]):
        self.server, self.given, self.answers = server, given, list(answers)
        self.index = {id(answer): n for n, answer in enumerate(answers)}
        self.head = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}", "object": self.kind,
            "created": int(time.time()), "model": given.get("model", server.name),
            "system_fingerprint": server.fingerprint,
        }  # fmt: skip

    def usage(self) -> dict[str, Any]:
        """Tokens of the prompts, each counted once, and of the answers."""
        firsts = self.answers[:: self.given.get("n", 1)]
        prompt = sum(len(answer.job.prompt) for answer in firsts)
        written = sum(answer.written for answer in self.answers)
        cached = sum(answer.cached for answer in firsts)
        return {
            "prompt_tokens": prompt, "completion_tokens": written,
            "total_tokens": prompt + written, "prompt_tokens_details": {"cached_tokens": cached},
        }  # fmt: skip

    def part(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """A part of a stream."""
        options = self.given.get("stream_options", {})
        empty = {"usage": None} if options.get("stream_options.include_usage") else {}
        return {**self.head, "choices": choices, **empty}

    def last(self) -> dict[str, Any]:
        """The part that holds what all of them cost."""
        return {**self.head, "choices": [], "usage": self.usage()}

    def token_text(self, token: int) -> bytes:
        """A token by itself; not always text."""
        return self.server.lm.tokenizer.decode_bytes([token])


class Chat(_Reply):
    """chat.completion and chat.completion.chunk."""

    def __init__(
        self,
        server: "Server",
        given: Mapping[str, Any],
        reader: Any,
        answers: Sequence[Answer],
    ) -> None:
        self.kind = "chat.completion.chunk" if given.get("stream") else "chat.completion"
        self.prefix = "chatcmpl"
        super().__init__(server, given, answers)
        self.readers: list[Reader] = [reader() for _ in answers]
        self.messages: list[dict[str, Any]] = [{"content": "", "tool_calls": []} for _ in answers]
        self.logprobs: list[list[Any]] = [[] for _ in answers]
        self.finish = [""] * len(answers)

    def begin(self) -> Iterator[dict[str, Any]]:
        """Who speaks."""
        for index in range(len(self.answers)):
            yield self.part([self._choice(index, {"role": "assistant", "content": ""})])

    def parts(self, answer: Answer, delta: Delta) -> Iterator[dict[str, Any]]:
        """What a delta means to who reads the stream."""
        index = self.index[id(answer)]
        found = self._read(index, delta)
        logprobs = self._logprobs(delta.tokens)
        for shown in found:
            yield self.part([self._choice(index, shown, logprobs)])
            logprobs = self._logprobs([])
        if delta.tokens and not found and self.given.get("logprobs"):
            yield self.part([self._choice(index, {}, logprobs)])
        if delta.finish:
            finish = self._finish(index, delta.finish)
            yield self.part([{**self._choice(index, {}), "finish_reason": finish}])

    def add(self, answer: Answer, delta: Delta) -> None:
        """Gathers a delta for `whole`."""
        index = self.index[id(answer)]
        message = self.messages[index]
        for shown in self._read(index, delta):
            message["content"] += shown.get("content", "")
            for call in shown.get("tool_calls", []):
                if "id" in call:
                    message["tool_calls"].append({k: call[k] for k in ("id", "type", "function")})
                else:
                    arguments = call["function"]["arguments"]
                    message["tool_calls"][-1]["function"]["arguments"] += arguments
        self.logprobs[index] += delta.tokens
        if delta.finish:
            self.finish[index] = self._finish(index, delta.finish)

    def whole(self) -> dict[str, Any]:
        """The object of an answer that is not streamed."""
        choices = []
        for index, message in enumerate(self.messages):
            calls = message["tool_calls"]
            said = {"role": "assistant", "content": message["content"], "refusal": None}
            if calls:
                said |= {"content": message["content"] or None, "tool_calls": calls}
            choices.append({
                "index": index, "message": said, "finish_reason": self.finish[index],
                "logprobs": self._logprobs(self.logprobs[index]),
            })  # fmt: skip
        return {**self.head, "choices": choices, "usage": self.usage()}

    def _read(self, index: int, delta: Delta) -> list[dict[str, Any]]:
        reader = self.readers[index]
        return reader.add(delta.text) + (reader.rest() if delta.finish else [])

    def _finish(self, index: int, finish: str) -> str:
        return "tool_calls" if finish == "stop" and self.readers[index].calls else finish

    def _choice(self, index: int, delta: dict[str, Any], logprobs: Any = None) -> dict[str, Any]:
        return {"index": index, "delta": delta, "finish_reason": None, "logprobs": logprobs}

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if not self.given.get("logprobs"):
            return None
        count = self.given.get("top_logprobs", 0)
        return {
            "content": [
                {**self._shown(token.id, token.logprob), "token_id": token.id,
                 "top_logprobs": [self._shown(*pair) for pair in token.tops[:count]]}
                for token in tokens
            ],
            "refusal": None,
        }  # fmt: skip

    def _shown(self, token: int, logprob: float) -> dict[str, Any]:
        text = self.token_text(token)
        shown = {"token": text.decode(errors="replace"), "bytes": list(text)}
        return {**shown, "logprob": max(logprob, -9999.0)}


class Text(_Reply):
    """text_completion."""

    kind, prefix = "text_completion", "cmpl"

    def __init__(
        self,
        server: "Server",
        given: Mapping[str, Any],
        prompts: Sequence[Sequence[int]],
        answers: Sequence[Answer],
    ) -> None:
        super().__init__(server, given, answers)
        decode = server.lm.tokenizer.decode
        shown = [p if isinstance(p, str) else decode(p) for p in given["prompt"]]
        self.before = shown if given.get("echo") else [""] * len(prompts)
        self.deltas: list[list[Delta]] = [[] for _ in answers]
        self.offset = [0] * len(answers)

    def begin(self) -> Iterator[dict[str, Any]]:
        """The prompt, if it shall be repeated."""
        for index, _ in enumerate(self.answers):
            if before := self._before(index):
                yield self.part([self._choice(index, before, None, None)])
                self.offset[index] = len(before)

    def parts(self, answer: Answer, delta: Delta) -> Iterator[dict[str, Any]]:
        """What a delta means to who reads the stream."""
        index = self.index[id(answer)]
        logprobs = self._logprobs(_with_stop(answer, delta), self.offset[index])
        self.offset[index] += len(delta.text)
        if delta.text or delta.tokens or delta.finish:
            yield self.part([self._choice(index, delta.text, logprobs, delta.finish)])

    def add(self, answer: Answer, delta: Delta) -> None:
        """Gathers a delta for `whole`."""
        self.deltas[self.index[id(answer)]].append(delta)

    def whole(self) -> dict[str, Any]:
        """The object of an answer that is not streamed."""
        choices = []
        for index, (answer, deltas) in enumerate(zip(self.answers, self.deltas, strict=True)):
            before = self._before(index)
            text = before + "".join(delta.text for delta in deltas)
            tokens = [token for delta in deltas for token in _with_stop(answer, delta)]
            logprobs = self._logprobs(tokens, len(before))
            if logprobs and self.given.get("echo"):
                logprobs = self._with_prompt(answer, logprobs)
            choices.append(self._choice(index, text, logprobs, deltas[-1].finish))
        return {**self.head, "choices": choices, "usage": self.usage()}

    def _before(self, index: int) -> str:
        return self.before[index // self.given.get("n", 1)]

    def _choice(self, index: int, text: str, logprobs: Any, finish: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}

    def _with_prompt(self, answer: Answer, logprobs: dict[str, Any]) -> dict[str, Any]:
        """The prompt's tokens before the answer's; nothing predicts the first."""
        read = self._logprobs(answer.scores, 0)
        assert read is not None
        first = self.token_text(answer.job.prompt[0]).decode(errors="replace")
        width = len(first) if answer.job.prompt[0] not in self.server.lm.begin_ids else 0
        read["text_offset"] = [width + place for place in read["text_offset"]]
        start: dict[str, list[Any]] = {
            "tokens": [first], "token_logprobs": [None], "top_logprobs": [None],
            "text_offset": [0],
        }  # fmt: skip
        return {name: start[name] + read[name] + logprobs[name] for name in start}

    def _logprobs(self, tokens: Sequence[Token], offset: int) -> dict[str, Any] | None:
        count = self.given.get("logprobs")
        if count is None:
            return None
        shown = lambda token: self.token_text(token).decode(errors="replace")
        found: dict[str, list[Any]] = {
            "tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": [],
        }  # fmt: skip
        found["token_ids"] = [token.id for token in tokens]
        for token in tokens:
            text = shown(token.id)
            tops: dict[str, float] = {}
            for other, logprob in token.tops[:count]:
                tops.setdefault(shown(other), logprob)  # the likelier of two with one text
            found["tokens"].append(text)
            found["token_logprobs"].append(token.logprob)
            found["top_logprobs"].append({text: token.logprob} | tops)
            found["text_offset"].append(offset)
            offset += len(text)
        return found


def _with_stop(answer: Answer, delta: Delta) -> list[Token]:
    """A delta's tokens, and the one that ended the answer: it is no text, but it was drawn.

    Harnesses ask for one token after a scored text, and leave the last token out.
    """
    return [*delta.tokens, *([answer.stopped] if delta.finish and answer.stopped else [])]
