"""Keys and values of prompts' beginnings, kept for the next prompt that begins so."""

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence

import numpy as np

from jaxgpt.types import Array

Chunk = tuple[Array, Array]  # keys and values, each [L, K, size, H]


class Prefixes:
    """Whole chunks by all the tokens up to their end; the one not used for longest goes first."""

    def __init__(self, size: int, most_bytes: int) -> None:
        self.size, self.most_bytes, self.bytes = size, most_bytes, 0
        self._chunks: OrderedDict[bytes, Chunk] = OrderedDict()

    def find(self, adapter: int, tokens: Sequence[int]) -> list[Chunk]:
        """The chunks with which a prompt begins; at least one of its tokens is left to be read."""
        found = []
        for name in self._names(adapter, tokens[: len(tokens) - 1]):
            if name not in self._chunks:
                break
            self._chunks.move_to_end(name)
            found.append(self._chunks[name])
        return found

    def holds(self, adapter: int, tokens: Sequence[int]) -> bool:
        """Whether the last of the chunks that the tokens fill is here, or can never be."""
        *_, name = self._names(adapter, tokens)
        return name in self._chunks

    def add(self, adapter: int, tokens: Sequence[int], chunk: Chunk) -> None:
        """Keeps the last of the chunks that the tokens fill."""
        *_, name = self._names(adapter, tokens)
        num_bytes = sum(part.nbytes for part in chunk)
        if name in self._chunks or num_bytes > self.most_bytes:
            return
        self._chunks[name] = chunk
        self.bytes += num_bytes
        while self.bytes > self.most_bytes:
            _, oldest = self._chunks.popitem(last=False)
            self.bytes -= sum(part.nbytes for part in oldest)

    def clear(self) -> None:
        """Forgets all."""
        self._chunks.clear()
        self.bytes = 0

    def _names(self, adapter: int, tokens: Sequence[int]) -> Iterator[bytes]:
        digest = hashlib.blake2b(str(adapter).encode(), digest_size=32)
        for start in range(0, len(tokens) - self.size + 1, self.size):
            digest.update(np.asarray(tokens[start : start + self.size], np.int32).tobytes())
            yield digest.digest()
