"""Whether a life's card still says what its runs hold: hashed again, and in part computed again."""

import hashlib
import json
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxgpt import lineage
from jaxgpt.life import card as cards
from jaxgpt.life import life as lives
from jaxgpt.life.life import Life, Stage

AGAIN = 16  # items of an evaluation that are computed again
TOLERANCE = 1e-3  # of numbers, which rounding may move; texts must be the same


def check(life: Life, run: Path, compute: bool = True) -> Iterator[tuple[str, str]]:
    """(what was looked at, what differs or "") of the card, every stage's files, one number each.

    Args:
        compute: also a few items of each stage's first evaluation, again.

    Raises:
        ValueError: there is no card.
    """
    for name in ("card.json", "card.md", "card.html"):
        if not (run / name).is_file():
            raise ValueError(f"{run / name}: is not there; make the life first")
    try:
        written = json.loads((run / "card.json").read_text())
    except ValueError as error:
        yield f"{run}/card.json", f"is damaged ({error})"
        return
    if written.get("seeds"):
        for seed in written["seeds"]:
            yield from check(life, run / f"seed{seed}", compute)
        found = cards.spread([cards.collect(life, run / f"seed{s}") for s in written["seeds"]])
    else:
        yield from _stages(life, run, compute)
        found = cards.collect(life, run)
    pages = written.pop("pages", {})
    yield f"{run}/card.json", difference(written, json.loads(json.dumps(found)))
    for name in ("card.md", "card.html"):
        same = hashlib.sha256((run / name).read_bytes()).hexdigest() == pages.get(name)
        yield f"{run}/{name}", "" if same else "is not what card.json says"


def difference(old: Any, new: Any, where: str = "") -> str:
    """The first place at which two JSON values differ, with both; empty: none."""
    if isinstance(old, dict) and isinstance(new, dict):
        pairs = [(f"{where}.{key}", old.get(key), new.get(key)) for key in {**old, **new}]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = [(f"{where}[{n}]", *both) for n, both in enumerate(zip(old, new, strict=True))]
    else:
        return "" if old == new else f"{where.lstrip('.')} is {old!r:.60}, the runs say {new!r:.60}"
    return next(filter(None, (difference(a, b, place) for place, a, b in pairs)), "")


def _stages(life: Life, run: Path, compute: bool) -> Iterator[tuple[str, str]]:
    made, seen = lives.read_state(run).get("stages", {}), set[str]()
    for stage in life.stages:
        if stage.name not in made:
            continue
        path, record = run / stage.name, made[stage.name]
        if lineage.read(path) and str(path.resolve()) not in seen:
            yield from lineage.check(path, seen)
        try:
            same = lives.output_of(stage, run) == record["output"]
        except (OSError, ValueError):
            same = False
        yield str(path), "" if same else "its files are not those that were made"
        if compute:
            yield from _again(life, stage, run, record)


def _again(
    life: Life, stage: Stage, run: Path, record: dict[str, Any]
) -> Iterator[tuple[str, str]]:
    """The first items of the stage's first evaluation, computed again."""
    for name in lives.evaluations_of(life, stage)[:1]:
        recorded = _items(run / stage.name, record["evaluations"][name]["command"])
        if not recorded:
            yield f"{run / stage.name}/evals", f"holds no results of {name}"
            return
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "items.jsonl"
            command = _with(
                record["evaluations"][name]["command"], "--limit", str(min(AGAIN, len(recorded)))
            )
            command = _with(command, "--output", str(output))
            lives.perform(command, run / "logs" / "check.log", f"{stage.name}, {name}: ")
            again = _read_items(output)
        wrong = [n for n, item in again.items() if not _equal(recorded.get(n), item)]
        about = f"{stage.name}: {name}, {len(again)} items computed again"
        yield about, f"item {wrong[0]} is another" if wrong else ""


def _items(path: Path, command: list[str]) -> dict[int, Any]:
    """The results of an evaluation by item, found by the command that made them."""
    for file in path.glob("evals/*.json"):
        if json.loads(file.read_text()).get("command", "").split()[2:] == command[1:]:
            return _read_items(file.with_suffix(".jsonl"))
    return {}


def _read_items(file: Path) -> dict[int, Any]:
    _, *lines = file.read_text().splitlines()
    return {item.pop("index"): item for item in map(json.loads, lines)}


def _with(command: list[str], flag: str, value: str) -> list[str]:
    """The command with a flag set."""
    if flag in command:
        place = command.index(flag)
        return [*command[: place + 1], value, *command[place + 2 :]]
    return [*command, flag, value]


def _equal(old: Any, new: Any) -> bool:
    if isinstance(old, dict) and isinstance(new, dict):
        return old.keys() == new.keys() and all(_equal(old[key], new[key]) for key in old)
    if isinstance(old, list) and isinstance(new, list):
        return len(old) == len(new) and all(map(_equal, old, new))
    if isinstance(old, float) and isinstance(new, float):
        return math.isclose(old, new, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
    return old == new
