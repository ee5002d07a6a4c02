"""The operations of the network, each written as the equation that it computes.

The model, the losses and the sampler call these functions and know nothing else of this folder.
Every platform has faster programs for some of them: `FAST`, at the end of this file, says which
and why. Where it names none, the equation itself runs. Tests compare each fast program with the
equation, and `with use("plain"):` (`--kernels plain` of the commands) runs the equations
everywhere: for reading, for experiments, and for telling a wrong program from a wrong idea.

Sums run in float32, whatever the type of the arrays: bfloat16 has 8 bits of mantissa, and a long
sum of such numbers loses its small terms.

Axes of this file: U tiles of LANES rows, C bytes of a row's blocks, I lanes (blocks.py).
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxgpt.kernels import (
    blocks,
    chunked_cross_entropy,
    fast_activation,
    fast_attention,
    fast_linear,
    fast_norm,
    grouped,
    platform,
)
from jaxgpt.kernels.chunked_cross_entropy import by_chunks
from jaxgpt.kernels.fast_attention import with_sinks
from jaxgpt.kernels.platform import use
from jaxgpt.sharding import by_columns, by_rows
from jaxgpt.types import Array, CrossEntropy

__all__ = ["by_chunks", "by_columns", "by_rows", "use"]

P = ParamSpec("P")
R = TypeVar("R")


def operation(equation: Callable[P, R]) -> Callable[P, R]:
    """The equation, or the program that FAST has in its place on the platform of the call.

    `inspect.unwrap` gives the equation itself.
    """

    @wraps(equation)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        programs = FAST[equation.__name__]  # type: ignore[attr-defined]
        return programs.get(platform.platform(), equation)(*args, **kwargs)

    return run


# ---- attention


@operation
def attention(
    q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, segments_BT: Array | None = None, window: int = 0,
    softcap: float = 0.0, sinks_N: Array | None = None,
) -> Array:  # fmt: skip
    """Causal self-attention over whole rows, softmax(q k^T / sqrt(H)) v (arXiv:1706.03762).

    Args:
        segments_BT: tokens see only tokens of their own segment (packed documents).
        window: tokens see only tokens fewer than this many places back; 0: all.
        softcap: scores become softcap * tanh(score / softcap); 0: they stay.
        sinks_N: a score of each head that takes part in every softmax and has no value
            (arXiv:2309.17453): a head may attend to nothing.
    """
    place_T = jnp.arange(q_BTNH.shape[1])
    back_TS = place_T[:, None] - place_T[None]  # how far the key stands behind the query
    mask_BTS = (back_TS >= 0)[None]  # the causal mask: nobody sees what comes after
    if window:
        mask_BTS = mask_BTS & (back_TS < window)[None]
    if segments_BT is not None:
        mask_BTS = mask_BTS & (segments_BT[:, :, None] == segments_BT[:, None])
    k_BKSH, v_BKSH = k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2)
    return _attend(q_BTNH, k_BKSH, v_BKSH, mask_BTS, softcap, sinks_N)


@operation
def cached_attention(
    q_BTNH: Array, k_BKSH: Array, v_BKSH: Array, mask_BTS: Array, softcap: float = 0.0,
    sinks_N: Array | None = None,
) -> Array:  # fmt: skip
    """Attention of a few new queries to the slots of a cache that the mask lets each one see."""
    return _attend(q_BTNH, k_BKSH, v_BKSH, mask_BTS, softcap, sinks_N)


def _attend(
    q_BTNH: Array, k_BKSH: Array, v_BKSH: Array, mask_BTS: Array, softcap: float,
    sinks_N: Array | None,
) -> Array:  # fmt: skip
    q, k, v = (x.astype(jnp.float32) for x in (q_BTNH, k_BKSH, v_BKSH))
    # Grouped queries (arXiv:2305.13245): G = N / K query heads in a row share a key head.
    B, T, N, H = q.shape
    q_BTKGH = q.reshape(B, T, k.shape[1], -1, H)
    scores_BKGTS = jnp.einsum("BTKGH,BKSH->BKGTS", q_BTKGH, k) / H**0.5
    if softcap:
        scores_BKGTS = softcap * jnp.tanh(scores_BKGTS / softcap)
    # A large negative number, not -inf: a row that may see nothing gives 1 / S, not NaN.
    scores_BKGTS = jnp.where(mask_BTS[:, None, None], scores_BKGTS, -1e30)
    weights_BKGTS = jax.nn.softmax(with_sinks(scores_BKGTS, sinks_N))[..., : v.shape[2]]
    out_BTKGH = jnp.einsum("BKGTS,BKSH->BTKGH", weights_BKGTS, v)
    return out_BTKGH.reshape(B, T, N, H).astype(q_BTNH.dtype)


# ---- products with a kernel


@operation
def linear(x: Array, kernel_DF: Array) -> Array:
    """x @ kernel over any leading axes, in the type of x (a CPU's program returns float32)."""
    return x @ kernel_DF.astype(x.dtype)


@operation
def linear_by_rows(x: Array, rows_FD: Array, dtype: DTypeLike) -> Array:
    """x @ rows^T in `dtype`, of a kernel whose output channels come first."""
    product = jnp.einsum("...D,FD->...F", x.astype(jnp.float32), rows_FD.astype(jnp.float32))
    return product.astype(dtype)


@operation
def linear_by_blocks(x: Array, tiles_UCI: Array, kind: str) -> Array:
    """x @ kernel in float32, of a kernel whose output channels are quantised (blocks.py)."""
    return blocks.linear(x, tiles_UCI, kind)


@operation
def scores(x: Array, kernel_DV: Array) -> Array:
    """`linear` in float32: bfloat16 would round scores of 30 to the nearest 1/8."""
    return _product(x, kernel_DV)


def _product(x: Array, kernel_DV: Array) -> Array:
    # The kernel is rounded to the compute type first, as in every other product.
    return x.astype(jnp.float32) @ kernel_DV.astype(x.dtype).astype(jnp.float32)


@operation
def add_bias(y: Array, bias_F: Array) -> Array:
    """y + bias, in the type of y."""
    return (y.astype(jnp.float32) + _last(bias_F, y)).astype(y.dtype)


@operation
def grouped_matmul(rows_RD: Array, kernel_EDF: Array, layout: grouped.Layout) -> Array:
    """Every row times the kernel of its own expert."""
    visits_RE = jax.nn.one_hot(layout.expert_R, len(kernel_EDF), dtype=rows_RD.dtype)
    return jnp.einsum("RD,EDF,RE->RF", rows_RD, kernel_EDF.astype(rows_RD.dtype), visits_RE)


# ---- norms and activations: float32 inside, `dtype` out


@operation
def layer_norm(
    x: Array, scale_D: Array, bias_D: Array | None, eps: float, dtype: DTypeLike
) -> Array:
    """(x - mean) / sqrt(variance + eps) * scale + bias, over the last axis (arXiv:1607.06450)."""
    x = x.astype(jnp.float32)
    x = x - x.mean(-1, keepdims=True)
    normed = x / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + eps) * _last(scale_D, x)
    return (normed if bias_D is None else normed + _last(bias_D, x)).astype(dtype)


@operation
def rms_norm(x: Array, scale_D: Array, eps: float, dtype: DTypeLike) -> Array:
    """x / sqrt(mean square + eps) * scale, over the last axis (arXiv:1910.07467)."""
    x = x.astype(jnp.float32)
    normed = x / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + eps)
    return (normed * _last(scale_D, x)).astype(dtype)


def _last(vector_F: Array, like: Array) -> Array:
    """The vector in float32 as the last axis of an array of the rank of `like`."""
    return vector_F.astype(jnp.float32).reshape((1,) * (like.ndim - 1) + (-1,))


@operation
def gelu(x: Array, dtype: DTypeLike) -> Array:
    """x Phi(x), where Phi is the normal distribution's cumulative function (arXiv:1606.08415)."""
    return jax.nn.gelu(x.astype(jnp.float32), approximate=False).astype(dtype)


@operation
def gelu_tanh(x: Array, dtype: DTypeLike) -> Array:
    """GPT-2's GELU: Phi approximated by (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) / 2."""
    return jax.nn.gelu(x.astype(jnp.float32), approximate=True).astype(dtype)


@operation
def silu(x: Array, dtype: DTypeLike) -> Array:
    """x sigmoid(x)."""
    return jax.nn.silu(x.astype(jnp.float32)).astype(dtype)


def relu(x: Array, dtype: DTypeLike) -> Array:
    """max(x, 0), of which every platform has one program."""
    return jax.nn.relu(x).astype(dtype)


# ---- losses of a linear head


@operation
def cross_entropy(
    hidden: Array, head_VD: Array, targets: Array, weights: Array, *, z_loss: float = 0.0,
    label_smoothing: float = 0.0, softcap: float = 0.0, chunk: int = 1024,
) -> CrossEntropy:  # fmt: skip
    """Weighted sums over tokens of the cross-entropy of softmax(hidden @ head^T) and targets.

    Args:
        hidden: [A, D] or [B, T, D]; targets and weights have its axes without D.
        targets: in [0, V); a token that has none takes any target and weight 0.
        z_loss: weight of (log normaliser)^2, which keeps the logits from drifting.
        label_smoothing: share of the target probability spread evenly over the vocabulary.
        softcap: logits become softcap * tanh(logit / softcap); 0: they stay.
        chunk: tokens of a device whose logits a fast program holds at one time; 0: all.
    """
    logits, norm, gold = _logits(hidden, head_VD, targets, 1.0, softcap)
    even = norm - logits.mean(-1)  # the cross-entropy with an even distribution
    loss = (1 - label_smoothing) * (norm - gold) + label_smoothing * even + z_loss * norm**2
    said = jax.lax.stop_gradient((norm - gold, norm**2, gold >= logits.max(-1)))
    return CrossEntropy(*((weights.astype(jnp.float32) * x).sum() for x in (loss, *said)))


@operation
def logprobs_and_entropy(
    hidden: Array, head_VD: Array, targets: Array, *, chunk: int = 1024, temperature: float = 1.0,
    softcap: float = 0.0,
) -> tuple[Array, Array]:  # fmt: skip
    """log p(target) under softmax(hidden @ head^T / temperature), and that softmax's entropy.

    Both have the axes of `targets`, in float32; `chunk` and `softcap` as in `cross_entropy`.
    """
    logits, norm, gold = _logits(hidden, head_VD, targets, temperature, softcap)
    return gold - norm, norm - (jax.nn.softmax(logits) * logits).sum(-1)


def _logits(
    hidden: Array, head_VD: Array, targets: Array, temperature: float, softcap: float
) -> tuple[Array, Array, Array]:
    """All logits, the logs of their softmaxes' normalisers, and the logits of the targets."""
    logits = _product(hidden, head_VD.T)
    logits = (softcap * jnp.tanh(logits / softcap) if softcap else logits) / temperature
    gold = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return logits, jax.nn.logsumexp(logits, axis=-1), gold


# ---- what runs in place of an equation, and why


def _everywhere(program: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    return dict.fromkeys(("cpu", "gpu", "tpu"), program)


FAST: dict[str, dict[str, Callable[..., Any]]] = {
    # On all of them: positions that are cut over devices meet in a ring (ring_attention.py), and
    # very long rows go chunk by chunk (chunked_attention.py), so that no array is T * T.
    "attention": {
        # Unrolled blocks of queries, which skip what the causal mask hides (blocked_attention.py).
        "cpu": fast_attention.on_cpu,
        # cuDNN's flash attention in half precision: scores stay on the chip.
        "gpu": fast_attention.on_gpu,
        # JAX's splash kernel from 128 tokens: scores stay on the chip (splash_attention.py).
        "tpu": fast_attention.on_tpu,
    },
    # Sums in the cache's type, without a float32 copy of the cache for every token.
    "cached_attention": _everywhere(fast_attention.cached),
    "linear": {
        # bfloat16 products that XLA:CPU has a fast kernel for, forward and backward.
        "cpu": fast_linear.on_cpu,
        # The backward pass keeps the kernel as it is stored, not one cast and gathered per layer.
        "gpu": fast_linear.gathered,
        "tpu": fast_linear.gathered,
    },
    "linear_by_rows": {
        "cpu": fast_linear.by_rows_on_cpu,  # two rows, where one would be widened to float32
        "gpu": fast_linear.by_rows_on_gpu,  # one pass over the kernel where there is one row
        "tpu": fast_linear.by_rows,
    },
    # Blocks are decoded where they are multiplied, never written down in float32 (blocks.cc).
    "linear_by_blocks": {"cpu": blocks.on_cpu},
    "scores": {
        "cpu": fast_linear.on_cpu,
        "gpu": fast_linear.in_float32,
        "tpu": fast_linear.in_float32,
    },
    # The bias's gradient in float32 without a float32 copy of y.
    "add_bias": _everywhere(fast_linear.add_bias),
    # Blocks of one expert each, or ragged products on a TPU (grouped.py).
    "grouped_matmul": _everywhere(grouped.grouped_matmul),
    # Backward passes that keep the input and one number a row, where autodiff keeps whole arrays.
    "layer_norm": _everywhere(fast_norm.layer_norm),
    "rms_norm": _everywhere(fast_norm.rms_norm),
    "gelu": _everywhere(fast_activation.gelu),
    "gelu_tanh": _everywhere(fast_activation.gelu_tanh),
    "silu": _everywhere(fast_activation.silu),
    # A chunk of tokens at a time: all logits, [A, V], are the largest array of a small model.
    "cross_entropy": _everywhere(chunked_cross_entropy.cross_entropy),
    "logprobs_and_entropy": _everywhere(chunked_cross_entropy.logprobs_and_entropy),
}
