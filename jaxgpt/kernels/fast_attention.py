"""Attention as each platform computes it fastest, for whole rows and against a cache.

A device has its own rows, and its own heads where `tensor` cuts them. Where `context` cuts the
positions of a row too, keys travel from device to device (ring_attention.py). Else the length of
the row decides, see `on_cpu`, `on_gpu` and `on_tpu`.

Axes of this file: Q = G * T queries that share a key head.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxgpt import sharding
from jaxgpt.kernels.blocked_attention import blocked_attention
from jaxgpt.kernels.chunked_attention import chunked_attention
from jaxgpt.kernels.platform import LANES
from jaxgpt.kernels.ring_attention import Ring, ring_attention
from jaxgpt.types import Array

LONGEST_BLOCKED = 2048  # 16 blocks: they are unrolled, and compile time grows with their number
LONGEST_SCORES = 2048  # 16 MB a head in float32
LONGEST_BIAS = 8192  # of 2 bytes: 128 MB a row

Kernel = Callable[..., Any]  # (q, k, v, segments, window) -> out


def on_cpu(
    q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, segments_BT: Array | None = None, window: int = 0,
    softcap: float = 0.0, sinks_N: Array | None = None,
) -> Array:  # fmt: skip
    """Unrolled blocks of queries up to LONGEST_BLOCKED tokens, then a loop over chunks."""
    kernel = blocked_attention if q_BTNH.shape[1] <= LONGEST_BLOCKED else chunked_attention
    return _per_device(kernel, q_BTNH, k_BTKH, v_BTKH, segments_BT, window, softcap, sinks_N)


def on_tpu(
    q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, segments_BT: Array | None = None, window: int = 0,
    softcap: float = 0.0, sinks_N: Array | None = None,
) -> Array:  # fmt: skip
    """JAX's splash kernel from LANES tokens, where its blocks are whole; all scores below."""
    kernel = _all_scores("xla")
    if q_BTNH.shape[1] >= LANES:
        from jaxgpt.kernels.splash_attention import splash_attention as kernel
    return _per_device(kernel, q_BTNH, k_BTKH, v_BTKH, segments_BT, window, softcap, sinks_N)


def on_gpu(
    q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, segments_BT: Array | None = None, window: int = 0,
    softcap: float = 0.0, sinks_N: Array | None = None,
) -> Array:  # fmt: skip
    """cuDNN's flash attention where it has the shape; else all scores, and chunks of long rows."""
    _, T, _, H = q_BTNH.shape
    half = q_BTNH.dtype in (jnp.bfloat16, jnp.float16)
    # Segments go into cuDNN as a bias of T * T numbers.
    short = segments_BT is None or T <= LONGEST_BIAS
    if half and T % 2 == 0 and H % 8 == 0 and H <= 128 and short:
        kernel = _all_scores("cudnn")
    else:
        kernel = _all_scores("xla") if T <= LONGEST_SCORES else chunked_attention
    return _per_device(kernel, q_BTNH, k_BTKH, v_BTKH, segments_BT, window, softcap, sinks_N)


def cached(
    q_BTNH: Array, k_BKSH: Array, v_BKSH: Array, mask_BTS: Array, softcap: float = 0.0,
    sinks_N: Array | None = None,
) -> Array:  # fmt: skip
    """Attention of new queries to a cache, in the type of the cache."""
    (B, T, N, H), (_, K, S, _) = q_BTNH.shape, k_BKSH.shape
    G = N // K
    q_BKGTH = q_BTNH.reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4)
    # The queries that share a head are rows of one product: XLA:CPU would copy operands for more.
    q_BKQH = q_BKGTH.reshape(B, K, G * T, H).astype(k_BKSH.dtype)
    scores_BKQS = jnp.einsum("BKQH,BKSH->BKQS", q_BKQH, k_BKSH, preferred_element_type=jnp.float32)
    scores_BKGTS = scores_BKQS.reshape(B, K, G, T, S) * H**-0.5
    if softcap:
        scores_BKGTS = softcap * jnp.tanh(scores_BKGTS / softcap)
    scores_BKGTS = jnp.where(mask_BTS[:, None, None], scores_BKGTS, -1e30)
    weights_BKGTS = jax.nn.softmax(with_sinks(scores_BKGTS, sinks_N))[..., :S]
    weights_BKQS = weights_BKGTS.reshape(B, K, G * T, S).astype(v_BKSH.dtype)
    out_BKQH = jnp.einsum(
        "BKQS,BKSH->BKQH", weights_BKQS, v_BKSH, preferred_element_type=jnp.float32
    )
    out_BKGTH = out_BKQH.reshape(B, K, G, T, H)
    return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H).astype(q_BTNH.dtype)


def with_sinks(scores_BKGTS: Array, sinks_N: Array | None) -> Array:
    """The scores, behind which each head's sink stands as one more key's."""
    if sinks_N is None:
        return scores_BKGTS
    B, K, G, T, _ = scores_BKGTS.shape
    sinks_KG11 = sinks_N.astype(jnp.float32).reshape(K, G, 1, 1)
    sinks_BKGT1 = jnp.broadcast_to(sinks_KG11[None], (B, K, G, T, 1))
    return jnp.concatenate((scores_BKGTS, sinks_BKGT1), axis=-1)


def _per_device(
    kernel: Kernel,
    q_BTNH: Array,
    k_BTKH: Array,
    v_BTKH: Array,
    segments_BT: Array | None,
    window: int,
    softcap: float,
    sinks_N: Array | None,
) -> Array:
    """The kernel on the rows and heads of each device, or the ring where positions are cut.

    Capped scores and sinks go chunk by chunk: no other kernel has them.
    """
    (B, T), K = q_BTNH.shape[:2], k_BTKH.shape[2]
    rows, positions = sharding.cut(B, *sharding.ROWS), sharding.cut(T, "context")
    heads = P(rows, positions, sharding.cut(K, "tensor"), None)
    ring = Ring("context", sharding.size("context"))

    def one_device(
        q: Array, k: Array, v: Array, segments: Array | None, sinks: Array | None
    ) -> Array:
        if positions:
            return ring_attention(q, k, v, segments, window, ring, softcap, sinks)
        if softcap or sinks is not None:
            return chunked_attention(q, k, v, segments, window, softcap, sinks)
        return kernel(q, k, v, segments, window)

    specs = (heads, heads, heads, P(rows, positions), P(heads[2]))
    arrays = (q_BTNH, k_BTKH, v_BTKH, segments_BT, sinks_N)
    return sharding.per_device(one_device, specs, heads, *arrays)


def _all_scores(implementation: Literal["cudnn", "xla"]) -> Kernel:
    """JAX's own attention, whose windows leave the query's own place out of the count."""

    def kernel(
        q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, segments_BT: Array | None, window: int
    ) -> Array:
        mask_B1TS = None
        if segments_BT is not None:
            mask_B1TS = (segments_BT[:, :, None] == segments_BT[:, None, :])[:, None]
        return jax.nn.dot_product_attention(
            q_BTNH, k_BTKH, v_BTKH, mask=mask_B1TS, is_causal=True,
            implementation=implementation, local_window_size=(window - 1, 0) if window else None,
        )  # fmt: skip

    return kernel
