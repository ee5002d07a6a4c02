"""softmax(q k^T / sqrt(H)) v, for whole sequences and for new tokens against a cache.

| where | kernel | because |
| --- | --- | --- |
| TPU | splash (Pallas) | reads scores from no memory, skips what masks hide, knows segments |
| GPU, half precision | cuDNN | the fastest there; segments go in as a mask, [B, 1, T, T] bytes |
| CPU, up to LONGEST_BLOCKED | blocks of queries, unrolled | see blocked_attention.py |
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxgpt.kernels import shards
from jaxgpt.kernels.blocked_attention import blocked_attention
from jaxgpt.kernels.platform import platform
from jaxgpt.kernels.splash_attention import LANES, splash_attention
from jaxgpt.types import Array


def attention(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    *,
    segments_BT: Array | None = None,
    causal: bool = True,
) -> Array:
    """Self-attention over whole sequences; query head n reads key/value head n // (N / K).

    Args:
        segments_BT: tokens see only tokens of their own segment (packed documents).
    """
    rows = shards.cut(q_BTNH.shape[0], *shards.ROWS)
    heads = P(rows, None, shards.cut(k_BSKH.shape[2], "tensor"), None)

    def kernel(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, segments_BT: Array | None) -> Array:
        return _attention(q_BTNH, k_BSKH, v_BSKH, segments_BT, causal)

    specs = (heads, heads, heads, P(rows, None))
    return shards.per_device(kernel, specs, heads, q_BTNH, k_BSKH, v_BSKH, segments_BT)


def _attention(
    q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, segments_BT: Array | None, causal: bool
) -> Array:
    """Attention of one device's rows and heads, by the kernel for its platform."""
    if platform() == "cpu":
        return blocked_attention(q_BTNH, k_BSKH, v_BSKH, segments_BT, causal)
    if platform() == "tpu" and q_BTNH.shape[1] >= LANES:
        return splash_attention(q_BTNH, k_BSKH, v_BSKH, segments_BT, causal, 0)
    mask_BNTS = None
    if segments_BT is not None:
        mask_BNTS = (segments_BT[:, :, None] == segments_BT[:, None, :])[:, None]
    return jax.nn.dot_product_attention(
        q_BTNH, k_BSKH, v_BSKH, mask=mask_BNTS, is_causal=causal,
        implementation="cudnn" if _cudnn_takes(q_BTNH) else "xla",
    )  # fmt: skip


def cached_attention(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, mask_BTS: Array) -> Array:
    """Attention of a few queries against a cache, of which each may read the masked slots."""
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    scores_BKGTS = jnp.einsum(
        "BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32
    )
    scores_BKGTS = jnp.where(mask_BTS[:, None, None], scores_BKGTS * H**-0.5, -1e30)
    weights_BKGTS = jax.nn.softmax(scores_BKGTS).astype(v_BSKH.dtype)
    out_BTKGH = jnp.einsum(
        "BKGTS,BSKH->BTKGH", weights_BKGTS, v_BSKH, preferred_element_type=jnp.float32
    )
    return out_BTKGH.reshape(B, T, N, H).astype(q_BTNH.dtype)


def _cudnn_takes(q_BTNH: Array) -> bool:
    """Whether cuDNN's flash attention has this shape: half precision, even T, short wide heads."""
    _, T, _, H = q_BTNH.shape
    half = q_BTNH.dtype in (jnp.bfloat16, jnp.float16)
    return platform() == "gpu" and half and T % 2 == 0 and H % 8 == 0 and H <= 128
