"""Expert parallelism: every device holds some of the experts, and tokens travel to them and back.

    over_devices(one_device, kernels, x_BTD, gate_BTJ, …)    # one_device sees its own tokens
        journey = plan(sizes_E)                              # its rows, sorted by expert
        arrived_RD = send(rows_ZD, journey)                  # rows for the experts that are here
        rows_ZD = fetch(done_RD, journey)                    # home, in their old order

No row is dropped: a device has room for all rows of all devices, which costs memory, but with
ragged exchanges neither time nor bandwidth. `expert_capacity` bounds the memory, see moe.py.

Axes of this file: X devices along the axis, Z rows that leave, R rows of room, C slots of one
expert.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxgpt import sharding, tree
from jaxgpt.kernels.platform import platform
from jaxgpt.types import Array

AXIS = "expert"


class Route(NamedTuple):
    """What `jax.lax.ragged_all_to_all` asks of every device, each with an entry per other one."""

    input_offsets: Array  # where the rows for a device begin here
    send_sizes: Array
    output_offsets: Array  # where they will begin there
    recv_sizes: Array


class Journey(NamedTuple):
    """The way to the experts and back."""

    there: Route
    back: Route
    expert_R: Array  # the expert, of those here, that an arrived row visits; fillers: the last
    num_filling: Array  # rows of room that nobody has taken, at the end


def over_devices(
    one_device: Callable[..., Array], kernels: dict[str, Any], *arrays: Array
) -> Array:
    """one_device(kernels, *arrays), each device on its own tokens [B, T, …] and its own experts.

    Args:
        kernels: by name, such as up/kernel and up/bias.
    """
    x_BTD = arrays[0]
    place = P(sharding.cut(x_BTD.shape[0], *sharding.ROWS), sharding.cut(x_BTD.shape[1], "context"))
    plain = all(isinstance(kernel, jax.Array) for kernel in kernels.values())
    # Codes, scales and low-rank factors have in common that experts are their first axis.
    there = lambda cut: P(*(axis if sharding.size(axis) > 1 else None for axis in cut))
    own = lambda name: tree.first_match(sharding.RULES, f"moe/{name}") or P()
    cuts = {name: there(own(name)[1:] if plain else (AXIS,)) for name in kernels}

    def gathered(kernels: dict[str, Any], *arrays: Array) -> Array:
        whole = {
            name: jax.lax.all_gather(kernel, "fsdp", axis=cuts[name].index("fsdp"), tiled=True)
            if "fsdp" in cuts[name] else kernel
            for name, kernel in kernels.items()
        }  # fmt: skip
        if "tensor" not in cuts["up/kernel"]:
            return one_device(whole, *arrays)
        if "down/bias" in whole:  # which is added on every device that has a part of the sum
            whole["down/bias"] = whole["down/bias"] / jax.lax.axis_size("tensor")
        return jax.lax.psum(one_device(whole, *arrays), "tensor")

    inward = (cuts, *(place for _ in arrays))
    return sharding.per_device(gathered, inward, place, kernels, *arrays)


def are_many() -> bool:
    """Whether tokens or kernels are cut over devices, and this is not one device's own program.

    Sorting by expert all tokens of all devices would send everything to everybody.
    """
    return sharding.size(*sharding.ROWS, "context", "tensor") > 1


def is_needed() -> bool:
    """Whether experts are cut over devices."""
    return sharding.size(AXIS) > 1


def swap(slots_BECD: Array, outward: bool) -> Array:
    """Slots of equal size: own rows' [B, E, C, D] to own experts' [X B, E / X, C, D], or back.

    A device that has all experts has nothing to swap.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if AxisType.Manual not in mesh.axis_types or mesh.shape[AXIS] == 1:
        return slots_BECD
    split, join = (1, 0) if outward else (0, 1)
    return jax.lax.all_to_all(slots_BECD, AXIS, split, join, tiled=True)


def plan(sizes_E: Array, num_rows: int) -> Journey:
    """The journey of `num_rows` rows that stand sorted by expert, `sizes_E` for each.

    Every device tells all others how many rows it has for each expert; from that table each one
    computes where its rows begin on the others, so that nothing else need be said. An example with
    two devices, four experts and three rows a device; device 0 holds experts 0 and 1:

        rows for expert      0  1 | 2  3
        of device 0          1  1 | 0  1       2 rows stay, 1 leaves for device 1
        of device 1          0  2 | 1  0       2 rows leave for device 0, 1 stays

        device 0 receives    0a 1a | 1b 1b     its own two rows first, then those of device 1
        device 1 receives    3a | 2b

    So `there` of device 1 says: my rows for device 0 begin at row 0 here, are 2, and will begin at
    row 2 there. `back` is the same table read from the other side. Device 0 has room for 6 rows,
    of which 2 are filling: nobody took them, and they visit its last expert.
    """
    num_devices, own = jax.lax.axis_size(AXIS), jax.lax.axis_index(AXIS)
    sizes_XE = jax.lax.all_gather(sizes_E, AXIS)
    sizes_XXE = sizes_XE.reshape(num_devices, num_devices, -1)  # from, to, expert there
    sizes_XX = sizes_XXE.sum(-1)
    leaves_XX, arrives_XX = (jnp.cumsum(sizes_XX, axis) - sizes_XX for axis in (1, 0))
    there = Route(leaves_XX[own], sizes_XX[own], arrives_XX[own], sizes_XX[:, own])
    back = Route(arrives_XX[:, own], sizes_XX[:, own], leaves_XX[:, own], sizes_XX[own])

    here_XE = sizes_XXE[:, own]
    ends = jnp.cumsum(here_XE.reshape(-1))
    rows_R = jnp.arange(num_devices * num_rows)
    visit_R = jnp.searchsorted(ends, rows_R, side="right")  # which of device * expert
    last = here_XE.shape[1] - 1
    expert_R = jnp.where(rows_R < ends[-1], visit_R % here_XE.shape[1], last)
    return Journey(there, back, expert_R, len(rows_R) - ends[-1])


# The way back of a row is the way of its gradient.


@jax.custom_vjp
def send(rows_ZD: Array, journey: Journey) -> Array:
    """Rows to the devices of their experts; [R, D] with zeros where there is room left."""
    return _move(rows_ZD, journey.there, len(journey.expert_R))


send.defvjp(
    lambda rows_ZD, journey: (send(rows_ZD, journey), journey),
    lambda journey, g_RD: (fetch(g_RD, journey), None),
)


@jax.custom_vjp
def fetch(rows_RD: Array, journey: Journey) -> Array:
    """Rows back to where they came from, in the order in which they left."""
    return _move(rows_RD, journey.back, len(rows_RD) // jax.lax.axis_size(AXIS))


fetch.defvjp(
    lambda rows_RD, journey: (fetch(rows_RD, journey), journey),
    lambda journey, g_ZD: (send(g_ZD, journey), None),
)


def _move(rows_ZD: Array, route: Route, room: int) -> Array:
    """A ragged exchange, of which XLA:CPU has none: there everything goes to everybody."""
    if platform() in ("gpu", "tpu"):
        empty = jnp.zeros((room, rows_ZD.shape[1]), rows_ZD.dtype)
        return jax.lax.ragged_all_to_all(rows_ZD, empty, *route, axis_name=AXIS)
    rows_XZD = jax.lax.all_gather(rows_ZD, AXIS)
    to_me = lambda x_X: jax.lax.all_to_all(x_X, AXIS, 0, 0, tiled=True)
    begin_X, start_X = to_me(route.input_offsets), to_me(route.output_offsets)
    ahead_RX = jnp.arange(room)[:, None] - start_X[None]
    from_RX = (ahead_RX >= 0) & (ahead_RX < route.recv_sizes[None])
    source_R = from_RX.argmax(1)
    index_R = begin_X[source_R] + jnp.arange(room) - start_X[source_R]
    moved_RD = rows_XZD.at[source_R, index_R].get(mode="clip")
    return jnp.where(from_RX.any(1)[:, None], moved_RD, 0)
