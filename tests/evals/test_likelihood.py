"""Batches, buckets and shared contexts change no likelihood."""

import numpy as np
import pytest
from byte_model import byte_model, with_context

from jaxgpt.evals import queries
from jaxgpt.sampling import likelihood
from jaxgpt.sampling.likelihood import Group


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    return byte_model(tmp_path_factory.mktemp("model"))


def reference(lm, context, continuation):
    """log p and greediness of each token from one full pass, in NumPy."""
    row = [*context, *continuation]
    padded = row + [0] * (lm.config.context_length - len(row))  # one shape to compile
    scores = np.asarray(lm.logits([padded]), np.float64)[0, len(context) - 1 : len(row) - 1]
    logprobs = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    chosen = logprobs[np.arange(len(continuation)), continuation]
    return chosen, scores.argmax(-1) == continuation


def likeliest(lm, context):
    padded = context + [0] * (lm.config.context_length - len(context))
    return int(lm.logits([padded])[0, len(context) - 1].argmax())


def draw(*lengths):
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, n).tolist() for n in lengths]


@pytest.mark.parametrize("batch_tokens", [48, 256])
def test_continuations_after_a_shared_context(lm, batch_tokens):
    contexts = draw(1, 17, 40, 5, 16)
    groups = [
        Group(context, draw(*lengths))
        for context, lengths in zip(
            contexts, [(3, 1), (9,), (2, 30, 4), (1, 1), (5, 6)], strict=True
        )
    ]
    groups[1] = Group(contexts[1], [[likeliest(lm, contexts[1])]])
    found = dict(likelihood.score_continuations(lm.config, lm.params, groups, batch_tokens))
    assert sorted(found) == [0, 1, 2, 3, 4]
    for number, group in enumerate(groups):
        for continuation, scored in zip(group.continuations, found[number], strict=True):
            logprobs, greedy = reference(lm, group.context, continuation)
            np.testing.assert_allclose(scored.logprobs, logprobs, atol=2e-5)
            np.testing.assert_array_equal(scored.greedy, greedy)
    assert found[1][0].greedy.tolist() == [True]


@pytest.mark.parametrize("batch_tokens", [48, 256])
def test_whole_rows(lm, batch_tokens):
    rows = draw(2, 30, 17, 64)
    found = dict(likelihood.score_rows(lm.config, lm.params, rows, batch_tokens))
    for number, row in enumerate(rows):
        logprobs, _ = reference(lm, row[:1], row[1:])
        np.testing.assert_allclose(found[number].logprobs, logprobs, atol=2e-5)


def test_pairs_are_scored_under_their_keys(lm):
    (a, b, c, d) = draw(20, 7, 5, 9)
    pairs = {
        "x": queries.Pair(a, b), "y": queries.Pair(a, c), "z": queries.Pair(c[:1], d),
    }  # fmt: skip
    found = dict(queries.score(lm, pairs, 256))
    for key, (context, continuation, _) in pairs.items():
        expected = reference(lm, context, continuation)[0].sum()
        assert queries.total(found[key]) == pytest.approx(expected, abs=1e-4)


def test_a_pair_is_cut_between_its_tokens(lm):
    assert queries.encode_pair(lm, "ab", " c") == ([97, 98], [32, 99], False)
    assert queries.encode_pair(lm, "ab \n", "c") == ([97, 98], [32, 10, 99], False)
    assert queries.encode_pair(lm, "", "c") == ([lm.tokenizer.eos_id], [99], False)
    assert queries.encode_pair(lm, "  ", "c") == ([lm.tokenizer.eos_id], [32, 32, 99], False)


def test_a_long_context_loses_its_beginning(lm):
    small = with_context(lm, 8)
    pair = queries.encode_pair(small, "0123456789", "abc")
    # "c" is predicted and not read: eight tokens are read.
    assert pair == ([ord(c) for c in "456789"], [97, 98, 99], True)
    with pytest.raises(ValueError, match=r"9 tokens: the model's context is 8"):
        queries.encode_pair(small, "0", "abcdefghi")


def test_windows_score_every_token_but_the_first_once():
    for count, window, stride in [(10, 4, 2), (11, 4, 4), (10, 4, 1), (5, 9, 3), (12, 4, 4)]:
        found = likelihood.windows(count, window, stride, context_length=64)
        scored = [t for w in found for t in range(w.stop - w.scored, w.stop)]
        heads = set(range(0, count, stride)) if stride == window else {0}
        assert scored == [t for t in range(count) if t not in heads]
        assert all(w.stop - w.start <= window for w in found)


def test_no_batch_is_larger_than_asked():
    lengths = [n % 90 + 1 for n in range(200)]
    seen = []
    for width, numbers in likelihood._batches(lengths, 128):
        assert max(lengths[n] for n in numbers) <= width
        assert (
            len(numbers) <= likelihood._batch_size(len(numbers), width, 128) <= max(1, 128 // width)
        )
        seen += numbers
    assert sorted(seen) == list(range(200))


def test_parts_hold_every_continuation_once_and_little_else():
    texts = [[[0] * (row * i % 30 + 1) for i in range(4)] for row in range(25)]
    seen, slots = [], 0
    for width, count, part in likelihood._parts(texts, 128):
        assert len(part) <= count and count * width <= 128
        assert max(len(texts[row][i]) for row, i in part) <= width
        seen, slots = seen + part, slots + count * width
    assert sorted(seen) == [(row, i) for row in range(25) for i in range(4)]
    assert slots < 2 * sum(len(text) for those in texts for text in those)
