"""A reward model: one number for an answer, higher for those that people prefer."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt import losses, scoring, sharding
from jaxgpt.config import ModelConfig, RewardConfig
from jaxgpt.convert import chatting
from jaxgpt.convert.load import Loaded
from jaxgpt.data import examples, tuning
from jaxgpt.model import gpt
from jaxgpt.train import Stage, spec
from jaxgpt.types import Array, Batch, Metrics, Params

BINS = 5  # of confidence, when the calibration is measured


def data(cfg: RewardConfig, start: Loaded) -> Stage:
    """The objective with a random scalar head in the place of the vocabulary, and its batches."""
    train, held_out = tuning.pairs(
        cfg.data,
        chatting.chat_format(start),
        examples.row_width(cfg.data.max_tokens, cfg.model.context_length),
        cfg.train.batch_size,
        cfg.seed,
    )
    mesh = jax.sharding.get_mesh()
    stage = objective(cfg, start.params)
    placed = sharding.shardings(mesh, {"reward": stage.params["reward"]})["reward"]
    head = jax.jit(partial(_head, cfg), out_shardings=placed)()

    @jax.jit
    def held_out_metrics(params: Params, batch: Batch) -> Metrics:
        total, weight, metrics = stage.loss(params, batch, jnp.zeros(0))
        reward_B2 = score_pairs(cfg.model, params, batch)
        real_B = (batch["mask"].sum(-1).min(-1) > 0).astype(jnp.float32)
        metrics |= calibration(reward_B2[:, 0] - reward_B2[:, 1], real_B)
        return metrics | {"loss": (total, weight)}

    return stage._replace(
        params=stage.params | {"reward": head},
        **scoring.on_rows(cfg, train, held_out, held_out_metrics),
    )


def objective(cfg: RewardConfig, params: Params) -> Stage:
    """What is trained, towards what; the head, and maybe `params`, are shapes."""

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

    width = examples.row_width(cfg.data.max_tokens, cfg.model.context_length)
    B = cfg.train.batch_size
    return Stage(
        params={"policy": params, "reward": jax.eval_shape(partial(_head, cfg))},
        trainable="^(policy|reward)/",
        loss=loss,
        batch=spec(examples.KINDS, B, 2, width) | spec({"margin": np.float32}, B),
        prompts=None,  # a reward model writes nothing
    )


def score_pairs(cfg: ModelConfig, params: Params, batch: Batch) -> Array:
    """The rewards [B, 2] of both answers of every row, read at their last token.

    Args:
        params: networks `policy`, the body, and `reward`, the head.
    """
    arms = scoring.flatten_arms(batch)
    return scoring.final_reward(cfg, params["policy"], params["reward"], arms).reshape(-1, 2)


def calibration(difference_B: Array, weight_B: Array) -> Metrics:
    """How often the model is right, by how sure it is: its probability that the answer which it
    scores higher is the better one, in BINS equal steps from a half to one.
    """
    sure_B = jax.nn.sigmoid(jnp.abs(difference_B))
    bin_B = jnp.minimum((2 * BINS * (sure_B - 0.5)).astype(jnp.int32), BINS - 1)
    metrics: Metrics = {}
    for number in range(BINS):
        inside_B = weight_B * (bin_B == number)
        name, count = f"calibration/{0.5 + (number + 0.5) / (2 * BINS):.2f}", inside_B.sum()
        metrics |= {
            f"{name}/right": ((inside_B * (difference_B > 0)).sum(), count),
            f"{name}/expected": ((inside_B * sure_B).sum(), count),
            f"{name}/share": (count, weight_B.sum()),
        }
    return metrics


def _head(cfg: RewardConfig) -> Params:
    """A random scalar head."""
    hidden_BTD = jnp.zeros((1, 1, cfg.model.model_dim))
    return gpt.ScalarHead(cfg.model).init(jax.random.key(cfg.seed), hidden_BTD)["params"]
