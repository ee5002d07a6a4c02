"""Text in: files, folders, JSONL, JSON, Parquet, Hub data sets, Python's own standard library."""

import functools
import hashlib
import os
import re
import sys
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from jaxgpt.config.checks import nearest
from jaxgpt.data import rows
from jaxgpt.data.rows import BLOCK, TABLES, Errors, kind, read_blocks
from jaxgpt.files import sha256

TEXTS = {
    ".txt", ".text", ".md", ".rst", ".tex", ".html", ".csv", ".py", ".pyi", ".c", ".h", ".cc",
    ".cpp", ".hpp", ".java", ".js", ".ts", ".go", ".rs", ".rb", ".sh", ".sql", ".yaml", ".toml",
}  # fmt: skip
LONGEST_BLOCK = 16 * BLOCK
WORD_END = re.compile(r"[^\W\d_](?=[ \n])")
WORD_SEARCH = 1 << 14  # characters at a block's end in which to look for it
# Tests, other packages, and tables that are no code to learn from (charmaps).
LEAVE_OUT = re.compile(
    r"tests?|idle_test|site-packages|dist-packages|__pycache__|config-.*|encodings"
)
# Fewer files than this many held-out ones and the end of each is held out instead.
FEWEST_HELD_OUT = 2


class Piece(NamedTuple):
    """A stretch of text: long documents come in several."""

    text: str
    held_out: bool  # in the validation split
    ends: bool  # a document (or its part in this split) ends here


class Advice(NamedTuple):
    """What the command at hand offers against text that cannot be read as it is."""

    errors: str = ", or put U+FFFD in such places with --errors replace"
    column: str = "choose with --column"


PREPARING = Advice()


@dataclass
class Found:
    """What there was in the rows of the last reading."""

    rows: int = 0
    empty: int = 0
    columns: dict[str, None] = field(default_factory=dict)

    def report(self, column: str) -> None:
        """Prints how many rows had text, and which columns were not read."""
        if self.rows:
            others = ", ".join(name for name in self.columns if name != column)
            print(
                f"{self.rows:,} rows, {self.empty:,} dropped without text; columns read: {column}"
                + (f"; not read: {others}" if others else ""),
                file=sys.stderr,
            )


@dataclass(frozen=True)
class Corpus:
    """What to read and how; reading it twice gives the same pieces."""

    inputs: tuple[str, ...] = ()  # none: Python's standard library
    val_fraction: float = 0.1
    errors: Errors = "strict"
    column: str = "text"  # of JSONL, JSON, Parquet and Hub rows
    hub_split: str = "train"
    hub_config: str = ""
    advice: Advice = PREPARING
    found: Found = field(default_factory=Found, compare=False)

    def describe(self) -> dict[str, Any]:
        """What decides the pieces, with a hash of every file's bytes."""
        digest, files = hashlib.sha256(), self._files()
        for file in files:
            if not isinstance(file, str):
                digest.update(bytes.fromhex(sha256(file)))
            else:  # the Hub's text is not here to be hashed, but its revision is a hash
                names = (file, self.hub_config, self.hub_split, rows.hub_revision(file))
                digest.update(":".join(names).encode())
        return {
            "inputs": list(self.inputs) or ["Python's standard library"],
            "files": len(files),
            "bytes": self.size(),
            "sha256": digest.hexdigest(),
            "val_fraction": self.val_fraction,
            "errors": self.errors,
            "column": self.column,
        }

    def size(self) -> int:
        """Bytes of all files; of a Hub data set it is not known."""
        return sum(file.stat().st_size for file in self._files() if not isinstance(file, str))

    def pieces(self) -> Iterator[Piece]:
        """All text in order; `found` then tells what there was besides.

        Held out is every n-th document (n = 1 / val_fraction), or, of few text files, the end of
        each. A corpus of one text file has no document ends: nothing follows it.
        """
        self.found.__init__()
        files = self._files()
        texts = [file for file in files if not isinstance(file, str) and kind(file) not in TABLES]
        cut = len(texts) * self.val_fraction < FEWEST_HELD_OUT
        number = 0
        for file in files:
            if file in texts and cut:
                yield from self._cut_file(file, ends=len(files) > 1)
                continue
            for blocks in self._documents(file):
                held_out = _is_held_out(number, self.val_fraction)
                number += 1
                yield from _pieces(blocks, held_out)

    def _files(self) -> list[Path | str]:
        """The files of all inputs, folders opened, in sorted order; a Hub name stays a string."""
        if not self.inputs:
            return list(python_files())
        return [file for name in self.inputs for file in rows.find(name, TABLES | TEXTS)]

    def _cut_file(self, path: Path, ends: bool) -> Iterator[Piece]:
        """A text file whose last characters are held out; the two parts are tokenised apart."""
        size = sum(map(len, self._blocks(path)))
        left = int(size * (1 - self.val_fraction))
        for start, stop, held_out in ((0, left, False), (left, size, True)):
            blocks = _at_word_ends(_clip(self._blocks(path), start, stop))
            yield from _pieces(blocks, held_out, ends)

    def _documents(self, file: Path | str) -> Iterator[Iterable[str]]:
        """Every document as its blocks."""
        if not isinstance(file, str) and not self.inputs:
            yield [_python_text(file)]
        elif not isinstance(file, str) and kind(file) not in TABLES:
            yield _at_word_ends(self._blocks(file))
        else:
            for row, where in self._rows(file):
                yield [self._text(row, where)]

    def _blocks(self, file: Path) -> Iterator[str]:
        return read_blocks(file, self.errors, self.advice.errors)

    def _rows(self, file: Path | str) -> Iterator[tuple[Any, str]]:
        if not isinstance(file, str):
            if kind(file) == ".parquet":  # of which only the text is read
                self.found.columns.update(dict.fromkeys(rows.parquet(file).schema_arrow.names))
            return rows.file_rows(file, self.hub_split, self.errors, self.column)
        name, _, part = file.partition(":")
        part, revision = self.hub_config or part, rows.hub_revision(name)
        found = rows.hub_rows(name, part, self.hub_split, revision)
        return ((row, f"{file}, row {number}") for number, row in found)

    def _text(self, row: Any, where: str) -> str:
        """The text of a row, which is counted; null is no text."""
        if not isinstance(row, dict):
            raise ValueError(f"{where}: must be an object, not {type(row).__name__}")
        text = row.get(self.column, 0)
        if not isinstance(text, (str, type(None))):
            what = "no such column" if self.column not in row else f"not {text!r:.40}"
            raise ValueError(
                f"{where}: needs text in column {self.column!r}, {what} (it holds: "
                f"{', '.join(row)}){nearest(self.column, row)}; {self.advice.column}"
            )
        self.found.rows += 1
        self.found.empty += not text
        self.found.columns.update(dict.fromkeys(row))
        return text or ""


@functools.cache
def python_files() -> tuple[Path, ...]:
    """The source files of Python's standard library, without tests and installed packages."""
    root, found = Path(sysconfig.get_path("stdlib")), []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not LEAVE_OUT.fullmatch(name)]
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    return tuple(sorted(file for file in found if _python_text(file)))


def _is_held_out(number: int, fraction: float) -> bool:
    # The small term lets 10 * 0.1 count as 1 although 0.1 is a little off.
    return int((number + 1) * fraction + 1e-9) > int(number * fraction + 1e-9)


def _pieces(blocks: Iterable[str], held_out: bool, ends: bool = True) -> Iterator[Piece]:
    previous = None
    for block in blocks:
        if previous is not None:
            yield Piece(previous, held_out, False)
        previous = block
    if previous:
        yield Piece(previous, held_out, ends)


def _at_word_ends(blocks: Iterable[str]) -> Iterator[str]:
    """The same text, cut between a letter and the white space after it.

    Every byte-level pre-tokenizer cuts there itself, so the tokens of the blocks are the tokens
    of the text. Text without such a place is cut where it becomes long.
    """
    text = ""
    for block in blocks:
        text += block
        start = max(0, len(text) - WORD_SEARCH)
        cut = max((start + word.end() for word in WORD_END.finditer(text[start:])), default=0)
        if not cut and len(text) > LONGEST_BLOCK:
            cut = len(text)
        if cut:
            yield text[:cut]
            text = text[cut:]
    if text:
        yield text


def _clip(blocks: Iterable[str], start: int, stop: int) -> Iterator[str]:
    """Characters start … stop - 1 of the joined blocks."""
    first = 0
    for block in blocks:
        yield block[max(start - first, 0) : max(stop - first, 0)]
        first += len(block)


def _python_text(path: Path) -> str:
    """A source file by its own coding cookie; empty where that fails."""
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (SyntaxError, UnicodeDecodeError):  # an unknown cookie, or bytes that belie it
        return ""
