"""Few shapes: each one compiles its own program, so lengths are rounded up and rows are padded.

A batch has the shape [size, width]. Zeros fill what no row reaches; masks and lengths tell which
they are.
"""

import itertools
from collections.abc import Sequence

import numpy as np


def multiple(length: int, step: int, most: int) -> int:
    """The next multiple of `step`, at most `most`: for training, where padding costs a gradient.

    multiple(65, 64, 512) = 128
    """
    return min(-(-max(length, 1) // step) * step, most)


def bucket(length: int, smallest: int = 16) -> int:
    """The next of 16, 24, 32, 48, 64, 96, 128, …: two sizes for each doubling, whatever comes."""
    sizes = (
        size
        for power in itertools.count()
        for size in (smallest << power, smallest * 3 << power >> 1)
    )
    return next(size for size in sizes if length <= size)


def power_of_two(count: int) -> int:
    """The next of 1, 2, 4, 8, …: for numbers of rows, which shrink while rows finish."""
    return 1 << max(count - 1, 0).bit_length()


def start_together(
    rows: Sequence[Sequence | np.ndarray], width: int, size: int = 0, kind: type = np.int32
) -> np.ndarray:
    """The rows as one array [size, width], each from column 0.

    Args:
        size: how many rows the array has; 0: as many as are given.
    """
    array_BT = np.zeros((size or len(rows), width), kind)
    for number, row in enumerate(rows):
        array_BT[number, : len(row)] = row
    return array_BT


def end_together(
    rows: Sequence[Sequence[int]], width: int, size: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """The rows as one array [size, width], each up to the last column, and their starts [size].

    Prompts end together, so that the next token of every row stands in the same column.
    """
    tokens_BT = np.zeros((size or len(rows), width), np.int32)
    start_B = np.full(len(tokens_BT), width, np.int32)
    for number, row in enumerate(rows):
        start_B[number] = width - len(row)
        tokens_BT[number, start_B[number] :] = row
    return tokens_BT, start_B
