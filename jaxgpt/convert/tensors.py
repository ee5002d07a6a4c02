"""safetensors checkpoints on disk: one file, or shards under an index.

The `safetensors` library checks every header against its file's length before it maps a byte, so
that a header cannot claim more than the file holds.
"""

import contextlib
import json
import math
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from jaxgpt import files as paths
from jaxgpt.convert.table import Shape
from jaxgpt.data import engines

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# The library knows these names and has no arrays of them.
FLOAT8 = {"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E8M0": ml_dtypes.float8_e8m0fnu}
INTEGERS = {"I8": "int8", "U8": "uint8", "I16": "int16", "I32": "int32", "I64": "int64"}
LARGEST_JSON = 100_000_000  # bytes; the index of a model of a million tensors
SHARD_BYTES = 5_000_000_000


class Tensors:
    """The tensors of a checkpoint directory by name; a `table.Source`, open within `with`.

    Those of a directory in a store are read by ranges, one when it is asked for: neither this
    machine's disk nor its memory has to hold all of them.

    Args:
        more: types that may be there beside DTYPES.
    """

    def __init__(self, path: Path, more: Collection[str] = ()):
        self.shapes: dict[str, Shape] = {}
        self.kinds: dict[str, str] = {}
        self._more = more
        self._files: dict[str, Any] = {}
        self._paths: dict[str, Path] = {}
        self._spans: dict[Path, dict[str, tuple[int, int]]] = {}  # where bytes of a name lie
        self._stored: dict[str, str] = {}  # a name -> that in the file, if it is another
        self._stack = ExitStack()
        try:
            for file, expected in _locate(path).items():
                self._open(file, expected)
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> "Tensors":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def read(self, name: str) -> np.ndarray:
        stored = self._stored.get(name, name)
        kind, path = self.kinds[name], self._paths[name]
        if paths.is_local(path) and kind not in FLOAT8:
            return self._files[name].get_tensor(stored)
        dtype = FLOAT8.get(kind) or as_dtype((DTYPES | INTEGERS)[kind])
        content = _content(path, *self._spans[path][stored])
        return np.frombuffer(content, dtype).reshape(self.shapes[name])

    def rename(self, names: Mapping[str, str]) -> None:
        """Keeps these tensors alone, under new names -> those in the files."""
        self.shapes = {new: self.shapes[old] for new, old in names.items()}
        self.kinds = {new: self.kinds[old] for new, old in names.items()}
        self._files = {new: self._files[old] for new, old in names.items()}
        self._paths = {new: self._paths[old] for new, old in names.items()}
        self._stored = dict(names)

    def _open(self, file: Path, expected: set[str] | None) -> None:
        try:
            here = file if paths.is_local(file) else self._stack.enter_context(_header_of(file))
            opened = self._stack.enter_context(safetensors.safe_open(here, "np"))
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise ValueError(f"{file}: not a whole safetensors file ({error})") from None
        names = set(opened.keys())
        if expected is not None and names != expected:
            odd = ", ".join(sorted(names ^ expected)[:8])
            raise ValueError(f"{file}: the index and the file disagree about {odd}")
        self._spans[file] = _read_spans(here)
        for name in opened.keys():  # noqa: SIM118 (not a mapping)
            tensor = opened.get_slice(name)
            if tensor.get_dtype() not in (*DTYPES, *self._more):
                raise ValueError(
                    f"{file}: {name} is {tensor.get_dtype()}; only {', '.join(DTYPES)} are read"
                )
            self.shapes[name] = tuple(tensor.get_shape())
            self.kinds[name] = tensor.get_dtype()
            self._files[name], self._paths[name] = opened, file


def _read_spans(file: Path) -> dict[str, tuple[int, int]]:
    """First byte and end of every tensor of a file whose header the library has checked."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    spans = {name: entry["data_offsets"] for name, entry in header.items()}
    return {name: (8 + length + first, 8 + length + end) for name, (first, end) in spans.items()}


def _content(file: Path, first: int, end: int) -> bytes:
    if not paths.is_local(file):
        from jaxgpt import store

        return store.read_range(file, first, end)
    with file.open("rb") as stream:
        stream.seek(first)
        return stream.read(end - first)


@contextlib.contextmanager
def _header_of(file: Path) -> Iterator[Path]:
    """A file of this machine with the header and the length of one in a store, and no more.

    The rest is a hole, which takes no place on the disk: the library checks it like a whole file.
    """
    from jaxgpt import store

    size = file.stat().st_size
    length = int.from_bytes(store.read_range(file, 0, min(8, size)), "little")
    with store.scratch() as folder:
        copy = folder / file.name
        copy.write_bytes(store.read_range(file, 0, min(8 + length, size, LARGEST_JSON)))
        os.truncate(copy, size)
        yield copy


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file that nobody vouches for."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if path.stat().st_size > LARGEST_JSON:
        raise ValueError(f"{path}: {path.stat().st_size} bytes are too many for a JSON file")
    return engines.parse_json(path.read_bytes(), str(path))


def save(
    path: Path, tensors: Iterator[tuple[str, np.ndarray]], sizes: Mapping[str, int], shard: int
) -> None:
    """Writes tensors, which arrive in the order of `sizes` (bytes by name), in files of `shard`
    bytes; never more than one file's worth of them is held.
    """
    groups = _groups(sizes, shard)
    if len(groups) == 1:
        save_file(path / SINGLE, dict(tensors))
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(groups, start=1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        save_file(path / file, dict(next(tensors) for _ in names))
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
    (path / INDEX).write_text(json.dumps(index, indent=2))


def save_file(file: Path, tensors: dict[str, np.ndarray]) -> None:
    """One safetensors file, as readable to others as any new file here."""
    file.touch()
    mode = file.stat().st_mode
    # transformers asks for the format's name.
    safetensors.numpy.save_file(tensors, file, metadata={"format": "pt"})
    file.chmod(mode)  # the library makes files of mode 0600


def as_dtype(name: str) -> np.dtype:
    """NumPy's dtype of that name, bfloat16 included."""
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def _locate(path: Path) -> dict[Path, set[str] | None]:
    """The files of the checkpoint, each with the tensors that the index says it holds."""
    if (path / INDEX).is_file():
        return _locate_shards(path)
    if (path / SINGLE).is_file():
        return {path / SINGLE: None}
    if any(found for pattern in PICKLED for found in path.glob(pattern)):
        raise ValueError(
            f"{path}: holds pickled weights, which can run code when they are loaded; "
            "convert to safetensors (transformers' save_pretrained writes it)"
        )
    raise ValueError(f"{path}: holds neither {SINGLE} nor {INDEX}")


def _locate_shards(path: Path) -> dict[Path, set[str] | None]:
    weight_map = read_json(path / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path / INDEX}: has no weight_map")
    files: dict[Path, set[str] | None] = {}
    held: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        # A name, not a path: the index must not lead out of the directory.
        if not isinstance(file, str) or not file.endswith(".safetensors") or "\0" in file \
                or Path(file).name != file or "\\" in file:  # fmt: skip
            raise ValueError(f"{path / INDEX}: {file!r:.80} is not the name of a shard beside it")
        held.setdefault(file, set()).add(name)
    missing = sorted(file for file in held if not (path / file).is_file())
    if missing:
        raise ValueError(f"{path}: shards are missing: {', '.join(missing[:8])}")
    files.update({path / file: names for file, names in sorted(held.items())})
    return files


def _groups(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if groups[-1] and filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return groups


def size_of(shape: Shape, dtype: np.dtype) -> int:
    """Bytes of an array."""
    return math.prod(shape) * dtype.itemsize
