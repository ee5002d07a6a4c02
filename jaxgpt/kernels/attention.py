"""softmax(q k^T / sqrt(H)) v for whole sequences and against a cache."""

import jax

from jaxgpt.types import Array


def attention(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    *,
    segments_BT: Array | None = None,
    causal: bool = True,
) -> Array:
    """Self-attention over whole sequences, within segments if given; grouped queries if K < N."""
    mask = None
    if segments_BT is not None:
        mask = (segments_BT[:, :, None] == segments_BT[:, None, :])[:, None]
    return jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, mask=mask, is_causal=causal)


def cached_attention(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, mask_BTS: Array) -> Array:
    """Attention of few queries against a key/value cache; the mask says which slots are read."""
    return jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, mask=mask_BTS[:, None])
