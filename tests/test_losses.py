"""Every loss against a plain loop over numbers, in double precision."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import losses

MARGINS = np.array([-3.0, -0.4, 0.0, 1.7, 12.0])
BETA = 0.3


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def ragged_rows(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities and masks of rows with 1 … 7 answer tokens behind prompts of any length."""
    rng = np.random.default_rng(seed)
    logprobs_BT = -rng.exponential(1.0, (5, 12)).astype(np.float32)
    mask_BT = np.zeros((5, 12), np.float32)
    for row in range(5):
        start = rng.integers(0, 5)
        mask_BT[row, start : start + 1 + rng.integers(0, 7)] = 1
    return logprobs_BT, mask_BT


def log_softmax(rows: np.ndarray) -> list[list[float]]:
    out = []
    for row in rows.tolist():
        norm = math.log(sum(math.exp(x) for x in row))
        out.append([x - norm for x in row])
    return out


def loop_kl(p: list[float], q: list[float]) -> float:
    return sum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True))


def logits(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 2, (6, 9)).astype(np.float32)


def test_sequence_logprobs_sum_only_the_answer() -> None:
    logprobs_BT, mask_BT = ragged_rows(0)
    total_B, count_B = losses.sequence_logprobs(jnp.asarray(logprobs_BT), jnp.asarray(mask_BT))
    for row in range(5):
        answer = [float(x) for x, m in zip(logprobs_BT[row], mask_BT[row], strict=True) if m]
        assert math.isclose(float(total_B[row]), sum(answer), abs_tol=1e-5)
        assert int(count_B[row]) == len(answer)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_dpo_is_the_log_likelihood_of_the_label(smoothing: float) -> None:
    expected = [
        -(1 - smoothing) * math.log(sigmoid(BETA * m)) - smoothing * math.log(1 - sigmoid(BETA * m))
        for m in MARGINS.tolist()
    ]
    chex.assert_trees_all_close(
        losses.dpo(jnp.asarray(MARGINS, jnp.float32), BETA, smoothing),
        np.array(expected, np.float32), atol=1e-5,
    )  # fmt: skip


def test_ipo_has_its_minimum_at_half_the_inverse_of_beta() -> None:
    expected = [(m - 1 / (2 * BETA)) ** 2 for m in MARGINS.tolist()]
    found_B = losses.ipo(jnp.asarray(MARGINS, jnp.float32), BETA)
    chex.assert_trees_all_close(found_B, np.array(expected, np.float32), rtol=1e-5)
    assert float(jax.grad(losses.ipo)(jnp.float32(1 / (2 * BETA)), BETA)) == 0


def test_hinge_forgets_pairs_that_are_apart() -> None:
    expected = [max(0.0, 1 - BETA * m) for m in MARGINS.tolist()]
    found_B = losses.hinge(jnp.asarray(MARGINS, jnp.float32), BETA)
    chex.assert_trees_all_close(found_B, np.array(expected, np.float32), atol=1e-5)


def test_simpo_compares_means_against_a_margin() -> None:
    chosen, rejected = -np.array([0.1, 2.0, 0.7]), -np.array([0.4, 0.3, 0.7])
    expected = [
        -math.log(sigmoid(2.0 * (c - r) - 0.5)) for c, r in zip(chosen, rejected, strict=True)
    ]
    found_B = losses.simpo(
        jnp.asarray(chosen, jnp.float32), jnp.asarray(rejected, jnp.float32), 2.0, 0.5
    )
    chex.assert_trees_all_close(found_B, np.array(expected, np.float32), atol=1e-5)


def test_orpo_compares_odds() -> None:
    chosen, rejected = -np.array([0.01, 2.0, 0.7]), -np.array([0.4, 0.3, 9.0])
    odds = lambda logprob: math.exp(logprob) / (1 - math.exp(logprob))
    expected = [
        -BETA * math.log(sigmoid(math.log(odds(c)) - math.log(odds(r))))
        for c, r in zip(chosen, rejected, strict=True)
    ]
    found_B = losses.orpo(
        jnp.asarray(chosen, jnp.float32), jnp.asarray(rejected, jnp.float32), BETA
    )
    chex.assert_trees_all_close(found_B, np.array(expected, np.float32), atol=1e-5)


def test_log1mexp_is_exact_near_zero_and_far_from_it() -> None:
    x = np.array([-1e-6, -1e-3, -0.6931, -0.6932, -5.0, -60.0])
    exact = np.where(x > -1, np.log(-np.expm1(x)), np.log1p(-np.exp(x)))
    expected = exact.astype(np.float32)
    chex.assert_trees_all_close(
        losses.log1mexp(jnp.asarray(x, jnp.float32)), expected, rtol=1e-5, atol=1e-30
    )
    assert np.isfinite(jax.grad(lambda x: losses.log1mexp(x))(jnp.float32(-60.0)))
    assert np.isfinite(jax.grad(lambda x: losses.log1mexp(x))(jnp.float32(0.0)))


def test_bradley_terry_with_margin_and_centring() -> None:
    chosen, rejected = np.array([2.0, -1.0, 0.5]), np.array([1.0, 0.3, 0.5])
    margin = np.array([0.0, 0.4, 1.0])
    expected = [
        -math.log(sigmoid(c - r - m)) + 0.01 * (c + r) ** 2
        for c, r, m in zip(chosen, rejected, margin, strict=True)
    ]
    found_B = losses.bradley_terry(
        *(jnp.asarray(x, jnp.float32) for x in (chosen, rejected, margin)), 0.01
    )
    chex.assert_trees_all_close(found_B, np.array(expected, np.float32), atol=1e-5)


def test_kto_values_gains_and_losses_from_the_reference_point() -> None:
    ratio, desirable = np.array([1.5, -0.5, 2.5, -4.0]), np.array([1, 1, 0, 0])
    kl = 0.8
    expected = [
        1.2 * (1 - sigmoid(BETA * (r - kl))) if d else 0.7 * (1 - sigmoid(BETA * (kl - r)))
        for r, d in zip(ratio, desirable, strict=True)
    ]
    found_B = losses.kto(
        jnp.asarray(ratio, jnp.float32), jnp.asarray(desirable), jnp.float32(kl), BETA, 1.2, 0.7
    )
    chex.assert_trees_all_close(found_B, np.array(expected, np.float32), atol=1e-5)


def test_the_reference_point_of_kto_is_a_constant_at_least_zero() -> None:
    assert float(losses.kto_kl(jnp.array([1.0, 2.0]))) == 1.5
    assert float(losses.kto_kl(jnp.array([1.0, -2.0]))) == 0
    loss = lambda ratio_B: losses.kto(
        jnp.ones(2), jnp.ones(2), losses.kto_kl(ratio_B), BETA
    ).sum()  # fmt: skip
    assert not jax.grad(loss)(jnp.array([1.0, 2.0])).any()


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergences_equal_a_loop(temperature: float) -> None:
    student, teacher = logits(1), logits(2)
    p = log_softmax(teacher.astype(float) / temperature)
    q = log_softmax(student.astype(float) / temperature)
    student_NV = losses.tempered(jnp.asarray(student), temperature)
    teacher_NV = losses.tempered(jnp.asarray(teacher), temperature)
    forward = [loop_kl(a, b) for a, b in zip(p, q, strict=True)]
    reverse = [loop_kl(b, a) for a, b in zip(p, q, strict=True)]
    mixed = []
    for a, b in zip(p, q, strict=True):
        m = [math.log(0.3 * math.exp(x) + 0.7 * math.exp(y)) for x, y in zip(a, b, strict=True)]
        mixed.append(0.3 * loop_kl(a, m) + 0.7 * loop_kl(b, m))
    close = lambda found, wanted: chex.assert_trees_all_close(
        found, np.array(wanted, np.float32), atol=1e-5
    )
    close(losses.forward_kl(student_NV, teacher_NV), forward)
    close(losses.reverse_kl(student_NV, teacher_NV), reverse)
    close(losses.generalized_jsd(student_NV, teacher_NV, 0.3), mixed)
    close(losses.generalized_jsd(student_NV, teacher_NV, 0.0), forward)
    close(losses.generalized_jsd(student_NV, teacher_NV, 1.0), reverse)


def test_the_likeliest_tokens_and_the_rest_bound_the_divergence() -> None:
    student_NV, teacher_NV = (losses.tempered(jnp.asarray(logits(s)), 1.0) for s in (1, 2))
    full_N = losses.forward_kl(student_NV, teacher_NV)
    for k in (2, 5, 8):
        kept_NK, ids_NK = jax.lax.top_k(teacher_NV, k)
        coarse_N = losses.forward_kl(
            losses.with_rest(student_NV, ids_NK), losses.append_rest(kept_NK)
        )
        assert (coarse_N <= full_N + 1e-5).all()
        if k == 8:  # the rest is one token: nothing is lost
            chex.assert_trees_all_close(coarse_N, full_N, atol=1e-5)
    expected = [1 - sum(math.exp(x) for x in row[:3]) for row in np.asarray(teacher_NV).tolist()]
    rest_N = jnp.exp(losses.append_rest(teacher_NV[:, :3])[:, -1])
    chex.assert_trees_all_close(rest_N, np.array(expected, np.float32), atol=1e-5)
