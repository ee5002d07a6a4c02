"""Mixture of experts: a float32 router sends every token to its top-k expert MLPs.

Axes of this file: X groups of experts, J choices of a token, Z choices of all tokens, C slots of
one expert or experts of one group, R rows sorted by expert (kernels/grouped.py), S slots of all
experts. Notes: chapter 4.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxgpt import weights
from jaxgpt.config import ModelConfig
from jaxgpt.kernels import exchange, grouped
from jaxgpt.model.layers import INIT_STD, Linear, parameter, residual_std
from jaxgpt.model.mlp import GatedMlp, Mlp, activate, gated
from jaxgpt.types import Array


class RouterStats(NamedTuple):
    """What a router did with a batch; every field adds up over rows, and padding counts nowhere."""

    balance: Array  # per-sequence balance loss, each sequence weighted by its tokens
    load_E: Array  # assignments per expert
    dropped: Array  # assignments beyond an expert's capacity
    entropy: Array  # of the router's distribution, in nats, summed over tokens
    tokens: Array


class MoE(nn.Module):
    """sum_j gate_j * expert_j(x) over the chosen experts (arXiv:2101.03961, 2401.04088).

    Args of the call:
        bias_E: added to the scores that choose the experts, never to the gates (arXiv:2408.15664).
        segments_BT: 0 marks padding, which the statistics leave out.
    """

    cfg: ModelConfig

    @nn.compact
    def __call__(
        self, x_BTD: Array, bias_E: Array | None, segments_BT: Array | None
    ) -> tuple[Array, RouterStats]:
        cfg, (B, T, D) = self.cfg, x_BTD.shape
        scores_BTE, expert_BTJ, gate_BTJ = Router(cfg, name="router")(x_BTD, bias_E)

        real_BT = jnp.ones((B, T), bool) if segments_BT is None else segments_BT > 0
        kernels = self._expert_kernels(D)
        if cfg.expert_capacity:
            kept_BTJ, slot_BTJ, capacity = assign_slots(cfg, expert_BTJ, real_BT)
            out_BTD = _through_slots(cfg, kernels, x_BTD, gate_BTJ, kept_BTJ, slot_BTJ, capacity)
        else:
            kept_BTJ = jnp.ones(expert_BTJ.shape, bool)
            out_BTD = _dropless(cfg, kernels, x_BTD, gate_BTJ, expert_BTJ)
        if cfg.shared_mlp_dim:
            out_BTD = out_BTD + self._shared(x_BTD).astype(out_BTD.dtype)
        return out_BTD, router_stats(scores_BTE, expert_BTJ, kept_BTJ, real_BT)

    def _shared(self, x_BTD: Array) -> Array:
        """sigmoid(gate(x)) * mlp(x), of an expert that is always visited; or without the gate."""
        cfg = replace(self.cfg, mlp_dim=self.cfg.shared_mlp_dim, bias="none")
        mlp = GatedMlp if cfg.mlp == "gated" else Mlp
        if not cfg.shared_gate:
            return mlp(cfg, name="shared")(x_BTD)
        gate_BT1 = Linear(1, False, cfg.dtype, name="shared_gate")(x_BTD)
        gate_BT1 = jax.nn.sigmoid(gate_BT1.astype(jnp.float32))
        return gate_BT1 * mlp(cfg, name="shared")(x_BTD)

    def _expert_kernels(self, model_dim: int) -> dict[str, Array]:
        cfg = self.cfg
        inward = (cfg.num_experts, model_dim, cfg.mlp_width)
        outward = (cfg.num_experts, cfg.mlp_width, model_dim)
        made = {"up": Kernel(inward, INIT_STD, cfg.expert_bias, name="up")()}
        if cfg.mlp == "gated":
            made["gate"] = Kernel(inward, INIT_STD, cfg.expert_bias, name="gate")()
        made["down"] = Kernel(outward, residual_std(cfg), cfg.expert_bias, name="down")()
        return {f"{name}/{leaf}": x for name, own in made.items() for leaf, x in own.items()}


class Kernel(nn.Module):
    """The kernels of all experts, stacked, under a name of their own, and their biases."""

    shape: tuple[int, ...]
    std: float
    use_bias: bool

    @nn.compact
    def __call__(self) -> dict[str, Array]:
        found = {"kernel": parameter(self, "kernel", self.std, self.shape)}
        if self.use_bias:
            shape = (self.shape[0], self.shape[-1])
            found["bias"] = self.param("bias", nn.initializers.zeros, shape)
        return found


class Router(nn.Module):
    """The distribution over experts [B, T, E], each token's experts [B, T, J] and their gates."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: Array, bias_E: Array | None) -> tuple[Array, Array, Array]:
        cfg = self.cfg
        router_DE = parameter(self, "kernel", INIT_STD, (x_BTD.shape[-1], cfg.num_experts))
        logits_BTE = jnp.einsum("BTD,DE->BTE", x_BTD.astype(jnp.float32), router_DE)
        if cfg.expert_bias:
            own_E = self.param("bias", nn.initializers.zeros, (cfg.num_experts,))
            logits_BTE = logits_BTE + own_E[None, None]
        if cfg.router == "sigmoid":
            # Whoever trained it moved it by the experts' load (arXiv:2408.15664).
            choice_E = self.param("choice_bias", nn.initializers.zeros, (cfg.num_experts,))
            bias_E = choice_E if bias_E is None else bias_E + choice_E
        return route(cfg, logits_BTE, bias_E)


def route(cfg: ModelConfig, logits_BTE: Array, bias_E: Array | None) -> tuple[Array, Array, Array]:
    """What `Router` returns, computed from its logits; `bias_E` changes the choice only."""
    one_by_one = cfg.router == "sigmoid"
    scores_BTE = jax.nn.sigmoid(logits_BTE) if one_by_one else jax.nn.softmax(logits_BTE, axis=-1)
    choose_BTE = scores_BTE if bias_E is None else scores_BTE + bias_E[None, None]
    if cfg.expert_groups > 1:
        choose_BTE = _in_best_groups(cfg, choose_BTE)
    _, expert_BTJ = jax.lax.top_k(choose_BTE, cfg.experts_per_token)
    gate_BTJ = jnp.take_along_axis(scores_BTE, expert_BTJ, axis=-1)
    if cfg.normalize_expert_weights:
        gate_BTJ = gate_BTJ / gate_BTJ.sum(-1, keepdims=True)
    if cfg.expert_scale != 1:
        gate_BTJ = gate_BTJ * cfg.expert_scale
    if one_by_one:  # as a distribution, for the statistics
        scores_BTE = scores_BTE / scores_BTE.sum(-1, keepdims=True)
    return scores_BTE, expert_BTJ, gate_BTJ


def _in_best_groups(cfg: ModelConfig, choose_BTE: Array) -> Array:
    """-inf for the experts of all groups but each token's best."""
    choose_BTXC = choose_BTE.reshape(*choose_BTE.shape[:2], cfg.expert_groups, -1)
    best = 2 if cfg.router == "sigmoid" else 1
    group_BTX = jax.lax.top_k(choose_BTXC, best)[0].sum(-1)
    _, chosen_BTJ = jax.lax.top_k(group_BTX, cfg.groups_per_token)
    kept_BTX = jax.nn.one_hot(chosen_BTJ, cfg.expert_groups).sum(2) > 0
    return jnp.where(kept_BTX[..., None], choose_BTXC, -jnp.inf).reshape(choose_BTE.shape)


def router_stats(
    scores_BTE: Array, expert_BTJ: Array, kept_BTJ: Array, real_BT: Array
) -> RouterStats:
    """The balance loss, E * sum_e f_e P_e of each sequence (arXiv:2412.19437, eq. 17), and counts.

    f_e is the share of assignments, P_e the mean score; 1 is perfect balance. Taken over whole
    batches it would depend on how the batch is cut into micro-batches.
    """
    num_experts, num_choices = scores_BTE.shape[-1], expert_BTJ.shape[-1]
    real_BT1 = real_BT[..., None].astype(jnp.float32)
    load_BE = jax.nn.one_hot(expert_BTJ, num_experts).sum(2)
    load_BE = (load_BE * real_BT1).sum(1)
    tokens_B = real_BT1.sum((1, 2))
    share_BE = load_BE / jnp.maximum(tokens_B * num_choices, 1)[:, None]
    score_BE = (scores_BTE * real_BT1).sum(1)  # P_e times the tokens
    entropy_BT = -(scores_BTE * jnp.log(scores_BTE + 1e-20)).sum(-1)
    return RouterStats(
        balance=num_experts * (jax.lax.stop_gradient(share_BE) * score_BE).sum(),
        load_E=load_BE.sum(0),
        dropped=(~kept_BTJ & real_BT[..., None]).sum().astype(jnp.float32),
        entropy=(entropy_BT * real_BT).sum(),
        tokens=tokens_B.sum(),
    )


def assign_slots(cfg: ModelConfig, expert_BTJ: Array, real_BT: Array) -> tuple[Array, Array, int]:
    """A slot for every choice, first come first served along each row; (kept, slot, capacity)."""
    B, T, J = expert_BTJ.shape
    capacity = math.ceil(cfg.expert_capacity * T * J / cfg.num_experts)
    wanted_BCE = jax.nn.one_hot(expert_BTJ.reshape(B, T * J), cfg.num_experts, dtype=jnp.int32)
    wanted_BCE = wanted_BCE * jnp.repeat(real_BT, J, axis=1)[..., None]
    before_BCE = jnp.cumsum(wanted_BCE, axis=1) - wanted_BCE
    place_BTJ = (before_BCE * wanted_BCE).sum(-1).reshape(B, T, J)
    kept_BTJ = (place_BTJ < capacity) & real_BT[..., None]
    return kept_BTJ, expert_BTJ * capacity + place_BTJ, capacity


def _dropless(
    cfg: ModelConfig, kernels: dict[str, Array], x_BTD: Array, gate_BTJ: Array, expert_BTJ: Array
) -> Array:
    if exchange.are_many():
        own = _dropless_on_one_device if exchange.is_needed() else _dropless
        return exchange.over_devices(partial(own, cfg), kernels, x_BTD, gate_BTJ, expert_BTJ)
    x_AD = x_BTD.reshape(-1, x_BTD.shape[-1])
    layout = grouped.group_rows(expert_BTJ.reshape(len(x_AD), -1), cfg.num_experts)
    rows_RD = _grouped(cfg, kernels, grouped.gather(x_AD, layout), layout)
    out_AD = grouped.combine(rows_RD, gate_BTJ.reshape(len(x_AD), -1), layout)
    return out_AD.reshape(x_BTD.shape)


def _dropless_on_one_device(
    cfg: ModelConfig, kernels: dict[str, Array], x_BTD: Array, gate_BTJ: Array, expert_BTJ: Array
) -> Array:
    """Its tokens, for all experts, through its experts, for all tokens."""
    x_AD = x_BTD.reshape(-1, x_BTD.shape[-1])
    leaving = grouped.group_rows(expert_BTJ.reshape(len(x_AD), -1), cfg.num_experts, block=1)
    journey = exchange.plan(leaving.group_sizes_E, len(leaving.choice_R))
    rows_RD = exchange.send(grouped.gather(x_AD, leaving), journey)
    num_here = jax.tree.leaves(kernels)[0].shape[0]
    layout = grouped.group_rows(journey.expert_R[:, None], num_here)
    unfilled_E = layout.group_sizes_E.at[-1].add(-journey.num_filling)
    layout = layout._replace(group_sizes_E=unfilled_E)
    out_RD = _grouped(cfg, kernels, grouped.gather(rows_RD, layout), layout)
    back_RD = grouped.combine(out_RD, jnp.ones((len(rows_RD), 1), out_RD.dtype), layout)
    done_ZD = exchange.fetch(back_RD, journey)
    out_AD = grouped.combine(done_ZD, gate_BTJ.reshape(len(x_AD), -1), leaving)
    return out_AD.reshape(x_BTD.shape)


def _grouped(
    cfg: ModelConfig, kernels: dict[str, Array], rows_RD: Array, layout: grouped.Layout
) -> Array:
    def matmul(rows: Array, name: str) -> Array:
        y_RF = weights.grouped_matmul(rows, kernels[f"{name}/kernel"], layout)
        bias_EF = kernels.get(f"{name}/bias")
        if bias_EF is None:
            return y_RF
        # A product, since the gradient of a gather would add up in no fixed order.
        visits_RE = jax.nn.one_hot(layout.expert_R, len(bias_EF))
        bias_RF = jnp.matmul(visits_RE, bias_EF, precision="highest")
        return (y_RF + bias_RF).astype(y_RF.dtype)

    return _expert(cfg, rows_RD, matmul)


def _through_slots(
    cfg: ModelConfig,
    kernels: dict[str, Array],
    x_BTD: Array,
    gate_BTJ: Array,
    kept_BTJ: Array,
    slot_BTJ: Array,
    capacity: int,
) -> Array:
    """Static shapes [B, E, C] for expert parallelism; a dropped token keeps its residual only."""
    if exchange.are_many():
        travel = partial(_through_slots, cfg, capacity=capacity)
        return exchange.over_devices(travel, kernels, x_BTD, gate_BTJ, kept_BTJ, slot_BTJ)
    B, T, D = x_BTD.shape
    num_slots = cfg.num_experts * capacity
    slot_BC = jnp.where(kept_BTJ, slot_BTJ, num_slots).reshape(B, -1)  # out of range: dropped
    x_BCD = jnp.repeat(x_BTD, gate_BTJ.shape[-1], axis=1)
    put = jax.vmap(lambda slot_C, x_CD: jnp.zeros((num_slots, D), x_CD.dtype).at[slot_C].add(
        x_CD, mode="drop"
    ))  # fmt: skip
    slots_BECD = put(slot_BC, x_BCD).reshape(B, cfg.num_experts, capacity, D)

    def matmul(rows_BECD: Array, name: str) -> Array:
        y_BECF = weights.batched_matmul(rows_BECD, kernels[f"{name}/kernel"])
        bias_EF = kernels.get(f"{name}/bias")
        if bias_EF is None:
            return y_BECF
        return (y_BECF + bias_EF[None, :, None]).astype(y_BECF.dtype)

    out_BECD = _expert(cfg, exchange.swap(slots_BECD, outward=True), matmul)
    out_BSD = exchange.swap(out_BECD, outward=False).reshape(B, num_slots, D)
    take = jax.vmap(lambda out_SD, slot_C: out_SD.at[slot_C].get(mode="fill", fill_value=0))
    chosen_BTJD = take(out_BSD, slot_BC).reshape(B, T, -1, D)
    return jnp.einsum("BTJD,BTJ->BTD", chosen_BTJD, gate_BTJ.astype(chosen_BTJD.dtype))


def _expert(cfg: ModelConfig, rows: Array, matmul: Callable[[Array, str], Array]) -> Array:
    """The experts' MLP, with `matmul` giving every row to its own expert's kernel and bias."""
    up = matmul(rows, "up")
    is_gated = cfg.mlp == "gated"
    hidden = gated(cfg, matmul(rows, "gate"), up) if is_gated else activate(cfg, up)
    return matmul(hidden, "down")
