"""What files hold: their text, and their rows. The one reader of JSONL, JSON, Parquet and Hub data.

A place is one file, several, a folder, a glob or a Hub data set; a file may be packed. Text is
UTF-8: a byte-order mark is dropped and line ends become "\\n". Invalid UTF-8 is an error with its
place, or becomes U+FFFD with errors="replace"; a NUL byte is always an error, because it means
that the file is no text.
"""

import bz2
import codecs
import functools
import glob
import gzip
import io
import itertools
import json
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from jaxgpt import files
from jaxgpt.config.checks import nearest

Errors = Literal["strict", "replace"]
Paths = str | Sequence[str]

TABLES = {".jsonl", ".ndjson", ".json", ".parquet"}
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
HUB_SECONDS = 20
BLOCK = 1 << 20  # bytes read at a time
# One JSON object may hold all rows under one of these names, or under the split's.
WRAPPERS = ("train", "data", "rows", "examples", "instances")
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
WHITE = re.compile(r"\s*")


def names(paths: Paths) -> list[str]:
    """One path or several as a list; the empty path is none."""
    return [name for name in ([paths] if isinstance(paths, str) else paths) if name]


def find(name: str, kinds: set[str]) -> list[Path | str]:
    """The files of a path, a folder (in sorted order) or a glob; a Hub name stays a string.

    Args:
        kinds: suffixes of the files to take from a folder.

    Raises:
        ValueError: there is no such file, or an empty one.
    """
    path = files.path(name)
    if path.is_dir():
        inside = (file for file in path.rglob("*") if file.is_file())
        shown = (f for f in inside if not any(p[0] == "." for p in f.relative_to(path).parts))
        found = _sorted(file for file in shown if kind(file) in kinds)
        if not found:
            raise ValueError(f"{name}: the folder holds no file that ends in {_list(kinds)}")
    elif path.is_file():
        found = [path]
    elif glob.has_magic(name):
        found = _sorted(file for file in files.find(name) if file.is_file())
        if not found:
            raise ValueError(f"{name}: no file has such a name")
    elif HUB_NAME.fullmatch(name.partition(":")[0]) and kind(path) not in kinds:
        return [name]
    else:
        raise ValueError(f"{name}: no such file or folder")
    for file in found:
        if not file.stat().st_size:
            raise ValueError(f"{file}: the file is empty")
    return list(found)


def require(setting: str, paths: Paths, tasks: Iterable[str] = ()) -> None:
    """Raises ValueError for a path that is nothing which can be read, before any is."""
    for name in names(paths):
        try:
            find(name, TABLES)
        except ValueError as error:
            known = f", and not one of {', '.join(tasks)}{nearest(name, tasks)}" if tasks else ""
            raise ValueError(f"{setting}={error}{known}") from None


def kind(path: Path) -> str:
    """The suffix that says what is inside, under any compression."""
    return Path(path.stem).suffix if path.suffix in PACKED else path.suffix


def read(
    paths: Paths, split: str = "train", errors: Errors = "strict"
) -> Iterator[tuple[Any, str]]:
    """Every row with its place, such as `a.jsonl, line 3`.

    A Hub data set that has several parts is named with one of them: openai/gsm8k:main.

    Raises:
        ValueError: a path that is not there, a damaged file, or one that holds no rows.
    """
    for name in names(paths):
        for file in find(name, TABLES):
            if isinstance(file, str):
                repository, _, part = file.partition(":")
                rows = ((row, f"{name}, row {n}") for n, row in hub_rows(repository, part, split))
            else:
                rows = file_rows(file, split, errors)
            first = next(rows, None)
            if first is None:
                raise ValueError(f"{file}: holds no rows")
            yield first
            yield from rows


def file_rows(
    file: Path, split: str = "train", errors: Errors = "strict", column: str = ""
) -> Iterator[tuple[Any, str]]:
    """The rows of one file; of Parquet only that column, where it is given and there."""
    if kind(file) == ".parquet":
        yield from _parquet_rows(file, column)
        return
    lines = enumerate(_lines(read_blocks(file, errors)), 1)
    filled = ((number, line) for number, line in lines if line.strip())
    number, first = next(filled, (0, ""))
    if not number:
        return
    try:
        value = _parse(first, "", errors)
    except ValueError:  # the first line alone is no JSON: the whole file may be
        yield from _whole(file, split, errors)
        return
    second = next(filled, None)
    if second is None:
        yield from _unwrapped(value, file, number, split)
        return
    yield value, f"{file}, line {number}"
    for number, line in itertools.chain([second], filled):
        where = f"{file}, line {number}"
        yield _parse(line, where, errors), where


def parquet(file: Path) -> Any:
    """The open file, a pyarrow.parquet.ParquetFile; one that is packed is read into memory."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        packed = file.suffix in PACKED
        opened = file if files.is_local(file) else file.open("rb")
        return pq.ParquetFile(io.BytesIO(b"".join(_bytes(file))) if packed else opened)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file}: not a Parquet file, or cut short ({error})") from None


def hub_rows(
    name: str, part: str, split: str, revision: str | None = None
) -> Iterator[tuple[int, Any]]:
    """Numbered rows of a Hub data set as they arrive."""
    from datasets import load_dataset

    try:
        loaded = load_dataset(name, part or None, split=split, revision=revision, streaming=True)
        for number, row in enumerate(loaded, 1):
            yield number, _arrow_row(row)
    except Exception as error:  # no network, no such data set, no permission: dozens of kinds
        raise _not_on_hub(name, error) from None


@functools.cache
def hub_revision(name: str) -> str:
    """The data set's present commit, so that a continued run reads what the first one read."""
    import huggingface_hub

    try:
        return huggingface_hub.HfApi().dataset_info(name, timeout=HUB_SECONDS).sha or ""
    except Exception as error:  # as in hub_rows
        raise _not_on_hub(name, error) from None


def _not_on_hub(name: str, error: Exception) -> ValueError:
    return ValueError(
        f"{name}: no such file or folder, and the Hub does not give a data set of that name "
        f"({type(error).__name__}: {error})"
    )


def read_text(path: str | Path, errors: Errors = "strict") -> str:
    """A whole text file.

    Raises:
        ValueError: empty, not UTF-8 (with the byte's offset), or binary.
    """
    if files.path(path).is_dir():
        raise ValueError(f"{path}: is a directory; name a file")
    text = "".join(read_blocks(files.path(path), errors))
    if not text.strip():
        raise ValueError(f"{path}: the file is empty")
    return text


def read_blocks(path: Path, errors: Errors = "strict", advice: str = "") -> Iterator[str]:
    """A text file in stretches of about a million characters, decoded as the module says.

    Args:
        advice: what else the command offers for invalid UTF-8.
    """
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
                f"if it is Latin-1: iconv -f LATIN1 -t UTF-8 FILE > NEW{advice}"
            ) from None
        offset += len(block)


def _open_zstd(file: Any, _: str) -> Any:
    import pyarrow as pa

    return pa.CompressedInputStream(pa.PythonFile(file, "r"), "zstd")


PACKED: dict[str, Callable[..., Any]] = {
    ".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _open_zstd,
}  # fmt: skip


def _sorted(found: Iterable[Path]) -> list[Path]:
    """By folder and name, wherever they are."""
    return sorted(found, key=lambda file: file.parts)


def _list(kinds: Iterable[str]) -> str:
    return ", ".join(sorted(kinds))


def _bytes(path: Path) -> Iterator[bytes]:
    unpack = PACKED.get(path.suffix, lambda file, _: file)
    try:
        with path.open("rb") as packed, unpack(packed, "rb") as file:
            while block := file.read(BLOCK):
                yield block
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        if path.suffix not in PACKED or isinstance(error, (FileNotFoundError, PermissionError)):
            raise
        raise ValueError(f"{path}: damaged archive ({error})") from None


def _lines(blocks: Iterable[str]) -> Iterator[str]:
    left = ""
    for block in blocks:
        *lines, left = (left + block).split("\n")
        yield from lines
    yield left


def _whole(file: Path, split: str, errors: Errors) -> Iterator[tuple[Any, str]]:
    """Rows of JSON that goes over several lines: one list, one object, or several of them."""
    text = "".join(read_blocks(file, errors))
    decoder, values = json.JSONDecoder(), []
    start, line = WHITE.match(text).end(), 1  # type: ignore[union-attr]
    before = 0
    while start < len(text):
        line += text.count("\n", before, start)
        try:
            value, stop = decoder.raw_decode(text, start)
        except (ValueError, RecursionError) as error:
            number = getattr(error, "lineno", line)
            raise _not_json(error, f"{file}, line {number}", text) from None
        values.append((_mended(value, text[start:stop], f"{file}, line {line}", errors), line))
        before, start = start, WHITE.match(text, stop).end()  # type: ignore[union-attr]
    if len(values) == 1:
        yield from _unwrapped(values[0][0], file, values[0][1], split)
    else:
        for value, number in values:
            yield value, f"{file}, line {number}"


def _unwrapped(value: Any, file: Path, line: int, split: str) -> Iterator[tuple[Any, str]]:
    """The rows of a file's only value: of a list its items, of an object its list of rows."""
    inside = ""
    if isinstance(value, dict):
        held = {name: rows for name, rows in value.items() if _is_rows(rows)}
        wrapper = next((name for name in (split, *WRAPPERS) if name in held), None)
        if wrapper is None:
            yield value, f"{file}, line {line}"
            return
        others = ", ".join(name for name in value if name != wrapper)
        if others:
            print(f"warning: {file}: the rows are read from {wrapper!r}; it also holds {others}, "
                  "which is not read", file=sys.stderr)  # fmt: skip
        value, inside = held[wrapper], f" of {wrapper}"
    if not isinstance(value, list):
        raise ValueError(f"{file}: must hold objects or a list of them, not {value!r:.40}")
    for number, row in enumerate(value, 1):
        yield row, f"{file}, item {number}{inside}"


def _is_rows(value: Any) -> bool:
    """Whether it is a list of objects which are no messages."""
    return (
        isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)
        and not {"role", "from"} & value[0].keys()
    )  # fmt: skip


def _parse(text: str, where: str, errors: Errors) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _not_json(error, where, text) from None
    return _mended(value, text, where, errors)


def _not_json(error: Exception, where: str, text: str) -> ValueError:
    reason = str(error)
    if isinstance(error, json.JSONDecodeError):
        reason = f"{error.msg}, column {error.colno}"
        if error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated"):
            reason += "; is it cut short?"
    return ValueError(f"{where}: not JSON ({reason})")


def _mended(value: Any, text: str, where: str, errors: Errors) -> Any:
    """JSON's escapes can write half a surrogate pair, which no tokenizer takes."""
    if not SURROGATE.search(text):
        return value
    whole = json.dumps(value, ensure_ascii=False)
    try:
        whole.encode()
    except UnicodeEncodeError:
        if errors == "strict":
            raise ValueError(
                f"{where}: holds half a surrogate pair (\\ud83d without what belongs to it), which "
                "is not Unicode text; repair it"
            ) from None
        return json.loads(whole.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
    return value


def _arrow_row(row: dict[str, Any]) -> dict[str, Any]:
    """A row without the nulls that Arrow gives, at any depth, to objects which lack a field."""
    return {name: _without_nulls(value) for name, value in row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        # A message without text says so: beside OpenAI's calls stands a content of null.
        return {k: _without_nulls(v) for k, v in value.items() if v is not None or k == "content"}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _parquet_rows(file: Path, column: str) -> Iterator[tuple[Any, str]]:
    import pyarrow as pa

    table = parquet(file)
    known = table.schema_arrow.names
    number = 0
    try:
        for batch in table.iter_batches(columns=[column] if column in known else known):
            for row in batch.to_pylist():
                number += 1
                yield _arrow_row(row), f"{file}, row {number}"
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file}, after row {number}: damaged Parquet ({error})") from None
