"""Optimizers: AdamW and Muon with warm-up schedules, clipping and decay by parameter path.

Notes: chapter 7.
"""

import dataclasses
import math
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from jaxgpt import tree
from jaxgpt.config import OptimConfig, own
from jaxgpt.types import Array, Params


def learning_rate(cfg: OptimConfig, step: Array, num_steps: int) -> Array:
    """The rate of the update number `step`, counted from 0.

    Linear warm-up from rate / (warmup + 1), then cosine: half a wave down to min_ratio (nanoGPT);
    wsd: flat, then a straight line over the last `decay_fraction` (arXiv:2404.06395); constant.
    """
    end = num_steps if cfg.decay_steps is None else cfg.decay_steps
    warm = jnp.minimum((step + 1) / (cfg.warmup_steps + 1), 1.0)
    if cfg.schedule == "constant":
        return cfg.learning_rate * warm
    begin = cfg.warmup_steps
    if cfg.schedule == "wsd":
        begin = max(begin, round(end * (1 - cfg.decay_fraction)))
    done = jnp.clip((step - begin) / max(end - begin, 1), 0.0, 1.0)
    left = 1 - done if cfg.schedule == "wsd" else 0.5 * (1 + jnp.cos(jnp.pi * done))
    return cfg.learning_rate * jnp.where(
        step < begin, warm, cfg.min_ratio + (1 - cfg.min_ratio) * left
    )


def open_until(cfg: OptimConfig, num_steps: int) -> float:
    """The number of first updates whose learning rates do not depend on where the run ends. A run
    that is given more steps may go on from there. For wsd, it is where the decay begins."""
    if cfg.schedule == "constant":
        return math.inf
    if cfg.schedule == "cosine":
        return cfg.warmup_steps
    end = num_steps if cfg.decay_steps is None else cfg.decay_steps
    return max(cfg.warmup_steps, round(end * (1 - cfg.decay_fraction)))


def goes_on(cfg: OptimConfig, num_steps: int, before: tuple[int, int | None], done: int) -> bool:
    """Whether this run may go on after `done` updates of an older run that had another end.

    It may if both runs have the same learning rates up to there.

    Args:
        before: train.steps and optim.decay_steps of the older run.
    """
    old = dataclasses.replace(cfg, decay_steps=before[1])
    ends = [before[0] if before[1] is None else before[1],
            num_steps if cfg.decay_steps is None else cfg.decay_steps]  # fmt: skip
    return ends[0] == ends[1] or done <= min(open_until(old, before[0]), open_until(cfg, num_steps))


def make_optimizer(cfg: OptimConfig, num_steps: int) -> optax.GradientTransformation:
    """Clipping by the global norm, then AdamW (arXiv:1711.05101), Muon, or the user's own.

    Raises:
        ValueError: optim.custom cannot be found or gives no optax.GradientTransformation.
    """
    rate = lambda step: learning_rate(cfg, jnp.asarray(step), num_steps)
    if cfg.custom:
        return _clipped(cfg, _custom(cfg, rate))
    direction = _kept_as(cfg.moments, optax.scale_by_adam(cfg.beta1, cfg.beta2, cfg.eps))
    if cfg.name == "muon":
        muon = _kept_as(cfg.moments, _muon())
        direction = optax.partition({"muon": muon, "adam": direction}, _labels)
    update = optax.chain(
        direction,
        optax.add_decayed_weights(cfg.weight_decay, lambda params: decayed(cfg, params)),
        optax.scale_by_learning_rate(rate),
    )
    return _clipped(cfg, update)


def _clipped(
    cfg: OptimConfig, update: optax.GradientTransformation
) -> optax.GradientTransformation:
    if cfg.clip_norm == 0:
        return update
    return optax.chain(optax.clip_by_global_norm(cfg.clip_norm), update)


def _custom(cfg: OptimConfig, rate: Callable[[Array], Array]) -> optax.GradientTransformation:
    made = own.function("optim.custom", cfg.custom)(rate)
    if not (hasattr(made, "init") and hasattr(made, "update")):
        raise ValueError(
            f"optim.custom={cfg.custom}: gives {type(made).__name__}, not an "
            "optax.GradientTransformation; it is called with the learning rate by step, a function"
        )
    return made


def decayed(cfg: OptimConfig, params: Params) -> Params:
    """True where weight decay applies; by path, since stacked layers give every leaf an axis."""
    return tree.map_named(lambda name, _: re.search(cfg.no_decay, name) is None, params)


def _labels(params: Params) -> Params:
    """Muon takes the matrices inside the blocks."""
    inside = lambda name: re.search(r"blocks/(?!.*(router|shared_gate)/).*kernel$", name)
    return tree.map_named(lambda name, _: "muon" if inside(name) else "adam", params)


def _muon() -> optax.GradientTransformation:
    """Momentum, orthogonalised (kellerjordan.github.io/posts/muon) and brought to the size of
    AdamW's updates (arXiv:2502.16982), so that one learning rate serves both."""
    axes = lambda leaf: contrib.MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1)
    resize = lambda leaf: leaf * (0.2 * max(leaf.shape[-2:]) ** 0.5)
    return optax.chain(
        contrib.scale_by_muon(weight_dimension_numbers=lambda leaves: jax.tree.map(axes, leaves)),
        optax.stateless(lambda updates, _: jax.tree.map(resize, updates)),
    )


def _kept_as(dtype: str, inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner`, computed in float32; its moments `mu` and `nu` lie in `dtype` between steps."""

    def cast(state: optax.OptState, dtype: str) -> optax.OptState:
        moment = re.compile(r"(^|/)(mu|nu)(/|$)")
        return tree.map_named(
            lambda name, leaf: leaf.astype(dtype) if moment.search(name) else leaf, state
        )

    def update(
        updates: Params, state: optax.OptState, params: Params | None = None
    ) -> tuple[Params, optax.OptState]:
        updates, state = inner.update(updates, cast(state, "float32"), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(lambda params: cast(inner.init(params), dtype), update)
