"""Floating-point operations of a traced program: its matrix products, loops counted out."""

import math
from collections.abc import Iterator
from typing import Any


def count(jaxpr: Any) -> float:
    """FLOPs of all devices together, with what is recomputed.

    Counted before the program is cut over devices, from the shapes of its products. A kernel's
    count is that of all blocks of its grid, those that a mask lets it skip among them.
    """
    return sum(_of(equation) for equation in jaxpr.eqns)


def _of(equation: Any) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        inner = math.prod(shape[axis] for axis in contracted)
        return 2.0 * equation.outvars[0].aval.size * inner
    if name.startswith("ragged_dot"):  # every row meets one of the kernels
        return 2.0 * equation.invars[0].aval.size * equation.invars[1].aval.shape[-1]
    if name == "cond":
        return max(count(branch.jaxpr) for branch in params["branches"])
    inner = sum(map(count, _inside(params)))
    if name == "scan":
        return inner * params["length"]
    if name == "pallas_call":
        grid = params["grid_mapping"].grid
        if all(isinstance(size, int) for size in grid):
            return inner * math.prod(grid)
        return float(params["cost_estimate"].flops)  # as many blocks as the data ask for
    if name == "shard_map":
        return inner * _devices(params)
    return inner


def _inside(params: dict[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if hasattr(item, "eqns"):
                yield item
            elif hasattr(item, "jaxpr") and hasattr(item.jaxpr, "eqns"):
                yield item.jaxpr


def _devices(params: dict[str, Any]) -> int:
    """How many devices run the body of a `shard_map`, each on its own piece."""
    return math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
