"""Times two programs against each other: each in its own process, in turn, as ratios.

A machine's speed drifts by more than what is to be measured, so a figure is never compared with
one of another day: both sides run within seconds of each other, and the ratio of each pair is
what counts. Each side's best variant on this machine is found first.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple


class Compared(NamedTuple):
    """What `compare` found: both sides' fastest variants, as medians."""

    title: str
    ours: str
    per_second: float
    unit: str
    peer: str | None = None
    peer_per_second: float | None = None
    ratio: float | None = None  # ours to the peer's, the median of the pairs
    ratios: tuple[float, float] | None = None  # the least and the largest pair
    share: float | None = None  # of `limit`
    limit: str | None = None


def serve(name: str, measure: Callable[[], float]) -> None:
    """The measured side: one line of seconds for every line on stdin."""
    measure()  # compiles and warms up
    print(json.dumps(name), flush=True)
    for _ in sys.stdin:
        print(json.dumps(measure()), flush=True)


def gpu() -> Any:
    """The GPU that the sides will share, or None; each side then takes only what it needs."""
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    import jax

    return jax.devices()[0] if jax.default_backend() == "gpu" else None


def timed(run: Callable[[], Any], repeats: int) -> float:
    """Seconds per call; `run` returns when its result is there."""
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) / repeats


class Side:
    """A process that measures itself when asked, and sleeps in between."""

    def __init__(self, script: str, *args: str, python: str = sys.executable) -> None:
        self._process = subprocess.Popen(
            [python, script, *args],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.name = self._read()

    def measure(self) -> float:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{' '.join(map(str, self._process.args))} ended early")  # type: ignore[arg-type]
        return json.loads(line)


def compare(
    title: str,
    ours: Sequence[Callable[[], Side]],
    peers: Sequence[Callable[[], Side]],
    amount: float,
    unit: str,
    pairs: int,
    limit: tuple[float, str] | None = None,
) -> Compared:
    """Prints and returns medians and the ratio to the fastest peer with its range.

    Args:
        ours, peers: start one variant each; the fastest of either side are paired. Without peers
            ours are timed alone.
        amount: what one measurement does, in `unit`s, such as tokens.
        limit: the seconds that the hardware must take for it, and what of the hardware.
    """
    mine = _fastest(ours, amount, unit)
    if not peers:
        own = statistics.median(mine.measure() for _ in range(pairs))
        print(f"{title}: {mine.name} {amount / own:,.0f} {unit}/s{_share(own, limit)}", flush=True)
        mine.close()
        return Compared(title, mine.name, amount / own, unit, **_of_limit(own, limit))
    best = _fastest(peers, amount, unit)
    times = [(mine.measure(), best.measure()) for _ in range(pairs)]
    ratios = sorted(theirs / own for own, theirs in times)
    own, theirs = (statistics.median(column) for column in zip(*times, strict=True))
    ratio = statistics.median(ratios)
    print(
        f"{title}: {mine.name} {amount / own:,.0f} {unit}/s, best of the peers ({best.name}) "
        f"{amount / theirs:,.0f} {unit}/s; ratio {ratio:.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f}, "
        f"{pairs} pairs){_share(own, limit)}",
        flush=True,
    )
    for side in (mine, best):
        side.close()
    return Compared(
        title, mine.name, amount / own, unit, best.name, amount / theirs, ratio,
        (ratios[0], ratios[-1]), **_of_limit(own, limit),
    )  # fmt: skip


def _of_limit(seconds: float, limit: tuple[float, str] | None) -> dict[str, Any]:
    return {"share": limit[0] / seconds, "limit": limit[1]} if limit else {}


def _share(seconds: float, limit: tuple[float, str] | None) -> str:
    return f"; {limit[0] / seconds:.1%} of {limit[1]}" if limit else ""


def _fastest(starts: Sequence[Callable[[], Side]], amount: float, unit: str) -> Side:
    """The variant that is fastest here; the others are closed again."""
    best, best_seconds = None, float("inf")
    for start in starts:
        side = start()
        seconds = statistics.median(side.measure() for _ in range(3))
        print(f"  {side.name}: {amount / seconds:,.0f} {unit}/s", flush=True)
        if seconds < best_seconds:
            best, side, best_seconds = side, best, seconds
        if side is not None:
            side.close()
    assert best is not None
    return best
