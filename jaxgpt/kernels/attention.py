"""softmax(q k^T / sqrt(H)) v, for whole sequences and for new tokens against a cache."""

import jax
import jax.numpy as jnp

from jaxgpt.kernels.blocked_attention import blocked_attention
from jaxgpt.kernels.platform import platform
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
    if platform() == "cpu":
        return blocked_attention(q_BTNH, k_BSKH, v_BSKH, segments_BT, causal)
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
