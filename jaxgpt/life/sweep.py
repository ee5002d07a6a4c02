"""A grid of runs: every combination of settings and seeds, of which the missing ones are run."""

import itertools
import shlex
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import yaml

from jaxgpt import rundir
from jaxgpt.config import RUN_CONFIGS
from jaxgpt.life import runs
from jaxgpt.life.life import in_process


class Job(NamedTuple):
    """One run of a sweep."""

    run: Path
    command: list[str]
    settings: str  # such as optim.learning_rate=0.001: what the runs of a group have in common

    @property
    def done(self) -> bool:
        """Whether it has made all its steps."""
        return rundir.is_run(self.run) and runs.Run(self.run).row()["state"] == "complete"


def jobs(
    stage: str,
    config: str,
    grid: Sequence[str],
    seeds: Sequence[int],
    folder: str,
    more: Sequence[str] = (),
) -> list[Job]:
    """Every combination as a command of its own; the same sweep always names the same folders.

    Args:
        grid: `KEY=A,B` each, or `KEY=[…]` with a YAML list of the values.
        more: settings that all runs have, as on a command line.

    Raises:
        ValueError: no such stage, or a grid of another form.
    """
    if stage not in RUN_CONFIGS:
        raise ValueError(f"stage={stage}: must be one of {', '.join(RUN_CONFIGS)}; give --stage")
    axes = [_axis(entry) for entry in grid]
    names = [name for name, _ in axes]
    if len(set(names)) < len(names):
        raise ValueError(
            f"grid: names {max(names, key=names.count)} twice; join its values by commas"
        )
    found = []
    for values in itertools.product(*(choices for _, choices in axes)):
        chosen = dict(zip(names, values, strict=True))
        label = " ".join(f"{name}={value}" for name, value in chosen.items())
        short = "-".join(f"{name.rsplit('.', 1)[-1]}={value}" for name, value in chosen.items())
        for seed in seeds:
            run = Path(folder) / f"{_plain(short) or stage}-seed{seed}"
            flags = [part for name, value in chosen.items() for part in (f"--{name}", value)]
            command = [
                *in_process(stage), *(["--config", config] if config else []),
                *more, *flags, "--seed", str(seed), "--run", str(run),
            ]  # fmt: skip
            found.append(Job(run, command, label))
    if len({job.run for job in found}) < len(found):
        raise ValueError("grid: two of its values give the same folder; write them apart")
    return found


def perform(todo: Sequence[Job], at_once: int) -> list[Job]:
    """Runs what is not done yet, each in a process of its own; gives the jobs that failed."""

    def work(job: Job) -> bool:
        if job.done:
            print(f"{job.run}: is there", flush=True)
            return True
        job.run.mkdir(parents=True, exist_ok=True)
        log = job.run.with_name(f"{job.run.name}.log")
        with log.open("a") as file:
            code = subprocess.run(job.command, stdout=file, stderr=file).returncode
        last = (log.read_text(errors="replace").splitlines() or [""])[-1]
        print(f"{job.run}: {'done' if code == 0 else f'failed, {last}'}", flush=True)
        return code == 0

    with ThreadPoolExecutor(at_once) as pool:
        return [job for job, good in zip(todo, pool.map(work, todo), strict=True) if not good]


def as_lines(todo: Sequence[Job]) -> list[str]:
    """One command a line, for an array job of a cluster."""
    return [shlex.join(job.command) for job in todo]


def _axis(entry: str) -> tuple[str, list[str]]:
    name, equals, text = entry.partition("=")
    values = yaml.safe_load(text) if text.startswith("[") else text.split(",")
    if not (name and equals and text and all(str(value) for value in values)):
        raise ValueError(f"grid={entry}: must be KEY=A,B such as optim.learning_rate=1e-3,3e-3")
    return name, [str(value) for value in values]


def _plain(text: str) -> str:
    """A name that is good as a folder's on every system."""
    return "".join(c if c.isalnum() or c in "=-.+" else "_" for c in text)
