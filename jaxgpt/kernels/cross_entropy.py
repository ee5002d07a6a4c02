"""Cross-entropy and token log-probabilities of a linear head."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxgpt.kernels.platform import dot
from jaxgpt.types import Array


class CrossEntropy(NamedTuple):
    """Sums over tokens, each times its weight. Only `loss` carries a gradient."""

    loss: Array  # what is trained: nll, smoothed if asked, plus z_loss * z
    nll: Array  # -log p(target)
    z: Array  # (log of the softmax's normaliser)^2
    correct: Array  # 1 where the target has the largest logit


def cross_entropy(
    hidden_ND: Array,
    head_VD: Array,
    targets_N: Array,
    weights_N: Array,
    *,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    chunk: int = 1024,
) -> CrossEntropy:
    """Weighted sum over tokens of the cross-entropy of hidden @ head^T against targets."""
    del chunk
    logits_NV = dot("ND,VD->NV", hidden_ND, head_VD.astype(hidden_ND.dtype)).astype(jnp.float32)
    norm_N = jax.nn.logsumexp(logits_NV, axis=-1)
    gold_N = jnp.take_along_axis(logits_NV, targets_N[:, None], axis=-1)[:, 0]
    smooth_N = (1 - label_smoothing) * gold_N + label_smoothing * logits_NV.mean(-1)
    loss_N = norm_N - smooth_N + z_loss * jnp.square(norm_N)
    correct_N = gold_N >= logits_NV.max(-1)
    total = lambda x_N: jnp.sum(weights_N * x_N)
    return CrossEntropy(
        total(loss_N),
        *jax.lax.stop_gradient(
            (total(norm_N - gold_N), total(jnp.square(norm_N)), total(correct_N))
        ),
    )


def token_logprobs(
    hidden_ND: Array,
    head_VD: Array,
    targets_N: Array,
    *,
    chunk: int = 1024,
    temperature: float = 1.0,
) -> Array:
    """log p(target) at each token, float32."""
    return token_logprobs_and_entropy(
        hidden_ND, head_VD, targets_N, chunk=chunk, temperature=temperature
    )[0]


def token_logprobs_and_entropy(
    hidden_ND: Array,
    head_VD: Array,
    targets_N: Array,
    *,
    chunk: int = 1024,
    temperature: float = 1.0,
) -> tuple[Array, Array]:
    """log p(target) and the entropy of the distribution at each token, float32."""
    del chunk
    logits_NV = dot("ND,VD->NV", hidden_ND, head_VD.astype(hidden_ND.dtype)).astype(jnp.float32)
    logp_NV = jax.nn.log_softmax(logits_NV / temperature)
    logp_N = jnp.take_along_axis(logp_NV, targets_N[:, None], axis=-1)[:, 0]
    return logp_N, -jnp.sum(jnp.exp(logp_NV) * logp_NV, axis=-1)
