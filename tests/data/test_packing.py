"""Packing: segments against a plain loop, first-fit against its promises."""

import numpy as np
import pytest

from jaxgpt.data import batches, examples


def test_segments_equal_a_walk_over_the_tokens():
    generator = np.random.default_rng(0)
    tokens_BS = generator.integers(0, 4, (16, 21)).astype(np.int32)  # 0 ends a document
    segments_BT, positions_BT, mask_BT = batches.segment(tokens_BS, eos_id=0)
    for tokens_S, segments_T, positions_T, mask_T in zip(
        tokens_BS, segments_BT, positions_BT, mask_BT, strict=True
    ):
        segment, position = 1, 0
        for t in range(20):
            assert (segments_T[t], positions_T[t]) == (segment, position)
            assert mask_T[t] == (tokens_S[t] != 0)
            segment, position = (segment + 1, 0) if tokens_S[t] == 0 else (segment, position + 1)


def test_first_fit_places_every_item_once_and_overfills_no_row():
    lengths = np.random.default_rng(1).integers(1, 60, 500).tolist()
    rows = examples.first_fit(lengths, 64)
    assert sorted(i for row in rows for i in row) == list(range(500))
    assert all(sum(lengths[i] for i in row) <= 64 for row in rows)
    # First-fit decreasing needs at most 11/9 of the optimum, which is at least the total.
    assert len(rows) <= 11 / 9 * -(-sum(lengths) // 64) + 1


def test_first_fit_takes_the_first_row_with_room():
    lengths = [4, 7, 3, 6, 2]
    assert examples.first_fit(lengths, 10) == [[1, 2], [3, 0], [4]]


def test_first_fit_of_nothing_is_nothing():
    assert examples.first_fit([], 8) == []


def test_an_item_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="item 1 has 9 tokens, more than a row's 8"):
        examples.first_fit([3, 9], 8)
