"""A reward model: one number for an answer, higher for those that people prefer."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt import losses, scoring, sharding
from jaxgpt.config import ModelConfig, RewardConfig
from jaxgpt.convert import chatting
from jaxgpt.convert.load import Loaded
from jaxgpt.data import examples, preferences
from jaxgpt.model import gpt
from jaxgpt.train import Stage
from jaxgpt.types import Array, Batch, Metrics, Params


def build(cfg: RewardConfig, start: Loaded) -> Stage:
    """Trains the network with a scalar head in the place of its vocabulary."""
    train, held_out = preferences.pairs(
        cfg.data,
        chatting.chat_format(start),
        examples.row_width(cfg.data.max_tokens, cfg.model.context_length),
        cfg.train.batch_size,
        cfg.seed,
    )
    mesh = jax.sharding.get_mesh()
    place = partial(sharding.place_rows, mesh, cfg.train.batch_size)

    stage = outline(cfg, start.params)
    placed = sharding.shardings(mesh, {"reward": stage.params["reward"]})["reward"]
    head = jax.jit(partial(_head, cfg), out_shardings=placed)()

    @jax.jit
    def held_out_metrics(params: Params, batch: Batch) -> Metrics:
        total, weight, metrics = stage.loss(params, batch, jnp.zeros(0))
        return metrics | {"loss": (total, weight)}

    return stage._replace(
        params=stage.params | {"reward": head},
        next_batch=lambda params, carry, step: place(partial(train.rows, step)),
        evaluate=partial(scoring.evaluate, held_out_metrics, held_out, cfg.eval.batches),
    )


def outline(cfg: RewardConfig, params: Params) -> Stage:
    """The stage without its data: batches are blank, the head and maybe `params` shapes."""

    def loss(params: Params, batch: Batch, rng_B: Array) -> tuple[Array, Array, Metrics]:
        reward_B2 = score_pairs(cfg.model, params, batch)
        chosen_B, rejected_B = reward_B2[:, 0], reward_B2[:, 1]
        margin_B = batch["margin"] if cfg.margin else 0.0
        loss_B = losses.bradley_terry(chosen_B, rejected_B, margin_B, cfg.centering)
        # A row without an answer fills up the last held-out batch.
        weight_B = (batch["mask"].sum(-1).min(-1) > 0).astype(jnp.float32)
        weight = weight_B.sum()
        mean = lambda x_B: ((x_B * weight_B).sum(), weight)
        metrics = {
            "accuracy": mean(chosen_B > rejected_B),
            "reward/chosen": mean(chosen_B),
            "reward/rejected": mean(rejected_B),
            "reward/margin": mean(chosen_B - rejected_B),
        }
        return (loss_B * weight_B).sum(), weight, metrics

    def blank(*_: Any) -> Batch:
        width = examples.row_width(cfg.data.max_tokens, cfg.model.context_length)
        margin_B = np.zeros(cfg.train.batch_size, np.float32)
        return examples.blank(cfg.train.batch_size, width, 2) | {"margin": margin_B}

    return Stage(
        params={"policy": params, "reward": jax.eval_shape(partial(_head, cfg))},
        trainable="^(policy|reward)/",
        loss=loss,
        next_batch=blank,
    )


def score_pairs(cfg: ModelConfig, params: Params, batch: Batch) -> Array:
    """The rewards [B, 2] of both answers of every row, read at their last token.

    Args:
        params: networks `policy`, the body, and `reward`, the head.
    """
    arms = scoring.flatten_arms(batch)
    return scoring.final_reward(cfg, params["policy"], params["reward"], arms).reshape(-1, 2)


def _head(cfg: RewardConfig) -> Params:
    """A random scalar head."""
    hidden_BTD = jnp.zeros((1, 1, cfg.model.model_dim))
    return gpt.ScalarHead(cfg.model).init(jax.random.key(cfg.seed), hidden_BTD)["params"]
