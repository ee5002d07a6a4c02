"""What a running loop tells the world: log lines, progress, samples, and that it has diverged."""

import dataclasses
import json
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, Self

import jax

from jaxgpt import files, lineage, machine, metrics
from jaxgpt.config import RunConfig
from jaxgpt.types import Array, Report

FLUSH_SECONDS = 1.0  # how stale the progress line may get


class Diverged(FloatingPointError):
    """The loss is not a number, or far too large."""


class RunLog:
    """Takes every step's metrics, and waits for the device only when a line is due.

    Args:
        start: the step that the run resumes at; what was logged beyond it is dropped.
        sinks: are given every line, too.
    """

    def __init__(self, cfg: RunConfig, start: int, sinks: Sequence[metrics.Sink] = ()) -> None:
        self._cfg, self._start, self._directory = cfg, start, files.path(cfg.run)
        self._writes = jax.process_index() == 0
        self._pending: list[tuple[int, Mapping[str, Array], int]] = []
        self._flushed = time.perf_counter()
        self._held_out: tuple[int, dict[str, float]] = (-1, {})
        self._rollout: list[str] = []
        self._given = sinks
        self.clock = metrics.Clock()
        self._session = lineage.Session(lineage.now(), start, start)
        peak = machine.peak_flops(jax.devices()[0])
        self.throughput = metrics.Throughput(
            metrics.flops_per_token(cfg.model, cfg.model.context_length),
            peak and peak * jax.device_count(),
        )

    def __enter__(self) -> Self:
        self._sinks: list[metrics.Sink] = []
        if self._writes:
            environment = json.dumps(machine.environment(), indent=1)
            files.write(self._directory / "environment.json", environment)
            # A run that begins again repeats the evaluation before its first step, too.
            self._log = metrics.MetricsLog(self._directory / "metrics.jsonl", self._start)
            settings = dataclasses.asdict(self._cfg)
            self._progress = metrics.Progress(self._cfg.train.steps, self._start)
            opened = metrics.open_sinks(self._cfg.log, self._directory, settings)
            self._sinks = [self._log, *opened, *self._given]
        return self

    def __exit__(self, *_: Any) -> None:
        if self._writes:
            self._progress.close()
            self._log.flush()
            if self._session.stop > self._start:
                self.note(self._session.stop)

    def write(self, text: str) -> None:
        """A line for the person who watches."""
        if self._writes:
            self._progress.write(text)

    def keep(self) -> None:
        """Has all lines in the run's directory, before the checkpoint that they lead up to."""
        if self._writes:
            self._log.flush()

    def note(self, done: int) -> None:
        """Writes what has been spent so far into the run's lineage.json, as of `done` updates."""
        self._session.stop, self._session.seconds = done, self.clock.seconds()
        if self._writes:
            lineage.note(self._directory, self._session)

    def step(self, done: int, measures: Mapping[str, Array], tokens: int) -> None:
        """Metrics of update number `done`, counted from 1, and the tokens it read."""
        self._pending.append((done, measures, tokens))
        self._session.count("step", tokens)
        first = done == self._start + 1  # which shows at once that all has compiled
        stale = time.perf_counter() - self._flushed > FLUSH_SECONDS
        if first or stale or self._due(done):
            self.flush()

    def flush(self) -> None:
        """Waits for the pending steps, checks their losses and writes the lines that are due.

        Raises:
            Diverged: naming the step and its loss.
        """
        pending, self._pending = self._pending, []
        if not pending:
            return
        fetched = jax.device_get([measures for _, measures, _ in pending])
        self.throughput.lap(sum(tokens for _, _, tokens in pending))
        self._flushed = time.perf_counter()
        line: dict[str, Any] = {}
        for (done, _, tokens), measures in zip(pending, fetched, strict=True):
            loss, norm = float(measures["loss"]), float(measures["grad_norm"])
            if not math.isfinite(loss) or loss > self._cfg.train.max_loss:
                raise Diverged(f"step {done}: the loss is {loss:.4g}")
            if not math.isfinite(norm):  # the parameters are lost although the loss was not yet
                raise Diverged(f"step {done}: the gradient's norm is {norm:.4g}")
            named = {name if "/" in name else f"train/{name}": v for name, v in measures.items()}
            line = named | {"train/tokens": done * tokens} | self.throughput.measures()
            if self._due(done):
                for sink in self._sinks:
                    sink(done, line)
        self._show(pending[-1][0], line)

    def held_out(self, done: int, measures: Mapping[str, float]) -> None:
        """Metrics of an evaluation after `done` updates.

        Raises:
            Diverged: naming the step and the loss.
        """
        if not math.isfinite(measures.get("loss", 0.0)):
            raise Diverged(f"step {done}: the held-out loss is {measures['loss']:.4g}")
        named = {name if "/" in name else f"val/{name}": v for name, v in measures.items()}
        self._held_out = (done, dict(measures))
        for sink in self._sinks:
            sink(done, named)
        self._show(done, named)

    def held_out_loss(self, done: int) -> float | None:
        """The held-out loss if it was measured after exactly `done` updates."""
        step, measures = self._held_out
        return measures.get("loss") if step == done else None

    def rollout(self, done: int, report: Report) -> None:
        """What the policy wrote after `done` updates, to learn from."""
        if report.warning:
            self.write(f"warning: step {done}: {report.warning}")
        for sink in self._sinks:
            sink(done, report.measures)
        if self._writes:
            self._progress.note(report.measures)
        self._rollout = report.texts
        self._session.count("rollout", int(report.measures.get("rollout/tokens", 0)))

    def samples(self, done: int, texts: Sequence[str]) -> None:
        """Texts written by the model after `done` updates, and some of the last rollout."""
        if self._writes and (texts or self._rollout):
            metrics.append_samples(self._directory / "samples.md", done, [*texts, *self._rollout])

    def _due(self, done: int) -> bool:
        return done % self._cfg.log.every == 0 or done == self._cfg.train.steps

    def _show(self, done: int, line: Mapping[str, Any]) -> None:
        if self._writes:
            self._progress(done, line)
