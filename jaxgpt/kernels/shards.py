"""A kernel on the pieces that each device of the ambient mesh holds, through `jax.shard_map`.

Axis names are those of sharding.py. Nothing here asks for a mesh: without one, or inside a
`shard_map`, a kernel runs on whole arrays.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType

ROWS = ("data", "fsdp", "expert")


def size(*axes: str) -> int:
    """Devices along the axes, multiplied; 1 for an axis that the ambient mesh does not have."""
    mesh = jax.sharding.get_abstract_mesh()
    if AxisType.Manual in mesh.axis_types:
        return 1
    return math.prod(mesh.shape.get(axis, 1) for axis in axes)


def cut(length: int, *axes: str) -> tuple[str, ...] | None:
    """What cuts a dimension of `length` in a PartitionSpec; None where the axes do not divide it.

    A few rows that are sampled from, or the single row that initialises a network, stay whole.
    """
    there = tuple(axis for axis in axes if size(axis) > 1)
    return there if there and length % size(*there) == 0 else None


def per_device(
    kernel: Callable[..., Any], inward: tuple[Any, ...], outward: Any, *arrays: Any
) -> Any:
    """kernel(*arrays), every device on its own pieces, cut as `inward` says for each.

    An argument may be None, or a tree with a tree of PartitionSpecs.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or AxisType.Manual in mesh.axis_types:
        return kernel(*arrays)
    # Pallas calls do not say along which axes their results vary, so that cannot be checked.
    mapped = jax.shard_map(kernel, in_specs=inward, out_specs=outward, check_vma=False)
    return mapped(*arrays)
