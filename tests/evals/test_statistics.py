"""Figures and their errors, by hand and by simulation."""

import itertools
import math

import numpy as np
import pytest

from jaxgpt.evals import statistics


def test_mean_and_its_error():
    found = statistics.mean("acc", [1.0, 0.0, 0.0, 1.0, 1.0])
    # sample variance 0.3, over 5 items
    assert found == {"acc": 0.6, "acc_stderr": pytest.approx(math.sqrt(0.3 / 5))}
    assert math.isnan(statistics.mean("acc", [1.0])["acc_stderr"])


def test_ratio_error_is_the_spread_over_repetitions():
    rng = np.random.default_rng(0)
    counts = rng.integers(5, 50, (4000, 60))
    sums = counts * rng.normal(3.0, 0.5, counts.shape)
    found = [statistics.ratio(s, n) for s, n in zip(sums, counts, strict=True)]
    values, errors = map(np.array, zip(*found, strict=True))
    assert values.mean() == pytest.approx(3.0, abs=0.01)
    assert errors.mean() == pytest.approx(values.std(), rel=0.05)


def test_exponential_error_by_the_delta_method():
    found = statistics.exponential("perplexity", 2.0, 0.01)
    assert found["perplexity"] == pytest.approx(math.e**2)
    assert found["perplexity_stderr"] == pytest.approx(math.e**2 * 0.01)


@pytest.mark.parametrize(("n", "c"), [(6, 0), (6, 1), (6, 4), (6, 6)])
def test_pass_at_k_counts_the_subsets_with_a_right_answer(n, c):
    right = [True] * c + [False] * (n - c)
    for k in range(1, n + 1):
        subsets = list(itertools.combinations(right, k))
        assert statistics.pass_at_k(n, c, k) == pytest.approx(np.mean([any(s) for s in subsets]))


def test_majority_ignores_no_answer_and_takes_the_first_of_equals():
    assert statistics.majority([None, None, None, "7", "8", "8"]) == "8"
    assert statistics.majority(["7", "8"]) == "7"
    assert statistics.majority([None]) is None


@pytest.mark.parametrize(
    ("right", "count", "ends"),
    [(8, 10, (0.4901625, 0.9433178)), (0, 10, (0.0, 0.2775328)), (10, 10, (0.7224672, 1.0))],
)
def test_wilsons_interval(right: int, count: int, ends: tuple[float, float]) -> None:
    """By hand: https://en.wikipedia.org/wiki/Binomial_proportion_confidence_interval."""
    assert statistics.interval(right, count) == pytest.approx(ends, abs=1e-6)
