"""Where activations and gathered kernels lie on the ambient mesh (`jax.set_mesh`).

Parameters are placed by sharding.RULES. Given those alone, XLA's partitioner may cut activations
along the width like the weights, every device then computing all rows and adding up the parts.
With their rows held in place it can only do what data parallelism and FSDP mean: gather each
weight before it is used, and reduce-scatter its gradient.
"""

import jax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxgpt.kernels import shards
from jaxgpt.types import Array


def by_rows(x_BTD: Array) -> Array:
    """Rows over `data` and `fsdp`, positions over `context`, the width whole; without a mesh, x."""
    if not _placeable():
        return x_BTD
    B, T, *_ = x_BTD.shape
    rows, positions = shards.cut(B, *shards.ROWS), shards.cut(T, "context")
    spec = P(rows, positions, *[None] * (x_BTD.ndim - 2))
    return jax.lax.with_sharding_constraint(x_BTD, spec)


def whole(kernel_DF: Array) -> Array:
    """A kernel gathered from the devices that share it, unless a tensor axis cuts it on purpose."""
    if not _placeable() or shards.size("tensor") > 1:
        return kernel_DF
    return jax.lax.with_sharding_constraint(kernel_DF, P(*[None] * kernel_DF.ndim))


def _placeable() -> bool:
    """Whether there is more than one device, and this is no part of a `shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.size > 1 and AxisType.Manual not in mesh.axis_types
