"""Tiny random models for the tests of evaluation."""

import dataclasses
from pathlib import Path

import jax

from jaxgpt.config import ModelConfig
from jaxgpt.convert.load import Loaded, own_files
from jaxgpt.data import tokenizer as tokenizers
from jaxgpt.language_model import LanguageModel
from jaxgpt.model import gpt

LLAMA = ModelConfig(
    vocab_size=260, context_length=96, num_layers=2, model_dim=32, num_heads=4, num_kv_heads=2,
    mlp_dim=48, mlp="gated", activation="silu", norm="rmsnorm", position="rope",
)  # fmt: skip


def byte_model(folder: Path, cfg: ModelConfig = LLAMA) -> LanguageModel:
    """Reads bytes; its weights are large enough for likelihoods to differ."""
    tokenizers.load("byte").save(folder / "tokenizer.json")
    files = own_files({"tokenizer.json": (folder / "tokenizer.json").read_bytes()})
    tokenizer = tokenizers.load(folder / "tokenizer.json")
    params = jax.tree.map(lambda x: 4 * x, gpt.init(cfg, jax.random.key(1)))
    return LanguageModel(
        Loaded(cfg, params, tokenizer, None, (), (tokenizer.eos_id,), files), "tiny"
    )


def with_context(lm: LanguageModel, context_length: int) -> LanguageModel:
    cfg = dataclasses.replace(lm.config, context_length=context_length)
    files = lm.loaded.files
    return LanguageModel(
        Loaded(cfg, lm.params, lm.tokenizer, None, (), lm.stop_ids, files), lm.name
    )
