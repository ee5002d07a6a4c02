"""GRPO and its relatives: of several answers to one prompt, the better ones become likelier.

Dr. GRPO, DAPO, RLOO and REINFORCE++ are settings of the same loss (GrpoConfig). An answer that was
cut off counts as any other, by what its rule says of it, unless rollout.truncated is mask.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt import policy_losses, scoring, tasks
from jaxgpt.config import GrpoConfig
from jaxgpt.convert import chatting
from jaxgpt.convert.load import Loaded
from jaxgpt.episodes import Writer
from jaxgpt.rollouts import Rollouts, Rows, from_task, minibatch
from jaxgpt.train import Stage
from jaxgpt.types import Array, Batch, Carry, Metrics, Params


def data(cfg: GrpoConfig, start: Loaded) -> Stage:
    """The objective with its rollouts: the policy\'s answers to a task\'s problems."""
    task = tasks.configured(cfg.data)
    writer = Writer(cfg.model, chatting.chat_format(start), start.stop_ids)
    rollouts = Rollouts(
        cfg, cfg.rollout, writer, from_task(task, False), jax.jit(partial(score, cfg)),
        partial(advantages, cfg), _kept(cfg), cfg.resample,
    )  # fmt: skip
    return objective(cfg, start.params)._replace(
        next_batch=rollouts,
        evaluate=partial(
            rollouts.evaluate, from_task(task, True), cfg.eval.batches * cfg.train.batch_size
        ),
    )


def objective(cfg: GrpoConfig, params: Params) -> Stage:
    """What is trained, towards what; `params` may be shapes."""
    networks = {"policy": params} | ({"reference": params} if cfg.kl else {})
    return Stage(
        params=networks,
        trainable="^policy/",
        loss=partial(loss, cfg),
        batch=minibatch(cfg, _kept(cfg)),
        updates_per_rollout=cfg.rollout.updates,
        skips=True,
    )


def _kept(cfg: GrpoConfig) -> list[str]:
    """What a rollout knows of every token beside the token."""
    return ["logprobs", "advantages", *(["reference"] if cfg.kl else [])]


def score(cfg: GrpoConfig, params: Params, batch: Batch) -> dict[str, Array]:
    """Log-probabilities of the policy before it learns from the rows, and of the reference."""
    networks = {"logprobs": "policy"} | ({"reference": "reference"} if cfg.kl else {})
    return {name: token_scores(cfg, params[own], batch)[0] for name, own in networks.items()}


def token_scores(cfg: GrpoConfig, params: Params, batch: Batch) -> tuple[Array, Array]:
    """log p of the targets, as they were drawn, and entropy; without dropout."""
    hidden_BTD = scoring.run(cfg.model, params, batch).hidden_BTD
    return scoring.token_scores(
        cfg.model, params, hidden_BTD, batch, cfg.rollout.temperature, cfg.train.loss_chunk
    )


def advantages(cfg: GrpoConfig, rows: Rows, carry: Carry) -> tuple[Rows, dict[str, float]]:
    """One number for all tokens of an answer."""
    rewards_GP = rows["reward"].reshape(-1, cfg.rollout.samples)
    advantages_GP = np.asarray(policy_losses.group_advantages(rewards_GP, cfg.baseline))
    return {"advantages": advantages_GP.reshape(-1, 1) * rows["mask"]}, {}


def loss(
    cfg: GrpoConfig, params: Params, batch: Batch, rng_B: Array
) -> tuple[Array, Array, Metrics]:
    """The clipped policy loss of a minibatch."""
    logprobs_BT, entropy_BT = token_scores(cfg, params["policy"], batch)
    old_BT, mask_BT = batch["logprobs"], batch["mask"]
    change_BT = logprobs_BT - old_BT
    if cfg.ratio == "sequence":
        change_BT = jnp.broadcast_to((change_BT * mask_BT).sum(-1, keepdims=True), mask_BT.shape)
    loss_BT, clipped_BT = policy_losses.clipped_policy_loss(
        change_BT, batch["advantages"], cfg.clip_low, cfg.clip_high
    )
    loss_BT -= cfg.entropy * entropy_BT
    tokens = mask_BT.sum()
    mean = lambda x_BT: ((x_BT * mask_BT).sum(), tokens)
    metrics = {
        "policy/entropy": mean(entropy_BT),
        "policy/clip_fraction": mean(clipped_BT),
        "policy/kl_of_update": mean(policy_losses.kl(old_BT, logprobs_BT, "k3")),
    }
    if cfg.kl:
        kl_BT = policy_losses.kl(logprobs_BT, batch["reference"], "k3")
        loss_BT += cfg.kl * kl_BT
        metrics["policy/kl"] = mean(kl_BT)
    weights_BT, weight = policy_losses.token_weights(
        mask_BT, cfg.normalize, cfg.rollout.max_new_tokens
    )
    return jnp.where(weights_BT > 0, loss_BT * weights_BT, 0.0).sum(), weight, metrics
