"""Learning from rewards against plain loops over numbers, on rows of unequal length."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import policy_losses

GAMMA, LAM = 0.9, 0.8


def rows(seed: int, B: int = 6, T: int = 11) -> dict[str, np.ndarray]:
    """Answers of 1 … 9 tokens behind prompts of any length; some are cut in two by a tool."""
    rng = np.random.default_rng(seed)
    mask_BT = np.zeros((B, T), np.float32)
    for row in range(B):
        start = rng.integers(0, 4)
        length = rng.integers(1, T - start)
        mask_BT[row, start : start + length] = 1
        if row % 2 and length > 4:
            mask_BT[row, start + 1 : start + 3] = 0
    draw = lambda scale: rng.normal(0, scale, (B, T)).astype(np.float32)
    return {
        "mask": mask_BT, "values": draw(1.0), "rewards": draw(0.5), "advantages": draw(1.0),
        "logprobs": -np.abs(draw(1.0)), "old": -np.abs(draw(1.0)), "returns": draw(1.0),
    }  # fmt: skip


def places(mask_T: np.ndarray) -> list[int]:
    return [t for t, m in enumerate(mask_T) if m]


def test_gae_walks_back_over_the_policys_own_tokens() -> None:
    r = rows(0)
    expected_BT = np.zeros_like(r["values"], np.float64)
    for row, mask_T in enumerate(r["mask"]):
        own = places(mask_T)
        for i, t in enumerate(own):
            total, discount = 0.0, 1.0
            for j in range(i, len(own)):  # the sum over all deltas to come
                now = own[j]
                ahead = float(r["values"][row, own[j + 1]]) if j + 1 < len(own) else 0.0
                delta = float(r["rewards"][row, now]) + GAMMA * ahead
                total += discount * (delta - float(r["values"][row, now]))
                discount *= GAMMA * LAM
            expected_BT[row, t] = total
    found_BT = policy_losses.gae(r["rewards"], r["values"], r["mask"], GAMMA, LAM)
    assert found_BT.dtype == jnp.float32
    chex.assert_trees_all_close(np.asarray(found_BT), expected_BT.astype(np.float32), atol=1e-5)


def test_gae_without_discount_is_the_sum_of_rewards_to_come_minus_the_value() -> None:
    r = rows(1)
    found_BT = np.asarray(policy_losses.gae(r["rewards"], r["values"], r["mask"], 1.0, 1.0))
    for row, mask_T in enumerate(r["mask"]):
        for t in places(mask_T):
            ahead = sum(float(r["rewards"][row, s]) for s in places(mask_T) if s >= t)
            assert math.isclose(found_BT[row, t], ahead - r["values"][row, t], abs_tol=1e-5)


def test_whole_number_rewards_are_not_truncated() -> None:
    ones = np.ones((2, 3), np.int32)
    found_BT = policy_losses.gae(ones, ones * 0, ones, 0.5, 1.0)
    chex.assert_trees_all_close(np.asarray(found_BT[0]), np.float32([1.75, 1.5, 1.0]))


def test_whitening_looks_at_unmasked_tokens_only() -> None:
    r = rows(2)
    own = [float(x) for x, m in zip(r["values"].flat, r["mask"].flat, strict=True) if m]
    mean = sum(own) / len(own)
    std = math.sqrt(sum((x - mean) ** 2 for x in own) / (len(own) - 1))
    expected_BT = (r["values"] - mean) / std * r["mask"]
    found_BT = policy_losses.whiten(jnp.asarray(r["values"]), jnp.asarray(r["mask"]))
    chex.assert_trees_all_close(np.asarray(found_BT), expected_BT.astype(np.float32), atol=1e-5)


@pytest.mark.parametrize("count", [0, 1])
def test_whitening_one_token_or_none_gives_zero(count: int) -> None:
    mask_BT = jnp.zeros((2, 3)).at[0, 1].set(count)
    found_BT = policy_losses.whiten(jnp.full((2, 3), 7.0), mask_BT)
    assert (np.asarray(found_BT) == 0).all()


@pytest.mark.parametrize("baseline", ["group", "mean", "others", "batch"])
def test_advantages_of_groups(baseline: str) -> None:
    rewards_GP = np.random.default_rng(3).normal(0, 1, (4, 5))
    flat = rewards_GP.ravel().tolist()
    expected_GP = np.zeros((4, 5), np.float32)
    for g, group in enumerate(rewards_GP.tolist()):
        for p, reward in enumerate(group):
            others = [x for q, x in enumerate(group) if q != p]
            pool = flat if baseline == "batch" else group
            mean = sum(others) / len(others) if baseline == "others" else sum(pool) / len(pool)
            std = math.sqrt(sum((x - mean) ** 2 for x in pool) / (len(pool) - 1))
            scale = std + 1e-4 if baseline in ("group", "batch") else 1.0
            expected_GP[g, p] = (reward - mean) / scale
    found_GP = policy_losses.group_advantages(jnp.asarray(rewards_GP, jnp.float32), baseline)
    chex.assert_trees_all_close(np.asarray(found_GP), expected_GP, atol=1e-5)


@pytest.mark.parametrize("baseline", ["group", "mean", "others"])
def test_a_group_without_variance_has_no_advantage(baseline: str) -> None:
    # 0.1 is no binary fraction: the mean of three is not 0.1.
    rewards_GP = jnp.array([[0.1, 0.1, 0.1], [0.0, 1.0, 1.0]], jnp.float32)
    found_GP = np.asarray(policy_losses.group_advantages(rewards_GP, baseline))
    assert (found_GP[0] == 0).all() and (found_GP[1] != 0).all()


def test_one_answer_alone_has_no_advantage() -> None:
    for baseline in ("group", "mean", "others"):
        found_GP = policy_losses.group_advantages(jnp.array([[1.0], [0.0]]), baseline)
        assert (np.asarray(found_GP) == 0).all()


def test_the_policy_loss_clips_on_the_side_that_would_gain() -> None:
    r = rows(4)
    low, high = 0.2, 0.4
    found_BT, clipped_BT = policy_losses.clipped_policy_loss(
        jnp.asarray(r["logprobs"] - r["old"]), jnp.asarray(r["advantages"]), low, high
    )
    for index in np.ndindex(r["mask"].shape):
        a = float(r["advantages"][index])
        ratio = math.exp(float(r["logprobs"][index]) - float(r["old"][index]))
        gone = (a > 0 and ratio > 1 + high) or (a < 0 and ratio < 1 - low)
        bounded = min(max(ratio, 1 - low), 1 + high)
        expected = -(bounded if gone else ratio) * a
        assert math.isclose(found_BT[index], expected, abs_tol=1e-5)
        assert bool(clipped_BT[index]) == gone
    assert 0 < float(clipped_BT.mean()) < 1


def test_a_clipped_token_has_no_gradient_and_a_lost_one_no_nan() -> None:
    loss = lambda change: policy_losses.clipped_policy_loss(change, jnp.float32(1), 0.2, 0.2)[0]
    assert float(jax.grad(loss)(jnp.float32(0.5))) == 0
    assert float(jax.grad(loss)(jnp.float32(-0.5))) != 0
    lost = lambda a: policy_losses.clipped_policy_loss(jnp.float32(1e9), jnp.float32(a), 0.2, 0.2)[
        0
    ]
    assert np.isfinite(float(lost(0.0))) and np.isfinite(float(lost(-1.0)))


def test_the_value_loss_is_the_larger_one() -> None:
    r = rows(5)
    found_BT, clipped_BT = policy_losses.clipped_value_loss(
        *(jnp.asarray(r[n]) for n in ("values", "old", "returns")), 0.3
    )
    for index in np.ndindex(r["mask"].shape):
        v, old, goal = (float(r[n][index]) for n in ("values", "old", "returns"))
        kept = min(max(v, old - 0.3), old + 0.3)
        free, bound = 0.5 * (v - goal) ** 2, 0.5 * (kept - goal) ** 2
        assert math.isclose(found_BT[index], max(free, bound), abs_tol=1e-5, rel_tol=1e-5)
        assert bool(clipped_BT[index]) == (bound > free)
    assert 0 < float(clipped_BT.mean()) < 1


def test_estimates_of_kl() -> None:
    r = rows(6)
    expected = {
        "k1": lambda d: d,
        "k2": lambda d: d * d / 2,
        "k3": lambda d: math.exp(-d) - 1 + d,
    }
    for kind, formula in expected.items():
        found_BT = policy_losses.kl(jnp.asarray(r["logprobs"]), jnp.asarray(r["old"]), kind)
        for index in np.ndindex(r["mask"].shape):
            d = float(r["logprobs"][index]) - float(r["old"][index])
            assert math.isclose(found_BT[index], formula(d), abs_tol=1e-5, rel_tol=1e-4)


def test_k1_and_k3_estimate_the_true_kl() -> None:
    rng = np.random.default_rng(7)
    p_V, q_V = (jax.nn.log_softmax(jnp.asarray(rng.normal(0, 1, 8), jnp.float32)) for _ in "pq")
    true = float((jnp.exp(p_V) * (p_V - q_V)).sum())
    for kind in ("k1", "k3"):
        mean = float((jnp.exp(p_V) * policy_losses.kl(p_V, q_V, kind)).sum())
        assert math.isclose(mean, true, abs_tol=1e-5)


def test_k3_does_not_overflow() -> None:
    far = (jnp.array([-1000.0], jnp.bfloat16), jnp.array([0.0], jnp.bfloat16))
    found_B = policy_losses.kl(*far, "k3")
    assert found_B.dtype == jnp.float32 and np.isfinite(np.asarray(found_B)).all()
    slope = jax.grad(lambda x: policy_losses.kl(x, jnp.float32(0), "k3"))(jnp.float32(-1000.0))
    assert np.isfinite(slope)


@pytest.mark.parametrize("normalize", ["tokens", "sequences", "constant"])
def test_normalisations(normalize: str) -> None:
    r = rows(8)
    r["mask"][2] = 0  # an answer left out
    answers = [
        [float(r["values"][row, t]) for t in places(mask_T)]
        for row, mask_T in enumerate(r["mask"])
        if mask_T.any()
    ]
    expected = {
        "tokens": sum(map(sum, answers)) / sum(map(len, answers)),
        "sequences": sum(sum(a) / len(a) for a in answers) / len(answers),
        "constant": sum(sum(a) / 16 for a in answers) / len(answers),
    }[normalize]
    weights_BT, weight = policy_losses.token_weights(jnp.asarray(r["mask"]), normalize, 16)
    assert math.isclose(float((weights_BT * r["values"]).sum() / weight), expected, rel_tol=1e-4)


def test_weights_add_up_over_parts_of_a_batch() -> None:
    mask_BT = jnp.asarray(rows(9)["mask"])
    for normalize in ("tokens", "sequences", "constant"):
        whole_BT, weight = policy_losses.token_weights(mask_BT, normalize, 16)
        parts = [policy_losses.token_weights(mask_BT[rows], normalize, 16)
                 for rows in (slice(0, 2), slice(2, 6))]  # fmt: skip
        chex.assert_trees_all_close(jnp.concatenate([w for w, _ in parts]), whole_BT)
        assert float(sum(w for _, w in parts)) == float(weight)


def test_explained_variance() -> None:
    r = rows(10)
    own = r["mask"] > 0
    left, spread = (r["returns"] - r["values"])[own], r["returns"][own]
    expected = 1 - left.var() / spread.var()
    arrays = [jnp.asarray(r[n]) for n in ("values", "returns", "mask")]
    assert math.isclose(policy_losses.explained_variance(*arrays), expected, rel_tol=1e-4)
    same = [arrays[0], jnp.ones_like(arrays[1]), arrays[2]]
    assert float(policy_losses.explained_variance(*same)) == 0
