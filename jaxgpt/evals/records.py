"""Data files of evaluations, and the file in which the results of single items are kept."""

import hashlib
import io
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxgpt import files
from jaxgpt.data import rows


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a file, or of a folder's or a glob's, each with its place for messages."""
    for row, where in rows.read(str(path)):
        if not isinstance(row, dict):
            raise ValueError(f"{where}: must be an object such as {{…}}")
        yield where, row


def text_field(row: Mapping[str, Any], name: str, where: str) -> str:
    """A field that must be text with something in it."""
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: {name} must be text, not {value!r:.80}")
    return value


def strings(value: Any, name: str, where: str) -> Sequence[str]:
    """A field that must be a list of at least two texts."""
    if not isinstance(value, list) or len(value) < 2 or not all(isinstance(v, str) for v in value):
        raise ValueError(f"{where}: {name} must be a list of two texts or more")
    return value


STORE_SECONDS = 30.0  # how long results may wait for the next writing of a file in a store


class Results:
    """Results by item, one JSON object a line after a header that says what was asked.

    The same question continues where it was left; another one is refused. In a store, where
    nothing is appended, the file is written again every STORE_SECONDS and at the end.
    """

    def __init__(self, path: Path | None, question: Mapping[str, Any]) -> None:
        self.found: dict[int, dict[str, Any]] = {}
        self._file: Any = None
        self._path: Path | None = None  # in a store
        self._stored = 0.0
        if path is None:
            return
        if path.is_dir():
            raise ValueError(f"output={path}: is a directory; name a file")
        files.make_folder(path.parent)
        intact = self._read(path, question) if path.exists() else 0
        if files.is_local(path):
            self._file = path.open("r+b" if intact else "wb")
        else:
            self._file, self._path = io.BytesIO(path.read_bytes() if intact else b""), path
            self._stored = time.monotonic()
        self._file.truncate(intact)
        self._file.seek(intact)
        if not intact:
            self._write({"question": question})

    def add(self, index: int, result: dict[str, Any]) -> None:
        self.found[index] = result
        self._write({"index": index} | result)

    def close(self) -> None:
        self._store()
        if self._file is not None:
            self._file.close()

    def _read(self, path: Path, question: Mapping[str, Any]) -> int:
        """Takes what is there; returns the length of the intact part (a kill may tear a line)."""
        lines = path.read_bytes().split(b"\n")[:-1]
        if not lines:
            return 0
        try:
            asked = json.loads(lines[0])["question"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"output={path}: holds something else; choose another file") from None
        differing = [
            f"{name}: {asked.get(name)} -> {question.get(name)}"
            for name in {**asked, **question}
            if asked.get(name) != question.get(name)
        ]
        if differing:
            raise ValueError(
                f"output={path}: holds the results of another evaluation ({'; '.join(differing)}); "
                "choose another file"
            )
        for line in lines[1:]:
            result = json.loads(line)
            self.found[result.pop("index")] = result
        return sum(len(line) + 1 for line in lines)

    def _write(self, record: Mapping[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
            self._file.flush()
            if self._path and time.monotonic() - self._stored > STORE_SECONDS:
                self._store()

    def _store(self) -> None:
        if self._path and self._file is not None:
            files.write(self._path, self._file.getvalue())
            self._stored = time.monotonic()


def digest(name: str) -> str:
    """sha256 of the bytes of all files that are read."""
    found = [file for file in rows.find(name, rows.TABLES) if not isinstance(file, str)]
    hashes = [files.sha256(file) for file in found]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
