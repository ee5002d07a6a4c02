"""Cross-entropy and log-probabilities of a linear head, a chunk of tokens at a time.

The logits of all tokens, [N, V], are the largest array of a small model's step. Here they exist
for one chunk only. The gradient of cross-entropy is linear in the incoming cotangent, so it is
taken in the forward pass while the chunk's logits are there; log-probabilities, whose cotangent
differs by token, are computed again in the backward pass.

Axes besides those of STYLE.md: N tokens, C tokens of one chunk, M chunks.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxgpt.kernels.platform import transposed
from jaxgpt.types import Array


class CrossEntropy(NamedTuple):
    """Sums over tokens, each times its weight. Only `loss` carries a gradient."""

    loss: Array  # what is trained: nll, smoothed if asked, plus z_loss * z
    nll: Array  # -log p(target)
    z: Array  # (log of the softmax's normaliser)^2
    correct: Array  # 1 where no logit is larger than the target's


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
    """Weighted sum over tokens of the cross-entropy of softmax(hidden @ head^T) and targets.

    Args:
        targets_N: in [0, V); a token that has none takes any target and weight 0.
        z_loss: weight of (log normaliser)^2, which keeps the logits from drifting.
        label_smoothing: share of the target probability spread evenly over the vocabulary.
        chunk: tokens whose logits exist at one time; 0: all.
    """
    inputs = (hidden_ND, targets_N, weights_N.astype(jnp.float32))
    hidden_MCD, targets_MC, weights_MC = _split(inputs, chunk)
    return _cross_entropy(hidden_MCD, head_VD, targets_MC, weights_MC, z_loss, label_smoothing)


def token_logprobs(
    hidden_ND: Array, head_VD: Array, targets_N: Array, *, chunk: int = 1024,
    temperature: float = 1.0,
) -> Array:  # fmt: skip
    """log p(target) of every token under softmax(hidden @ head^T / temperature), float32."""
    return logprobs_and_entropy(
        hidden_ND, head_VD, targets_N, chunk=chunk, temperature=temperature
    )[0]


def logprobs_and_entropy(
    hidden_ND: Array, head_VD: Array, targets_N: Array, *, chunk: int = 1024,
    temperature: float = 1.0,
) -> tuple[Array, Array]:  # fmt: skip
    """log p(target) and the entropy of the whole distribution, at every token, float32."""
    hidden_MCD, targets_MC = _split((hidden_ND, targets_N), chunk)
    both = _logprobs_and_entropy(hidden_MCD, head_VD, targets_MC, temperature)
    return jax.tree.map(lambda x_MC: _join(x_MC, len(targets_N)), both)


def _split(arrays_N: tuple[Array, ...], chunk: int) -> list[Array]:
    """[N, ...] -> [M, C, ...], filled up with zeros.

    A chunk takes every M-th token: under a batch that is sharded over devices each chunk then
    lies on all of them, so that the scan over chunks moves nothing.
    """
    num_tokens = len(arrays_N[0])
    M = -(-num_tokens // chunk) if 0 < chunk < num_tokens else 1
    C = -(-num_tokens // M)
    fill = lambda x: jnp.pad(x, [(0, M * C - num_tokens)] + [(0, 0)] * (x.ndim - 1))
    return [jnp.swapaxes(fill(x).reshape(C, M, *x.shape[1:]), 0, 1) for x in arrays_N]


def _join(x_MC: Array, num_tokens: int) -> Array:
    return jnp.swapaxes(x_MC, 0, 1).reshape(-1)[:num_tokens]


class _Softmax(NamedTuple):
    """The softmax of a chunk's logits; its products are left to the reader, to be fused."""

    logits_CV: Array
    exp_CV: Array  # exp(logits - max)
    total_C: Array  # its sum
    norm_C: Array  # the log of the normaliser: log p = logits - norm
    gold_C: Array  # the targets' logits


def _softmax(
    hidden_CD: Array, head_VD: Array, targets_C: Array, temperature: float = 1.0
) -> _Softmax:
    logits_CV = _dot("CD,VD->CV", hidden_CD, head_VD) / temperature
    max_C1 = logits_CV.max(-1, keepdims=True)
    exp_CV = jnp.exp(logits_CV - max_C1)
    total_C = exp_CV.sum(-1)
    gold_C = jnp.take_along_axis(logits_CV, targets_C[:, None], axis=-1)[:, 0]
    return _Softmax(logits_CV, exp_CV, total_C, max_C1[:, 0] + jnp.log(total_C), gold_C)


def _one_hot(targets_C: Array, V: int) -> Array:
    return jnp.where(targets_C[:, None] == jnp.arange(V)[None], 1.0, 0.0)


_dot = partial(jnp.einsum, preferred_element_type=jnp.float32)


def _pull(dlogits_CV: Array, hidden_CD: Array, head_VD: Array) -> tuple[Array, Array]:
    """The head's gradient in float32 and that of hidden, from the chunk's logits'."""
    dlogits_CV = dlogits_CV.astype(hidden_CD.dtype)
    dhead_VD = _dot("VC,CD->VD", transposed(dlogits_CV), hidden_CD)
    return dhead_VD, _dot("CV,VD->CD", dlogits_CV, head_VD).astype(hidden_CD.dtype)


def _over_chunks(one: Callable[..., tuple[Any, Any]], *chunks: Array) -> tuple[Any, Any]:
    """Calls `one` on each chunk; sums its first result and stacks its second."""
    if len(chunks[0]) == 1:
        summed, stacked = one(*(x[0] for x in chunks))
        return summed, jax.tree.map(lambda x: x[None], stacked)

    def step(total: Any, chunk: tuple[Array, ...]) -> tuple[Any, Any]:
        summed, stacked = one(*chunk)
        return jax.tree.map(jnp.add, total, summed), stacked

    shapes, _ = jax.eval_shape(one, *(x[0] for x in chunks))
    return jax.lax.scan(step, jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes), chunks)


# ---- cross-entropy: the gradient in the forward pass


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _cross_entropy(
    hidden_MCD: Array,
    head_VD: Array,
    targets_MC: Array,
    weights_MC: Array,
    z_loss: float,
    label_smoothing: float,
) -> CrossEntropy:
    cast_VD = head_VD.astype(hidden_MCD.dtype)

    def one(hidden_CD: Array, targets_C: Array, weights_C: Array) -> tuple[CrossEntropy, None]:
        softmax = _softmax(hidden_CD, cast_VD, targets_C)
        return _sums(softmax, weights_C, z_loss, label_smoothing), None

    return _over_chunks(one, hidden_MCD, targets_MC, weights_MC)[0]


def _sums(
    softmax: _Softmax, weights_C: Array, z_loss: float, label_smoothing: float
) -> CrossEntropy:
    nll_C = softmax.norm_C - softmax.gold_C
    z_C = jnp.square(softmax.norm_C)
    loss_C = nll_C + z_loss * z_C
    if label_smoothing:
        mean_C = softmax.logits_CV.mean(-1)
        loss_C = loss_C + label_smoothing * (softmax.gold_C - mean_C)
    correct_C = softmax.gold_C >= softmax.logits_CV.max(-1)
    return CrossEntropy(*((weights_C * x_C).sum() for x_C in (loss_C, nll_C, z_C, correct_C)))


def _cross_entropy_forward(
    hidden_MCD: Array,
    head_VD: Array,
    targets_MC: Array,
    weights_MC: Array,
    z_loss: float,
    label_smoothing: float,
) -> tuple[CrossEntropy, tuple[Array, Array]]:
    cast_VD = head_VD.astype(hidden_MCD.dtype)
    V = len(head_VD)

    def one(hidden_CD: Array, targets_C: Array, weights_C: Array) -> tuple[Any, Array]:
        softmax = _softmax(hidden_CD, cast_VD, targets_C)
        sums = _sums(softmax, weights_C, z_loss, label_smoothing)
        scale_C = weights_C * (1 + 2 * z_loss * softmax.norm_C) / softmax.total_C
        goal_CV = (1 - label_smoothing) * _one_hot(targets_C, V) + label_smoothing / V
        dlogits_CV = softmax.exp_CV * scale_C[:, None] - goal_CV * weights_C[:, None]
        dhead_VD, dhidden_CD = _pull(dlogits_CV, hidden_CD, cast_VD)
        return (sums, dhead_VD), dhidden_CD

    (sums, dhead_VD), dhidden_MCD = _over_chunks(one, hidden_MCD, targets_MC, weights_MC)
    return sums, (dhidden_MCD, dhead_VD.astype(head_VD.dtype))


def _cross_entropy_backward(
    z_loss: float, label_smoothing: float, gradients: tuple[Array, Array], g: CrossEntropy
) -> tuple[Array, Array, None, None]:
    dhidden_MCD, dhead_VD = gradients
    return (g.loss * dhidden_MCD).astype(dhidden_MCD.dtype), g.loss * dhead_VD, None, None


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)

# ---- log-probabilities: the logits once more in the backward pass


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _logprobs_and_entropy(
    hidden_MCD: Array, head_VD: Array, targets_MC: Array, temperature: float
) -> tuple[Array, Array]:
    cast_VD = head_VD.astype(hidden_MCD.dtype)

    def one(hidden_CD: Array, targets_C: Array) -> tuple[None, tuple[Array, Array]]:
        softmax = _softmax(hidden_CD, cast_VD, targets_C, temperature)
        return None, (softmax.gold_C - softmax.norm_C, _entropy(softmax))

    return _over_chunks(one, hidden_MCD, targets_MC)[1]


def _entropy(softmax: _Softmax) -> Array:
    mean_logit_C = (softmax.exp_CV * softmax.logits_CV).sum(-1) / softmax.total_C
    return softmax.norm_C - mean_logit_C


def _logprobs_backward(
    temperature: float, saved: tuple[Array, Array, Array], g: tuple[Array, Array]
) -> tuple[Array, Array, None]:
    hidden_MCD, head_VD, targets_MC = saved
    cast_VD = head_VD.astype(hidden_MCD.dtype)

    def one(
        hidden_CD: Array, targets_C: Array, g_logprob_C: Array, g_entropy_C: Array
    ) -> tuple[Array, Array]:
        softmax = _softmax(hidden_CD, cast_VD, targets_C, temperature)
        probs_CV = softmax.exp_CV / softmax.total_C[:, None]
        mean_logit_C = softmax.norm_C - _entropy(softmax)
        dlogits_CV = g_logprob_C[:, None] * (_one_hot(targets_C, len(head_VD)) - probs_CV)
        dlogits_CV -= g_entropy_C[:, None] * probs_CV * (softmax.logits_CV - mean_logit_C[:, None])
        return _pull(dlogits_CV / temperature, hidden_CD, cast_VD)

    dhead_VD, dhidden_MCD = _over_chunks(one, hidden_MCD, targets_MC, *g)
    return dhidden_MCD, dhead_VD.astype(head_VD.dtype), None


_logprobs_and_entropy.defvjp(
    lambda hidden_MCD, head_VD, targets_MC, temperature: (
        _logprobs_and_entropy(hidden_MCD, head_VD, targets_MC, temperature),
        (hidden_MCD, head_VD, targets_MC),
    ),
    _logprobs_backward,
)
