"""Finished and unfinished runs as rows: what was set, what came out, what it cost."""

import json
import operator
import re
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from jaxgpt import files, lineage, metrics, rundir, tree

# The longest first, so that <= is not read as <.
COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "<=": operator.le, ">=": operator.ge, "!=": operator.ne, "=": operator.eq, "<": operator.lt,
    ">": operator.gt, "~": lambda found, wanted: re.search(str(wanted), str(found)) is not None,
}  # fmt: skip
SHOWN = (
    "run",
    "stage",
    "state",
    "step",
    "seed",
    "val/loss",
    "val/exact_match",
    "val/full_reward",
    "tokens",
    "seconds",
)


class Run:
    """A run directory, read when asked.

    Raises:
        ValueError: it is no run.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = files.path(path)
        if not rundir.is_run(path):
            raise ValueError(f"{path}: is no run (it has no config.yaml); name a run directory")

    @cached_property
    def config(self) -> dict[str, Any]:
        """Settings by their dotted names."""
        settings = yaml.safe_load((self.path / "config.yaml").read_text(encoding="utf-8"))
        return {name.replace("/", "."): value for name, value in tree.flatten(settings).items()}

    @cached_property
    def records(self) -> list[dict[str, Any]]:
        return metrics.read_jsonl(self.path / "metrics.jsonl")

    @cached_property
    def lineage(self) -> dict[str, Any]:
        return lineage.read(self.path) or {}

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the run's numbers, apart from its seed."""
        kept = lambda name: name != "seed" and name.split(".")[0] not in rundir.FREE
        return {name: value for name, value in self.config.items() if kept(name)}

    def series(self, metric: str) -> dict[int, float]:
        """The values of a metric by step."""
        return {
            record["step"]: float(record[metric])
            for record in self.records
            if isinstance(record.get(metric), int | float)
        }

    def spent(self, kind: str) -> dict[str, float]:
        """Seconds or tokens by kind, over all sessions."""
        return lineage.spent(self.lineage, kind)

    def row(self) -> dict[str, Any]:
        """All of it in one flat object: settings, the last value of every metric, the costs."""
        last: dict[str, Any] = {}
        for record in self.records:
            last |= record
        step = last.pop("step", 0)
        wanted = self.config.get("train.steps", 0)
        return {
            "run": str(self.path), "stage": self.lineage.get("stage", "?"),
            "state": "complete" if step >= wanted else "incomplete" if step else "not begun",
            "step": step, "begun": self.lineage.get("begun", ""),
            "tokens": sum(self.spent("tokens").values()),
            "seconds": round(sum(self.spent("seconds").values()), 1),
            **{name: value for name, value in self.config.items() if name != "run"}, **last,
        }  # fmt: skip


def find(folder: str | Path) -> list[Run]:
    """All runs in a folder and the folders in it, by name.

    Raises:
        ValueError: there is no such folder.
    """
    if not files.path(folder).is_dir():
        raise ValueError(f"{folder}: is no folder")
    return [Run(file.parent) for file in sorted(files.path(folder).rglob("config.yaml"))]


def select(
    rows: Sequence[dict[str, Any]], where: Sequence[str] = (), sort: str = ""
) -> list[dict[str, Any]]:
    """The rows that fulfil every condition, in order.

    Args:
        where: such as `stage=sft`, `val/loss<2.5`, `run~arith`.
        sort: a column; -column is descending; rows without it go last.

    Raises:
        ValueError: no condition, or a column that no row has.
    """
    kept = list(rows)
    for condition in where:
        found = re.match(rf"(.+?)({'|'.join(map(re.escape, COMPARE))})(.*)", condition)
        if found is None:
            raise ValueError(
                f"where={condition}: must be COLUMN=VALUE, or with {' '.join(COMPARE)}"
            )
        name, sign, text = found.groups()
        _require_column(rows, "where", name)
        kept = [row for row in kept if _holds(row.get(name), sign, text)]
    if sort:
        name = sort.removeprefix("-")
        _require_column(rows, "sort", name)
        have = [row for row in kept if isinstance(row.get(name), int | float | str)]
        key = lambda row: (isinstance(row[name], str), row[name])
        rest = [row for row in kept if not isinstance(row.get(name), int | float | str)]
        kept = sorted(have, key=key, reverse=sort.startswith("-")) + rest
    return kept


def table(rows: Sequence[dict[str, Any]], more: Sequence[str] = ()) -> str:
    """Rows as aligned text: SHOWN, and the columns in `more`."""
    columns = [name for name in dict.fromkeys([*SHOWN, *more]) if any(name in r for r in rows)]
    cells = [columns, *([_short(row.get(name)) for name in columns] for row in rows)]
    widths = [max(len(line[n]) for line in cells) for n in range(len(columns))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    )


def _holds(found: Any, sign: str, text: str) -> bool:
    wanted = yaml.safe_load(text) if text else ""
    if found is None or (sign in ("<", ">", "<=", ">=") and not isinstance(found, int | float)):
        return sign == "!=" and wanted is not None
    if sign == "~":
        wanted = text
    try:
        return COMPARE[sign](found, wanted)
    except TypeError:  # a number against a text
        return sign == "!="


def _require_column(rows: Sequence[dict[str, Any]], setting: str, name: str) -> None:
    if rows and not any(name in row for row in rows):
        known = ", ".join(SHOWN)
        raise ValueError(
            f"{setting}={name}: no run has this column; try {known}, a setting or a metric"
        )


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e6 else f"{value:,.0f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return "" if value is None else value if isinstance(value, str) else json.dumps(value)
