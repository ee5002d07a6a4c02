"""softmax(q k^T / sqrt(H)) v, for whole sequences and for new tokens against a cache.

| where | kernel | because |
| --- | --- | --- |
| positions cut over devices | ring | no device ever holds the whole row (ring_attention.py) |
| TPU, from 128 tokens | splash | scores stay on the chip, and hidden blocks are skipped |
| GPU, half precision | cuDNN | the same there; segments go in as a bias of T * T, to LONGEST_BIAS |
| CPU, up to LONGEST_BLOCKED | blocked | unrolled blocks of queries (blocked_attention.py) |
| elsewhere, short | XLA | all scores at once: for float32 on a GPU and single tokens on a TPU |
| elsewhere | chunked | no array of T * T, on any platform (chunked_attention.py) |

Each has causal masks, windows, segments and grouped queries.

Axes of this file: Q = G * T queries that share a key head.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxgpt.kernels import shards
from jaxgpt.kernels.blocked_attention import blocked_attention
from jaxgpt.kernels.chunked_attention import chunked_attention
from jaxgpt.kernels.platform import LANES, platform
from jaxgpt.kernels.ring_attention import Ring, ring_attention
from jaxgpt.kernels.splash_attention import splash_attention
from jaxgpt.types import Array

LONGEST_BLOCKED = 2048  # 16 blocks: they are unrolled, and compile time grows with their number
LONGEST_SCORES = 2048  # 16 MB a head in float32
LONGEST_BIAS = 8192  # of 2 bytes: 128 MB a row


def attention(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    *,
    segments_BT: Array | None = None,
    causal: bool = True,
    window: int = 0,
) -> Array:
    """Self-attention over whole sequences; query head n reads key/value head n // (N / K).

    Args:
        segments_BT: tokens see only tokens of their own segment (packed documents).
        window: tokens see only tokens fewer than this many places away; 0: all.
    """
    B, T, K = q_BTNH.shape[0], q_BTNH.shape[1], k_BSKH.shape[2]
    rows, positions = shards.cut(B, *shards.ROWS), shards.cut(T, "context")
    heads = P(rows, positions, shards.cut(K, "tensor"), None)

    ring = Ring("context", shards.size("context"))

    def kernel(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, segments_BT: Array | None) -> Array:
        if positions:
            return ring_attention(q_BTNH, k_BSKH, v_BSKH, segments_BT, causal, window, ring)
        return _attention(q_BTNH, k_BSKH, v_BSKH, segments_BT, causal, window)

    specs = (heads, heads, heads, P(rows, positions))
    return shards.per_device(kernel, specs, heads, q_BTNH, k_BSKH, v_BSKH, segments_BT)


def _attention(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    segments_BT: Array | None,
    causal: bool,
    window: int,
) -> Array:
    """Attention of one device's rows and heads."""
    arrays, T = (q_BTNH, k_BSKH, v_BSKH), q_BTNH.shape[1]
    if platform() == "cpu" and T <= LONGEST_BLOCKED:
        return blocked_attention(*arrays, segments_BT, causal, window)
    if platform() == "tpu" and T >= LANES:
        return splash_attention(*arrays, segments_BT, causal, window)
    if platform() == "gpu" and causal and _cudnn_takes(q_BTNH, segments_BT):
        return _dot_product_attention(*arrays, segments_BT, causal, window, "cudnn")
    if platform() != "cpu" and T <= LONGEST_SCORES:
        return _dot_product_attention(*arrays, segments_BT, causal, window, "xla")
    return chunked_attention(*arrays, segments_BT, causal, window)


def cached_attention(q_BTNH: Array, k_BKSH: Array, v_BKSH: Array, mask_BTS: Array) -> Array:
    """Attention of a few queries against a cache, of which each may read the masked slots.

    Computed in the type of the cache, returned in that of the queries.
    """
    (B, T, N, H), (_, K, S, _) = q_BTNH.shape, k_BKSH.shape
    G = N // K
    q_BKGTH = q_BTNH.reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4)
    # The queries that share a head are rows of one product: XLA:CPU would copy operands for more.
    q_BKQH = q_BKGTH.reshape(B, K, G * T, H).astype(k_BKSH.dtype)
    scores_BKQS = jnp.einsum("BKQH,BKSH->BKQS", q_BKQH, k_BKSH, preferred_element_type=jnp.float32)
    scores_BKGTS = scores_BKQS.reshape(B, K, G, T, S) * H**-0.5
    weights_BKGTS = jax.nn.softmax(jnp.where(mask_BTS[:, None, None], scores_BKGTS, -1e30))
    weights_BKQS = weights_BKGTS.reshape(B, K, G * T, S).astype(v_BKSH.dtype)
    out_BKQH = jnp.einsum(
        "BKQS,BKSH->BKQH", weights_BKQS, v_BKSH, preferred_element_type=jnp.float32
    )
    out_BKGTH = out_BKQH.reshape(B, K, G, T, H)
    return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H).astype(q_BTNH.dtype)


def _dot_product_attention(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    segments_BT: Array | None,
    causal: bool,
    window: int,
    implementation: Literal["cudnn", "xla"],
) -> Array:
    """JAX's own, whose windows leave the query's own place out of the count."""
    mask_B1TS = None
    if segments_BT is not None:
        mask_B1TS = (segments_BT[:, :, None] == segments_BT[:, None, :])[:, None]
    return jax.nn.dot_product_attention(
        q_BTNH, k_BSKH, v_BSKH, mask=mask_B1TS, is_causal=causal, implementation=implementation,
        local_window_size=(window - 1, 0 if causal else window - 1) if window else None,
    )  # fmt: skip


def _cudnn_takes(q_BTNH: Array, segments_BT: Array | None) -> bool:
    """Whether cuDNN's flash attention has this shape: half precision, even T, short wide heads."""
    _, T, _, H = q_BTNH.shape
    half = q_BTNH.dtype in (jnp.bfloat16, jnp.float16)
    return (
        half and T % 2 == 0 and H % 8 == 0 and H <= 128
        and (segments_BT is None or T <= LONGEST_BIAS)
    )  # fmt: skip
