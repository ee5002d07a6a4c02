"""The names of the few types that travel between modules."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

Array = jax.Array
Params = Any  # a nested dict of arrays, or of the leaves that weights.py defines
Batch = dict[str, Any]  # name -> array whose first axis is the row; see train.make_step
Carry = dict[str, Any]  # small state outside the gradient, checkpointed
Metrics = dict[str, tuple[Array, Array]]  # name -> (sum, weight); their ratio is the value


class Report(NamedTuple):
    """What a stage that samples has to tell of a rollout; it travels as a batch's `report`."""

    measures: dict[str, float]
    texts: list[str]  # some of what was written
    warning: str = ""


# (params, batch, rng_B) -> (loss sum, weight, metrics). `params` has one entry per network, and
# `carry`. There is one random key per row, so that a row draws the same numbers wherever it is.
LossFn = Callable[[Params, Batch, Array], tuple[Array, Array, Metrics]]
BatchFn = Callable[[Params, Carry, int], Batch]  # (params, carry, step) -> batch
EvalFn = Callable[[Params], dict[str, float]]  # held-out metrics
CarryFn = Callable[[Carry, Mapping[str, Any]], Carry]  # (carry, metrics) -> carry, traced
