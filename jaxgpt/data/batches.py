"""batch(step): the same rows for any number of processes, and the one protocol of all batches.

Nothing is drawn and nothing is remembered. The rows of a run are numbered 0, 1, 2, … (row r of
step s is s * batch_size + r); a closed form sends a number to a source of the mixture and to the
count of rows that source has given before, and that count to (epoch, window) by a permutation
keyed on (seed, epoch). So an epoch visits every window once, a resume needs the step alone, and a
process reads only the rows it is asked for.

Windows of token files are here; rows of conversations, in examples.py, follow the same protocol.
"""

import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from jaxgpt import store
from jaxgpt.data.token_files import TokenFile, check_vocab, open_tokens
from jaxgpt.data.tokenizer import Tokenizer

WEIGHT_BITS = 32  # mixture weights are kept as multiples of 2^-32, for exact counting

Rows = dict[str, np.ndarray]  # name -> [B, T], or [B, A, T] for rows of several sequences


class Batches(Protocol):
    """What a stage trains on and is evaluated on."""

    @property
    def batch_size(self) -> int: ...

    def rows(self, step: int, rows: np.ndarray) -> Rows:
        """The asked rows (0 … batch_size - 1) of a step's batch."""
        ...

    def num_held_out(self, limit: int = 0) -> int:
        """Batches that cover the held-out rows, at most `limit` unless that is 0."""
        ...

    def held_out(self, index: int, rows: np.ndarray, limit: int = 0) -> Rows:
        """The asked rows of held-out batch `index`; rows beyond the last one have mask 0.

        With a limit, the batches are spread evenly over all held-out rows.
        """
        ...


@dataclass(frozen=True)
class Windows:
    """Batches of windows from one or several token files."""

    files: tuple[TokenFile, ...]
    weights: tuple[float, ...]
    batch_size: int
    context_length: int
    seed: int
    documents: bool
    vocab_size: int
    eos_id: int | None

    def rows(self, step: int, rows: np.ndarray) -> Rows:
        """The asked rows (0 … batch_size - 1) of a step's batch."""
        numbers = np.uint64(step) * np.uint64(self.batch_size) + np.asarray(rows, np.uint64)
        choice, counts = choose(numbers, self.weights)
        tokens_BS = np.empty((numbers.size, self.context_length + 1), np.int32)
        for file in set(choice.tolist()):
            mine = np.flatnonzero(choice == file)
            tokens = self.files[file].train
            read = lambda start, of=tokens: of.read(start, start + self.context_length + 1)
            starts = self._train_starts(file, counts[mine])
            windows = (store.together if tokens.in_store() else map)(read, starts)
            for row, window in zip(mine, windows, strict=True):
                tokens_BS[row] = window
        return self._batch(tokens_BS)

    def num_held_out(self, limit: int = 0) -> int:
        """Batches that cover the held-out split, at most `limit` unless that is 0."""
        batches = -(-sum(self._val_windows()) // self.batch_size)
        return min(batches, limit) if limit else batches

    def held_out(self, index: int, rows: np.ndarray, limit: int = 0) -> Rows:
        """The asked rows of held-out batch `index`; rows beyond the split's end have mask 0.

        With a limit, the batches are spread evenly over the whole split.
        """
        total, batches = sum(self._val_windows()), self.num_held_out(limit)
        wanted = min(total, batches * self.batch_size)
        numbers = index * self.batch_size + np.asarray(rows, np.int64)
        chosen = [int(row) * total // wanted if row < wanted else -1 for row in numbers]
        in_store = any(file.val.in_store() for file in self.files)
        windows = (store.together if in_store else map)(self._val_window, chosen)
        return self._batch(np.stack(list(windows)))

    def _train_starts(self, file: int, counts: np.ndarray) -> list[int]:
        """Where the windows begin that this file gives as its counts-th ones."""
        size, length = self.files[file].train.size, self.context_length
        # One window fewer than fit, so that every epoch can cut the text at other places.
        windows = max(1, (size - length) // length)
        slack = min(length, size - windows * length)
        epochs, positions = np.divmod(counts, windows)
        starts = np.empty_like(counts)
        for epoch in set(epochs.tolist()):
            key, mine = _key(self.seed, file, epoch), epochs == epoch
            starts[mine] = key % slack + length * permute(positions[mine], windows, key)
        return starts.tolist()

    def _val_windows(self) -> list[int]:
        return [-(-max(0, file.val.size - 1) // self.context_length) for file in self.files]

    def _val_window(self, window: int) -> np.ndarray:
        """Windows of all files in a row; short of tokens at a file's end, it is filled with -1."""
        padded = np.full(self.context_length + 1, -1, np.int32)
        if window < 0:
            return padded
        for file, count in zip(self.files, self._val_windows(), strict=True):
            if window < count:
                start = window * self.context_length
                tokens = file.val.read(start, start + self.context_length + 1)
                padded[: tokens.size] = tokens
                break
            window -= count
        return padded

    def _batch(self, tokens_BS: np.ndarray) -> Rows:
        top = int(tokens_BS.max())
        if self.vocab_size and top >= self.vocab_size:
            raise ValueError(
                f"data.path={self.files[0].path}: holds token {top}, but the tokenizer has only "
                f"{self.vocab_size}; set data.tokenizer to the one the files were made with"
            )
        held_BS = tokens_BS >= 0
        padded_BS = np.where(held_BS, tokens_BS, 0)
        batch = {
            "tokens": padded_BS[:, :-1],
            "targets": padded_BS[:, 1:],
            "mask": held_BS[:, 1:].astype(np.float32),
        }
        if self.documents:
            assert self.eos_id is not None
            segments, positions, mask = segment(padded_BS, self.eos_id)
            batch["segments"] = np.where(held_BS[:, :-1], segments, 0)
            batch["positions"] = positions
            batch["mask"] *= mask
        return batch


def kinds(documents: bool) -> dict[str, type]:
    """The arrays of such a source's batch, [B, T] each, and their types."""
    plain = {"tokens": np.int32, "targets": np.int32, "mask": np.float32}
    return plain | ({"segments": np.int32, "positions": np.int32} if documents else {})


def windows(
    files: Mapping[str, float] | str | Path,
    tokenizer: Tokenizer,
    batch_size: int,
    context_length: int,
    seed: int = 0,
    documents: bool = False,
    cache: float = 0.0,
) -> Windows:
    """Opens and checks one path, or several with weights.

    Args:
        cache: see token_files.open_tokens; each path gets its share.

    Raises:
        ValueError: a file that is missing, damaged, shorter than the context, or made with
            another tokenizer.
    """
    weights = files if isinstance(files, Mapping) else {str(files): 1.0}
    opened = tuple(open_tokens(path, cache / len(weights)) for path in weights)
    for file in opened:
        check_vocab(file, tokenizer)
        if file.train.size < context_length + 1:
            raise ValueError(
                f"data.path: the {file.train.size} training tokens of {file.path} are fewer than "
                f"model.context_length={context_length} + 1; use more text or a shorter context"
            )
    shares = tuple(weight / sum(weights.values()) for weight in weights.values())
    return Windows(
        opened, shares, batch_size, context_length, seed, documents, tokenizer.vocab_size,
        tokenizer.eos_id,
    )  # fmt: skip


def segment(tokens_BS: np.ndarray, eos_id: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Documents inside windows of a stream: (segments, positions, mask) of all but the last token.

    A document ends with `eos_id`; segments count from 1, because 0 is padding. The mask is 0 where
    the target would be the next document's first token. A document that the window's edge cuts
    goes on as its own segment in the next window: so a window needs nothing but itself, and
    batch(step) stays a function of the step.
    """
    ends_BT = tokens_BS[:, :-1] == eos_id
    starts_BT = np.zeros_like(ends_BT)
    starts_BT[:, 1:] = ends_BT[:, :-1]
    index_T = np.arange(ends_BT.shape[1], dtype=np.int32)
    first_BT = np.maximum.accumulate(np.where(starts_BT, index_T, 0), axis=1)
    segments_BT = 1 + np.cumsum(starts_BT, axis=1, dtype=np.int32)
    return segments_BT, index_T - first_BT, (~ends_BT).astype(np.float32)


def permute(index: np.ndarray, size: int, key: int) -> np.ndarray:
    """A permutation of 0 … size - 1 keyed by `key`, evaluated only where asked.

    Four Feistel rounds permute the next even power of two; what falls outside goes round again
    (cycle walking), at most four times as long on average.
    """
    half = max(1, -(-(size - 1).bit_length() // 2))
    low, half = np.uint64(2**half - 1), np.uint64(half)
    out = np.array(index, np.uint64)
    todo = np.arange(out.size)
    while todo.size:
        left, right = out[todo] >> half, out[todo] & low
        for number in range(4):
            left, right = right, left ^ (_mix(right ^ np.uint64(_key(key, number))) & low)
        out[todo] = left << half | right
        todo = todo[out[todo] >= size]
    return out.astype(np.int64)


def shuffled(counts: np.ndarray, size: int, seed: int) -> np.ndarray:
    """Item number `count` of the endless sequence of epochs over `size`, each in its own order."""
    chosen = np.empty_like(counts)
    for epoch in np.unique(counts // size):
        inside = counts // size == epoch
        chosen[inside] = permute(counts[inside] % size, size, (seed << 32) + int(epoch))
    return chosen


def choose(numbers: np.ndarray, weights: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """For each row number its source, and how many earlier rows that source had.

    Of the first n rows, source 0 has floor(n * w0); the rest is shared among the others in the
    same way. So any stretch keeps the proportions to within one row a source, and counting needs
    no memory.
    """
    choice = np.zeros(numbers.shape, np.int64)
    counts = np.array(numbers, np.uint64)
    active, left = np.ones(numbers.shape, bool), 1.0
    for number, weight in enumerate(weights[:-1]):
        share = np.uint64(round(min(weight / left, 1.0) * 2**WEIGHT_BITS))
        before = counts * share >> np.uint64(WEIGHT_BITS)
        takes = (counts + np.uint64(1)) * share >> np.uint64(WEIGHT_BITS) > before
        choice[active & takes] = number
        counts = np.where(active, np.where(takes, before, counts - before), counts)
        active &= ~takes
        left -= weight
    choice[active] = len(weights) - 1
    return choice, counts.astype(np.int64)


@functools.lru_cache(1024)
def _key(*parts: int) -> int:
    digest = hashlib.blake2b(":".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser: every output bit depends on every input bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
