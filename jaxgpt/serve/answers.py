"""From tokens to text: decoded as they come, cut at stop strings, handed to whoever waits."""

import asyncio
import codecs
import queue
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.serve.engine import Job, Token

CONTEXT = 8  # tokens of the prompt that are decoded with an answer: some decoders treat the first
# token of a text in another way


class Delta(NamedTuple):
    """What came since the last one."""

    text: str
    tokens: list[Token]
    finish: str | None = None  # stop, length, cancelled, timeout or error


class TextStream:
    """Decodes token by token; half a character waits for its rest."""

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(before[-CONTEXT:])
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._shown = len(tokenizer.decode_bytes(self._ids)) if self._ids else 0

    def add(self, token: int) -> str:
        """The characters that are complete with this token."""
        self._ids.append(token)
        found = self._tokenizer.decode_bytes(self._ids)
        new, self._shown = found[self._shown :], len(found)
        if len(self._ids) > 4 * CONTEXT:  # what came long ago does not change the next characters
            self._ids = self._ids[-CONTEXT:]
            self._shown = len(self._tokenizer.decode_bytes(self._ids))
        return self._utf8.decode(new)

    def rest(self) -> str:
        """What is left at the end: the replacement of half a character."""
        return self._utf8.decode(b"", final=True)


class Stops:
    """Cuts a growing text before the first stop string in it."""

    def __init__(self, marks: Sequence[str]) -> None:
        self._marks, self._held = list(marks), ""
        self.found = False

    def add(self, text: str) -> tuple[str, bool]:
        """The text that surely stands before a stop string, and whether one was found."""
        self._held += text
        found = [place for mark in self._marks if (place := self._held.find(mark)) >= 0]
        if found:
            self.found = True
            return self._held[: min(found)], True
        kept = max((_overlap(self._held, mark) for mark in self._marks), default=0)
        ready = self._held[: len(self._held) - kept]
        self._held = self._held[len(ready) :]
        return ready, False

    def rest(self) -> str:
        """What was held back and is no stop string."""
        return self._held


class Line:
    """Hands one answer, token by token, to another thread; its last item is why it ended."""

    def __init__(self) -> None:
        self.queue: queue.Queue[Token | str] = queue.Queue()

    def prompt_read(self, tokens: list[Token], hidden_2D: np.ndarray, cached: int) -> None:
        """Nothing is to be told of it."""

    def token(self, token: Token) -> bool:
        """See engine.Receiver."""
        self.queue.put(token)
        return False

    def end(self, reason: str, stop: Token | None = None) -> None:
        """See engine.Receiver."""
        self.queue.put(reason)


@dataclass(eq=False)
class Answer:
    """One answer on its way: filled in the engine's thread, read in the event loop.

    It keeps what it was told of the prompt: `scores` of its tokens and `hidden_2D`, if the job is
    scored, and how many tokens were `cached`; and of the end the token that `stopped` it.
    """

    tokenizer: Tokenizer
    stops: Sequence[str]
    job: Job = field(init=False)
    scores: list[Token] = field(default_factory=list)
    hidden_2D: np.ndarray | None = None
    cached: int = 0
    written: int = 0
    stopped: Token | None = None

    def __post_init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._lock, self._ready = threading.Lock(), asyncio.Event()
        self._deltas: deque[Delta] = deque()
        self._waiting: list[tuple[Token, int]] = []  # tokens, and where their text begins
        self._made = self._sent = 0  # characters
        self._stream = self._stop = None

    def prompt_read(self, tokens: list[Token], hidden_2D: np.ndarray, cached: int) -> None:
        """See engine.Receiver."""
        self.scores, self.hidden_2D, self.cached = tokens, hidden_2D, cached

    def token(self, token: Token) -> bool:
        """See engine.Receiver."""
        if self._stream is None or self._stop is None:
            self._stream = TextStream(self.tokenizer, self.job.prompt)
            self._stop = Stops(self.stops)
        self.written += 1
        text = self._stream.add(token.id)
        self._waiting.append((token, self._made))
        self._made += len(text)
        ready, found = self._stop.add(text)
        self._send(ready)
        return found

    def end(self, reason: str, stop: Token | None = None) -> None:
        """See engine.Receiver."""
        self.stopped, rest = stop, ""
        if self._stream is not None and self._stop is not None and reason in ("stop", "length"):
            found = False
            if not self._stop.found:
                rest, found = self._stop.add(self._stream.rest())
                rest += "" if found else self._stop.rest()
        self._send(rest, reason)

    async def next(self) -> Delta:
        """What came since the last call; all of it in one."""
        deltas: list[Delta] = []
        while not deltas:  # it may have been told of what the last call took already
            await self._ready.wait()
            with self._lock:
                self._ready.clear()
                deltas = list(self._deltas)
                self._deltas.clear()
        tokens = [token for delta in deltas for token in delta.tokens]
        return Delta("".join(delta.text for delta in deltas), tokens, deltas[-1].finish)

    def _send(self, text: str, finish: str | None = None) -> None:
        """A token goes with the text in which its own begins."""
        self._sent += len(text)
        out = []
        while self._waiting and (finish or self._waiting[0][1] < self._sent):
            token, start = self._waiting.pop(0)
            if start < self._sent or start == self._made:
                out.append(token)
        if not text and not out and finish is None:
            return
        with self._lock:
            self._deltas.append(Delta(text, out, finish))
            if len(self._deltas) > 1:
                return  # the reader has been told already
        try:
            self._loop.call_soon_threadsafe(self._ready.set)
        except RuntimeError:  # the event loop ended before the engine
            return


def _overlap(text: str, mark: str) -> int:
    """The longest end of the text with which the mark begins."""
    most = min(len(text), len(mark) - 1)
    return next((n for n in range(most, 0, -1) if text.endswith(mark[:n])), 0)
