"""The maths of learning from examples, preferences and teachers: arrays in, arrays out.

Every loss is given per row or per token; stages sum it and count its weight. `logprobs` are of
whole answers: summed over their tokens, or averaged where a docstring says mean.

Axes of this file: K tokens that the teacher finds likeliest.
"""

import jax
import jax.numpy as jnp

from jaxgpt.types import Array


def sequence_logprobs(logprobs_BT: Array, mask_BT: Array) -> tuple[Array, Array]:
    """log p(answer) [B], summed over the tokens of the mask, and their number [B].

    Notes: chapter 16.
    """
    return (logprobs_BT * mask_BT).sum(-1), mask_BT.sum(-1)


# ---- pairs of answers


def dpo(margin_B: Array, beta: float, label_smoothing: float = 0.0) -> Array:
    """-log p(chosen beats rejected) = -log sigmoid(beta * margin) (arXiv:2305.18290).

    Args:
        margin_B: log p(chosen) - log p(rejected) under the policy, minus the same under the
            reference.
        label_smoothing: chance that a pair is labelled the wrong way round (cDPO).

    Notes: chapter 16.
    """
    agree_B = jax.nn.log_sigmoid(beta * margin_B)
    disagree_B = jax.nn.log_sigmoid(-beta * margin_B)
    return -(1 - label_smoothing) * agree_B - label_smoothing * disagree_B


def ipo(mean_margin_B: Array, beta: float) -> Array:
    """(margin - 1 / (2 beta))^2, where the margin is of mean log-probabilities (arXiv:2310.12036).

    Unlike DPO's, this margin has a target, so that agreeing pairs do not push it to infinity.

    Notes: chapter 16.
    """
    return jnp.square(mean_margin_B - 1 / (2 * beta))


def hinge(margin_B: Array, beta: float) -> Array:
    """max(0, 1 - beta * margin): no gradient from pairs that are far enough apart (SLiC).

    Notes: chapter 16.
    """
    return jax.nn.relu(1 - beta * margin_B)


def simpo(mean_chosen_B: Array, mean_rejected_B: Array, beta: float, gamma: float) -> Array:
    """-log sigmoid(beta * (mean chosen - mean rejected) - gamma); no reference (2405.14734).

    Notes: chapter 16.
    """
    return -jax.nn.log_sigmoid(beta * (mean_chosen_B - mean_rejected_B) - gamma)


def orpo(mean_chosen_B: Array, mean_rejected_B: Array, beta: float) -> Array:
    """-beta * log sigmoid(log odds(chosen) - log odds(rejected)) (arXiv:2403.07691).

    odds = p / (1 - p) of the mean log-probability. It is added to the loss of the chosen answer.

    Notes: chapter 16.
    """
    log_odds_B = mean_chosen_B - mean_rejected_B
    log_odds_B = log_odds_B - log1mexp(mean_chosen_B) + log1mexp(mean_rejected_B)
    return -beta * jax.nn.log_sigmoid(log_odds_B)


def log1mexp(x: Array) -> Array:
    """log(1 - exp(x)) for x < 0, exact at both ends. Notes: chapter 16."""
    near_zero = x > -0.6931472  # -log 2: 1 - exp(x) cancels above, log cancels below
    # Each branch sees a value it can differentiate, even where the other one is taken.
    small = jnp.where(near_zero, jnp.minimum(x, -1e-7), -1.0)
    large = jnp.where(near_zero, -1.0, x)
    return jnp.where(near_zero, jnp.log(-jnp.expm1(small)), jnp.log1p(-jnp.exp(large)))


def bradley_terry(
    chosen_B: Array, rejected_B: Array, margin_B: Array | float = 0.0, centering: float = 0.0
) -> Array:
    """-log p(chosen beats rejected) for two rewards (arXiv:2009.01325).

    Args:
        margin_B: by how much the chosen answer should win (Llama 2).
        centering: weight of (chosen + rejected)^2, which fixes the free constant near zero.

    Notes: chapter 14.
    """
    loss_B = -jax.nn.log_sigmoid(chosen_B - rejected_B - margin_B)
    return loss_B + centering * jnp.square(chosen_B + rejected_B)


# ---- single answers


def kto(
    ratio_B: Array,
    desirable_B: Array,
    kl: Array,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Array:
    """weight * (1 - sigmoid(±beta * (log-ratio - kl))) for good and bad answers (arXiv:2402.01306).

    Args:
        ratio_B: log p(answer) under the policy minus that under the reference.
        desirable_B: above 0 for good answers, which have the plus sign; 0 for bad ones.
        kl: how far the policy has moved, from `kto_kl`; no gradient passes through it.

    Notes: chapter 16.
    """
    sign_B = jnp.where(desirable_B > 0, 1.0, -1.0)
    weight_B = jnp.where(desirable_B > 0, desirable_weight, undesirable_weight)
    return weight_B * jax.nn.sigmoid(-sign_B * beta * (ratio_B - jax.lax.stop_gradient(kl)))


def kto_kl(mismatched_ratio_B: Array) -> Array:
    """KTO's reference point: the mean log-ratio of answers to other prompts, at least zero.

    Notes: chapter 16.
    """
    return jax.lax.stop_gradient(jax.nn.relu(mismatched_ratio_B.mean()))


# ---- distributions over the vocabulary


def forward_kl(student_AV: Array, teacher_AV: Array) -> Array:
    """KL(teacher || student) per token, of log-probabilities: the student covers the teacher.

    Notes: chapter 18.
    """
    return (jnp.exp(teacher_AV) * (teacher_AV - student_AV)).sum(-1)


def reverse_kl(student_AV: Array, teacher_AV: Array) -> Array:
    """KL(student || teacher) per token: the student keeps to what the teacher would do.

    Notes: chapter 18.
    """
    return forward_kl(teacher_AV, student_AV)


def generalized_jsd(student_AV: Array, teacher_AV: Array, beta: float) -> Array:
    """beta KL(teacher || m) + (1 - beta) KL(student || m) (arXiv:2306.13649).

    m = beta * teacher + (1 - beta) * student. By convention beta 0 is forward KL and 1 reverse KL,
    the limits of this divided by beta or 1 - beta. Notes: chapter 18.
    """
    if beta == 0:
        return forward_kl(student_AV, teacher_AV)
    if beta == 1:
        return reverse_kl(student_AV, teacher_AV)
    mixture_AV = jnp.logaddexp(jnp.log1p(-beta) + student_AV, jnp.log(beta) + teacher_AV)
    return beta * forward_kl(mixture_AV, teacher_AV) + (1 - beta) * forward_kl(
        mixture_AV, student_AV
    )


def tempered(logits_AV: Array, temperature: float) -> Array:
    """Log-probabilities of softmax(logits / temperature).

    A divergence of two such distributions is multiplied by temperature^2, so that its gradient
    keeps its size (arXiv:1503.02531). Notes: chapter 18.
    """
    return jax.nn.log_softmax(logits_AV / temperature, axis=-1)


def with_rest(logprobs_AV: Array, ids_AK: Array) -> Array:
    """Log-probabilities [A, K + 1] of the tokens `ids` and of all others together.

    A divergence between two such coarse distributions is at most that of the full ones, and equal
    if the teacher's likeliest K tokens are all it has. Notes: chapter 18.
    """
    kept_AK = jnp.take_along_axis(logprobs_AV, ids_AK, axis=-1)
    return append_rest(kept_AK)


def append_rest(kept_AK: Array) -> Array:
    """Log-probabilities [A, K + 1]: the given ones, and that of all other tokens together.

    Notes: chapter 18.
    """
    total_A1 = jax.scipy.special.logsumexp(kept_AK, axis=-1, keepdims=True)
    # Rounding may leave a total of exactly one, whose rest is nothing: keep its log finite.
    return jnp.concatenate([kept_AK, log1mexp(jnp.minimum(total_A1, -1e-7))], axis=-1)
