"""Several documents in one row: segment ids, restarted positions, no target across documents."""

from collections.abc import Sequence

import numpy as np


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
