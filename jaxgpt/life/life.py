"""A life: stages that are existing commands, one after another, each with measures and targets.

    run: runs/life                  folder of the life; a stage NAME has RUN/NAME
    evaluations:                    commands that measure a stage, by name
      sums: evaluate.py --task arithmetic --data arithmetic --chat
    stages:
      - name: sft
        command: sft.py --init {pretrain} --train.steps 900
        measures:                   EVALUATION/NUMBER, or a metric of the run, and its target
          sums/flexible_match: ">= 0.9"
          val/loss:

{NAME} is the folder of an earlier stage, {self} the stage's own, {repo} where jaxgpt's configs are;
`places` names others, such as data, with what stands for them unless --set NAME=VALUE says else.
A training command also gets --run {self} and --seed, an evaluation --checkpoint {self}. No stage
knows that it is part of a life: each line of it can be typed in a shell.
"""

import contextlib
import ctypes
import hashlib
import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from jaxgpt import files, lineage
from jaxgpt.config import RUN_CONFIGS, named
from jaxgpt.life.runs import COMPARE, Run

COMMANDS = Path(__file__).parents[1] / "commands"
STATE = "life.json"
FIELDS = {"run", "about", "minutes", "price_per_hour", "plan", "asks", "titles",
          "places", "evaluations", "stages"}  # fmt: skip
STAGE_FIELDS = {"name", "command", "about", "measures"}


class Missed(FloatingPointError):
    """A stage's measure that is not what its target asks for."""


class Stage(NamedTuple):
    """One command of a life, and what is asked of its result."""

    name: str
    command: list[str]  # with {placeholders}
    about: str
    measures: dict[str, str]  # measure -> target such as ">= 0.9"; empty: none

    @property
    def kind(self) -> str:
        """The command's name, which may end in .py."""
        return self.command[0].removesuffix(".py")

    @property
    def trains(self) -> bool:
        return self.kind in RUN_CONFIGS


class Life(NamedTuple):
    """What a life's YAML says."""

    title: str
    run: str
    about: str
    stages: list[Stage]
    evaluations: dict[str, list[str]]
    titles: dict[str, str]  # of measures, for people
    asks: list[str]  # questions that every stage answers on the card
    minutes: float
    price_per_hour: float
    plan: list[str]  # arguments of plan.py
    places: dict[str, str]  # {NAME} -> what stands for it in commands


def read(path: str | Path, settings: Sequence[str] = ()) -> Life:
    """A life's YAML, checked before anything is started.

    Args:
        settings: NAME=VALUE for its places.

    Raises:
        ValueError: naming the stage and what is wrong with it.
    """
    path = named.find("config", str(path))
    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"config={path}: is no YAML ({error})") from None
    if not isinstance(found, dict) or not isinstance(found.get("stages"), list):
        raise ValueError(f"config={path}: must have a list of stages")
    _known(found, FIELDS, str(path))
    evaluations = {n: shlex.split(c) for n, c in (found.get("evaluations") or {}).items()}
    places = {name: str(value) for name, value in (found.get("places") or {}).items()}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or name not in places:
            known = ", ".join(places) or "none"
            raise ValueError(f"set={setting}: must be NAME=VALUE, with a name of places ({known})")
        places[name] = value
    stages: list[Stage] = []
    for entry in found["stages"]:
        stages.append(_stage(entry, [stage.name for stage in stages], evaluations))
    return Life(
        Path(path).stem, found.get("run", "runs/life"), found.get("about", ""), stages,
        evaluations, found.get("titles") or {}, found.get("asks") or [],
        float(found.get("minutes") or 0), float(found.get("price_per_hour") or 0),
        shlex.split(found.get("plan") or ""), places,
    )  # fmt: skip


def live(life: Life, run: Path, seed: int, keep_going: bool = False) -> list[str]:
    """Makes what is missing of a life; gives the targets that were missed, one line each.

    A killed life goes on where it was: each finished command is noted in life.json.

    Raises:
        Missed: without `keep_going`, at the first stage that misses a target.
        ValueError: a command failed, or a stage was made from what has changed since.
    """
    run.mkdir(parents=True, exist_ok=True)
    with _alone(run):
        state = read_state(run)
        made = state.setdefault("stages", {})
        state |= {"title": life.title, "seed": seed}
        missed: list[str] = []
        for stage in life.stages:
            record = _make(life, stage, run, seed, made)
            for name in evaluations_of(life, stage):
                _measure(life, stage, name, run, seed, record, made)
            _save(run, state)
            found = judged(stage, run, record)
            print(_line(life, stage, record, found), flush=True)
            lacking = [
                f"{stage.name}: {name} is {value:.4g}, the target is {target}"
                for name, (value, target, met) in found.items()
                if not met
            ]
            missed += lacking
            if lacking and not keep_going:
                raise Missed(f"{lacking[0]}; --keep_going goes on all the same")
    return missed


def judged(stage: Stage, run: Path, record: dict[str, Any]) -> dict[str, tuple[float, str, bool]]:
    """Measure -> (value, target, whether it is met)."""
    found = {}
    for name, target in stage.measures.items():
        value = value_of(stage, run, record, name)
        sign = next(sign for sign in ("<=", ">=", "<", ">") if target.startswith(sign)) \
            if target else ""  # fmt: skip
        met = not target or COMPARE[sign](value, float(target.removeprefix(sign)))
        found[name] = (value, target, met)
    return found


def value_of(stage: Stage, run: Path, record: dict[str, Any], measure: str) -> float:
    """A number of an evaluation, or the last value of a metric of the run.

    Raises:
        ValueError: there is no such number.
    """
    name, _, number = measure.partition("/")
    if name in record["evaluations"]:
        known = record["evaluations"][name]["result"]
    else:
        series = Run(run / stage.name).series(measure) if stage.trains else {}
        known, number = ({measure: series[max(series)]} if series else {}), measure
    if not isinstance(known.get(number), int | float):
        raise ValueError(
            f"{stage.name}: measures {measure}, of which there is no number; there are "
            f"{', '.join(n for n, v in known.items() if isinstance(v, float)) or 'none'}"
        )
    return float(known[number])


def evaluations_of(life: Life, stage: Stage) -> list[str]:
    """The names of the evaluations that a stage's measures come from."""
    names = dict.fromkeys(measure.partition("/")[0] for measure in stage.measures)
    return [name for name in names if name in life.evaluations]


def command_of(life: Life, stage: Stage, run: Path, seed: int) -> list[str]:
    """The stage's command as it is run, without the interpreter."""
    filled = _filled(stage.command, life, stage, run)
    return filled + (["--run", str(run / stage.name), "--seed", str(seed)] if stage.trains else [])


def evaluation_of(life: Life, stage: Stage, name: str, run: Path) -> list[str]:
    """An evaluation's command as it is run on a stage."""
    filled = _filled(life.evaluations[name], life, stage, run)
    return filled + ([] if "--checkpoint" in filled else ["--checkpoint", str(run / stage.name)])


def output_of(stage: Stage, run: Path) -> str:
    """What identifies a stage's result: a hash of its weights, or of its files."""
    if stage.trains:
        return (lineage.read(run / stage.name) or {}).get("result", {}).get("sha256", "")
    export = lineage.read(run / stage.name)  # which says when it was written, too
    if export:
        return hashlib.sha256(json.dumps(export["files"], sort_keys=True).encode()).hexdigest()
    return lineage.source(stage.name, str(run / stage.name))["sha256"]


def read_state(run: Path) -> dict[str, Any]:
    """life.json, what has been done so far."""
    file = run / STATE
    try:
        return json.loads(file.read_text()) if file.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{file}: is damaged ({error})") from None


def in_process(name: str, *args: str) -> list[str]:
    """A command of ours for a process of its own, whose folder hides no module (-P)."""
    return [sys.executable, "-P", "-m", "jaxgpt", name.removesuffix(".py"), *args]


def typed(command: Sequence[str]) -> str:
    """A command as a person types it."""
    return " ".join(["jaxgpt", command[0].removesuffix(".py"), *command[1:]])


def perform(command: Sequence[str], log: Path, prefix: str = "") -> str:
    """Runs a command of ours to its end; the last line of its output.

    Raises:
        ValueError: it failed, with the line in which it says why.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as errors:
        done = subprocess.run(
            in_process(command[0], *command[1:]), stdout=subprocess.PIPE, stderr=errors,
            preexec_fn=_die_with_parent if sys.platform == "linux" else None, text=True,
        )  # fmt: skip
        errors.write(done.stdout.encode())
    if done.returncode:
        lines = log.read_text(errors="replace").splitlines() or [""]
        why = next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1])
        raise ValueError(
            f"{prefix}{shlex.join(command)}: {why.removeprefix('error: ')}; see {log}; the same "
            "command goes on"
        )
    return (done.stdout.strip().splitlines() or [""])[-1]


def _make(life: Life, stage: Stage, run: Path, seed: int, made: dict[str, Any]) -> dict[str, Any]:
    """The stage's record, after its command has been run to the end."""
    command = command_of(life, stage, run, seed)
    inputs = {
        other.name: output_of(other, run)
        for other in life.stages
        if any(f"{{{other.name}}}" in part for part in stage.command)
    }
    record = made.get(stage.name, {})
    if record and record["inputs"] != inputs:
        changed = next(name for name in inputs if record["inputs"].get(name) != inputs[name])
        raise ValueError(
            f"{stage.name}: was made from another {changed}; delete {run / stage.name} and its "
            f"entry in {run / STATE}, or take another --run"
        )
    output = output_of(stage, run) if (run / stage.name).exists() else ""
    if record and record["command"] == command and output == record["output"]:
        return record
    began = time.perf_counter()
    perform(command, run / "logs" / f"{stage.name}.log", f"{stage.name}: ")
    seconds = record.get("seconds", 0.0) + time.perf_counter() - began
    output = output_of(stage, run)
    if not output:
        raise ValueError(
            f"{stage.name}: was stopped before its last step; the same command goes on"
        )
    made[stage.name] = {
        "command": command, "inputs": inputs, "output": output, "seconds": seconds,
        "ended": lineage.now(), "evaluations": {},
    }  # fmt: skip
    return made[stage.name]


def _measure(
    life: Life,
    stage: Stage,
    name: str,
    run: Path,
    seed: int,
    record: dict[str, Any],
    made: dict[str, Any],
) -> None:
    """Adds an evaluation to the stage's record, unless it is there."""
    command = evaluation_of(life, stage, name, run)
    if record["evaluations"].get(name, {}).get("command") == command:
        return
    _save(run, {"title": life.title, "seed": seed, "stages": made})
    began = time.perf_counter()
    line = perform(command, run / "logs" / f"{stage.name}.log", f"{stage.name}, {name}: ")
    record["evaluations"][name] = {
        "command": command, "result": json.loads(line), "seconds": time.perf_counter() - began,
    }  # fmt: skip


def _line(
    life: Life,
    stage: Stage,
    record: dict[str, Any],
    found: dict[str, tuple[float, str, bool]],
) -> str:
    seconds = record["seconds"] + sum(e["seconds"] for e in record["evaluations"].values())
    width = max(len(stage.name) for stage in life.stages)
    parts = [
        f"{life.titles.get(name, name)} {value:.4g}"
        + (f" ({'' if met else 'MISSED '}{target})" if target else "")
        for name, (value, target, met) in found.items()
    ]
    return (
        f"{stage.name:{width}}  {int(seconds // 60):3}:{int(seconds % 60):02}  {', '.join(parts)}"
    )


def _filled(command: Sequence[str], life: Life, stage: Stage, run: Path) -> list[str]:
    places = life.places | {other.name: str(run / other.name) for other in life.stages}
    places |= {"self": str(run / stage.name), "run": str(run), "repo": str(named.CONFIGS.parent)}
    return [_replace(part, places) for part in command]


def _replace(part: str, places: dict[str, str]) -> str:
    """{name} by its place; other braces, as of JSON, stay."""
    for name, place in places.items():
        part = part.replace(f"{{{name}}}", place)
    return part


def _stage(entry: Any, earlier: Sequence[str], evaluations: dict[str, list[str]]) -> Stage:
    if not isinstance(entry, dict) or not entry.get("name") or not entry.get("command"):
        raise ValueError(f"stages: {entry!r:.80} must have a name and a command")
    name = str(entry["name"])
    _known(entry, STAGE_FIELDS, f"stage {name}")
    command = shlex.split(entry["command"])
    measures = {m: str(t or "") for m, t in (entry.get("measures") or {}).items()}
    taken = [*earlier, "self", "run", "repo", "logs", "answers"]
    if name in taken or not name.replace("-", "").replace("_", "").isalnum():
        raise ValueError(f"stage {name}: is no name of its own (letters, digits, - and _)")
    for script in (command[0], *(line[0] for line in evaluations.values())):
        kind = script.removesuffix(".py")
        if kind not in RUN_CONFIGS and not (COMMANDS / f"{kind}.py").is_file():
            raise ValueError(f"stage {name}: there is no command {kind}")
    for target in measures.values():
        number = target.lstrip("<>= ")
        if target and (target[0] not in "<>" or not _is_number(number)):
            raise ValueError(f"stage {name}: target {target!r} must be such as '>= 0.9'")
    return Stage(name, command, entry.get("about", ""), measures)


def _known(found: dict[str, Any], fields: set[str], where: str) -> None:
    unknown = sorted(found.keys() - fields)
    if unknown:
        raise ValueError(
            f"{where}: has no {unknown[0]}; its fields are {', '.join(sorted(fields))}"
        )


def _is_number(text: str) -> bool:
    try:
        return float(text) is not None
    except ValueError:
        return False


def _save(run: Path, state: dict[str, Any]) -> None:
    files.write(run / STATE, json.dumps(state, indent=1, ensure_ascii=False))


@contextlib.contextmanager
def _alone(run: Path) -> Iterator[None]:
    """Refuses a second life in the same folder."""
    import fcntl

    with (run / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"run={run}: another life is at work here") from None
        yield


def _die_with_parent() -> None:
    """A killed life leaves no command behind that writes where the next one goes on (Linux)."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
