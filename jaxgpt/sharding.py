"""Where arrays lie on the devices: the mesh, parameters, rows of a batch, activations.

Every parameter is placed by its name, by the one table RULES. The rows of a batch are cut over
ROWS and their positions over `context`. Given these alone, XLA's partitioner may cut activations
along the width like the weights, every device then computing all rows and adding up the parts. So
the model also holds its activations in place (`by_rows`, `by_columns`); then XLA can only do what
data parallelism and FSDP mean: gather each weight before it is used, and reduce-scatter its
gradient.

Functions that take a mesh are for setting up. The others look at the ambient one (`jax.set_mesh`)
while a program is traced: without a mesh, or inside a `shard_map`, arrays are whole.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxgpt import tree
from jaxgpt.config import MeshConfig, ModelConfig
from jaxgpt.types import Array, Batch

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
    (r"moe/(router|shared_gate)/(kernel|bias)$", P()),
    (r"moe/(gate|up)/bias$", P(None, "expert", "tensor")),
    (r"moe/down/bias$", P(None, "expert", None)),
    (r"attention/sink_bias$", P(None, "tensor")),
    *_kernel(r"moe/(gate|up)", None, "expert", "fsdp", "tensor"),
    *_kernel(r"moe/down", None, "expert", "tensor", "fsdp"),
    *_kernel(r"_adapter/down", None, "fsdp", None),
    *_kernel(r"_adapter/up", None, None, "fsdp"),
    (r"_adapter/(down|up)/bias$", P()),
    *_kernel(r"attention/(latent|query_latent)", None, "fsdp", None),
    *_kernel(r"(query|query_up|key|value|gate|up)", None, "fsdp", "tensor"),
    *_kernel(r"(output|down)", None, "tensor", "fsdp"),
    *_kernel(r"head", "fsdp", "tensor"),
    (r"(kernel(/w)?|embedding)/(scales|groups|offset|tiles)$", P()),
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


# ---- inside a program: the ambient mesh


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
    if not _placeable() or size("tensor") == 1:
        return x_BTF
    spec = P(*token_spec(x_BTF.shape[:2]), cut(x_BTF.shape[2], "tensor"))
    return jax.lax.with_sharding_constraint(x_BTF, spec)


def by_slots(x: Array) -> Array:
    """The arrays of a server's batch: rows over `data`, the heads of keys and values [rows, K, S,
    H] over `tensor`; without a mesh, x.
    """
    if not _placeable():
        return x
    heads = [cut(x.shape[1], "tensor")] if x.ndim == 4 else []
    return jax.lax.with_sharding_constraint(x, P(cut(x.shape[0], "data"), *heads))


def gather_kernel(kernel_DF: Array) -> Array:
    """A kernel gathered from the devices that share it, unless a tensor axis cuts it on purpose."""
    if not _placeable() or size("tensor") > 1:
        return kernel_DF
    return jax.lax.with_sharding_constraint(kernel_DF, P(*[None] * kernel_DF.ndim))


def token_spec(shape: tuple[int, ...]) -> P:
    """What cuts tokens [B, T], or [N] with all positions of a row in one piece."""
    return P(cut(shape[0], *ROWS), *(cut(T, "context") for T in shape[1:]))


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
    if not axes or (len(shape) == 1 and size("context") > 1):
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
    return P(None, "fsdp") if size("fsdp") > 1 else P()


def per_device(
    kernel: Callable[..., Any], inward: tuple[Any, ...], outward: Any, *arrays: Any
) -> Any:
    """kernel(*arrays), every device on its own pieces, cut as `inward` says for each.

    An argument may be None, or a tree with a tree of PartitionSpecs.
    """
    if not _placeable():
        return kernel(*arrays)
    # Pallas calls do not say along which axes their results vary, so that cannot be checked.
    mapped = jax.shard_map(kernel, in_specs=inward, out_specs=outward, check_vma=False)
    return mapped(*arrays)


def _placeable() -> bool:
    """Whether there is more than one device, and this is no part of a `shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.size > 1 and AxisType.Manual not in mesh.axis_types
