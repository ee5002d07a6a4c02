"""Text in: files, folders, JSONL, JSON, Parquet, Hub data sets, Python's own standard library.

Text files are UTF-8. A byte-order mark is dropped and line ends become "\\n". Invalid UTF-8 is an
error with its place, or becomes U+FFFD with errors="replace"; a NUL byte is always an error,
because it means that the file is no text.
"""

import bz2
import codecs
import functools
import gzip
import hashlib
import io
import itertools
import json
import os
import re
import sysconfig
import tokenize
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

Errors = Literal["strict", "replace"]

TABLES = {".jsonl", ".ndjson", ".json", ".parquet"}
TEXTS = {
    ".txt", ".text", ".md", ".rst", ".tex", ".html", ".csv", ".py", ".pyi", ".c", ".h", ".cc",
    ".cpp", ".hpp", ".java", ".js", ".ts", ".go", ".rs", ".rb", ".sh", ".sql", ".yaml", ".toml",
}  # fmt: skip
PACKED: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open}
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
HUB_SECONDS = 20
BLOCK = 1 << 20  # bytes read, and characters encoded, at a time
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


@dataclass(frozen=True)
class Corpus:
    """What to read and how; reading it twice gives the same pieces."""

    inputs: tuple[str, ...] = ()  # none: Python's standard library
    val_fraction: float = 0.1
    errors: Errors = "strict"
    column: str = "text"  # of JSONL, JSON, Parquet and Hub rows
    hub_split: str = "train"
    hub_config: str = ""

    def describe(self) -> dict[str, Any]:
        """What decides the pieces, with a hash of every file's bytes."""
        digest, files = hashlib.sha256(), self._files()
        for file in files:
            if isinstance(file, Path):
                digest.update(_sha256(file))
            else:  # the Hub's text is not here to be hashed, but its revision is a hash
                names = (file, self.hub_config, self.hub_split, _hub_revision(file))
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
        return sum(file.stat().st_size for file in self._files() if isinstance(file, Path))

    def pieces(self) -> Iterator[Piece]:
        """All text in order.

        Held out is every n-th document (n = 1 / val_fraction), or, of few text files, the end of
        each. A corpus of one text file has no document ends: nothing follows it.
        """
        files = self._files()
        texts = [file for file in files if isinstance(file, Path) and _kind(file) not in TABLES]
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
        return [file for name in self.inputs for file in _expand(name)]

    def _cut_file(self, path: Path, ends: bool) -> Iterator[Piece]:
        """A text file whose last characters are held out; the two parts are tokenised apart."""
        size = sum(map(len, read_blocks(path, self.errors)))
        left = int(size * (1 - self.val_fraction))
        for start, stop, held_out in ((0, left, False), (left, size, True)):
            blocks = _at_word_ends(_clip(read_blocks(path, self.errors), start, stop))
            yield from _pieces(blocks, held_out, ends)

    def _documents(self, file: Path | str) -> Iterator[Iterable[str]]:
        """Every document as its blocks."""
        if isinstance(file, Path) and not self.inputs:
            yield [_python_text(file)]
        elif isinstance(file, Path) and _kind(file) not in TABLES:
            yield _at_word_ends(read_blocks(file, self.errors))
        else:
            rows = (
                _table_rows(file, self.column, self.errors)
                if isinstance(file, Path)
                else _hub_rows(file, self.hub_config, self.hub_split)
            )
            for number, row in enumerate(rows, 1):
                yield [_cell(row, self.column, f"{file}, row {number}", self.errors)]


def read_text(path: str | Path, errors: Errors = "strict") -> str:
    """A whole text file.

    Raises:
        ValueError: empty, not UTF-8 (with the byte's offset), or binary.
    """
    text = "".join(read_blocks(Path(path), errors))
    if not text:
        raise ValueError(f"{path}: the file is empty")
    return text


def read_blocks(path: Path, errors: Errors = "strict") -> Iterator[str]:
    """A text file in stretches of about a million characters, decoded as the module says."""
    utf8 = codecs.getincrementaldecoder("utf-8-sig")(errors)
    newlines = io.IncrementalNewlineDecoder(utf8, translate=True)
    offset = 0
    for block in itertools.chain(_bytes(path), [b""]):
        if b"\0" in block:
            raise ValueError(
                f"{path}: byte {offset + block.index(0)} is NUL: this is a binary file, not text"
            )
        waiting = len(utf8.getstate()[0])
        try:
            yield newlines.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path}: byte {offset - waiting + error.start} is not UTF-8 ({error.reason}); "
                "repair the file, or put U+FFFD in such places with --errors replace"
            ) from None
        offset += len(block)


@functools.cache
def python_files() -> tuple[Path, ...]:
    """The source files of Python's standard library, without tests and installed packages."""
    root, found = Path(sysconfig.get_path("stdlib")), []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not LEAVE_OUT.fullmatch(name)]
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    return tuple(sorted(file for file in found if _python_text(file)))


def _expand(name: str) -> list[Path | str]:
    path = Path(name)
    if path.is_file():
        if not path.stat().st_size:
            raise ValueError(f"{name}: the file is empty")
        return [path]
    if path.is_dir():
        found = sorted(f for f in path.rglob("*") if f.is_file() and _kind(f) in TABLES | TEXTS)
        if not found:
            raise ValueError(f"{name}: the folder holds no text, JSONL, JSON or Parquet files")
        return list(found)
    if HUB_NAME.fullmatch(name) and _kind(path) not in TABLES | TEXTS:
        return [name]
    raise ValueError(f"{name}: no such file or folder")


def _kind(path: Path) -> str:
    """The suffix that says what is inside, under any compression."""
    return Path(path.stem).suffix if path.suffix in PACKED else path.suffix


def _sha256(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


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


def _bytes(path: Path) -> Iterator[bytes]:
    opener = PACKED.get(path.suffix, open)
    try:
        with opener(path, "rb") as file:
            while block := file.read(BLOCK):
                yield block
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: damaged archive ({error})") from None


def _python_text(path: Path) -> str:
    """A source file by its own coding cookie; empty where that fails."""
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (SyntaxError, UnicodeDecodeError):  # an unknown cookie, or bytes that belie it
        return ""


def _table_rows(path: Path, column: str, errors: Errors) -> Iterator[Any]:
    if _kind(path) == ".parquet":
        yield from _parquet_rows(path, column)
    elif _kind(path) == ".json":
        rows = _json(read_text(path, errors), str(path))
        if not isinstance(rows, list):
            raise ValueError(f"{path}: must hold a list of objects; one object a line is JSONL")
        yield from rows
    else:
        left = ""
        lines: list[str] = []
        number = 0
        for block in itertools.chain(read_blocks(path, errors), ["\n"]):
            *lines, left = (left + block).split("\n")
            for line in lines:
                number += 1
                if line.strip():
                    yield _json(line, f"{path}, line {number}")


def _json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{place}: not JSON ({error})") from None


def _parquet_rows(path: Path, column: str) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except pa.ArrowException as error:
        raise ValueError(f"{path}: not a Parquet file ({error})") from None
    known = file.schema_arrow.names
    for batch in file.iter_batches(columns=[column] if column in known else known):
        yield from batch.to_pylist()


@functools.cache
def _hub_revision(name: str) -> str:
    """The data set's present commit, so that a continued run reads what the first one read."""
    import huggingface_hub

    try:
        return huggingface_hub.HfApi().dataset_info(name, timeout=HUB_SECONDS).sha or ""
    except Exception as error:  # no network, no such data set, no permission: dozens of kinds
        raise ValueError(
            f"{name}: no such file or folder, and the Hub does not give a data set of that name "
            f"({type(error).__name__}: {error})"
        ) from None


def _hub_rows(name: str, config: str, split: str) -> Iterator[Any]:
    """Rows of a Hub data set as they arrive."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        yield from load_dataset(
            name, config or None, split=split, revision=_hub_revision(name), streaming=True
        )
    except (OSError, ValueError, DatasetsError) as error:
        raise ValueError(f"{name}: cannot be read from the Hub ({error})") from None


def _cell(row: Any, column: str, place: str, errors: Errors) -> str:
    text = row.get(column) if isinstance(row, dict) else None
    if not isinstance(text, str):
        found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise ValueError(
            f"{place}: has no text in column {column!r} (it holds: {found}); choose with --column"
        )
    try:
        text.encode()
    except UnicodeEncodeError:
        if errors == "strict":
            raise ValueError(
                f"{place}: holds half a surrogate pair, which is not Unicode text; "
                "repair it, or put U+FFFD there with --errors replace"
            ) from None
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
