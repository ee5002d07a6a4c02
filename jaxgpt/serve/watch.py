"""The runs of a folder, as they stand and as they go on."""

import json
import time
from pathlib import Path
from typing import Any

from jaxgpt.checkpoint import Checkpoints

LIVE_SECONDS = 60  # a run whose log is younger is training
TAIL = 16384  # bytes of a log in which its last values are looked for


def find(folder: Path, name: str) -> Path | None:
    """The run of a name in the folder, or in one of its folders."""
    return {path.relative_to(folder).as_posix(): path for path in _paths(folder)}.get(name)


def runs(folder: Path) -> list[dict[str, Any]]:
    """All of them, the one that wrote last first: name, step, loss, whether it is training."""
    found = [(path, path / "metrics.jsonl") for path in _paths(folder)]
    written = {path: log.stat().st_mtime if log.exists() else 0.0 for path, log in found}
    described = []
    for path in sorted(written, key=lambda path: -written[path]):
        last: dict[str, Any] = {}
        for record in _records(path, max(0, _size(path) - TAIL))[0]:
            last |= record
        name = path.relative_to(folder).as_posix()
        described.append({
            "name": name, "open": f"run:{name}", "step": last.get("step"),
            "loss": last.get("val/loss", last.get("train/loss")),
            "live": time.time() - written[path] < LIVE_SECONDS,
            "steps": Checkpoints(path / "checkpoints").steps(),
        })  # fmt: skip
    return described


def read(path: Path, offset: int) -> dict[str, Any]:
    """What a run recorded after `offset` bytes of its log; one that is shorter began anew."""
    restarted = _size(path) < offset
    records, end = _records(path, 0 if restarted else offset)
    return {"records": records, "offset": end, "restarted": restarted}


def _paths(folder: Path) -> list[Path]:
    return [file.parent for depth in ("*", "*/*") for file in folder.glob(f"{depth}/config.yaml")]


def _size(path: Path) -> int:
    log = path / "metrics.jsonl"
    return log.stat().st_size if log.exists() else 0


def _records(path: Path, start: int) -> tuple[list[dict[str, Any]], int]:
    """The whole lines from a place on, and where they end; a line that it cuts is left out."""
    if not _size(path):
        return [], start
    with (path / "metrics.jsonl").open("rb") as file:
        file.seek(start)
        whole, newline, _ = file.read().rpartition(b"\n")
    found = []
    for line in whole.split(b"\n"):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "step" in record:
            found.append(record)
    return found, start + len(whole) + len(newline)
