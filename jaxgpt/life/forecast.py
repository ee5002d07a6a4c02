"""What a life will need before anything of it is run: memory, time and cost of every stage."""

import json
import tempfile
from pathlib import Path
from typing import Any

import yaml

from jaxgpt import config as configs
from jaxgpt import files
from jaxgpt.config import RUN_CONFIGS
from jaxgpt.life import life as lives
from jaxgpt.life.life import Life, Stage


def forecast(life: Life) -> tuple[str, list[dict[str, Any]]]:
    """The plans of scripts/plan.py as a table, and as objects.

    A stage that starts from another one is planned on the shape that this one will have.

    Raises:
        ValueError: a stage does not fit, or a setting that it refuses.
    """
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for stage in life.stages:
            if stage.trains:
                found.append({"stage": stage.name} | _plan(life, stage, Path(folder)))
    lines = [("stage", "memory", "of", "steps", "time", "cost")]
    for plan in found:
        memory = plan["memory_total"] / 1e9
        room = (plan["memory_available"] or 0) / 1e9
        if room and memory > room:
            raise ValueError(f"{plan['stage']}: needs {memory:.1f} GB of {room:.1f} GB a device")
        hours, dollars = plan.get("hours"), plan.get("dollars")
        if hours and not dollars and life.price_per_hour:
            dollars = [each * life.price_per_hour for each in hours]
        lines.append((
            plan["stage"], f"{memory:.2f} GB", f"{room:.1f} GB" if room else "?",
            f"{plan['steps']:,}", _span(hours, "{:.3g} h"), _span(dollars, "${:.2f}"),
        ))  # fmt: skip
    widths = [max(len(line[n]) for line in lines) for n in range(len(lines[0]))]
    table = "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
    return table, found


def _plan(life: Life, stage: Stage, run: Path) -> dict[str, Any]:
    """plan.py's object for a stage; the stage's folder then tells its shape to the next ones."""
    args = lives.command_of(life, stage, run, 0)[1:]
    args = _without(args, "--data.tokenizer") if stage.kind == "pretrain" else args
    command = ["plan.py", "--stage", stage.kind, *args, *life.plan]
    line = lives.perform(command, run / "plan.log", f"{stage.name}: ")
    plan = json.loads(line)
    cfg = configs.parse(RUN_CONFIGS[stage.kind], None, args)
    (run / stage.name).mkdir(exist_ok=True)
    shape = yaml.safe_dump({"model": plan["model"]})
    files.write(run / stage.name / "config.yaml", shape)
    return plan | {"steps": cfg.train.steps}


def _without(args: list[str], flag: str) -> list[str]:
    if flag not in args:
        return args
    place = args.index(flag)
    return [*args[:place], *args[place + 2 :]]


def _span(values: Any, form: str) -> str:
    return " to ".join(form.format(value) for value in values) if values else "?"
