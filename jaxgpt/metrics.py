"""What a run records: metrics.jsonl, samples.md, other sinks, progress, throughput, environment.

Names have a group before the slash. Those known to the progress line and the report:
`train/loss`, `val/loss`, `train/learning_rate`, `train/grad_norm`, `train/tokens` (seen so far),
`speed/tokens_per_second`, `speed/mfu`.
"""

import contextlib
import hashlib
import importlib.util
import json
import math
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from jaxgpt import files
from jaxgpt.config import LogConfig, ModelConfig
from jaxgpt.types import Sink

NEARLY, NATS = 0.05, 2.0  # share of a reward's rise, and growth of a KL, that `outran` minds
STORE_SECONDS = 30.0  # how long lines may wait for the next writing of a log in a store


class MetricsLog:
    """metrics.jsonl: one flat JSON object a line, each written whole or not at all.

    In a store, where nothing is appended, `flush` writes the file again; so does a line that comes
    STORE_SECONDS after the last time.

    Args:
        resume_step: lines of later steps are dropped, since they will be written again;
            0, before any update, starts an empty file.
    """

    def __init__(self, path: str | Path, resume_step: int = 0) -> None:
        path = files.path(path)
        files.make_folder(path.parent)
        old = read_jsonl(path) if resume_step > 0 else []
        lines = [_line(record) for record in old if record["step"] <= resume_step]
        self._path, self._stored = files.write(path, b"".join(lines)), time.monotonic()
        self._lines = [] if files.is_local(path) else lines  # of a store all that it shall hold
        self._waiting = False

    def __call__(self, step: int, metrics: Mapping[str, Any]) -> None:
        line = _line({"step": step, **metrics})
        if not files.is_local(self._path):
            self._lines.append(line)
            self._waiting = True
            if time.monotonic() - self._stored > STORE_SECONDS:
                self.flush()
            return
        with self._path.open("ab", buffering=0) as file:  # one write call, so no half lines
            file.write(line)

    def flush(self) -> None:
        """Puts the lines that wait into the store; on this machine none do."""
        if self._waiting:
            files.write(self._path, b"".join(self._lines))
            self._waiting, self._stored = False, time.monotonic()


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; a last line that was cut by a kill is left out."""
    path = files.path(path)
    if not path.exists():
        return []
    *lines, _half = path.read_text().split("\n")
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            int(record["step"])
        except (ValueError, TypeError, KeyError):
            raise ValueError(
                f"{path}, line {number}: not a JSON object with a step: {line[:40]}"
            ) from None
        records.append(record)
    return records


def _line(record: Mapping[str, Any]) -> bytes:
    """JSON has no NaN or infinity: they become null."""
    plain = {name: _plain(value) for name, value in record.items()}
    return (json.dumps(plain, allow_nan=False) + "\n").encode()


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    number = float(value)  # scalars of NumPy and JAX too
    return number if math.isfinite(number) else None


def append_samples(path: str | Path, step: int, texts: Sequence[str]) -> None:
    """Adds `## step N` and each text in a fence to samples.md; drops what a resume writes again."""
    path = files.path(path)
    sections = [*(s for s in read_samples(path) if s[0] < step), (step, list(texts))]
    files.write(path, "\n".join(_section(*section) for section in sections))


def read_samples(path: str | Path) -> list[tuple[int, list[str]]]:
    """(step, texts) of every section of samples.md."""
    path = files.path(path)
    sections: list[tuple[int, list[str]]] = []
    pattern = r"^## step (\d+)$|^(`{3,})text\n(.*?)\n\2$"  # in order, so fences hide headings
    content = path.read_bytes().decode(errors="replace") if path.exists() else ""
    for step, fence, text in re.findall(pattern, content, re.MULTILINE | re.DOTALL):
        if not fence:
            sections.append((int(step), []))
        elif sections:
            sections[-1][1].append(text)
    return sections


def _section(step: int, texts: list[str]) -> str:
    blocks = [f"## step {step}\n"]
    for text in texts:
        longest = max(map(len, re.findall("`+", text)), default=0)
        fence = "`" * max(3, longest + 1)
        blocks.append(f"{fence}text\n{text}\n{fence}\n")
    return "\n".join(blocks)


def open_sinks(cfg: LogConfig, run_dir: str | Path, settings: dict[str, Any]) -> list[Sink]:
    """TensorBoard and Weights & Biases, as far as the config asks for them."""
    require_sinks(cfg)
    sinks = []
    if cfg.tensorboard:
        sinks.append(_tensorboard(files.path(run_dir)))
    if cfg.wandb:
        sinks.append(_wandb(cfg.wandb, files.path(run_dir), settings))
    return sinks


def require_sinks(cfg: LogConfig) -> None:
    """Raises ValueError where a package is missing that the config asks for."""
    for setting, wanted, package in (
        ("log.tensorboard=true", cfg.tensorboard, "tensorboard"),
        (f"log.wandb={cfg.wandb}", cfg.wandb, "wandb"),
    ):
        at_hand = sys.modules.get(package) or importlib.util.find_spec(package)
        if wanted and not at_hand:
            raise ValueError(
                f'{setting}: needs the package {package}: pip install "jaxgpt[log]", or drop the '
                "setting"
            )


def _tensorboard(run_dir: Path) -> Sink:
    from tensorboard.summary import Writer  # pyright: ignore[reportMissingImports]

    writer = Writer(str(run_dir / "tensorboard"))

    def write(step: int, metrics: Mapping[str, Any]) -> None:
        for name, value in metrics.items():
            if isinstance(number := _plain(value), int | float):
                writer.add_scalar(name, number, step=step)
        writer.flush()

    return write


def _wandb(project: str, run_dir: Path, settings: dict[str, Any]) -> Sink:
    import wandb  # pyright: ignore[reportMissingImports]

    # One id per directory, so that the command that resumes the run resumes its curves.
    run_id = hashlib.sha256(str(run_dir.absolute()).encode()).hexdigest()[:12]
    try:
        run = wandb.init(
            project=project, name=run_dir.name, id=run_id, config=settings, resume="allow",
            dir=run_dir if files.is_local(run_dir) else None,
        )  # fmt: skip
    except Exception as error:  # of its own kinds: no key, a wrong one, no network
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"log.wandb={project}: {reason.rstrip('.'):.160}; run wandb login, set "
            "WANDB_MODE=offline, or drop the setting"
        ) from None
    return lambda step, metrics: run.log({n: _plain(v) for n, v in metrics.items()}, step=step)


class Progress:
    """A tqdm bar on a terminal, else (CI logs, files) one plain line per update."""

    def __init__(self, steps: int, start: int = 0, stream: TextIO | None = None) -> None:
        self.steps, self.start = steps, start
        self.stream = sys.stderr if stream is None else stream
        self._shown: dict[str, Any] = {}
        self._first: tuple[int, float] | None = None  # step and time once compilation is over
        self._bar = None
        if self.stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=steps, initial=start, file=self.stream, dynamic_ncols=True,
                bar_format="{percentage:3.0f}% |{bar}| {n}/{total}{postfix}",
            )  # fmt: skip

    def __call__(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Is a Sink; a measure that `metrics` lacks keeps the value it had."""
        self._shown |= metrics
        line = "  ".join(filter(None, [_summary(self._shown), self._time_left(step)]))
        if self._bar is None:
            width = len(str(self.steps))
            print(f"step {step:{width}}/{self.steps}  {line}", file=self.stream, flush=True)
        else:
            self._bar.set_postfix_str(line, refresh=False)
            self._bar.n = step
            self._bar.refresh()

    def note(self, metrics: Mapping[str, Any]) -> None:
        """Measures to show with the next step."""
        self._shown |= metrics

    def write(self, text: str) -> None:
        """Prints above the bar."""
        if self._bar is None:
            print(text, file=self.stream, flush=True)
        else:
            self._bar.write(text, file=self.stream)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _time_left(self, step: int) -> str:
        now = time.perf_counter()
        if self._first is None:
            self._first = (step, now)
        first_step, first_time = self._first
        if step == first_step:
            return ""
        seconds = round((now - first_time) / (step - first_step) * (self.steps - step))
        minutes, hours = seconds // 60 % 60, seconds // 3600
        clock = f"{hours}:{minutes:02}" if hours else f"{minutes}"
        return f"left {clock}:{seconds % 60:02}"


def outran(lines: Sequence[Mapping[str, Any]]) -> str:
    """What to say of a policy that kept leaving its reference for no more learnt reward; or "".

    Such a policy finds what the reward model takes for good and people do not (arXiv:2210.10760).

    Args:
        lines: of metrics.jsonl.
    """
    seen = [
        (line["step"], line["rollout/kl"], line["rollout/learnt_reward"])
        for line in lines
        if None not in (line.get("rollout/kl"), line.get("rollout/learnt_reward"))
    ]
    if not seen:
        return ""
    first, best = seen[0][2], max(reward for _, _, reward in seen)
    # Where nearly all of the reward was there.
    step, kl, reward = next(x for x in seen if x[2] >= best - NEARLY * (best - first))
    last, end, at_end = seen[-1]
    if end < max(2 * kl, kl + NATS):
        return ""
    return (
        f"from step {step} to {last} the KL of an answer grew from {kl:.1f} to {end:.1f} nats and "
        f"the learnt reward went from {reward:.2f} to {at_end:.2f}: the policy may deceive the "
        f"reward model; read its answers, take a checkpoint near step {step}, or raise kl"
    )


def short(value: float) -> str:
    """Three digits and a unit: 12.3k."""
    for unit, size in {"G": 1e9, "M": 1e6, "k": 1e3}.items():
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def _summary(metrics: Mapping[str, Any]) -> str:
    """`loss 2.314  val 2.401  12.3k tokens/s  MFU 31.2%`, as far as known."""
    formats = {
        "train/loss": lambda value: f"loss {value:.4g}",
        "val/loss": lambda value: f"val {value:.4g}",
        "rollout/reward": lambda value: f"reward {value:.3f}",
        "val/exact_match": lambda value: f"exact match {value:.1%}",
        "val/full_reward": lambda value: f"full reward {value:.1%}",
        "speed/tokens_per_second": lambda value: f"{short(value)} tokens/s",
        "speed/mfu": lambda value: f"MFU {value:.1%}",
    }
    known = {name: metrics.get(name) for name in formats}
    return "  ".join(formats[n](float(v)) for n, v in known.items() if v is not None)


class Throughput:
    """Tokens per second over the last laps, without compilation, evaluation and saving.

    A lap ends where the host has waited for its steps' results. The first one compiles and is
    not counted, so end it after the first step.

    Args:
        flops_per_token: see the function of that name.
        peak_flops: of all devices together; None or 0 leaves MFU out.
    """

    def __init__(
        self,
        flops_per_token: float = 0.0,
        peak_flops: float | None = None,
        laps: int = 20,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._flops_per_token, self._peak_flops, self._clock = flops_per_token, peak_flops, clock
        self._laps: deque[tuple[float, float]] = deque(maxlen=laps)  # (tokens, seconds)
        self._compiled = False
        self._start = clock()

    def lap(self, tokens: float) -> None:
        """Counts `tokens` for the time since the last lap."""
        now = self._clock()
        if self._compiled:
            self._laps.append((tokens, now - self._start))
        self._compiled = True
        self._start = now

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent in here does not count: evaluation, sampling, checkpoints."""
        before = self._clock()
        yield
        # What the lap had before the pause still counts, unless a lap ended within the pause.
        self._start = self._clock() - max(0.0, before - self._start)

    def measures(self) -> dict[str, float]:
        """`speed/tokens_per_second` and `speed/mfu`, once known."""
        tokens, seconds = map(sum, zip(*self._laps, strict=True)) if self._laps else (0, 0)
        if not seconds:
            return {}
        rate = tokens / seconds
        measures = {"speed/tokens_per_second": rate}
        if self._peak_flops and self._flops_per_token:
            measures["speed/mfu"] = rate * self._flops_per_token / self._peak_flops
        return measures


class Clock:
    """Seconds by kind; what is timed inside another kind counts for itself alone."""

    def __init__(self, kind: str = "step", clock: Callable[[], float] = time.perf_counter) -> None:
        self._kind, self._clock, self._since = kind, clock, clock()
        self._seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, kind: str) -> Iterator[None]:
        """The time spent in here is of this kind."""
        outer = self._turn(kind)
        try:
            yield
        finally:
            self._turn(outer)

    def seconds(self) -> dict[str, float]:
        """What every kind has taken so far."""
        self._turn(self._kind)
        return dict(self._seconds)

    def _turn(self, kind: str) -> str:
        now, before = self._clock(), self._kind
        self._seconds[before] = self._seconds.get(before, 0.0) + now - self._since
        self._kind, self._since = kind, now
        return before


def flops_per_token(cfg: ModelConfig, context: int) -> float:
    """Training FLOPs per token, 6·N + 12·L·H·Q·T (PaLM, arXiv:2204.02311, appendix B).

    N counts the weights a token is multiplied with: the head (tied or not), but not the
    embedding look-up, and of a mixture only the experts it visits. As in PaLM, attention counts
    the whole square although half of it is masked, and recomputation (remat) does not count.
    """
    query_dim = cfg.num_heads * cfg.head_width
    attention = 2 * cfg.model_dim * (query_dim + cfg.kv_heads * cfg.head_width)
    if (latent := cfg.latent) is not None:
        values = cfg.num_heads * latent.value_dim
        read = latent.query_dim or cfg.model_dim
        attention = cfg.model_dim * (latent.query_dim + latent.dim + latent.rope_dim + values)
        expanded = query_dim - cfg.num_heads * latent.rope_dim + values
        attention += read * query_dim + latent.dim * expanded
    adapters = 2 * cfg.model_dim * cfg.adapter_dim * (1 if cfg.adapter_parallel else 2)
    weights = cfg.num_layers * (attention + adapters) + cfg.model_dim * cfg.vocab_size
    for _, _, part in cfg.parts:
        column = cfg.model_dim * (3 if cfg.mlp == "gated" else 2)
        mlp = column * part.mlp_width
        if part.num_experts:
            mlp = mlp * cfg.experts_per_token + cfg.model_dim * cfg.num_experts
            mlp += column * cfg.shared_mlp_dim
        weights += part.num_layers * mlp
    return 6.0 * weights + 12.0 * cfg.num_layers * query_dim * context
