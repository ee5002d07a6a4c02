"""What the engine did, in the words of Prometheus."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from jaxgpt.serve.engine import Engine

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counters of one engine; a registry of their own, so that two engines can be in a process."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._registry = engine, CollectorRegistry()
        self._registry.register(self)  # type: ignore[arg-type]
        self._seconds = Histogram(
            "jaxgpt_request_seconds", "Until the answer, or the beginning of a stream.", ["path"],
            registry=self._registry, buckets=SECONDS,
        )  # fmt: skip

    def text(self) -> bytes:
        """All of them."""
        return generate_latest(self._registry)

    @contextmanager
    def timed(self, path: str) -> Iterator[None]:
        """Notes how long a request took."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._seconds.labels(path).observe(time.monotonic() - began)

    def collect(self) -> Iterator[Metric]:
        """What Prometheus' registry asks for."""
        engine, counts = self._engine, self._engine.counts
        rows = engine.rows
        for name, text, value in (
            ("slots", "Rows of the batch.", len(rows)),
            ("slots_used", "Rows that requests have.", len(rows) - rows.count(None)),
            ("waiting", "Requests that wait for a row.", len(engine.waiting)),
            ("prefix_bytes", "Kept keys and values of prompts.", engine.prefixes.bytes),
            ("alive", "Whether the engine runs.", int(engine.alive)),
        ):
            yield GaugeMetricFamily(f"jaxgpt_{name}", text, value)
        for name, text, value in (
            ("requests", "Answers asked for.", counts.requests),
            ("prompt_tokens", "Tokens of prompts.", counts.prompt_tokens),
            ("cached_tokens", "Of these, not read again.", counts.cached_tokens),
            ("written_tokens", "Tokens of answers.", counts.written_tokens),
            ("compiled_programs", "Compiled while requests waited.", counts.compiled),
        ):
            yield CounterMetricFamily(f"jaxgpt_{name}", text, value)
        ended = CounterMetricFamily("jaxgpt_finished", "Answers by their end.", labels=["reason"])
        for reason, count in dict(counts.finished).items():
            ended.add_metric([reason], count)
        yield ended
