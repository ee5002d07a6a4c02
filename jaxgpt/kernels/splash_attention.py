"""Flash attention on TPUs: the splash kernel that comes with JAX, for one device's rows and heads.

It skips blocks that the causal mask or the window hides, reads a shared key/value head once for
all its query heads, and knows segments.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from jaxgpt.kernels.platform import LANES, lane_block
from jaxgpt.types import Array


def splash_attention(
    q_BTNH: Array,
    k_BTKH: Array,
    v_BTKH: Array,
    segments_BT: Array | None,
    window: int,
    interpret: bool = False,
) -> Array:
    """Self-attention as `kernels.attention` defines it.

    Args:
        interpret: runs the kernel's own program on any platform, slowly.
    """
    _, T, N, H = q_BTNH.shape
    fill = -T % LANES
    if fill:  # keys behind the end: no query sees what comes after it
        q_BTNH, k_BTKH, v_BTKH = (
            jnp.pad(x, ((0, 0), (0, fill), (0, 0), (0, 0))) for x in (q_BTNH, k_BTKH, v_BTKH)
        )
        if segments_BT is not None:
            segments_BT = jnp.pad(segments_BT, ((0, 0), (0, fill)), constant_values=-1)
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([_mask(T + fill, window)] * N),
        block_sizes=_block_sizes(T + fill),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name="attention",
        interpret=interpret,
    )
    # The kernel does not scale. Rounding to bf16 after scaling costs no more than q's own rounding.
    scaled_BTNH = (q_BTNH.astype(jnp.float32) * H**-0.5).astype(q_BTNH.dtype)
    q_BNTH, k_BKTH, v_BKTH = (x.swapaxes(1, 2) for x in (scaled_BTNH, k_BTKH, v_BTKH))
    segments = None if segments_BT is None else splash.SegmentIds(segments_BT, segments_BT)
    out_BNTH: Array = jax.vmap(kernel)(q_BNTH, k_BKTH, v_BKTH, segments)  # type: ignore[assignment]
    return out_BNTH.swapaxes(1, 2)[:, :T].astype(q_BTNH.dtype)


def _mask(T: int, window: int) -> splash.Mask:
    if window:
        return splash.LocalMask((T, T), (window - 1, 0), 0)
    return splash.CausalMask((T, T))


def _block_sizes(T: int) -> splash.BlockSizes:
    """The largest block everywhere."""
    block = lane_block(T)
    return splash.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block,
        block_q_dkv=block, block_kv_dkv=block, block_kv_dkv_compute=block,
        block_q_dq=block, block_kv_dq=block,
    )  # fmt: skip
