"""Any model on disk: a run directory, a Hugging Face directory, a GGUF or a llama2.c file."""

import tempfile
from pathlib import Path
from typing import NamedTuple

from jaxgpt import rundir
from jaxgpt.config import ModelConfig
from jaxgpt.convert import gguf, hf, llama2c
from jaxgpt.data import tokenizer as tokenizers
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.types import Params


class Loaded(NamedTuple):
    """A network and what reads and writes its tokens."""

    config: ModelConfig
    params: Params  # NumPy or JAX arrays
    tokenizer: Tokenizer


def load(path: str | Path) -> Loaded:
    """Opens a model by what its path is.

    Raises:
        ValueError: nothing we know, damaged files, or settings that our model does not have.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"checkpoint={path}: does not exist")
    if rundir.is_run(path):
        return Loaded(
            rundir.model_config(path),
            rundir.read_params(path),
            tokenizers.load(str(path / "tokenizer.json")),
        )
    if path.is_dir():
        cfg, params = hf.load(path)
        return Loaded(cfg, params, tokenizers.load(str(path)))
    reader = gguf.load if path.suffix == ".gguf" else llama2c.load
    cfg, params, files = reader(path)
    with tempfile.TemporaryDirectory() as directory:
        for name, content in files.items():
            (Path(directory) / name).write_bytes(content)
        return Loaded(cfg, params, tokenizers.load(directory))
