"""One thread owns the device: it gives rows to requests, reads prompts in chunks, writes tokens.

Between two calls of the device it takes what others asked for: new requests, cancelled ones, and
functions that want the device (`Engine.call`). All programs are compiled by `Engine.compile`.

Axes of this file: N tokens written by one call; J likeliest tokens, or shifted ones; W words of 32
bits.
"""

import math
import queue
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from jaxgpt.config import ModelConfig
from jaxgpt.sampling import slots
from jaxgpt.sampling.sample import Sampling
from jaxgpt.serve.prefixes import Prefixes
from jaxgpt.types import Params

CHUNK = 128  # tokens of a prompt that are read between two steps of writing
TAIL = 16  # the end of a prompt is read in chunks of this size, if few of them hold it
FEW_STEPS = 4  # tokens written at a time while somebody waits: for a first token, or for the next
COMPILED = "/jax/core/compile/backend_compile_duration"  # the event of a compiled program


class Busy(Exception):
    """As many requests wait as may."""


class Failed(Exception):
    """The engine no longer runs."""


class Grammar(Protocol):
    """What a row may write."""

    def fill(self, allowed_W: np.ndarray) -> None:
        """Sets the bits of the tokens that may come next."""
        ...

    def take(self, token: int) -> bool:
        """Notes a token; whether nothing can follow it."""
        ...


class Token(NamedTuple):
    """One token that was written or read, and how likely the model itself found it."""

    id: int
    logprob: float
    tops: list[tuple[int, float]]  # the likeliest tokens, if they were asked for


class Receiver(Protocol):
    """Who asked; called in the engine's thread."""

    def prompt_read(self, tokens: list[Token], hidden_2D: np.ndarray, cached: int) -> None:
        """The prompt stands in the cache.

        Args:
            tokens: the prompt's but the first, if the job is scored.
            hidden_2D: the mean of the hidden states, and the last one; if the job is scored.
            cached: how many of its tokens were not read again.
        """
        ...

    def token(self, token: Token) -> bool:
        """One more token of the answer; whether it is the last."""
        ...

    def end(self, reason: str, stop: Token | None = None) -> None:
        """The answer ended: stop, length, cancelled, timeout or error.

        Args:
            stop: the token that ended it, if it was one.
        """
        ...


@dataclass(eq=False)
class Job:
    """One answer to one prompt."""

    prompt: Sequence[int]
    sampling: Sampling
    receiver: Receiver
    seed: int = 0
    number: int = 0  # of the answer among those to one prompt
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    bias: Mapping[int, float] = field(default_factory=dict)
    adapter: int = 0  # 0: the base
    stop_ids: frozenset[int] = frozenset()
    tops: bool = False  # the likeliest tokens are asked for
    scored: bool = False  # and those of the prompt, with its hidden states
    grammar: Grammar | None = None
    hasty: bool = False  # somebody reads along
    deadline: float = math.inf  # of time.monotonic
    cancelled: bool = False

    def check(self, cfg: ModelConfig, capacity: int) -> None:
        """Raises ValueError for a prompt that is empty or too long; it is never cut."""
        room = capacity - (self.sampling.max_new_tokens > 0)
        if not self.prompt:
            raise ValueError("the prompt is empty: give it at least one token")
        if len(self.prompt) > room:
            raise ValueError(
                f"the prompt has {len(self.prompt):,} tokens, but the context holds {capacity:,}, "
                "the answer included; shorten it"
            )
        if not all(0 <= token < cfg.vocab_size for token in self.prompt):
            raise ValueError(f"the prompt holds ids outside [0, {cfg.vocab_size})")


@dataclass(eq=False)
class Row:
    """A job in its row."""

    job: Job
    read: int  # tokens of the prompt that stand in the cache
    sizes: deque[int]  # of the chunks to come
    cached: int
    written: int = 0
    scores: list[Token] = field(default_factory=list)
    hidden_2D: np.ndarray | None = None


@dataclass
class Counts:
    """What happened since the start."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    written_tokens: int = 0
    finished: dict[str, int] = field(default_factory=dict)
    compiled: int = 0  # programs, after the start; functions given to `call` may add to it


class Engine:
    """The slots, and the thread that fills them."""

    def __init__(
        self,
        cfg: ModelConfig,
        params: Params,
        num_slots: int,
        capacity: int,
        most_waiting: int = 64,
        prefix_bytes: int = 1 << 28,
        mesh: Mesh | None = None,
    ) -> None:
        self.cfg, self.params, self.capacity = cfg, params, min(capacity, cfg.context_length)
        self.most_waiting = most_waiting
        self.counts = Counts()
        self.failure: BaseException | None = None
        self.waiting: deque[Job] = deque()
        self.rows: list[Row | None] = [None] * num_slots
        self.prefixes = Prefixes(CHUNK, prefix_bytes)
        self.mesh = mesh
        # Programs are compiled for the mesh that is set in the thread that calls them.
        self._on_mesh = partial(jax.set_mesh, mesh) if mesh is not None else nullcontext
        with self._on_mesh():
            self._state = slots.init_state(cfg, num_slots, -(-self.capacity // CHUNK) * CHUNK)
        self._settings = slots.default_settings(num_slots)
        self._allowed_BW = np.full((num_slots, -(-cfg.vocab_size // 32)), -1, np.int32)
        self._asked: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._lock = threading.Lock()  # of `waiting` and `failure`
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def compile(self, show: Callable[[str], None]) -> None:
        """Compiles every program by running it once; `show` is told before each."""
        with self._on_mesh():
            self._compile(show)

    def _compile(self, show: Callable[[str], None]) -> None:
        settings, row = self._settings, np.int32(0)
        for size in (CHUNK, TAIL):
            show(f"reading {size} tokens of a prompt")
            self._admit(row, [0], {})
            self._read(row, 0, size, [0], [0], False)
        show("writing tokens")
        self._write(settings, 1)
        show("keeping and copying the beginnings of prompts")
        chunk = slots.save(self._state, row, np.int32(0), CHUNK)
        self._state = slots.put(self._state, row, np.int32(0), chunk)
        self._admit(row, [0], {})
        jax.block_until_ready(self._state)

    def start(self) -> None:
        """Begins to take jobs."""
        self._thread.start()

    def work_off(self, job: Job) -> None:
        """Answers one job in the caller's thread, of an engine that is not started."""
        self.waiting.append(job)
        while self.waiting or any(self.rows):
            self._take_turn()

    def stop(self) -> None:
        """Ends every job, and the thread."""
        self._stopping = True
        self._asked.put(lambda: None)
        if self._thread.is_alive():
            self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether jobs are worked on."""
        return self._thread.is_alive() and self.failure is None

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queues jobs, all of them or none.

        Raises:
            Busy: too many wait.
            Failed: the engine does not run.
        """
        with self._lock:
            if not self.alive:
                raise Failed("the engine has stopped")
            free, waiting = self.rows.count(None), len(self.waiting)
            idle = free == len(self.rows) and not waiting  # then one may ask for many answers
            if not idle and waiting + len(jobs) > self.most_waiting + free:
                raise Busy(f"{len(self.waiting)} requests wait, the most that may")
            self.waiting.extend(jobs)
            self.counts.requests += len(jobs)
        self._asked.put(lambda: None)

    def cancel(self, job: Job) -> None:
        """Frees the job's row before the next tokens are written; it need not have one."""
        job.cancelled = True
        self._asked.put(lambda: None)

    def call(self, function: Callable[[], Any]) -> Future[Any]:
        """Runs a function in the thread that owns the device, between two of its steps."""
        future: Future[Any] = Future()

        def work() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)

        with self._lock:
            if not self.alive:
                raise Failed("the engine has stopped")
            self._asked.put(work)
        return future

    def _run(self) -> None:
        me = threading.get_ident()

        def compiled(event: str, duration_secs: float, **_: str | int) -> None:
            self.counts.compiled += event == COMPILED and threading.get_ident() == me

        jax.monitoring.register_event_duration_secs_listener(compiled)
        try:
            with self._on_mesh():
                while not self._stopping:
                    self._take_turn()
        except BaseException as error:  # whatever it is, nobody shall wait for an answer
            self.failure = error
        finally:
            jax.monitoring.unregister_event_duration_listener(compiled)
            self._end_all("error" if self.failure else "cancelled")

    def _take_turn(self) -> None:
        """What was asked for, then a chunk of one prompt, then the next tokens of all rows."""
        idle = not self.waiting and not any(self.rows)
        while idle or not self._asked.empty():
            self._asked.get()()
            idle = False
        self._drop_cancelled()
        self._give_rows()
        reading = [(row, n) for n, row in enumerate(self.rows) if row is not None and row.sizes]
        if reading:
            self._read_chunk(*min(reading, key=lambda pair: pair[0].job.deadline))
        writing = [row for row in self.rows if row is not None and not row.sizes]
        if writing:
            self._write_tokens(writing, waited_for=len(reading) > 1 or bool(self.waiting))

    def _drop_cancelled(self) -> None:
        now = time.monotonic()
        reason = lambda job: "cancelled" if job.cancelled else "timeout"
        gone = lambda job: job.cancelled or now > job.deadline
        for number, row in enumerate(self.rows):
            if row is not None and gone(row.job):
                self._free(number, reason(row.job))
        with self._lock:
            dropped = [job for job in self.waiting if gone(job)]
            for job in dropped:
                self.waiting.remove(job)
        for job in dropped:
            self._note_end(job, reason(job))

    def _give_rows(self) -> None:
        while None in self.rows:
            with self._lock:
                if not self.waiting:
                    return
                job = self.waiting.popleft()
                number = self.rows.index(None)
                kept = [] if job.scored else self.prefixes.find(job.adapter, job.prompt)
                start = CHUNK * len(kept)
                row = Row(job, start, _chunk_sizes(len(job.prompt) - start), start)
                self.rows[number] = row
            self._admit(np.int32(number), job.prompt, job.bias)
            for place, chunk in enumerate(kept):
                self._state = slots.put(
                    self._state, np.int32(number), np.int32(place * CHUNK), chunk
                )
            self.counts.prompt_tokens += len(job.prompt)
            self.counts.cached_tokens += start

    def _read_chunk(self, row: Row, number: int) -> None:
        job, size = row.job, row.sizes.popleft()
        tokens = list(job.prompt[row.read : row.read + size])
        targets = list(job.prompt[row.read + 1 : row.read + 1 + size])
        found = self._read(np.int32(number), job.adapter, size, tokens, targets, job.scored)
        row.read += len(tokens)
        if job.scored:
            self._note_scores(row, found, targets)
        elif size == CHUNK and len(tokens) == CHUNK:
            self._keep(row, number)
        if row.sizes:
            return
        hidden_2D = np.zeros((2, self.cfg.model_dim)) if row.hidden_2D is None else row.hidden_2D
        hidden_2D = hidden_2D / np.array([[len(job.prompt)], [1]])
        job.receiver.prompt_read(row.scores, hidden_2D, row.cached)
        if job.sampling.max_new_tokens == 0:
            self._free(number, "length")
            return
        self._set(number, job)

    def _note_scores(self, row: Row, found: slots.Read, targets: list[int]) -> None:
        found = jax.device_get(found)
        tops = zip(found.top_ids_CJ.tolist(), found.top_logprobs_CJ.tolist(), strict=True)
        for token, logprob, top in zip(targets, found.logprobs_C.tolist(), tops, strict=False):
            row.scores.append(Token(token, logprob, list(zip(*top, strict=True))))
        before = np.zeros_like(found.hidden_2D) if row.hidden_2D is None else row.hidden_2D
        row.hidden_2D = np.stack([before[0] + found.hidden_2D[0], found.hidden_2D[1]])

    def _keep(self, row: Row, number: int) -> None:
        """The chunk just read, for prompts that begin like this one."""
        job, tokens = row.job, row.job.prompt[: row.read]
        if self.prefixes.most_bytes and not self.prefixes.holds(job.adapter, tokens):
            chunk = slots.save(self._state, np.int32(number), np.int32(row.read - CHUNK), CHUNK)
            self.prefixes.add(job.adapter, tokens, chunk)

    def _write_tokens(self, writing: list[Row], waited_for: bool) -> None:
        for n, row in self._written_rows():
            if row.job.grammar is not None:
                with self._only_of(n):
                    row.job.grammar.fill(self._allowed_BW[n])
        hasty = waited_for or any(row.job.hasty for row in writing)
        # One step, for a mask that depends on the last token, or for who waits for the first one.
        one = any(row.job.grammar or (row.job.hasty and not row.written) for row in writing)
        steps = 1 if one else FEW_STEPS if hasty else slots.MOST_STEPS
        steps = min(steps, max(self._room(row) for row in writing))
        written = self._write(self._settings, steps)
        for n, row in self._written_rows():
            with self._only_of(n):
                for step in range(min(steps, self._room(row))):
                    if self._take_token(n, row, written, step):
                        break

    def _written_rows(self) -> list[tuple[int, Row]]:
        return [(n, row) for n, row in enumerate(self.rows) if row is not None and not row.sizes]

    @contextmanager
    def _only_of(self, number: int) -> Iterator[None]:
        """What fails for one answer ends that answer only."""
        try:
            yield
        except Exception:
            traceback.print_exc()
            if self.rows[number] is not None:
                self._free(number, "error")

    def _take_token(self, n: int, row: Row, written: slots.Written, step: int) -> bool:
        """Hands one token over; whether the row ended."""
        job, tops = row.job, []
        if job.tops:
            ids, logprobs = written.top_ids_BNJ[n, step], written.top_logprobs_BNJ[n, step]
            tops = list(zip(ids.tolist(), logprobs.tolist(), strict=True))
        token = Token(int(written.tokens_BN[n, step]), float(written.logprobs_BN[n, step]), tops)
        if token.id in job.stop_ids:
            self._free(n, "stop", token)
            return True
        row.written += 1
        self.counts.written_tokens += 1
        enough = job.receiver.token(token)
        complete = job.grammar is not None and job.grammar.take(token.id)
        if enough or complete or self._room(row) == 0:
            self._free(n, "stop" if enough or complete else "length")
            return True
        return False

    def _room(self, row: Row) -> int:
        """How many tokens the row may still get."""
        job = row.job
        most = min(job.sampling.max_new_tokens, self.capacity - len(job.prompt))
        return most - row.written

    def _set(self, number: int, job: Job) -> None:
        """From now on the row is written."""
        how = job.sampling
        values = {
            "active_B": True, "temperature_B": how.temperature, "top_k_B": how.top_k,
            "top_p_B": how.top_p, "min_p_B": how.min_p, "repetition_B": how.repetition_penalty,
            "presence_B": job.presence_penalty, "frequency_B": job.frequency_penalty,
            "seed_B2": [job.seed >> 32 & 0xFFFFFFFF, job.seed & 0xFFFFFFFF],
            "number_B": job.number, "adapter_B": job.adapter, "tops_B": job.tops,
            "masked_B": job.grammar is not None,
        }  # fmt: skip
        for name, value in values.items():
            getattr(self._settings, name)[number] = value

    def _free(self, number: int, reason: str, stop: Token | None = None) -> None:
        row = self.rows[number]
        assert row is not None
        self.rows[number] = None
        for array, idle in zip(self._settings, slots.default_settings(1), strict=True):
            array[number] = idle[0]
        self._admit(np.int32(number), [], {})
        self._note_end(row.job, reason, stop)

    def _note_end(self, job: Job, reason: str, stop: Token | None = None) -> None:
        self.counts.finished[reason] = self.counts.finished.get(reason, 0) + 1
        job.receiver.end(reason, stop)

    def _end_all(self, reason: str) -> None:
        with self._lock:  # from here on `submit` refuses
            self.failure = self.failure or Failed("the engine has stopped")
            jobs = [row.job for row in self.rows if row is not None] + list(self.waiting)
            self.rows = [None] * len(self.rows)
            self.waiting.clear()
        for job in jobs:
            self._note_end(job, reason)
        while not self._asked.empty():
            self._asked.get()()

    def _admit(self, row: np.int32, prompt: Sequence[int], bias: Mapping[int, float]) -> None:
        ids_J = np.full(slots.MOST_BIASES, -1, np.int32)
        bias_J = np.zeros(slots.MOST_BIASES, np.float32)
        ids_J[: len(bias)], bias_J[: len(bias)] = list(bias), list(bias.values())
        prompt_S = np.full(-(-self.capacity // CHUNK) * CHUNK, -1, np.int32)
        prompt_S[: len(prompt)] = prompt
        self._state = slots.admit(self._state, row, ids_J, bias_J, prompt_S)

    def _read(
        self,
        row: np.int32,
        adapter: int,
        size: int,
        tokens: list[int],
        targets: list[int],
        scored: bool,
    ) -> slots.Read:
        tokens_C, targets_C = np.zeros((2, size), np.int32)
        tokens_C[: len(tokens)], targets_C[: len(targets)] = tokens, targets
        self._state, found = slots.read(
            self.cfg, self.params, self._state, row, np.int32(adapter), tokens_C,
            np.int32(len(tokens)), targets_C, np.bool_(scored),
        )  # fmt: skip
        return found

    def _write(self, settings: slots.RowSettings, steps: int) -> slots.Written:
        self._state, written = slots.write(
            self.cfg, self.params, self._state, settings, self._allowed_BW, np.int32(steps)
        )
        return jax.device_get(written)


def _chunk_sizes(count: int) -> deque[int]:
    """How so many tokens are read; decided by their number alone, so that the bits are, too."""
    whole, tail = divmod(count, CHUNK)
    few = -(-tail // TAIL)
    return deque([CHUNK] * whole + ([TAIL] * few if few <= 3 else [CHUNK]))
