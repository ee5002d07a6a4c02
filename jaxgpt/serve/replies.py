"""Answers in the form of OpenAI's objects: a delta of an answer becomes choices, which are sent one
by one in a stream, or put together.
"""

import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxgpt.data.tool_calls import Reader
from jaxgpt.serve.answers import Answer, Delta
from jaxgpt.serve.engine import Token

if TYPE_CHECKING:
    from jaxgpt.serve.app import Server

LISTS = ("tokens", "token_logprobs", "top_logprobs", "text_offset", "token_ids")


class _Reply:
    """What chats and completions share."""

    kind = part_kind = prefix = ""

    def __init__(self, server: "Server", given: Mapping[str, Any], answers: Sequence[Answer]):
        self.server, self.given, self.answers = server, given, list(answers)
        self.index = {id(answer): n for n, answer in enumerate(answers)}
        self.begun: set[int] = set()
        self.head = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()),
            "object": self.part_kind if given.get("stream") else self.kind,
            "model": given.get("model", server.name), "system_fingerprint": server.fingerprint,
        }  # fmt: skip

    def parts(self, answer: Answer, delta: Delta) -> Iterator[dict[str, Any]]:
        """What a delta means to who reads the stream."""
        empty = {"usage": None} if self.given.get("stream_options", {}).get("include_usage") else {}
        for choice in self.choices(answer, delta):
            yield {**self.head, "choices": [choice], **empty}

    def last(self) -> dict[str, Any]:
        """The part that holds what all of them cost."""
        return {**self.head, "choices": [], "usage": self.usage()}

    def whole(self, found: Sequence[Sequence[Delta]]) -> dict[str, Any]:
        """The object of answers that are not streamed, from all their deltas."""
        merged = []
        for index, (answer, deltas) in enumerate(zip(self.answers, found, strict=True)):
            choices = [choice for delta in deltas for choice in self.choices(answer, delta)]
            finish = choices[-1]["finish_reason"]
            merged.append({"index": index, "finish_reason": finish, **self.merge(choices)})
        return {**self.head, "choices": merged, "usage": self.usage()}

    def choices(self, answer: Answer, delta: Delta) -> Iterator[dict[str, Any]]:
        """The choices of a stream."""
        raise NotImplementedError

    def merge(self, choices: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """What is different in a choice that is not streamed."""
        raise NotImplementedError

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

    def begins(self, index: int) -> bool:
        """Whether this is the first delta of the answer."""
        first = index not in self.begun
        self.begun.add(index)
        return first

    def token_bytes(self, token: int) -> bytes:
        """A token by itself; not always text."""
        return self.server.lm.tokenizer.decode_bytes([token])


class Chat(_Reply):
    """chat.completion and chat.completion.chunk."""

    kind, part_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(
        self,
        server: "Server",
        given: Mapping[str, Any],
        answers: Sequence[Answer],
        reader: Callable[[], Reader],
    ) -> None:
        super().__init__(server, given, answers)
        self.readers = [reader() for _ in answers]

    def choices(self, answer: Answer, delta: Delta) -> Iterator[dict[str, Any]]:
        """First who speaks, then what the text means, last why it ended."""
        index = self.index[id(answer)]
        reader = self.readers[index]

        def choice(shown: dict[str, Any], tokens: Sequence[Token] = (), finish: str | None = None):
            logprobs = self._logprobs(tokens) if tokens else None
            return {"index": index, "delta": shown, "finish_reason": finish, "logprobs": logprobs}

        if self.begins(index):
            yield choice({"role": "assistant", "content": ""})
        found, tokens = (
            reader.add(delta.text) + (reader.rest() if delta.finish else []),
            delta.tokens,
        )
        if not found and tokens and self.given.get("logprobs"):
            found = [{}]
        for shown in found:
            yield choice(shown, tokens)
            tokens = []
        if delta.finish:
            called = delta.finish == "stop" and reader.calls
            yield choice({}, finish="tool_calls" if called else delta.finish)

    def merge(self, choices: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """See _Reply."""
        content, calls, tokens = "", [], []
        for choice in choices:
            content += choice["delta"].get("content", "")
            for call in choice["delta"].get("tool_calls", []):
                if "id" in call:
                    calls.append({name: call[name] for name in ("id", "type", "function")})
                else:
                    calls[-1]["function"]["arguments"] += call["function"]["arguments"]
            tokens += (choice["logprobs"] or {}).get("content", [])
        said = {"role": "assistant", "content": content, "refusal": None}
        if calls:
            said |= {"content": content or None, "tool_calls": calls}
        logprobs = {"content": tokens, "refusal": None} if self.given.get("logprobs") else None
        return {"message": said, "logprobs": logprobs}

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if not self.given.get("logprobs"):
            return None
        count = self.given.get("top_logprobs", 0)
        shown = [
            {**self._shown(token.id, token.logprob), "token_id": token.id,
             "top_logprobs": [self._shown(*pair) for pair in token.tops[:count]]}
            for token in tokens
        ]  # fmt: skip
        return {"content": shown, "refusal": None}

    def _shown(self, token: int, logprob: float) -> dict[str, Any]:
        text = self.token_bytes(token)
        shown = {"token": text.decode(errors="replace"), "bytes": list(text)}
        return {**shown, "logprob": max(logprob, -9999.0)}


class Text(_Reply):
    """text_completion."""

    kind = part_kind = "text_completion"
    prefix = "cmpl"

    def __init__(
        self, server: "Server", given: Mapping[str, Any], answers: Sequence[Answer]
    ) -> None:
        super().__init__(server, given, answers)
        self.offset = [0] * len(answers)  # of the next token in the text

    def choices(self, answer: Answer, delta: Delta) -> Iterator[dict[str, Any]]:
        """The prompt, if it shall be repeated, and what was written."""
        index = self.index[id(answer)]

        def choice(text: str, tokens: Sequence[Token], finish: str | None = None) -> dict[str, Any]:
            logprobs = self._logprobs(tokens, self.offset[index])
            self.offset[index] += len(text)
            return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}

        if self.begins(index) and self.given.get("echo"):
            prompt = self.given["prompt"][index // self.given.get("n", 1)]
            decode = self.server.lm.tokenizer.decode
            first = Token(answer.job.prompt[0], 0.0, [])
            repeated = choice(
                prompt if isinstance(prompt, str) else decode(prompt), [first, *answer.scores]
            )
            if repeated["logprobs"]:  # nothing predicts the first token
                for name in ("token_logprobs", "top_logprobs"):
                    repeated["logprobs"][name][0] = None
            yield repeated
        # The token that ended the answer is no text, but it was drawn: harnesses ask for one token
        # after a scored text, and leave the last token out.
        ended = [answer.stopped] if delta.finish and answer.stopped else []
        if delta.text or delta.tokens or delta.finish:
            yield choice(delta.text, [*delta.tokens, *ended], delta.finish)

    def merge(self, choices: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """See _Reply."""
        found, logprobs = [choice["logprobs"] for choice in choices], None
        if found[-1]:
            logprobs = {name: [x for part in found for x in part[name]] for name in LISTS}
        return {"text": "".join(choice["text"] for choice in choices), "logprobs": logprobs}

    def _logprobs(self, tokens: Sequence[Token], offset: int) -> dict[str, Any] | None:
        count = self.given.get("logprobs")
        if count is None:
            return None
        shown = lambda token: self.token_bytes(token).decode(errors="replace")
        found: dict[str, list[Any]] = {name: [] for name in LISTS}
        for place, token in enumerate(tokens):
            text = shown(token.id)
            tops: dict[str, float] = {}
            for other, logprob in token.tops[:count]:
                tops.setdefault(shown(other), logprob)  # the likelier of two with one text
            values = text, token.logprob, {text: token.logprob} | tops, offset, token.id
            for name, value in zip(LISTS, values, strict=True):
                found[name].append(value)
            # What every text begins with, such as <s>, is not in the prompt's text.
            hidden = place == 0 and not offset and token.id in self.server.lm.begin_ids
            offset += 0 if hidden else len(text)
        return found
