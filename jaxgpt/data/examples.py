"""Rows of conversations: packed or padded, in an order that is a function of (seed, step)."""

import hashlib
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from jaxgpt import shapes
from jaxgpt.config import ConversationConfig
from jaxgpt.data import batches, rows
from jaxgpt.data.batches import Rows, Windows
from jaxgpt.data.chat import ROLES, Encoded, Format
from jaxgpt.data.columns import Columns
from jaxgpt.data.rows import Paths
from jaxgpt.data.tokenizer import Tokenizer

T = TypeVar("T")
Item = tuple[Sequence[Encoded], ...]  # the sequences of a row, each of one or several examples
KINDS = {"tokens": np.int32, "targets": np.int32, "mask": np.float32, "segments": np.int32,
         "positions": np.int32, "roles": np.int8}  # fmt: skip
WIDTH = 64  # padded rows are as wide as their longest, rounded up to a multiple of this


@dataclass
class Tally:
    """What became of the rows of a data set."""

    used: int = 0
    truncated: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        reasons = "".join(f", {count:,} {why}" for why, count in self.dropped.items())
        dropped = f"{self.dropped.total():,} dropped{reasons}"
        return f"{self.used:,} used, {self.truncated:,} truncated, {dropped}"

    def report(self, name: str) -> None:
        """Prints it, and warns where most is left out: then the data or the settings are wrong."""
        print(f"{name}: {self}", file=sys.stderr)
        total = self.used + self.dropped.total()
        if 2 * self.dropped.total() > total:
            why, count = self.dropped.most_common(1)[0]
            print(
                f"warning: {name}: {self.dropped.total() / total:.0%} are dropped, {count:,} of "
                f"them {why}; raise data.max_tokens, shorten them or choose other data",
                file=sys.stderr,
            )


@dataclass(frozen=True)
class Examples:
    """Batches of items.

    Args:
        width: tokens of a row; padded rows may be narrower.
        numbers: name -> array whose first axis is the item, such as the margin of every pair. Of
            packed items only what has positions after it: the examples in a row lie one behind
            the other.
        text: windows of plain text; `text_share` of the rows are such windows instead of items.
    """

    items: Sequence[Item]
    width: int
    batch_size: int
    seed: int = 0
    packed: bool = False
    numbers: dict[str, np.ndarray] = field(default_factory=dict)
    text: Windows | None = None  # of one row a batch
    text_share: float = 0.0

    @property
    def fingerprint(self) -> str:
        """sha256 of all tokens and targets."""
        digest = hashlib.sha256()
        for item in self.items:
            for sequence in item:
                for example in sequence:
                    digest.update(example.tokens_T.tobytes() + example.target_T.tobytes())
        return digest.hexdigest()

    def rows(self, step: int, rows: np.ndarray) -> Rows:
        """The asked rows (0 … batch_size - 1) of a step's batch."""
        numbers = step * self.batch_size + np.arange(self.batch_size)
        if self.text is None:
            return self._batch(self._shuffled(numbers), rows)
        shares = (1 - self.text_share, self.text_share)
        source, counts = batches.choose(numbers.astype(np.uint64), shares)
        chosen = np.where(source == 0, self._shuffled(counts), -1 - counts)
        return self._batch(chosen, rows)

    def num_held_out(self, limit: int = 0) -> int:
        """Batches that hold every item once, at most `limit` unless that is 0."""
        batches = -(-len(self.items) // self.batch_size)
        return min(batches, limit) if limit else batches

    def held_out(self, index: int, rows: np.ndarray, limit: int = 0) -> Rows:
        """Batch `index` of every item once; rows beyond the last one are empty.

        With a limit, the batches are spread evenly over the items.
        """
        total = len(self.items)
        wanted = min(total, self.num_held_out(limit) * self.batch_size)
        position = index * self.batch_size + np.arange(self.batch_size)
        chosen = np.where(position < wanted, position * total // max(wanted, 1), total)
        return self._batch(chosen, rows)

    def _shuffled(self, counts: np.ndarray) -> np.ndarray:
        return batches.shuffled(counts, max(len(self.items), 1), self.seed)

    def _batch(self, chosen: np.ndarray, rows: np.ndarray) -> Rows:
        """The asked rows of a batch.

        Args:
            chosen: what each row of the global batch holds, of which the longest decides the
                width. 0 … len(items) - 1: that item; len(items): nothing; -1, -2, …: window 0, 1,
                … of the text.
        """
        items = [self._item(int(number)) for number in chosen]
        width = self.width if self.packed else self._width(items)
        made = [[fill(sequence, width) for sequence in items[row]] for row in rows]
        batch = {
            name: np.stack([np.stack([sequence[name] for sequence in item]) for item in made])
            for name in made[0][0]
        }
        if len(self.items) == 0 or len(self.items[0]) == 1:
            batch = {name: array[:, 0] for name, array in batch.items()}
        inside = np.minimum(chosen[rows], max(len(self.items), 1) - 1)
        known = {name: np.asarray(values[inside]) for name, values in self.numbers.items()}
        return batch | known

    def _item(self, number: int) -> Item:
        if number < 0:
            assert self.text is not None
            return plain(self.text.rows(-1 - number, np.zeros(1, np.int64)))
        if number == len(self.items):
            return ((),) * (len(self.items[0]) if self.items else 1)
        return self.items[number]

    def _width(self, items: Sequence[Item]) -> int:
        longest = max(sum(map(_slots, sequence)) for item in items for sequence in item)
        return shapes.multiple(longest, WIDTH, self.width)


def split(
    cfg: ConversationConfig,
    read: Callable[[Paths, str, Columns], Iterable[T]],
    embedded: Callable[[str, bool], list[T]],
    tasks: Iterable[str],
) -> tuple[list[T], list[T]]:
    """Training and held-out rows of `data.path`.

    Args:
        read: (paths or Hub name, split, columns) -> rows.
        embedded: (task, held out) -> rows of one of `tasks`, of which the first is the default.
    """
    columns = lambda: Columns(cfg.columns, cfg.roles)
    path = cfg.path or next(iter(tasks))
    if isinstance(path, str) and path in tasks:
        return embedded(path, False), embedded(path, True)
    rows.require("data.path", path, tasks)
    found = list(read(path, cfg.split, columns()))
    if cfg.val_path:
        rows.require("data.val_path", cfg.val_path)
        return found, list(read(cfg.val_path, cfg.split, columns()))
    every = max(round(1 / cfg.val_fraction), 2) if cfg.val_fraction else len(found) + 1
    held_out = found[every - 1 :: every]
    return [row for number, row in enumerate(found, 1) if number % every], held_out


def fill(sequence: Sequence[Encoded], width: int) -> Rows:
    """One row: examples one after another, each its own segment with positions from 0."""
    row = {name: np.zeros(width, kind) for name, kind in KINDS.items()}
    start = 0
    for number, example in enumerate(sequence, 1):
        stop = start + _slots(example)
        row["tokens"][start:stop] = example.tokens_T[:-1]
        row["targets"][start:stop] = example.tokens_T[1:]
        row["mask"][start:stop] = example.target_T[1:]
        row["segments"][start:stop] = number
        row["positions"][start:stop] = np.arange(stop - start)
        row["roles"][start:stop] = example.role_T[:-1]
        start = stop
    return row


def fit(
    arms: Sequence[Encoded], width: int, truncate: bool, tally: Tally, read_end: bool = False
) -> list[Encoded] | None:
    """The sequences of an item up to their last targets, if they fit a row, or their beginnings.

    None if that leaves no target, which the tally counts.

    Args:
        read_end: the last target is read too, not only predicted (a reward stands there).
    """
    arms = [_up_to_last_target(arm, read_end) for arm in arms]
    long = any(_slots(arm) > width for arm in arms)
    if long and not truncate:
        tally.dropped[f"longer than {width} tokens"] += 1
        return None
    if not all(arm.target_T[1 : width + 1].any() for arm in arms):
        tally.dropped[f"without a target in the first {width} tokens"] += 1
        return None
    tally.used += 1
    tally.truncated += long
    return [Encoded(*(array[: width + 1] for array in arm)) for arm in arms]


def fit_any(parts: Sequence[Encoded], width: int, truncate: bool, tally: Tally) -> list[Encoded]:
    """The examples of one conversation that fit a row; the tally counts the conversation."""
    kept: list[Encoded] = []
    counted = Tally()
    for part in parts:
        kept += fit([part], width, truncate, counted) or []
    tally.used += bool(kept)
    tally.truncated += bool(counted.truncated)
    if not kept:
        tally.dropped[next(iter(counted.dropped))] += 1
    return kept


def check_targets(encoded: Sequence[Encoded], form: Format) -> None:
    """Refuses data from which a model would learn nothing, or not when to stop."""
    if not encoded:
        raise ValueError("data.path: no row has a target; see the reasons above")
    end = form.end_of_turn
    if not any((example.tokens_T[example.target_T] == end).any() for example in encoded):
        raise ValueError(
            f"data.path: {form.tokenizer.decode([end])}, which ends the assistant's turn, is never "
            "a target, so the model would not learn to stop; raise data.max_tokens"
        )


def row_width(max_tokens: int, context_length: int) -> int:
    """Tokens of a row: `data.max_tokens`, or all that the model can read."""
    if max_tokens > context_length:
        raise ValueError(
            f"data.max_tokens={max_tokens}: the model reads at most {context_length} "
            "(model.context_length)"
        )
    return max_tokens or context_length


def pack(examples: Iterable[Encoded], width: int) -> list[Item]:
    """Several examples to a row."""
    examples = list(examples)
    rows = first_fit([_slots(example) for example in examples], width)
    return [([examples[index] for index in sorted(row)],) for row in rows]


def first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Packs items into rows, longest first, each into the first row with room (11/9 of optimal).

    Returns the indices of the items of each row; equal lengths keep their order.
    """
    too_long = next((i for i, length in enumerate(lengths) if length > capacity), None)
    if too_long is not None:
        raise ValueError(
            f"item {too_long} has {lengths[too_long]} tokens, more than a row's {capacity}"
        )
    rows: list[list[int]] = []
    # A full binary tree over the rows: room[1] is the most room of any row.
    size = 1
    while size < max(1, len(lengths)):
        size *= 2
    room = [capacity] * (2 * size)
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        node = 1
        while node < size:  # the leftmost row with room: left child first
            node = 2 * node if room[2 * node] >= lengths[item] else 2 * node + 1
        row = node - size
        if row == len(rows):
            rows.append([])
        rows[row].append(item)
        room[node] -= lengths[item]
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return rows


def plain(window: Rows) -> Item:
    """A window of text as an item: everything is a target, nobody says it."""
    tokens_T = np.append(window["tokens"][0], window["targets"][0, -1:])
    target_T = np.append(False, window["mask"][0] > 0)
    return ((Encoded(tokens_T, target_T, np.zeros(len(tokens_T), np.int8)),),)


def prompts(rows: Examples, context_length: int, count: int = 2) -> list[list[int]]:
    """What comes before the first target of the first held-out rows, as tokens; fewer where that
    is nothing, or leaves a context no room for an answer."""
    found = []
    for arms in rows.items:
        for example in arms[0][:1]:  # of a pair's two answers, or of a packed row's conversations
            before = example.tokens_T[: int(example.target_T.argmax())].tolist()
            if 0 < len(before) < context_length and before not in found:
                found.append(before)
        if len(found) == count:
            break
    return found


def describe(batch: Mapping[str, Any], tokenizer: Tokenizer) -> str:
    """A batch as text: every token with its segment, position and role, and its target if any."""
    arrays = {name: np.asarray(array) for name, array in batch.items()}
    shape = arrays["tokens"].shape
    defaults = {
        "segments": np.ones(shape, np.int32),
        "positions": np.broadcast_to(np.arange(shape[-1]), shape),
        "roles": np.zeros(shape, np.int8),
    }
    arrays = defaults | arrays
    lines = []
    for row in np.ndindex(shape[:-1]):
        lines.append(f"row {', '.join(map(str, row))}{_numbers(arrays, row[0])}")
        lines.append("  segment position role       token                 target (mask 1)")
        columns = [arrays[n][row] for n in ("segments", "positions", "roles", "tokens")]
        columns += [arrays["targets"][row], arrays["mask"][row]]
        lines += [_line(tokenizer, *values) for values in zip(*columns, strict=True)]
        lines.append("")
    return "\n".join(lines)


def _up_to_last_target(arm: Encoded, read_end: bool) -> Encoded:
    stop = len(arm.target_T) - int(np.argmax(arm.target_T[::-1])) if arm.target_T.any() else 0
    after = [0] if read_end else []  # something to predict after the end; it is no target
    return Encoded(*(np.append(x[:stop], np.array(after, x.dtype)) for x in arm))


def _slots(example: Encoded) -> int:
    """Positions in a row: the last token is only ever a target."""
    return len(example.tokens_T) - 1


def _line(
    tokenizer: Tokenizer, segment: int, position: int, role: int, token: int, target: int,
    mask: float,
) -> str:  # fmt: skip
    name = lambda token: f"{token} {tokenizer.decode([int(token)])!r}"
    if segment == 0:
        return "  padding"
    goal = name(target) if mask else ""
    return f"  {segment:7} {position:8} {ROLES[role] or '-':10} {name(token):21} {goal}".rstrip()


def _numbers(arrays: Mapping[str, np.ndarray], row: int) -> str:
    """What else is known of a row, such as a pair's margin."""
    return "".join(f"  {n}={array[row]:g}" for n, array in arrays.items() if array.ndim == 1)
