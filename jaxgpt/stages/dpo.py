"""Direct preference optimisation and its relatives: DPO, cDPO, IPO, hinge, KTO, ORPO, SimPO."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt import files, losses, scoring, train
from jaxgpt.config import DpoConfig
from jaxgpt.convert import chatting
from jaxgpt.convert.load import Loaded
from jaxgpt.data import examples, tuning
from jaxgpt.data.examples import Examples
from jaxgpt.train import Stage, spec
from jaxgpt.types import Array, Batch, Metrics, Params

ALONE = ("orpo", "simpo")  # losses that look at no reference
ARMS = ("chosen", "rejected")


class Answers(NamedTuple):
    """What a network thinks of the two answers of every row."""

    logprobs_B2: Array  # summed over tokens
    counts_B2: Array  # tokens

    @property
    def mean_B2(self) -> Array:
        return self.logprobs_B2 / jnp.maximum(self.counts_B2, 1)


def data(cfg: DpoConfig, start: Loaded) -> Stage:
    """The objective with its batches of answers."""
    read = tuning.ratings if cfg.loss == "kto" else tuning.pairs
    train_pairs, held_out = read(
        cfg.data,
        chatting.chat_format(start),
        examples.row_width(cfg.data.max_tokens, cfg.model.context_length),
        cfg.train.batch_size,
        cfg.seed,
    )
    if cfg.loss not in ALONE and cfg.reference == "precomputed":
        train_pairs = _with_reference(cfg, start.params, train_pairs, "train")
        held_out = _with_reference(cfg, start.params, held_out, "val")
    stage = objective(cfg, start.params)

    @jax.jit
    def held_out_metrics(params: Params, batch: Batch) -> Metrics:
        total, weight, metrics = stage.loss(params, batch, jnp.zeros(0))
        return metrics | {"loss": (total, weight)}

    return stage._replace(
        **scoring.on_rows(cfg, train_pairs, held_out, held_out_metrics),
        prompts=examples.prompts(held_out, cfg.model.context_length),
    )


def objective(cfg: DpoConfig, params: Params) -> Stage:
    """What is trained, towards what: chosen answers, near a frozen copy; `params` may be shapes."""
    networks = {"policy": params}
    if cfg.loss not in ALONE and cfg.reference == "live":
        networks["reference"] = params

    def loss(params: Params, batch: Batch, rng_B: Array) -> tuple[Array, Array, Metrics]:
        policy = score(cfg, params["policy"], batch)
        if cfg.loss in ALONE:
            reference = Answers(jnp.zeros_like(policy.logprobs_B2), policy.counts_B2)
        elif cfg.reference == "live":
            reference = score(cfg, params["reference"], batch)
        else:
            known_B2 = jnp.stack([batch[f"reference_{arm}"] for arm in ARMS], axis=1)
            reference = Answers(known_B2, policy.counts_B2)
        # A row without an answer fills up the last held-out batch.
        weight_B = (policy.counts_B2.min(1) > 0).astype(jnp.float32)
        if cfg.loss == "kto":
            return _kto(cfg, policy, reference, batch["desirable"], weight_B)
        return _pairs(cfg, policy, reference, weight_B)

    width = examples.row_width(cfg.data.max_tokens, cfg.model.context_length)
    numbers = ["desirable" if cfg.loss == "kto" else "margin"]
    if cfg.loss not in ALONE and cfg.reference == "precomputed":
        numbers += [f"reference_{arm}" for arm in ARMS]
    B = cfg.train.batch_size
    batch = spec(examples.KINDS, B, len(ARMS), width) | spec(dict.fromkeys(numbers, np.float32), B)
    return Stage(params=networks, trainable="^policy/", loss=loss, batch=batch)


def score(cfg: DpoConfig, params: Params, batch: Batch) -> Answers:
    """Both answers of every row, in one pass; without dropout, as the reference."""
    arms = scoring.flatten_arms(batch)
    logprobs_B, counts_B = scoring.answer_logprobs(cfg.model, params, arms, cfg.train.loss_chunk)
    return Answers(logprobs_B.reshape(-1, 2), counts_B.reshape(-1, 2))


def _pairs(
    cfg: DpoConfig, policy: Answers, reference: Answers, weight_B: Array
) -> tuple[Array, Array, Metrics]:
    margin = lambda x_B2: x_B2[:, 0] - x_B2[:, 1]
    ratio_B2 = policy.logprobs_B2 - reference.logprobs_B2
    mean_B2 = policy.mean_B2
    match cfg.loss:
        case "sigmoid":
            loss_B = losses.dpo(margin(ratio_B2), cfg.beta, cfg.label_smoothing)
        case "ipo":
            loss_B = losses.ipo(margin(mean_B2 - reference.mean_B2), cfg.beta)
        case "hinge":
            loss_B = losses.hinge(margin(ratio_B2), cfg.beta)
        case "simpo":
            ratio_B2 = mean_B2
            loss_B = losses.simpo(mean_B2[:, 0], mean_B2[:, 1], cfg.beta, cfg.gamma)
        case _:
            ratio_B2 = mean_B2
            odds_B = losses.orpo(mean_B2[:, 0], mean_B2[:, 1], cfg.beta)
            loss_B = odds_B - mean_B2[:, 0]
    weight = weight_B.sum()
    mean = lambda x_B: ((x_B * weight_B).sum(), weight)
    reward_B2 = cfg.beta * ratio_B2
    metrics = {
        "reward/chosen": mean(reward_B2[:, 0]),
        "reward/rejected": mean(reward_B2[:, 1]),
        "reward/margin": mean(margin(reward_B2)),
        "reward/accuracy": mean(margin(reward_B2) > 0),
        "logprobs/chosen": mean(policy.logprobs_B2[:, 0]),
        "logprobs/rejected": mean(policy.logprobs_B2[:, 1]),
    }
    return (loss_B * weight_B).sum(), weight, metrics


def _kto(
    cfg: DpoConfig, policy: Answers, reference: Answers, desirable_B: Array, weight_B: Array
) -> tuple[Array, Array, Metrics]:
    """The reference point is a mean over the micro-batch: the one loss that is no plain sum."""
    ratio_B2 = policy.logprobs_B2 - reference.logprobs_B2
    kl = losses.kto_kl(ratio_B2[:, 1])
    loss_B = losses.kto(
        ratio_B2[:, 0], desirable_B, kl, cfg.beta, cfg.desirable_weight, cfg.undesirable_weight
    )
    weight, reward_B = weight_B.sum(), cfg.beta * ratio_B2[:, 0]
    good_B, bad_B = weight_B * desirable_B, weight_B * (1 - desirable_B)
    right_B = (reward_B > cfg.beta * kl) == (desirable_B > 0)
    metrics = {
        "reward/desirable": ((reward_B * good_B).sum(), jnp.maximum(good_B.sum(), 1)),
        "reward/undesirable": ((reward_B * bad_B).sum(), jnp.maximum(bad_B.sum(), 1)),
        "reward/accuracy": ((right_B * weight_B).sum(), weight),
        "kl": (kl * weight, weight),
    }
    return (loss_B * weight_B).sum(), weight, metrics


def _with_reference(cfg: DpoConfig, params: Params, pairs: Examples, name: str) -> Examples:
    """The pairs with the reference's log-probabilities, kept in the run's directory."""

    def known(params: Params, batch: Batch) -> dict[str, Array]:
        logprobs_B2 = score(cfg, params, batch).logprobs_B2
        return {f"reference_{arm}": logprobs_B2[:, index] for index, arm in enumerate(ARMS)}

    directory = files.path(cfg.run) / "reference" / name
    return scoring.precompute(directory, train.fingerprint(params), known, params, pairs)
