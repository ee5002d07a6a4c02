"""A tiny random model on disk, and a server of it that most tests share."""

from pathlib import Path

import jax
import pytest
from serving import TINY, running

from jaxgpt.convert.load import Loaded, own_files
from jaxgpt.data import tokenizer as tokenizers
from jaxgpt.language_model import LanguageModel
from jaxgpt.model import gpt


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


@pytest.fixture(scope="session")
def served(checkpoint):
    """The address and the process of a server, which outlives all that is done to it."""
    flags = ("--slots", "3", "--queue", "200", "--body_seconds", "2", "--prefix_cache", "4")
    with running("--checkpoint", str(checkpoint), *flags) as it:
        yield it
        assert it[1].poll() is None
