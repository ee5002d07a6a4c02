"""A tiny random model on disk."""

from pathlib import Path

import jax
import pytest

from jaxgpt.config import ModelConfig
from jaxgpt.convert.load import Loaded, own_files
from jaxgpt.data import tokenizer as tokenizers
from jaxgpt.language_model import LanguageModel
from jaxgpt.model import gpt

TINY = ModelConfig(
    vocab_size=260, context_length=1024, num_layers=2, model_dim=24, num_heads=4, num_kv_heads=2,
    mlp_dim=40, mlp="gated", activation="silu", norm="rmsnorm", position="rope",
)  # fmt: skip


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Reads bytes; its weights are large enough for likelihoods to differ."""
    folder = tmp_path_factory.mktemp("serve")
    tokenizers.load("byte").save(folder / "tokenizer.json")
    files = own_files({"tokenizer.json": (folder / "tokenizer.json").read_bytes()})
    tokenizer = tokenizers.load(folder / "tokenizer.json")
    params = jax.tree.map(lambda x: 8 * x, gpt.init(TINY, jax.random.key(1)))
    stops = (tokenizer.eos_id, tokenizer.special["<|im_end|>"])
    parts = Loaded(TINY, params, tokenizer, None, (), stops, files)
    LanguageModel(parts, "tiny").save(folder / "tiny")
    return folder / "tiny"
