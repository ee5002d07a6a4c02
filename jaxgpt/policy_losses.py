"""The maths of learning from rewards: advantages, PPO's clipped losses, estimates of KL.

In arrays [B, T], place t belongs to the token that is predicted there: `values_BT` at t is what was
expected before that token was drawn. `mask_BT` is 1 where the policy drew the token, 0
in prompts, in what tools wrote and in padding. Everything is float32.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxgpt.types import Array

TINY = 1e-6  # beside a standard deviation


# ---- advantages


def group_advantages(rewards_GP: ArrayLike, baseline: str) -> Array:
    """By how much each of P answers to a prompt is better than its group.

    group   (r - mean) / std, GRPO (arXiv:2402.03300)
    mean    r - mean, Dr. GRPO (arXiv:2503.20783)
    others  r - mean of the other answers, RLOO (arXiv:2402.14740)
    batch   (r - mean) / std over the answers to all prompts, REINFORCE++ (arXiv:2501.03262)

    Answers that are all equally good have advantage zero exactly. Notes: chapter 17.

    Raises:
        ValueError: the baseline is none of these.
    """
    rewards_GP = jnp.asarray(rewards_GP, jnp.float32)
    P = rewards_GP.shape[1]
    axis = None if baseline == "batch" else 1
    centred_GP = rewards_GP - rewards_GP.mean(axis, keepdims=True)
    match baseline:
        case "mean":
            advantages_GP = centred_GP
        case "others":
            advantages_GP = centred_GP * P / max(P - 1, 1)
        case "group" | "batch":
            # ddof 1, as TRL and torch have it.
            count = P if axis else rewards_GP.size
            variance = jnp.square(centred_GP).sum(axis, keepdims=True) / max(count - 1, 1)
            advantages_GP = centred_GP / (jnp.sqrt(variance) + 1e-4)
        case _:
            raise ValueError(f"baseline={baseline}: must be group, mean, others or batch")
    # The mean of equal numbers may be off in its last bit.
    spread = rewards_GP.max(axis, keepdims=True) - rewards_GP.min(axis, keepdims=True)
    return jnp.where(spread > 0, advantages_GP, 0.0)


def gae(
    rewards_BT: ArrayLike, values_BT: ArrayLike, mask_BT: ArrayLike, gamma: float, lam: float
) -> Array:
    """Generalised advantage estimation (arXiv:1506.02438) over the tokens of the mask.

    delta_t = r_t + gamma V_next - V_t;  A_t = delta_t + gamma lam A_next, where next is the next
    token of the mask: tokens between, such as a tool's answer, are skipped and have advantage zero.
    After the last token of the mask the value is zero. Notes: chapter 15.
    """
    rewards_BT, values_BT = (jnp.asarray(x, jnp.float32) for x in (rewards_BT, values_BT))
    real_BT = jnp.asarray(mask_BT) > 0

    def step(after: tuple[Array, Array], now: tuple) -> tuple[tuple[Array, Array], Array]:
        (next_value_B, next_advantage_B), (reward_B, value_B, real_B) = after, now
        delta_B = reward_B + gamma * next_value_B - value_B
        advantage_B = delta_B + gamma * lam * next_advantage_B
        value_B = jnp.where(real_B, value_B, next_value_B)
        carried_B = jnp.where(real_B, advantage_B, next_advantage_B)
        return (value_B, carried_B), jnp.where(real_B, advantage_B, 0.0)

    zero_B = jnp.zeros(rewards_BT.shape[0])
    steps = (rewards_BT.T, values_BT.T, real_BT.T)
    _, advantages_TB = jax.lax.scan(step, (zero_B, zero_B), steps, reverse=True)
    return advantages_TB.T


def whiten(x_BT: Array, mask_BT: ArrayLike) -> Array:
    """(x - mean) / std over the tokens of the mask, zero elsewhere and where there is only one.

    Notes: chapter 15.
    """
    mask_BT = jnp.asarray(mask_BT, jnp.float32)
    count = jnp.maximum(mask_BT.sum(), 1.0)
    centred_BT = (x_BT - (x_BT * mask_BT).sum() / count) * mask_BT
    variance = jnp.square(centred_BT).sum() / jnp.maximum(count - 1, 1.0)
    return centred_BT * jax.lax.rsqrt(variance + TINY**2)


# ---- losses per token


def clipped_policy_loss(
    change_BT: Array, advantages_BT: Array, low: float, high: float
) -> tuple[Array, Array]:
    """-min(ratio A, clip(ratio, 1 - low, 1 + high) A), and 1 where clipping removes the gradient.

    PPO (arXiv:1707.06347); with high > low a rare good token may grow further (arXiv:2503.14476).

    Args:
        change_BT: log p now minus log p when the token was drawn; the ratio is its exponential.

    Notes: chapter 15.
    """
    # exp(20) is far beyond any clip; the bound keeps a lost token from becoming inf * 0.
    ratio_BT = jnp.exp(jnp.clip(change_BT, -20.0, 20.0))
    free_BT = -advantages_BT * ratio_BT
    bound_BT = -advantages_BT * jnp.clip(ratio_BT, 1 - low, 1 + high)
    return jnp.maximum(free_BT, bound_BT), (bound_BT > free_BT).astype(jnp.float32)


def clipped_value_loss(
    values_BT: Array, old_BT: Array, returns_BT: Array, clip: float
) -> tuple[Array, Array]:
    """The larger of half the squared errors of V and of V kept within `clip` of the old value.

    The second array is 1 where clipping removes the gradient, 0 elsewhere.

    Notes: chapter 15.
    """
    kept_BT = old_BT + jnp.clip(values_BT - old_BT, -clip, clip)
    free_BT, bound_BT = (0.5 * jnp.square(v - returns_BT) for v in (values_BT, kept_BT))
    # Where V has moved less, the two differ by rounding alone.
    clipped_BT = (jnp.abs(values_BT - old_BT) > clip) & (bound_BT > free_BT)
    return jnp.maximum(free_BT, bound_BT), clipped_BT.astype(jnp.float32)


def kl(logprobs_BT: Array, reference_BT: Array, kind: str) -> Array:
    """Estimates of KL(policy || reference) from tokens that the policy drew.

    With d = log policy - log reference (joschu.net/blog/kl-approx.html):
    k1  d, unbiased, of either sign
    k2  d^2 / 2
    k3  exp(-d) - 1 + d, unbiased, never negative; d is clamped, as its exponential may overflow

    Notes: chapter 15.
    """
    d_BT = logprobs_BT.astype(jnp.float32) - reference_BT.astype(jnp.float32)
    if kind == "k1":
        return d_BT
    if kind == "k2":
        return 0.5 * jnp.square(d_BT)
    d_BT = jnp.clip(d_BT, -10.0, 10.0)
    return jnp.expm1(-d_BT) + d_BT


# ---- sums and weights


def token_weights(mask_BT: Array, normalize: str, max_tokens: int) -> tuple[Array, Array]:
    """The weight [B, T] of each token, and the number by which the weighted sum is divided.

    tokens     all tokens alike (DAPO, arXiv:2503.14476)
    sequences  all answers alike, so that a token of a long one counts less (GRPO as published)
    constant   all tokens alike, divided by max_tokens for every answer (Dr. GRPO)

    Notes: chapter 17.

    Raises:
        ValueError: normalize is none of these.
    """
    mask_BT = jnp.asarray(mask_BT, jnp.float32)
    length_B = mask_BT.sum(-1)
    written = (length_B > 0).astype(jnp.float32).sum()
    match normalize:
        case "tokens":
            return mask_BT, length_B.sum()
        case "sequences":
            return mask_BT / jnp.maximum(length_B, 1.0)[:, None], written
        case "constant":
            return mask_BT, written * max_tokens
    raise ValueError(f"normalize={normalize}: must be tokens, sequences or constant")


def explained_variance(values_BT: ArrayLike, returns_BT: ArrayLike, mask_BT: ArrayLike) -> Array:
    """1 - Var(return - value) / Var(return): 1 if values are exact, 0 if no better than a constant.

    Notes: chapter 15.
    """
    values_BT, returns_BT, mask_BT = map(jnp.asarray, (values_BT, returns_BT, mask_BT))
    count = jnp.maximum(mask_BT.sum(), 1.0)

    def variance(x_BT: Array) -> Array:
        mean = (x_BT * mask_BT).sum() / count
        return (jnp.square(x_BT - mean) * mask_BT).sum() / count

    spread = variance(returns_BT)
    left = variance(returns_BT - values_BT)
    return jnp.where(spread > 0, 1 - left / jnp.where(spread > 0, spread, 1.0), 0.0)
