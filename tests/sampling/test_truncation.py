"""Which tokens may be drawn, and how often, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.sampling.sample import Sampling, draw
from jaxgpt.sampling.truncation import penalize_repetition, truncate

DRAWS = 200_000
VOCAB = 40
LOGITS_V = np.random.default_rng(0).normal(0, 2, VOCAB).astype(np.float32)


def softmax(logits_V: np.ndarray) -> np.ndarray:
    exp_V = np.exp(np.float64(logits_V) - logits_V.max())
    return exp_V / exp_V.sum()


def reference(
    logits_V: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float
) -> np.ndarray:
    """Sorts, cuts and renormalises, one rule after the other."""
    probs_V = softmax(logits_V / temperature)
    order = np.argsort(-probs_V, kind="stable")
    if top_k:
        probs_V[order[top_k:]] = 0
        probs_V /= probs_V.sum()
    if top_p < 1:
        before = np.cumsum(probs_V[order]) - probs_V[order]
        probs_V[order[before >= top_p]] = 0
        probs_V /= probs_V.sum()
    if min_p:
        probs_V[probs_V < min_p * probs_V.max()] = 0
        probs_V /= probs_V.sum()
    return probs_V


SETTINGS = {
    "nucleus": (1.0, 0, 0.8, 0.0),
    "top-k": (1.0, 7, 1.0, 0.0),
    "min-p": (1.5, 0, 1.0, 0.1),
    "temperature": (0.6, 0, 1.0, 0.0),
    "all": (1.3, 12, 0.9, 0.05),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_frequencies_match_numpy(name):
    """Chi-square over 200,000 draws: a fair sampler fails once in 10,000 seeds, and this one is."""
    stats = pytest.importorskip("scipy.stats", reason="scipy is in the test extra")
    temperature, top_k, top_p, min_p = SETTINGS[name]
    settings = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    rng_B = jax.random.split(jax.random.key(1), DRAWS)
    index_B = jnp.zeros(DRAWS, jnp.int32)
    one = jax.jit(
        lambda rng_B: draw(jnp.asarray(LOGITS_V)[None], None, rng_B, index_B[:1], settings)[0][0]
    )
    token_B = np.asarray(jax.lax.map(lambda rng: one(rng[None]), rng_B, batch_size=20_000))
    expected_V = reference(LOGITS_V, *SETTINGS[name])
    counts_V = np.bincount(token_B, minlength=VOCAB)
    assert counts_V[expected_V == 0].sum() == 0
    allowed = expected_V > 0
    result = stats.chisquare(counts_V[allowed], expected_V[allowed] * DRAWS)
    assert result.pvalue > 1e-4, result


@pytest.mark.parametrize("name", SETTINGS)
def test_the_kept_set_and_its_probabilities_equal_numpy(name):
    random = np.random.default_rng(3)
    logits_BV = random.normal(0, 3, (50, VOCAB)).astype(np.float32)
    probs_BV = np.exp(np.asarray(truncate(jnp.asarray(logits_BV), *SETTINGS[name])))
    for row in range(50):
        expected_V = reference(logits_BV[row], *SETTINGS[name])
        np.testing.assert_allclose(probs_BV[row], expected_V, rtol=1e-4, atol=1e-7)


def kept(probs: list[float], **settings) -> list[int]:
    logprobs_BV = truncate(
        jnp.log(jnp.array([probs])), settings.pop("temperature", 1.0), **settings
    )
    return np.flatnonzero(np.isfinite(np.asarray(logprobs_BV[0]))).tolist()


def test_top_p_keeps_the_token_that_crosses_it():
    assert kept([0.5, 0.25, 0.15, 0.1], top_p=0.7) == [0, 1]
    assert kept([0.5, 0.25, 0.15, 0.1], top_p=0.74) == [0, 1]
    assert kept([0.5, 0.25, 0.15, 0.1], top_p=0.76) == [0, 1, 2]
    assert kept([0.5, 0.25, 0.15, 0.1], top_p=1e-6) == [0]


def test_ties_with_the_last_kept_token_are_kept():
    assert kept([0.4, 0.2, 0.2, 0.2], top_k=2) == [0, 1, 2, 3]
    assert kept([0.4, 0.2, 0.2, 0.2], top_p=0.5) == [0, 1, 2, 3]
    assert kept([0.25, 0.25, 0.3, 0.2], top_k=2) == [0, 1, 2]


def test_temperature_comes_before_top_k_before_top_p():
    probs = [0.5, 0.25, 0.15, 0.1]
    # Flattened to [0.34, 0.27, 0.21, 0.17] (power 1/2, temperature 2), 0.5 asks for two tokens.
    assert kept(probs, top_p=0.5) == [0]
    assert kept(probs, temperature=2.0, top_p=0.5) == [0, 1]
    # Of the two that top-k keeps, the first holds 0.667: enough for 0.6, of all four it is not.
    assert kept(probs, top_p=0.6) == [0, 1]
    assert kept(probs, top_k=2, top_p=0.6) == [0]


def test_temperature_zero_is_argmax_at_any_scale():
    logits_BV = jnp.array([[1.0, 3.0, 2.0], [1e30, 0.0, -1e30], [-5.0, -4.0, -4.5]])
    rng_B = jax.random.split(jax.random.key(0), 3)
    token_B, logprob_B = draw(
        logits_BV, None, rng_B, jnp.zeros(3, jnp.int32), Sampling(temperature=0.0, top_p=0.1)
    )
    np.testing.assert_array_equal(token_B, [1, 0, 1])
    np.testing.assert_allclose(logprob_B, jax.nn.log_softmax(logits_BV).max(-1), rtol=1e-6)


def test_logprobs_are_those_of_the_distribution_drawn_from():
    settings = Sampling(temperature=1.3, top_k=12, top_p=0.9, min_p=0.05)
    rng_B = jax.random.split(jax.random.key(0), 64)
    logits_BV = jnp.broadcast_to(jnp.asarray(LOGITS_V)[None], (64, VOCAB))
    token_B, logprob_B = draw(logits_BV, None, rng_B, jnp.zeros(64, jnp.int32), settings)
    expected_V = reference(LOGITS_V, *SETTINGS["all"])
    np.testing.assert_allclose(logprob_B, np.log(expected_V[np.asarray(token_B)]), rtol=1e-4)


def test_the_repetition_penalty_by_hand():
    logits_BV = jnp.array([[2.0, -2.0, 4.0, -4.0]])
    seen_BV = jnp.array([[True, True, False, False]])
    penalized_BV = penalize_repetition(logits_BV, seen_BV, 2.0)
    np.testing.assert_array_equal(penalized_BV, [[1.0, -4.0, 4.0, -4.0]])


def test_the_repetition_penalty_equals_transformers():
    reason = "the reference extra is not installed"
    torch = pytest.importorskip("torch", reason=reason)
    transformers = pytest.importorskip("transformers", reason=reason)
    random = np.random.default_rng(0)
    logits_BV = random.normal(size=(3, VOCAB)).astype(np.float32)
    tokens_BT = random.integers(0, VOCAB, (3, 9))
    theirs = transformers.RepetitionPenaltyLogitsProcessor(1.7)(
        torch.as_tensor(tokens_BT), torch.as_tensor(logits_BV)
    )
    seen_BV = np.zeros((3, VOCAB), bool)
    np.put_along_axis(seen_BV, tokens_BT, True, axis=1)
    mine = penalize_repetition(jnp.asarray(logits_BV), jnp.asarray(seen_BV), 1.7)
    np.testing.assert_allclose(mine, theirs.numpy(), rtol=1e-6)


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -1}, {"top_p": 0}, {"top_p": 1.1}, {"top_k": -1}, {"min_p": 1},
     {"repetition_penalty": 0}, {"max_new_tokens": -1}],
    ids=str,
)  # fmt: skip
def test_settings_out_of_range_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Sampling(**wrong)
