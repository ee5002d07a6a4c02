"""What stages and evaluations ask of a network: losses and log-probabilities on a batch."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt import files, kernels, losses, sharding
from jaxgpt.config import ModelConfig, RunConfig
from jaxgpt.data.batches import Batches
from jaxgpt.data.examples import Examples
from jaxgpt.model import gpt
from jaxgpt.model.moe import RouterStats
from jaxgpt.types import Array, Batch, Carry, LossFn, Metrics, Params


def run(
    cfg: ModelConfig,
    params: Params,
    batch: Batch,
    rng_B: Array | None = None,
    carry: Carry | None = None,
) -> gpt.Output:
    """Hidden states of a batch's `tokens`, with its `positions` and `segments` if it has them."""
    return gpt.apply(
        cfg,
        params,
        batch["tokens"],
        positions_BT=batch.get("positions"),
        segments_BT=batch.get("segments"),
        rng_B=rng_B if cfg.dropout else None,
        bias_LE=(carry or {}).get("router_bias"),
    )


def next_token_loss(
    cfg: ModelConfig,
    params: Params,
    batch: Batch,
    rng_B: Array | None = None,
    carry: Carry | None = None,
    **options: Any,
) -> tuple[Array, Array, Metrics]:
    """Cross-entropy of `targets` where `mask` is set: (sum, number of targets, metrics).

    The experts' balance loss is added with the weight of every token, so that the one division
    by the number of targets leaves it in proportion.

    Args:
        options: z_loss, label_smoothing and chunk of `kernels.cross_entropy`.
    """
    output = run(cfg, params, batch, rng_B, carry)
    mask_BT = batch["mask"].astype(jnp.float32)
    result = kernels.cross_entropy(
        output.hidden_BTD, gpt.head(params), batch["targets"], mask_BT,
        softcap=cfg.logit_softcap, **options,
    )  # fmt: skip
    # A sum and its weight, not a mean: train.make_step adds both over micro-batches and devices,
    # and divides once. A mean of means would weigh a short batch as much as a long one.
    weight = mask_BT.sum()
    metrics = {"nll": (result.nll, weight), "accuracy": (result.correct, weight)}
    loss = result.loss
    if output.router is not None:
        metrics |= router_metrics(cfg, output.router)
        if cfg.balance == "loss":
            loss = loss + cfg.balance_weight * output.router.balance.mean()
    return loss, weight, metrics


def next_token(cfg: RunConfig) -> LossFn:
    """`next_token_loss` of the policy as pretraining and fine-tuning minimise it."""
    options = {
        "z_loss": cfg.train.z_loss,
        "label_smoothing": cfg.train.label_smoothing,
        "chunk": cfg.train.loss_chunk,
    }

    def loss(params: Params, batch: Batch, rng_B: Array) -> tuple[Array, Array, Metrics]:
        return next_token_loss(
            cfg.model, params["policy"], batch, rng_B, params["carry"], **options
        )

    return loss


def held_out(cfg: RunConfig) -> Callable[[Params, Batch], Metrics]:
    """Loss and accuracy per held-out token, compiled; what `evaluate` takes."""

    @jax.jit
    def metrics(params: Params, batch: Batch) -> Metrics:
        _, _, found = next_token_loss(
            cfg.model, params["policy"], batch, carry=params["carry"], chunk=cfg.train.loss_chunk
        )
        return {"loss": found["nll"], "accuracy": found["accuracy"]}

    return metrics


def answer_logprobs(
    cfg: ModelConfig, params: Params, batch: Batch, chunk: int = 1024
) -> tuple[Array, Array]:
    """log p of the targets of every row where `mask` is set, and how many those are."""
    hidden_BTD = run(cfg, params, batch).hidden_BTD
    logprobs_BT, _ = kernels.logprobs_and_entropy(
        hidden_BTD, gpt.head(params), batch["targets"], chunk=chunk, softcap=cfg.logit_softcap
    )
    return losses.sequence_logprobs(logprobs_BT, batch["mask"])


def token_scores(
    cfg: ModelConfig, params: Params, hidden_BTD: Array, batch: Batch, temperature: float = 1.0,
    chunk: int = 1024,
) -> tuple[Array, Array]:  # fmt: skip
    """log p of every target and the entropy of the distribution it comes from, each [B, T].

    Args:
        hidden_BTD: what `run` makes of the batch.
    """
    targets_BT = batch["targets"]
    scores = kernels.logprobs_and_entropy(
        hidden_BTD.reshape(-1, cfg.model_dim), gpt.head(params), targets_BT.reshape(-1),
        chunk=chunk, temperature=temperature, softcap=cfg.logit_softcap,
    )  # fmt: skip
    logprobs_BT, entropy_BT = (x_A.reshape(targets_BT.shape) for x_A in scores)
    return logprobs_BT, entropy_BT


def scalars(cfg: ModelConfig, head: Params, hidden_BTD: Array) -> Array:
    """A value or a reward at every position; `head` has a `score`."""
    own = {"params": {"score": head["score"]}}
    return gpt.ScalarHead(cfg).apply(own, hidden_BTD)  # type: ignore[return-value]


def final_reward(cfg: ModelConfig, body: Params, head: Params, batch: Batch) -> Array:
    """The reward [B] of every row, read at its last token by its length."""
    hidden_BTD = run(cfg, body, batch).hidden_BTD
    length_B = (batch["segments"] > 0).sum(
        -1
    )  # by length, so that the side of padding is no matter
    last_B11 = jnp.maximum(length_B, 1)[:, None, None] - 1
    last_B1D = jnp.take_along_axis(hidden_BTD, last_B11, axis=1)
    return scalars(cfg, head, last_B1D)[:, 0]


def flatten_arms(batch: Batch) -> Batch:
    """[B, A, T] -> [B * A, T]: every sequence of an item its own row."""
    return {
        name: array.reshape(-1, array.shape[-1]) for name, array in batch.items() if array.ndim == 3
    }


def on_rows(
    cfg: RunConfig, train: Batches, held_out: Batches, fn: Callable[[Params, Batch], Metrics]
) -> dict[str, Any]:
    """What a Stage knows of its data: every step's batch, and `fn` of the held-out rows, if any."""
    place = partial(sharding.place_rows, jax.sharding.get_mesh(), train.batch_size)
    measure = partial(evaluate, fn, held_out, cfg.eval.batches)
    return {
        "next_batch": lambda params, carry, step: place(partial(train.rows, step)),
        "evaluate": measure if held_out.num_held_out() else None,
    }


def evaluate(
    fn: Callable[[Params, Batch], Metrics], rows: Batches, limit: int, params: Params
) -> dict[str, float]:
    """Each metric of `fn`, which should be compiled, over the held-out rows in order.

    Args:
        limit: of batches; 0: all.
    """
    place = partial(sharding.place_rows, jax.sharding.get_mesh(), rows.batch_size)
    batches = (
        place(partial(rows.held_out, index, limit=limit))
        for index in range(rows.num_held_out(limit))
    )
    totals = jax.device_get([fn(params, batch) for batch in batches])
    added = jax.tree.map(lambda *parts: np.sum(parts, axis=0), *totals) if totals else {}
    return {
        f"val/{name}" if "/" in name else name: float(total / weight)
        for name, (total, weight) in added.items()
        if weight
    }


def precompute(
    directory: Path,
    key: str,
    fn: Callable[[Params, Batch], dict[str, Array]],
    params: Params,
    rows: Examples,
) -> Examples:
    """The rows with what a frozen network says of them, computed once and kept in `directory`.

    Args:
        key: what `fn` and `params` are; the rows' own hash is added.

    Raises:
        ValueError: the directory was made for another network or other rows.
    """
    key = f"{key}, rows {rows.fingerprint}"
    done = directory / "key.txt"
    if not done.is_file():
        with files.staged(directory, last=done.name, over=True) as folder:
            _compute(folder, fn, params, rows)
            if jax.process_index() == 0:
                (folder / done.name).write_text(key)
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(str(directory))
    if done.read_text() != key:
        raise ValueError(f"{directory}: is of another network or other data; delete it")
    with files.here(directory) as folder:  # what is mapped stays when its folder goes
        found = {f.stem: np.load(f, mmap_mode="r") for f in sorted(folder.glob("*.npy"))}
    return replace(rows, numbers=rows.numbers | found)


def _compute(
    directory: Path, fn: Callable[[Params, Batch], dict[str, Array]], params: Params, rows: Examples
) -> None:
    mesh = jax.sharding.get_mesh()
    whole = jax.jit(fn, out_shardings=sharding.replicated(mesh))  # every process can read that
    place = partial(sharding.place_rows, mesh, rows.batch_size)
    arrays: dict[str, np.memmap] = {}
    directory.mkdir(parents=True, exist_ok=True)
    for index in range(rows.num_held_out()):
        found = whole(params, place(partial(rows.held_out, index)))
        if jax.process_index() > 0:
            continue
        first = index * rows.batch_size
        for name, array in jax.device_get(found).items():
            if name not in arrays:
                shape = (len(rows.items), *array.shape[1:])
                arrays[name] = np.lib.format.open_memmap(
                    directory / f"{name}.npy", "w+", array.dtype, shape
                )
            left = len(rows.items) - first
            arrays[name][first : first + len(array)] = array[:left]
    for array in arrays.values():
        array.flush()


def router_metrics(cfg: ModelConfig, stats: RouterStats) -> Metrics:
    """Means over layers; `load` is each expert's share of an even share, 1 being balance."""
    tokens = stats.tokens.sum()
    assignments = tokens * cfg.experts_per_token
    even_LE = jnp.broadcast_to(
        stats.tokens[:, None] * cfg.experts_per_token / cfg.num_experts, stats.load_E.shape
    )
    return {
        "router/balance": (stats.balance.sum(), tokens),
        "router/entropy": (stats.entropy.sum(), tokens),
        "router/dropped": (stats.dropped.sum(), assignments),
        "router/load": (stats.load_E, even_LE),
    }
