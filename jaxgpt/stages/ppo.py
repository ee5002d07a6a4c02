"""PPO: a value network says what was to be expected, and the policy does more of what was better.

The reward of an answer is its rule's, a learnt reward model's, or both; it stands on the answer's
last token. A penalty for leaving the reference stands on every token. An answer that was cut off
counts as any other, unless rollout.truncated is mask.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt import policy_losses, rundir, scoring, sharding, tasks
from jaxgpt.config import ModelConfig, PpoConfig
from jaxgpt.convert import chatting
from jaxgpt.convert.load import Loaded, load
from jaxgpt.episodes import Writer
from jaxgpt.rollouts import Rollouts, Rows, from_task, minibatch
from jaxgpt.train import Stage
from jaxgpt.types import Array, Batch, Carry, Metrics, Params

KEPT = ("logprobs", "reference", "values", "advantages", "returns")  # of every token of a rollout


def data(cfg: PpoConfig, start: Loaded) -> Stage:
    """The objective with its rollouts: the policy\'s answers to a task\'s problems."""
    task = tasks.configured(cfg.data)
    writer = Writer(cfg.model, chatting.chat_format(start), start.stop_ids)
    stage = objective(cfg, start.params)
    params, judge = stage.params | {"value": _value(cfg, start.params)}, None
    if cfg.reward_model:
        judge, params["reward"] = _load_judge(cfg, start)
    reward = jax.jit(partial(learnt_reward, judge)) if judge else None
    rollouts = Rollouts(
        cfg, cfg.rollout, writer, from_task(task, False), jax.jit(partial(score, cfg, judge)),
        partial(advantages, cfg), KEPT,
    )  # fmt: skip
    return stage._replace(
        params=params,
        next_batch=rollouts,
        evaluate=partial(
            rollouts.evaluate,
            from_task(task, True),
            cfg.eval.batches * cfg.train.batch_size,
            reward=reward,
        ),
    )


def objective(cfg: PpoConfig, params: Params) -> Stage:
    """What is trained, towards what; `params` may be shapes.

    A reward model, which is not read, counts as one of the policy's shape.
    """
    value = jax.eval_shape(partial(_value, cfg), params)
    judge = {"reward": jax.eval_shape(partial(_with_head, cfg), params)} if cfg.reward_model else {}
    counters = dict.fromkeys(("update", "stopped", "kl", "answers"), 0.0) | {"kl_weight": cfg.kl}
    return Stage(
        params={"policy": params, "reference": params, "value": value} | judge,
        trainable="^(policy|value)/",
        loss=partial(loss, cfg),
        batch=minibatch(cfg, KEPT),
        # Of NumPy: the devices that a plan is for need not be here.
        carry={name: np.float32(value) for name, value in counters.items()},
        after_step=partial(after_step, cfg),
        updates_per_rollout=cfg.rollout.updates,
        skips=True,
    )


def score(
    cfg: PpoConfig, judge: ModelConfig | None, params: Params, batch: Batch
) -> dict[str, Array]:
    """What the networks say before they learn from the rows."""
    hidden_BTD, values_BT = hidden_and_values(cfg, params, batch)
    options = (cfg.rollout.temperature, cfg.train.loss_chunk)
    token_scores = partial(scoring.token_scores, cfg.model)
    reference_BTD = scoring.run(cfg.model, params["reference"], batch).hidden_BTD
    found = {
        "logprobs": token_scores(params["policy"], hidden_BTD, batch, *options)[0],
        "reference": token_scores(params["reference"], reference_BTD, batch, *options)[0],
        "values": values_BT,
    }
    return found if judge is None else {**found, "learnt": learnt_reward(judge, params, batch)}


def hidden_and_values(cfg: PpoConfig, params: Params, batch: Batch) -> tuple[Array, Array]:
    """The policy's hidden states, and the value expected before each target."""
    hidden_BTD = scoring.run(cfg.model, params["policy"], batch).hidden_BTD
    own_BTD = hidden_BTD
    if cfg.value == "separate":
        own_BTD = scoring.run(cfg.model, params["value"], batch).hidden_BTD
    return hidden_BTD, scoring.scalars(cfg.model, params["value"], own_BTD)


def learnt_reward(judge: ModelConfig, params: Params, batch: Batch) -> Array:
    """The reward model's opinion of whole rows."""
    return scoring.final_reward(judge, params["reward"], params["reward"], batch)


def advantages(cfg: PpoConfig, rows: Rows, carry: Carry) -> tuple[Rows, dict[str, float]]:
    """GAE over the tokens, whitened once the returns are known."""
    mask_BT, kl_weight = rows["mask"], float(carry["kl_weight"])
    rule_weight = float(not cfg.reward_model) if cfg.rule_weight is None else cfg.rule_weight
    reward_B = rule_weight * rows["reward"] + rows.get("learnt", np.float32(0))
    kl_BT = (rows["logprobs"] - rows["reference"]) * mask_BT
    rewards_BT = -kl_weight * kl_BT if cfg.kl_in == "reward" else np.zeros_like(kl_BT)
    last_B = mask_BT.shape[1] - 1 - mask_BT[:, ::-1].argmax(1)
    rewards_BT[np.arange(len(reward_B)), last_B] += reward_B * mask_BT.any(1)
    advantages_BT = policy_losses.gae(rewards_BT, rows["values"], mask_BT, cfg.gamma, cfg.lam)
    returns_BT = advantages_BT + rows["values"] * mask_BT
    explained = policy_losses.explained_variance(rows["values"], returns_BT, mask_BT)
    made = {"advantages": policy_losses.whiten(advantages_BT, mask_BT), "returns": returns_BT}
    measures = {
        "rollout/kl": float(kl_BT.sum(1).mean()),
        "rollout/kl_weight": kl_weight,
        "rollout/explained_variance": float(explained),
    }
    if "learnt" in rows:
        measures["rollout/learnt_reward"] = float(rows["learnt"].mean())
    return {name: np.asarray(array) for name, array in made.items()}, measures


def loss(
    cfg: PpoConfig, params: Params, batch: Batch, rng_B: Array
) -> tuple[Array, Array, Metrics]:
    """The clipped losses of policy and value; of weight zero once the rollout is stopped."""
    carry, mask_BT = params["carry"], batch["mask"] * (1 - params["carry"]["stopped"])
    hidden_BTD, values_BT = hidden_and_values(cfg, params, batch)
    logprobs_BT, entropy_BT = scoring.token_scores(
        cfg.model, params["policy"], hidden_BTD, batch, cfg.rollout.temperature,
        cfg.train.loss_chunk,
    )  # fmt: skip
    old_BT, reference_BT = batch["logprobs"], batch["reference"]
    policy_BT, clipped_BT = policy_losses.clipped_policy_loss(
        logprobs_BT - old_BT, batch["advantages"], cfg.clip_low, cfg.clip_high
    )
    value_BT, value_clipped_BT = policy_losses.clipped_value_loss(
        values_BT, batch["values"], batch["returns"], cfg.value_clip
    )
    loss_BT = policy_BT + cfg.value_weight * value_BT - cfg.entropy * entropy_BT
    if cfg.kl_in == "loss":
        loss_BT += carry["kl_weight"] * policy_losses.kl(logprobs_BT, reference_BT, "k3")
    weight = mask_BT.sum()
    mean = lambda x_BT: (jnp.where(mask_BT > 0, x_BT, 0.0).sum(), weight)
    metrics = {
        "policy/loss": mean(policy_BT),
        "policy/entropy": mean(entropy_BT),
        "policy/clip_fraction": mean(clipped_BT),
        "policy/kl_of_update": mean(policy_losses.kl(old_BT, logprobs_BT, "k3")),
        "value/loss": mean(value_BT),
        "value/clip_fraction": mean(value_clipped_BT),
        # By answer, and of the policy that wrote it.
        "policy/kl": (
            mean(old_BT - reference_BT)[0],
            (mask_BT.sum(-1) > 0).astype(weight.dtype).sum(),
        ),
    }
    return mean(loss_BT)[0], weight, metrics


def after_step(cfg: PpoConfig, carry: Carry, sums: Mapping[str, Any]) -> Carry:
    """Stops a rollout's updates that went too far; moves the weight of KL where it ends."""
    moved, tokens = sums["policy/kl_of_update"]
    kl, answers = (carry[n] + x for n, x in zip(("kl", "answers"), sums["policy/kl"], strict=True))
    ends = carry["update"] + 1 >= cfg.rollout.updates
    far = (moved > cfg.kl_stop * tokens) if cfg.kl_stop else jnp.bool_(False)
    kl_weight = carry["kl_weight"]
    if cfg.kl_target:
        ratio = jnp.clip(kl / jnp.maximum(answers, 1) / cfg.kl_target, 0.5, 2.0)
        kl_weight = jnp.where(ends, jnp.maximum(cfg.kl, kl_weight * ratio), kl_weight)
    return {
        "update": jnp.where(ends, 0.0, carry["update"] + 1),
        "stopped": jnp.where(ends, 0.0, jnp.maximum(carry["stopped"], far)),
        "kl": jnp.where(ends, 0.0, kl),
        "answers": jnp.where(ends, 0.0, answers),
        "kl_weight": kl_weight,
    }


def _value(cfg: PpoConfig, params: Params) -> Params:
    """A head that expects nothing yet, on a copy of the policy or on the policy itself."""
    whole = _with_head(cfg, params)
    return whole if cfg.value == "separate" else {"score": whole["score"]}


def _with_head(cfg: PpoConfig, params: Params) -> Params:
    return {**params, "score": {"kernel": jnp.zeros((cfg.model.model_dim, 1))}}


def _load_judge(cfg: PpoConfig, start: Loaded) -> tuple[ModelConfig, Params]:
    """A reward model's shape, and its body and head as one network."""
    try:
        place = partial(sharding.place, jax.sharding.get_mesh())
        body = load(cfg.reward_model, place=place, merged=True)
        head = rundir.read_params(cfg.reward_model, "reward")
    except ValueError as error:
        raise ValueError(f"reward_model: no run of scripts/reward.py, {error}") from None
    if body.tokenizer.fingerprint != start.tokenizer.fingerprint:
        raise ValueError(f"reward_model={cfg.reward_model}: reads other tokens than the policy")
    return replace(body.config, dropout=0.0), {**body.params, **head}
