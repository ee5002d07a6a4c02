"""Cross-entropy and log-probabilities of a linear head, a chunk of tokens at a time.

The logits of all tokens, [A, V], are the largest array of a small model's step. Here they exist
for one chunk only. The gradient of cross-entropy is linear in the incoming cotangent, so it is
taken in the forward pass while the chunk's logits are there; log-probabilities, whose cotangent
differs by token, are computed again in the backward pass.

On a mesh every device goes through its own tokens: the head is gathered once, and its gradient is
added up once, not with every chunk.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxgpt.kernels.platform import platform, transposed
from jaxgpt.sharding import add_up, head_spec, per_token, scatter
from jaxgpt.types import Array, CrossEntropy

Axes = tuple[str, ...]  # of the mesh, over which the tokens are cut
TILE = 128  # a GPU multiplies by GPT-2's 50,257 rows at 0.4 of the speed that 50,304 have


def cross_entropy(
    hidden: Array,
    head_VD: Array,
    targets: Array,
    weights: Array,
    *,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    softcap: float = 0.0,
    chunk: int = 1024,
) -> CrossEntropy:
    """`kernels.cross_entropy`, `chunk` tokens of every device at a time."""
    weights = weights.astype(jnp.float32)
    how = (z_loss, label_smoothing, softcap, chunk)
    return _cross_entropy(hidden, head_VD, targets, weights, *how)


def logprobs_and_entropy(
    hidden: Array, head_VD: Array, targets: Array, *, chunk: int = 1024,
    temperature: float = 1.0, softcap: float = 0.0,
) -> tuple[Array, Array]:  # fmt: skip
    """`kernels.logprobs_and_entropy`, `chunk` tokens of every device at a time."""
    return _logprobs_and_entropy(hidden, head_VD, targets, temperature, softcap, chunk)


def by_chunks(fn: Callable[..., Any], arrays_A: tuple[Array, ...], chunk: int) -> Any:
    """fn(*arrays) on `chunk` tokens at a time; what is inside is computed again backward.

    Args:
        fn: of arrays [C, …]; gives an array [C, …] or a tree of such.
    """
    parts = _into_chunks(chunk, *arrays_A)
    out_MC = jax.lax.map(jax.checkpoint(lambda part: fn(*part)), parts)
    count = len(arrays_A[0])
    return jax.tree.map(lambda x_MC: _join(x_MC, (count, *x_MC.shape[2:])), out_MC)


def _split(chunk: int, hidden: Array, *tokens: Array) -> tuple[Array, ...]:
    """[..., D] and [...] -> [M, C, D] and [M, C]."""
    return _into_chunks(
        chunk, hidden.reshape(-1, hidden.shape[-1]), *(x.reshape(-1) for x in tokens)
    )


def _into_chunks(chunk: int, *arrays_A: Array) -> tuple[Array, ...]:
    """[A, ...] -> [M, C, ...], filled up with zeros; a chunk takes every M-th token.

    Where a batch is cut over devices each chunk then lies on all of them, so that the loop over
    chunks moves nothing. Seven tokens in chunks of three: 0 3 6, then 1 4 and a zero, then 2 5.
    """
    num_tokens = len(arrays_A[0])
    M = -(-num_tokens // chunk) if 0 < chunk < num_tokens else 1
    C = -(-num_tokens // M)
    fill = lambda x: jnp.pad(x, [(0, M * C - num_tokens)] + [(0, 0)] * (x.ndim - 1))
    return tuple(jnp.swapaxes(fill(x).reshape(C, M, *x.shape[1:]), 0, 1) for x in arrays_A)


def _join(x_MC: Array, shape: tuple[int, ...]) -> Array:
    """The inverse of `_into_chunks`, without what was filled up."""
    x_A = jnp.swapaxes(x_MC, 0, 1).reshape(-1, *x_MC.shape[2:])
    count = math.prod(shape) // math.prod(x_A.shape[1:])
    return x_A[:count].reshape(shape)


class _Softmax(NamedTuple):
    """The softmax of a chunk's logits; its products are left to the reader, to be fused."""

    logits_CV: Array
    exp_CV: Array  # exp(logits - max)
    total_C: Array  # its sum
    norm_C: Array  # the log of the normaliser: log p = logits - norm
    gold_C: Array  # the targets' logits


def _softmax(
    hidden_CD: Array, head_VD: Array, targets_C: Array, size: int, softcap: float,
    temperature: float = 1.0,
) -> _Softmax:  # fmt: skip
    """Of the first `size` rows of the head; the others have no probability."""
    logits_CV = _dot("CD,VD->CV", hidden_CD, head_VD)
    logits_CV = (softcap * jnp.tanh(logits_CV / softcap) if softcap else logits_CV) / temperature
    if size < len(head_VD):
        logits_CV = jnp.where(jnp.arange(len(head_VD))[None] < size, logits_CV, -1e30)
    max_C1, total_C = _max_and_total(logits_CV)
    exp_CV = jnp.exp(logits_CV - max_C1)
    gold_C = jnp.take_along_axis(logits_CV, targets_C[:, None], axis=-1)[:, 0]
    return _Softmax(logits_CV, exp_CV, total_C, max_C1[:, 0] + jnp.log(total_C), gold_C)


def _max_and_total(logits_CV: Array) -> tuple[Array, Array]:
    """The largest logit [C, 1] and the sum [C] of exp(logits - largest); a GPU reads them once."""
    if platform() != "gpu":
        max_C1 = logits_CV.max(-1, keepdims=True)
        return max_C1, jnp.exp(logits_CV - max_C1).sum(-1)

    def join(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
        largest = jnp.maximum(a[0], b[0])
        return largest, a[1] * jnp.exp(a[0] - largest) + b[1] * jnp.exp(b[0] - largest)

    start = (jnp.float32(-1e30), jnp.float32(0))
    max_C, total_C = jax.lax.reduce((logits_CV, jnp.ones_like(logits_CV)), start, join, (1,))
    return max_C[:, None], total_C


def _padded(head_VD: Array) -> Array:
    """The head with rows of zeros up to a multiple of TILE, on a GPU."""
    if platform() != "gpu" or len(head_VD) % TILE == 0:
        return head_VD
    rows = [(0, -len(head_VD) % TILE), (0, 0)]
    return jax.lax.optimization_barrier(jnp.pad(head_VD, rows))  # once, not with every product


def _even(size: int, V: int) -> Array:
    """1 / size for the first `size` of V, 0 for the rest."""
    return jnp.where(jnp.arange(V) < size, 1 / size, 0.0)


def _one_hot(targets_C: Array, V: int) -> Array:
    return jnp.where(targets_C[:, None] == jnp.arange(V)[None], 1.0, 0.0)


_dot = partial(jnp.einsum, preferred_element_type=jnp.float32)


def _uncapped(dlogits_CV: Array, logits_CV: Array, softcap: float) -> Array:
    """The gradient of the logits as they were before their softcap."""
    if not softcap:
        return dlogits_CV
    return dlogits_CV * (1 - jnp.square(jnp.clip(logits_CV / softcap, -1, 1)))


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


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7))
def _cross_entropy(
    hidden: Array,
    head_VD: Array,
    targets: Array,
    weights: Array,
    z_loss: float,
    label_smoothing: float,
    softcap: float,
    chunk: int,
) -> CrossEntropy:
    V = len(head_VD)

    def local(axes: Axes, hidden: Array, head_VD: Array, *tokens: Array) -> CrossEntropy:
        def one(hidden_CD: Array, targets_C: Array, weights_C: Array) -> tuple[CrossEntropy, None]:
            softmax = _softmax(hidden_CD, head_VD, targets_C, V, softcap)
            return _sums(softmax, weights_C, V, z_loss, label_smoothing), None

        return add_up(_over_chunks(one, *_split(chunk, hidden, *tokens))[0], axes)

    cast_VD = _padded(head_VD.astype(hidden.dtype))
    return per_token(local, lambda _: P(), hidden, cast_VD, targets, weights)


def _sums(
    softmax: _Softmax, weights_C: Array, size: int, z_loss: float, label_smoothing: float
) -> CrossEntropy:
    nll_C = softmax.norm_C - softmax.gold_C
    z_C = jnp.square(softmax.norm_C)
    loss_C = nll_C + z_loss * z_C
    if label_smoothing:
        even_V = _even(size, softmax.logits_CV.shape[-1])
        mean_C = (softmax.logits_CV * even_V[None]).sum(-1)
        loss_C = loss_C + label_smoothing * (softmax.gold_C - mean_C)
    correct_C = softmax.gold_C >= softmax.logits_CV.max(-1)
    return CrossEntropy(*((weights_C * x_C).sum() for x_C in (loss_C, nll_C, z_C, correct_C)))


def _cross_entropy_forward(
    hidden: Array,
    head_VD: Array,
    targets: Array,
    weights: Array,
    z_loss: float,
    label_smoothing: float,
    softcap: float,
    chunk: int,
) -> tuple[CrossEntropy, tuple[Array, Array]]:
    V = len(head_VD)

    def local(axes: Axes, hidden: Array, head_VD: Array, *tokens: Array) -> tuple[Any, ...]:
        def one(hidden_CD: Array, targets_C: Array, weights_C: Array) -> tuple[Any, Array]:
            softmax = _softmax(hidden_CD, head_VD, targets_C, V, softcap)
            sums = _sums(softmax, weights_C, V, z_loss, label_smoothing)
            scale_C = weights_C * (1 + 2 * z_loss * softmax.norm_C) / softmax.total_C
            goal_CV = (1 - label_smoothing) * _one_hot(targets_C, len(head_VD))
            if label_smoothing:
                goal_CV = goal_CV + label_smoothing * _even(V, len(head_VD))[None]
            dlogits_CV = softmax.exp_CV * scale_C[:, None] - goal_CV * weights_C[:, None]
            dlogits_CV = _uncapped(dlogits_CV, softmax.logits_CV, softcap)
            dhead_VD, dhidden_CD = _pull(dlogits_CV, hidden_CD, head_VD)
            return (sums, dhead_VD), dhidden_CD

        summed, dhidden_MCD = _over_chunks(one, *_split(chunk, hidden, *tokens))
        sums, dhead_VD = summed
        dhead_VD = scatter(dhead_VD[:V], axes)
        return add_up(sums, axes), dhead_VD, _join(dhidden_MCD, hidden.shape)

    outward = lambda tokens: (P(), head_spec(), P(*tokens, None))
    cast_VD = _padded(head_VD.astype(hidden.dtype))
    sums, dhead_VD, dhidden = per_token(local, outward, hidden, cast_VD, targets, weights)
    return sums, (dhidden, dhead_VD.astype(head_VD.dtype))


def _cross_entropy_backward(
    z_loss: float,
    label_smoothing: float,
    softcap: float,
    chunk: int,
    gradients: tuple[Array, Array],
    g: CrossEntropy,
) -> tuple[Array, Array, None, None]:
    dhidden, dhead_VD = gradients
    return (g.loss * dhidden).astype(dhidden.dtype), g.loss * dhead_VD, None, None


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)

# ---- log-probabilities: the logits once more in the backward pass


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _logprobs_and_entropy(
    hidden: Array, head_VD: Array, targets: Array, temperature: float, softcap: float, chunk: int
) -> tuple[Array, Array]:
    V = len(head_VD)

    def local(_: Axes, hidden: Array, head_VD: Array, targets: Array) -> tuple[Array, Array]:
        def one(hidden_CD: Array, targets_C: Array) -> tuple[None, tuple[Array, Array]]:
            softmax = _softmax(hidden_CD, head_VD, targets_C, V, softcap, temperature)
            return None, (softmax.gold_C - softmax.norm_C, _entropy(softmax))

        both_MC = _over_chunks(one, *_split(chunk, hidden, targets))[1]
        return _join(both_MC[0], targets.shape), _join(both_MC[1], targets.shape)

    cast_VD = _padded(head_VD.astype(hidden.dtype))
    return per_token(local, lambda tokens: (tokens, tokens), hidden, cast_VD, targets)


def _entropy(softmax: _Softmax) -> Array:
    mean_logit_C = (softmax.exp_CV * softmax.logits_CV).sum(-1) / softmax.total_C
    return softmax.norm_C - mean_logit_C


def _logprobs_backward(
    temperature: float, softcap: float, chunk: int, saved: tuple[Array, Array, Array],
    g: tuple[Array, Array],
) -> tuple[Array, Array, None]:  # fmt: skip
    hidden, head_VD, targets = saved
    V = len(head_VD)

    def local(axes: Axes, hidden: Array, head_VD: Array, *tokens: Array) -> tuple[Array, Array]:
        def one(
            hidden_CD: Array, targets_C: Array, g_logprob_C: Array, g_entropy_C: Array
        ) -> tuple[Array, Array]:
            softmax = _softmax(hidden_CD, head_VD, targets_C, V, softcap, temperature)
            probs_CV = softmax.exp_CV / softmax.total_C[:, None]
            mean_logit_C = softmax.norm_C - _entropy(softmax)
            toward_CV = _one_hot(targets_C, len(head_VD)) - probs_CV
            spread_CV = probs_CV * (softmax.logits_CV - mean_logit_C[:, None])
            dlogits_CV = g_logprob_C[:, None] * toward_CV - g_entropy_C[:, None] * spread_CV
            dlogits_CV = _uncapped(dlogits_CV, softmax.logits_CV * temperature, softcap)
            return _pull(dlogits_CV / temperature, hidden_CD, head_VD)

        dhead_VD, dhidden_MCD = _over_chunks(one, *_split(chunk, hidden, *tokens))
        return scatter(dhead_VD[:V], axes), _join(dhidden_MCD, hidden.shape)

    outward = lambda tokens: (head_spec(), P(*tokens, None))
    cast_VD = _padded(head_VD.astype(hidden.dtype))
    dhead_VD, dhidden = per_token(local, outward, hidden, cast_VD, targets, *g)
    return dhidden, dhead_VD.astype(head_VD.dtype), None


_logprobs_and_entropy.defvjp(
    lambda hidden, head_VD, targets, temperature, softcap, chunk: (
        _logprobs_and_entropy(hidden, head_VD, targets, temperature, softcap, chunk),
        (hidden, head_VD, targets),
    ),
    _logprobs_backward,
)
