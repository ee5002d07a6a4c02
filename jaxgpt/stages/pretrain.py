"""Pretraining: predict the next token of plain text."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxgpt import files, scoring
from jaxgpt.config import DataConfig, ModelConfig, PretrainConfig
from jaxgpt.convert.load import Loaded
from jaxgpt.data import batches, rows, token_files
from jaxgpt.data import tokenizer as tokenizers
from jaxgpt.data.rows import Paths
from jaxgpt.machine import processes
from jaxgpt.train import Stage, spec
from jaxgpt.types import Carry, CarryFn, Params


def begin(cfg: PretrainConfig) -> Loaded:
    """A random network of the asked shape, which reads what the text was tokenised with."""
    tokenizer = tokenizers.load(tokenise(cfg))
    model = replace(cfg.model, vocab_size=cfg.model.vocab_size or tokenizer.vocab_size)
    return Loaded(model, None, tokenizer)


def tokenise(cfg: PretrainConfig) -> str:
    """Makes token files of the text, if that is still to be done; the tokenizer's name."""
    data, run = cfg.data, files.path(cfg.run)
    name = str(run / "tokenizer.json") if cfg.init else data.tokenizer
    for path, directory in zip(data.mixture or [data.path], _token_paths(cfg), strict=True):
        if directory != path:
            with processes.first_process_first(str(directory)):
                _tokenise(path, directory, name, data)
        # The first one decides for all, unless the user has.
        name = name or token_files.open_tokens(directory).tokenizer
    if not name:
        raise ValueError(
            f"data.tokenizer is empty, and {data.path} does not say what made it; set it"
        )
    return name


def _tokenise(path: Paths, directory: str | Path, tokenizer: str, data: DataConfig) -> None:
    column = data.columns.get("text", "text")
    try:
        token_files.prepare(path, directory, tokenizer, data.vocab_size, data.val_fraction, column)
    except ValueError as error:
        # Of a file that the user named, not of another setting.
        if str(error).startswith(tuple(rows.names(path))):
            raise ValueError(f"data.path={error}; give a text file or folder") from None
        raise


def vocab_size(cfg: PretrainConfig) -> int:
    """The size of the vocabulary that `begin` will come to, before any text is read."""
    if cfg.data.tokenizer:
        return tokenizers.load(cfg.data.tokenizer).vocab_size
    for path in cfg.data.mixture or [cfg.data.path]:
        if token_files.is_tokens(path):
            return token_files.open_tokens(path).vocab_size or cfg.data.vocab_size
    return cfg.data.vocab_size


def objective(cfg: PretrainConfig, params: Params) -> Stage:
    """What is trained, towards what: the next token of every text; `params` may be shapes."""
    biased = cfg.model.num_experts > 0 and cfg.model.balance == "bias"
    return Stage(
        params={"policy": params},
        trainable="^policy/",
        loss=scoring.next_token(cfg),
        batch=spec(
            batches.kinds(cfg.data.documents), cfg.train.batch_size, cfg.model.context_length
        ),
        carry={"router_bias": _no_bias(cfg.model)} if biased else {},
        after_step=_move_bias(cfg.model.balance_weight) if biased else None,
    )


def data(cfg: PretrainConfig, start: Loaded) -> Stage:
    """The objective with its batches, from the token files."""
    if cfg.init:  # else `begin` has done it
        tokenise(cfg)
    weights = list(cfg.data.mixture.values()) or [1.0]
    windows = batches.windows(
        dict(zip(map(str, _token_paths(cfg)), weights, strict=True)),
        start.tokenizer,
        cfg.train.batch_size,
        cfg.model.context_length,
        cfg.seed,
        cfg.data.documents,
        cfg.data.cache,
    )
    data = scoring.on_rows(cfg, windows, windows, scoring.held_out(cfg))
    return objective(cfg, start.params)._replace(**data)


def _token_paths(cfg: PretrainConfig) -> list[str | Path]:
    """Where the token files of every `--data.path` are: as given, or in the run's own folder."""
    paths = list(cfg.data.mixture) or [cfg.data.path]
    own = files.path(cfg.run) / "data"
    return [path if token_files.is_tokens(path) else own / str(n) for n, path in enumerate(paths)]


def _no_bias(model: ModelConfig) -> np.ndarray:
    return np.zeros((model.num_layers - model.dense_layers, model.num_experts), np.float32)


def _move_bias(speed: float) -> CarryFn:
    """Raises the selection bias of experts with less than an even load (arXiv:2408.15664)."""

    def after_step(carry: Carry, metrics: Mapping[str, Any]) -> Carry:
        load_LE, even_LE = metrics["router/load"]
        return {"router_bias": carry["router_bias"] + speed * jnp.sign(even_LE - load_LE)}

    return after_step
