"""Figures over items, each with its standard error."""

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

Measures = dict[str, Any]  # name -> number, or the two ends of an interval
NORMAL_95 = 1.959964  # standard errors to each side that hold 95 %


def mean(name: str, values: Sequence[float]) -> Measures:
    """The mean and its standard error, the sample deviation over the root of the count."""
    array = np.asarray(values, np.float64)
    error = array.std(ddof=1) / math.sqrt(len(array)) if len(array) > 1 else math.nan
    return {name: float(array.mean()), f"{name}_stderr": float(error)}


def ratio(sums: Sequence[float], counts: Sequence[float]) -> tuple[float, float]:
    """Sum of sums over sum of counts, and its standard error with the pairs as the sample.

    The tokens of one text depend on each other; its windows hardly do.
    """
    s, n = np.asarray(sums, np.float64), np.asarray(counts, np.float64)
    value = s.sum() / n.sum()
    if len(s) < 2:
        return float(value), math.nan
    error = np.sqrt(((s - value * n) ** 2).sum() * len(s) / (len(s) - 1)) / n.sum()
    return float(value), float(error)


def interval(right: float, count: int) -> list[float]:
    """Wilson's 95 % interval of a share, which holds for few items and shares near 0 or 1 too."""
    share, z = right / count, NORMAL_95
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    spread = math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    half = z * spread / (1 + z * z / count)
    return [max(middle - half, 0.0), min(middle + half, 1.0)]


def exponential(name: str, value: float, error: float) -> Measures:
    """exp(value) with the error that follows by the delta method."""
    result = math.exp(value) if value < 700 else math.inf
    return {name: result, f"{name}_stderr": result * error}


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """The unbiased chance that one of k samples is right (arXiv:2107.03374)."""
    if num_samples - num_correct < k:
        return 1.0
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def majority(answers: Sequence[Hashable | None]) -> Hashable | None:
    """The commonest answer; of equally common ones the first. None is no answer."""
    counts = Counter(answer for answer in answers if answer is not None)
    return counts.most_common(1)[0][0] if counts else None
