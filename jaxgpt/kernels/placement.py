"""Where activations and gathered kernels lie on the ambient mesh (`jax.set_mesh`).

Parameters are placed by sharding.RULES. Given those alone, XLA's partitioner may cut activations
along the width like the weights, every device then computing all rows and adding up the parts.
With their rows held in place it can only do what data parallelism and FSDP mean: gather each
weight before it is used, and reduce-scatter its gradient.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxgpt.kernels import shards
from jaxgpt.types import Array


def by_rows(x_BTD: Array) -> Array:
    """Rows over `data` and `fsdp`, positions over `context`, the width whole; without a mesh, x."""
    if not _placeable():
        return x_BTD
    spec = P(*token_spec(x_BTD.shape[:2]), *[None] * (x_BTD.ndim - 2))
    return jax.lax.with_sharding_constraint(x_BTD, spec)


def by_columns(x_BTF: Array) -> Array:
    """`by_rows`, but the width cut over `tensor`: heads side by side, as their kernels give or take
    them.

    Left alone XLA merges the change between [B, T, F] and heads into the product, and in the
    backward pass otherwise than in the forward one: it would gather each kernel once for either.
    """
    if not _placeable() or shards.size("tensor") == 1:
        return x_BTF
    spec = P(*token_spec(x_BTF.shape[:2]), shards.cut(x_BTF.shape[2], "tensor"))
    return jax.lax.with_sharding_constraint(x_BTF, spec)


def whole(kernel_DF: Array) -> Array:
    """A kernel gathered from the devices that share it, unless a tensor axis cuts it on purpose."""
    if not _placeable() or shards.size("tensor") > 1:
        return kernel_DF
    return jax.lax.with_sharding_constraint(kernel_DF, P(*[None] * kernel_DF.ndim))


def token_spec(shape: tuple[int, ...]) -> P:
    """What cuts tokens [B, T], or [N] with all positions of a row in one piece."""
    return P(shards.cut(shape[0], *shards.ROWS), *(shards.cut(T, "context") for T in shape[1:]))


def per_token(
    kernel: Callable[..., Any],
    outward: Callable[[P], Any],
    hidden: Array,
    head_VD: Array,
    *tokens: Array,
) -> Any:
    """kernel(axes, hidden [..., D], head_VD, *tokens [...]), every device on its own tokens.

    Args:
        kernel: sums what it adds up over tokens over the mesh's `axes`, too.
        outward: the placement of its results, by that of the tokens.
    """
    shape = tokens[0].shape
    spec = token_spec(shape) if _placeable() else P()
    cuts = [(cut,) if isinstance(cut, str) else cut or () for cut in spec]
    axes = tuple(axis for cut in cuts for axis in cut)
    # A context axis cuts inside a row, which tokens without rows cannot show.
    if not axes or (len(shape) == 1 and shards.size("context") > 1):
        return kernel((), hidden, head_VD, *tokens)
    mapped = jax.shard_map(
        partial(kernel, axes),
        in_specs=(P(*spec, None), P(), *[spec] * len(tokens)),
        out_specs=outward(spec),
        axis_names=set(axes),
        check_vma=False,
    )
    return mapped(hidden, head_VD, *tokens)


def add_up(x: Any, axes: tuple[str, ...]) -> Any:
    """The sum of what devices along the axes have."""
    return jax.lax.psum(x, axes) if axes else x


def scatter(head_VD: Array, axes: tuple[str, ...]) -> Array:
    """`add_up`, of which each device of `fsdp` gets its own columns."""
    if "fsdp" not in axes:
        return add_up(head_VD, axes)
    scattered = partial(jax.lax.psum_scatter, axis_name="fsdp", scatter_dimension=1, tiled=True)
    tensor = jax.sharding.get_abstract_mesh().shape.get("tensor", 1)
    if tensor > 1 and len(head_VD) % tensor == 0:
        # Left to XLA the rows that `tensor` cuts would be gathered first.
        rows = P("tensor", None)
        scattered = jax.shard_map(
            scattered, in_specs=rows, out_specs=rows, axis_names={"tensor"}, check_vma=False
        )
    return add_up(scattered(head_VD), tuple(axis for axis in axes if axis != "fsdp"))


def head_spec() -> P:
    """Where `scatter` leaves a gradient of the head."""
    return P(None, "fsdp") if shards.size("fsdp") > 1 else P()


def _placeable() -> bool:
    """Whether there is more than one device, and this is no part of a `shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.size > 1 and AxisType.Manual not in mesh.axis_types
