"""The mesh, and one table that places every parameter on it."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxgpt import tree
from jaxgpt.config import MeshConfig, ModelConfig
from jaxgpt.types import Batch

# Rows of a batch are cut over these axes, so that devices with different experts have different
# tokens for them; `context` cuts the positions within a row.
ROWS = ("data", "fsdp", "expert")


def _kernel(owner: str, *axes: str | None) -> list[tuple[str, P]]:
    """Rules for a kernel [..., D, F] and for what weights.py may put in its place.

    w and codes are cut as the kernel; NF4's bytes, which lie [F, D], the other way round; a and b
    along the axis that they share with the kernel; numbers per output channel along F.
    """
    *lead, inward, outward = axes
    return [
        (owner + r"/kernel(/w)?(/codes)?$", P(*axes)),
        (owner + r"/kernel(/w)?/packed$", P(*lead, outward, inward)),
        (owner + r"/kernel/a$", P(*lead, inward, None)),
        (owner + r"/kernel/b$", P(*lead, None, outward)),
        (owner + r"/kernel(/w)?/(scale|magnitude|norm)$", P(*lead, outward)),
    ]


# First match wins; blocks have a leading layer axis, which is never cut. The moments of the
# optimizer end like the parameters they belong to.
RULES: list[tuple[str, P]] = [
    (r"embed/embedding$", P("tensor", "fsdp")),
    (r"positions/embedding$", P(None, "fsdp")),
    (r"moe/(router|shared_gate)/kernel$", P()),
    *_kernel(r"moe/(gate|up)", None, "expert", "fsdp", "tensor"),
    *_kernel(r"moe/down", None, "expert", "tensor", "fsdp"),
    *_kernel(r"_adapter/down", None, "fsdp", None),
    *_kernel(r"_adapter/up", None, None, "fsdp"),
    (r"_adapter/(down|up)/bias$", P()),
    *_kernel(r"(query|key|value|gate|up)", None, "fsdp", "tensor"),
    *_kernel(r"(output|down)", None, "tensor", "fsdp"),
    *_kernel(r"head", "fsdp", "tensor"),
    (r"kernel(/w)?/(scales|groups|offset)$", P()),
    (r"score/kernel$", P("fsdp", None)),
    (r"(query|key|value|gate|up)/bias$", P(None, "tensor")),
    (r"(bias|scale)$", P()),
    (r"(^|/)carry/", P()),
    (r"ns_coeffs$", P()),  # of Muon: the coefficients of its polynomial
]


def make_mesh(cfg: MeshConfig, devices: list[Any] | None = None) -> Mesh:
    """All devices along the axes of `cfg`; a mesh of ones on one device is no special case."""
    devices = jax.devices() if devices is None else devices
    sizes = {axis: getattr(cfg, axis) for axis in ("data", "fsdp", "tensor", "context", "expert")}
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise ValueError(f"mesh.{free[1]}=-1: only one axis may take what is left")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if fixed < 1 or len(devices) % fixed or (not free and fixed != len(devices)):
        raise ValueError(_does_not_fit(sizes, len(devices)))
    if free:
        sizes[free[0]] = len(devices) // fixed
    try:
        return jax.make_mesh(
            tuple(sizes.values()), tuple(sizes), (AxisType.Auto,) * len(sizes), devices=devices
        )
    except NotImplementedError:
        axes = "x".join(map(str, np.max([device.coords for device in devices], axis=0) + 1))
        raise ValueError(
            f"mesh={_in_words(sizes)}: each must be a product of axes of the slice, {axes}"
        ) from None


def _does_not_fit(sizes: dict[str, int], count: int) -> str:
    """What is wrong with a mesh for `count` devices, and a value that would do."""
    fixed, free = math.prod(size for size in sizes.values() if size != -1), -1 in sizes.values()
    fix = "choose sizes whose product is that"
    for axis, size in sizes.items():
        named = size > 1 or axis == "data"
        room, odd = divmod(count, fixed // max(size, 1))
        if named and size != -1 and not odd:  # the other axes fit, beside one of this size
            below = max(n for n in range(1, size + 1) if room % n == 0)
            value = below if free else -1 if axis == "data" else room
            fix = f"--mesh.{axis} {value} would fit"
            break
    takes = f"a multiple of {fixed}" if free else f"{fixed}"
    return (
        f"mesh={_in_words(sizes) or 'data 1'}: takes {takes} devices, and here are {count}; {fix}"
    )


def _in_words(sizes: dict[str, int]) -> str:
    return " * ".join(f"{axis} {size}" for axis, size in sizes.items() if size not in (1, -1))


def check_model(cfg: ModelConfig, mesh: Mesh) -> None:
    """Raises ValueError where an axis does not divide what it cuts in every layer.

    Kernels alone would not tell: two key heads of 64 are a kernel of 128 columns.
    """
    for axis, setting, count in (
        ("tensor", "num_heads", cfg.num_heads),
        ("tensor", "num_kv_heads", cfg.kv_heads),
        ("expert", "num_experts", cfg.num_experts),
        ("context", "context_length", cfg.context_length),
    ):
        if count % mesh.shape[axis]:
            raise ValueError(
                f"mesh.{axis}={mesh.shape[axis]}: does not divide model.{setting}={count}; "
                f"--mesh.{axis} {math.gcd(count, mesh.shape[axis])} would"
            )


def spec_of(name: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    """The placement of one array by its name.

    Raises:
        ValueError: no rule matches, or an axis does not divide its dimension.
    """
    if not shape:
        return P()
    spec = tree.first_match(RULES, name)
    if spec is None:
        raise ValueError(f"{name}: no rule in sharding.RULES says where it goes")
    for dim, axis in zip(shape, spec, strict=False):
        if axis is not None and dim % mesh.shape[axis]:
            raise ValueError(
                f"mesh.{axis}={mesh.shape[axis]}: does not divide {name}, which is {list(shape)}"
            )
    return spec


def shardings(mesh: Mesh, arrays: Any) -> Any:
    """A NamedSharding for every leaf of a tree of arrays or shapes."""
    place = lambda name, leaf: NamedSharding(mesh, spec_of(name, leaf.shape, mesh))
    return tree.map_named(place, arrays)


def place(mesh: Mesh, name: str, leaf: Any) -> Any:
    """A parameter, or what a kernel became, from its whole value on this host.

    Unlike `device_put`, it lets no process wait for another.
    """

    named = {name: leaf}
    return jax.tree.map(spread, shardings(mesh, named), named)[name]


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, P())


def place_rows(
    mesh: Mesh, num_rows: int, read: Callable[[np.ndarray], dict[str, np.ndarray]]
) -> Batch:
    """The global batch whose rows come from `read(row numbers)`; only this process's are read.

    The first axis of an array is the row and, if it has more, the last one is the position.

    Raises:
        ValueError: the devices do not divide the rows or positions.
    """
    check_rows(mesh, num_rows)
    spans = NamedSharding(mesh, P(ROWS)).addressable_devices_indices_map((num_rows,))
    mine = np.unique(np.concatenate([np.arange(num_rows)[index] for index in spans.values()]))
    local = read(mine)

    def place(array: np.ndarray) -> jax.Array:
        shape = (num_rows, *array.shape[1:])
        placed = row_sharding(mesh, shape)

        def piece(index: Any) -> np.ndarray:
            rows = np.searchsorted(mine, np.arange(num_rows)[index[0]])
            return array[rows][:, *index[1:]]

        return jax.make_array_from_callback(shape, placed, piece)

    return {name: place(array) for name, array in local.items()}


def check_rows(mesh: Mesh, num_rows: int) -> None:
    """Raises ValueError unless the devices that have rows of their own divide a batch."""
    ways = math.prod(mesh.shape[axis] for axis in ROWS)
    if num_rows % ways:
        raise ValueError(
            f"train.batch_size={num_rows}: mesh {'*'.join(ROWS)}={ways} must divide the rows of a "
            f"batch; --train.batch_size {-(-num_rows // ways) * ways} would fit"
        )


def over_rows(mesh: Mesh, num_rows: int) -> NamedSharding:
    """Arrays [rows, …] cut over the devices that have rows of their own, or whole."""
    ways = math.prod(mesh.shape[axis] for axis in ROWS)
    return NamedSharding(mesh, P(ROWS) if num_rows % ways == 0 else P())


def spread(placed: NamedSharding, array: Any) -> jax.Array:
    """`device_put` of an array that every process has whole, without waiting for each other."""
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(spread(placed, jax.random.key_data(array)))
    host = np.asarray(array)
    return jax.make_array_from_callback(host.shape, placed, host.__getitem__)


def whole(array: jax.Array) -> np.ndarray:
    """An array as NumPy, also where other processes hold some of it."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def row_sharding(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """Where an array of a batch lies: the first axis is the row, the last of several the position.

    Raises:
        ValueError: the devices do not divide the positions.
    """
    if len(shape) == 1:
        return NamedSharding(mesh, P(ROWS))
    if shape[-1] % mesh.shape["context"]:
        raise ValueError(
            f"mesh.context={mesh.shape['context']}: does not divide {shape[-1]} positions"
        )
    return NamedSharding(mesh, P(ROWS, *[None] * (len(shape) - 2), "context"))
