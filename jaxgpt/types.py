"""The names of the few types that travel between modules, and the letters of their axes.

An array's name ends in its axes, one capital letter each: `logits_BTV` is [B, T, V], `scale_D` is
[D], and a 1 is an axis of length one. A scalar has no suffix.

    B  rows of a batch            T  positions in a row (of queries)
    A  all tokens, laid flat      S  positions that are looked at (keys; slots of a cache)
    D  width of the model         F  width of a hidden layer; output channels of a kernel
    N  query heads                K  key/value heads
    G  query heads per key head   H  width of one head
    V  tokens of the vocabulary   L  layers
    E  experts                    R  rank of an adapter
    P  answers to one prompt      C  tokens of one chunk
    M  chunks

A file that needs more letters, or one of these for something else, says so in its first lines:
"Axes of this file: X devices along the mesh axis."
"""

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


class CrossEntropy(NamedTuple):
    """Sums over tokens, each times its weight. Only `loss` carries a gradient."""

    loss: Array  # what is trained: nll, smoothed if asked, plus z_loss * z
    nll: Array  # -log p(target)
    z: Array  # (log of the softmax's normaliser)^2
    correct: Array  # 1 where no logit is larger than the target's


BatchSpec = dict[str, jax.ShapeDtypeStruct]  # the arrays of a batch by name, without numbers
# (params, batch, rng_B) -> (loss sum, weight, metrics). `params` has one entry per network, and
# `carry`. There is one random key per row, so that a row draws the same numbers wherever it is.
LossFn = Callable[[Params, Batch, Array], tuple[Array, Array, Metrics]]
BatchFn = Callable[[Params, Carry, int], Batch]  # (params, carry, step) -> batch
EvalFn = Callable[[Params], dict[str, float]]  # held-out metrics
CarryFn = Callable[[Carry, Mapping[str, Any]], Carry]  # (carry, metrics) -> carry, traced
Sink = Callable[[int, Mapping[str, Any]], None]  # (step, metrics): takes a line of the log
