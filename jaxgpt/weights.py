"""What a kernel leaf may be, and the only place where a weight meets an activation.

Layers hand over whatever the parameter tree holds; no layer knows of quantisation or adapters.
"""

import jax.numpy as jnp

from jaxgpt import tree
from jaxgpt.kernels import grouped
from jaxgpt.kernels.linear import linear
from jaxgpt.kernels.platform import dot
from jaxgpt.types import Array, Params


def matmul(x: Array, kernel: Array) -> Array:
    """x [..., D] times a kernel [D, F]."""
    return linear(x, kernel)


def grouped_matmul(rows_RD: Array, kernel_EDF: Array, layout: grouped.Layout) -> Array:
    """Each row times the kernel of its expert."""
    return grouped.grouped_matmul(rows_RD, kernel_EDF, layout)


def batched_matmul(slots_BECD: Array, kernel_EDF: Array) -> Array:
    """Every expert's slots [B, E, C, D] times its kernel."""
    return dot("BECD,EDF->BECF", slots_BECD, kernel_EDF.astype(slots_BECD.dtype))


def dense(kernel: Array) -> Array:
    """The kernel as one plain array."""
    return kernel


def transpose(kernel: Array) -> Array:
    """The kernel [F, D] as [D, F]."""
    return kernel.T


def take(embedding_VD: Array, tokens_BT: Array) -> Array:
    """Rows of an embedding table, in float32."""
    return embedding_VD[tokens_BT].astype(jnp.float32)


def cast_kernels(params: Params, dtype: str) -> Params:
    """Plain kernels in another type; embeddings, norms and biases stay."""
    cast = lambda name, leaf: leaf.astype(dtype) if name.endswith("kernel") else leaf
    return tree.map_named(cast, params)
