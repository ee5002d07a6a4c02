"""Training from Python: `jaxgpt.launch`, and the run that it gives."""

import dataclasses
import hashlib
import html
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxgpt import config, files, metrics, report
from jaxgpt import run as runs
from jaxgpt.config import RunConfig
from jaxgpt.config.checks import nearest
from jaxgpt.config.own import Own
from jaxgpt.types import Sink

Callback = Callable[[int, Mapping[str, Any]], Any]  # (step, measures); False ends the run, saved
ROWS = Path.home() / ".cache" / "jaxgpt" / "rows"


class Run:
    """A run that was launched here.

    Args:
        path: its directory, as --run.
    """

    def __init__(self, stage: str, cfg: RunConfig) -> None:
        self.stage, self.config, self.path = stage, cfg, files.path(cfg.run)
        self._asked = threading.Event()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def __repr__(self) -> str:
        lines = self.metrics()
        return f"Run({self.stage!r}, {str(self.path)!r}, step={lines[-1]['step'] if lines else 0})"

    def _repr_html_(self) -> str:
        """In a notebook: the run's page, with its curves as they are now."""
        page = html.escape(report.write_report(self.path).read_text())
        return f'<iframe srcdoc="{page}" style="width: 100%; height: 40em; border: 0"></iframe>'

    @property
    def running(self) -> bool:
        """Whether it is still being trained, in the background."""
        return self._thread is not None and self._thread.is_alive()

    def stop(self) -> None:
        """Asks it to save and end: after this step, and the evaluation or rollout under way."""
        self._asked.set()

    def wait(self) -> "Run":
        """Returns when the training is over.

        Raises:
            ValueError, FloatingPointError: what ended it.
        """
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return self

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl so far."""
        return metrics.read_jsonl(self.path / "metrics.jsonl")

    def series(self, name: str) -> dict[int, float]:
        """step -> value of a measure such as val/loss."""
        return {line["step"]: line[name] for line in self.metrics() if name in line}

    def load(self) -> Any:
        """The trained model, as jaxgpt.load gives it."""
        from jaxgpt import language_model

        return language_model.load(str(self.path))

    def train(self, callbacks: Sequence[Callback]) -> None:
        """Trains here and now."""
        sinks = [self._sink(callback) for callback in callbacks]
        runs.launch(self.stage, self.config, sinks, self._asked)

    def train_in_background(self, callbacks: Sequence[Callback]) -> None:
        """Trains in a thread, which ends with the process, unsaved."""

        def work() -> None:
            try:
                self.train(callbacks)
            except BaseException as error:  # raised again where the run is waited for
                self._error = error

        self._thread = threading.Thread(target=work, daemon=True, name=f"jaxgpt {self.path}")
        self._thread.start()

    def _sink(self, callback: Callback) -> Sink:
        def sink(step: int, measures: Mapping[str, Any]) -> None:
            if callback(step, measures) is False:
                self.stop()

        return sink


def launch(
    stage: str,
    *,
    data: Any = None,
    reward: Any = None,
    task: Any = None,
    tools: Sequence[Any] = (),
    environment: Any = None,
    optimizer: Any = None,
    loss: Any = None,
    callbacks: Sequence[Callback] | Callback = (),
    background: bool = False,
    **settings: Any,
) -> Run:
    """Trains, and gives the run. Everything but `callbacks` is recorded in its config.yaml.

    Args:
        stage: pretrain, sft, reward, dpo, distill, grpo or ppo.
        data: a path or several (data.path), a list of rows as the files have them, or a mapping of
            the settings under data.
        reward: a function (problem, answer) -> number, in place of the task's rule (grpo, ppo).
        task: a jaxgpt.tasks.Task, or a function that makes one (grpo, ppo).
        tools: names, or functions whose arguments and results are JSON (grpo, ppo).
        environment: a function (problem) -> object with reset() and step(text) (grpo, ppo).
        optimizer: a function (learning rate by step) -> optax.GradientTransformation: optax.lion.
        loss: a function (config, params, batch, rng_B) -> (sum, weight, metrics); of dpo also the
            name of a loss.
        callbacks: functions (step, measures), called with every line of metrics.jsonl; one that
            returns False ends the run, saved.
        background: train in a thread; Run.stop asks it to end, Run.wait waits for it.
        settings: as on the command line, nested or dotted; config names a file of them.

    Raises:
        ValueError: a setting that is unknown, wrong, or does not fit the others, data or directory.
        FloatingPointError: the loss exploded.
    """
    if stage not in config.RUN_CONFIGS:
        known = ", ".join(config.RUN_CONFIGS)
        raise ValueError(
            f"stage={stage}: must be one of {known}{nearest(stage, config.RUN_CONFIGS)}"
        )
    given: dict[str, Any] = {
        "data.task": task, "data.reward": reward, "data.environment": environment,
        "data.tools": [*tools] or None, "optim.custom": optimizer,
    }  # fmt: skip
    given["loss" if isinstance(loss, str) and ":" not in loss else "train.loss"] = loss
    if isinstance(data, Mapping):
        settings["data"] = {**settings.get("data", {}), **data}
    elif data is not None:
        given["data.path"] = _path_of(data)
    named = {name: _named(value) for name, value in given.items() if value is not None}
    cfg = parsed(stage, {**settings, **named})
    for name, value in named.items():
        cfg = _with(cfg, name.split("."), value)
    made = Run(stage, cfg)
    several = [callbacks] if callable(callbacks) else callbacks
    if background:
        made.train_in_background(several)
    else:
        made.train(several)
    return made


def parsed(stage: str, settings: Mapping[str, Any]) -> RunConfig:
    """The config of these settings, as the stage's command would read them."""
    kind = config.RUN_CONFIGS[stage]
    first = [f"--config={settings['config']}"] if "config" in settings else []
    rest = {name: value for name, value in settings.items() if name != "config"}
    args = config.with_recipe(stage, [*first, *config.as_args(kind, rest)])
    return config.parse(kind, None, args)


def _path_of(data: Any) -> Any:
    """What data.path is for paths, or for rows, which are written to a file named by their hash."""
    if isinstance(data, str | Path):
        return str(data)
    rows = list(data)
    if not rows:
        raise ValueError("data=[]: holds no rows")
    if all(isinstance(row, str | Path) for row in rows):
        return [str(path) for path in rows]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    ROWS.mkdir(parents=True, exist_ok=True)
    name = hashlib.sha256(text.encode()).hexdigest()[:16]
    return str(files.write(ROWS / f"{name}.jsonl", text))


def _named(value: Any) -> Any:
    """A name where it is one already, else an object with its name."""
    if isinstance(value, list):
        return [_named(each) for each in value]
    return value if isinstance(value, str) else Own(value)


def _with(cfg: Any, path: Sequence[str], value: Any) -> Any:
    """The config with an object where parsing left its name."""
    first, *rest = path
    found = _with(getattr(cfg, first), rest, value) if rest else value
    return dataclasses.replace(cfg, **{first: found})
