"""GGUF's container: the metadata and the tensors of one file, or of a split one.

The header is parsed here: the library's own reader trusts the counts in it, and a damaged file
makes it loop until memory runs out.
"""

import functools
import math
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np

from jaxgpt.convert import table

# Value types of the metadata; 8 is a string, 9 an array.
SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
STRING, ARRAY = 8, 9
LARGEST_ARRAY = 2**22  # entries; the largest vocabularies have a quarter of a million
SPLIT = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


def open_file(path: Path) -> tuple[dict[str, Any], "Source"]:
    """Metadata and tensors of a file, and of those that it is split into.

    Raises:
        ValueError: not whole GGUF files, or not the first of them.
    """
    source = Source()
    metadata = _read(path, source)
    count = metadata.get("split.count", 1)
    if count == 1:
        return metadata, source
    named = SPLIT.search(path.name)
    if type(count) is not int or named is None or int(named[2]) != count:
        raise ValueError(
            f"{path}: is one of {count!r:.80} files, whose names must end as …-00001-of-00003.gguf"
        )
    parts = [
        path.with_name(f"{path.name[: named.start()]}-{number:05d}-of-{count:05d}.gguf")
        for number in range(1, count + 1)
    ]
    if metadata.get("split.no") != 0:
        raise ValueError(f"{path}: is a later part of a split file; give {parts[0]}")
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise ValueError(f"{path}: parts are missing: {', '.join(missing[:8])}")
    for number, part in enumerate(parts[1:], start=1):
        if _read(part, source).get("split.no") != number:
            raise ValueError(f"{part}: is not part {number + 1} of {path.name}")
    return metadata, source


@functools.cache
def _is_readable(kind: Any) -> bool:
    """Whether the library de-quantises this type, tried on one block of zeros."""
    from gguf import GGML_QUANT_SIZES, quants

    try:
        quants.dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except (NotImplementedError, ValueError):
        return False
    return True


class Source:
    """The tensors by name; each is de-quantised when it is read."""

    def __init__(self) -> None:
        self.shapes: dict[str, table.Shape] = {}
        self._stored: dict[str, tuple[Any, np.ndarray]] = {}  # quantisation, bytes

    def add(self, name: str, shape: table.Shape, kind: int, data: np.ndarray, start: int) -> None:
        import gguf

        known = {member.value: member for member in gguf.GGMLQuantizationType}
        if kind not in known or not _is_readable(known[kind]):
            stored = known[kind].name if kind in known else kind
            raise ValueError(f"{name} is stored as {stored}, which the gguf library does not read")
        block, size = gguf.GGML_QUANT_SIZES[known[kind]]
        if shape[-1] % block or name in self.shapes:
            raise ValueError(
                f"{name}: {shape[-1]} does not fill blocks of {block}, or stands twice"
            )
        length = math.prod(shape) // block * size
        if start + length > len(data):
            raise ValueError(f"{name} ends behind the end of the file")
        self.shapes[name] = shape
        self._stored[name] = known[kind], data[start : start + length]

    def hold(self, name: str, array: np.ndarray) -> None:
        """Takes a tensor that is in memory."""
        import gguf

        self.shapes[name] = array.shape
        stored = np.ascontiguousarray(array, np.float32).view(np.uint8).ravel()
        self._stored[name] = gguf.GGMLQuantizationType.F32, stored

    def kind(self, name: str) -> str:
        """How a tensor is stored, such as Q8_0."""
        return self._stored[name][0].name

    def rows(self, name: str) -> np.ndarray:
        """The bytes of a tensor as they are stored, row by row."""
        shape = self.shapes[name]
        return np.asarray(self._stored[name][1]).reshape(*shape[:-1], -1)

    def read(self, name: str) -> np.ndarray:
        from gguf import quants

        kind, stored = self._stored[name]
        shape = self.shapes[name]
        rows = np.asarray(stored).reshape(math.prod(shape[:-1]), -1)
        if kind.name in ("F32", "F16"):
            return rows.view(np.float32 if kind.name == "F32" else np.float16).reshape(shape)
        return quants.dequantize(rows, kind).reshape(shape)


def _read(path: Path, source: Source) -> dict[str, Any]:
    """Metadata; tensors go to `source`. Counts are held against the file's length before use."""
    if path.stat().st_size < 24:
        raise ValueError(f"{path}: too short for a GGUF file")
    data = np.memmap(path, np.uint8, "r")
    try:
        header = _Header(data)
        if data[:4].tobytes() != b"GGUF" or header.scalar("I", skip=4) not in (2, 3):
            raise ValueError("not a GGUF file of version 2 or 3")
        num_tensors, num_values = header.scalar("Q"), header.scalar("Q")
        metadata = {}
        for _ in range(num_values):
            key = header.string()
            metadata[key] = header.value(header.scalar("I"))
        infos = [header.tensor() for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"general.alignment={alignment!r:.80}: must be a power of two")
        start = -(-header.offset // alignment) * alignment
        for name, shape, kind, offset in infos:
            if offset % alignment:
                raise ValueError(f"{name} does not begin at a multiple of {alignment} bytes")
            source.add(name, shape, kind, data, start + offset)
    except (ValueError, struct.error) as error:
        raise ValueError(f"{path}: {error}") from None
    return metadata


class _Header:
    """A cursor over the file; reading beyond the end raises struct.error or ValueError."""

    def __init__(self, data: np.ndarray):
        self._data = memoryview(data)  # type: ignore[arg-type]
        self.offset = 0

    def scalar(self, code: str, skip: int = 0) -> Any:
        self.offset += skip
        (value,) = struct.unpack_from("<" + code, self._data, self.offset)
        self.offset += struct.calcsize("<" + code)
        return value

    def string(self) -> str:
        return str(self._take(self.scalar("Q")), "utf-8")

    def value(self, kind: int) -> Any:
        if kind in SCALARS:
            return self.scalar(SCALARS[kind])
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            raise ValueError(f"unknown type {kind} of a value")
        kind, count = self.scalar("I"), self.scalar("Q")
        if count > LARGEST_ARRAY:
            raise ValueError(f"an array of {count} values is too long for metadata")
        if kind == STRING:
            return [self.string() for _ in range(count)]
        if kind not in SCALARS:
            raise ValueError(f"unknown type {kind} of an array")
        bytes_ = self._take(count * struct.calcsize("<" + SCALARS[kind]))
        return [value for (value,) in struct.iter_unpack("<" + SCALARS[kind], bytes_)]

    def tensor(self) -> tuple[str, table.Shape, int, int]:
        name, rank = self.string(), self.scalar("I")
        if not 1 <= rank <= 4:
            raise ValueError(f"{name}: has {rank} axes")
        shape = tuple(self.scalar("Q") for _ in range(rank))[::-1]
        return name, shape, self.scalar("I"), self.scalar("Q")

    def _take(self, size: int) -> memoryview:
        if size > len(self._data) - self.offset:
            raise ValueError("the header ends behind the end of the file")
        self.offset += size
        return self._data[self.offset - size : self.offset]
