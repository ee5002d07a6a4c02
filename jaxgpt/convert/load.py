"""Any model on disk: a run directory, a Hugging Face directory, a GGUF or a llama2.c file."""

import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from jaxgpt import peft, rundir, tree
from jaxgpt.config import ModelConfig
from jaxgpt.convert import gguf, hf, llama2c, peft_hf, tensors, tokenizer_files
from jaxgpt.convert.table import Place
from jaxgpt.data import chat
from jaxgpt.data import tokenizer as tokenizers
from jaxgpt.data.engines import END_OF_TEXT, HuggingFace
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.types import Params

FILES = ("*.gguf", "*.bin")
PICKLED = (".pt", ".pth", ".ckpt", ".pkl")  # .bin is llama2.c's too
IM_START, IM_END = "<|im_start|>", "<|im_end|>"


class Loaded(NamedTuple):
    """A network, what reads and writes its tokens, and how its texts begin and end."""

    config: ModelConfig
    params: Params  # NumPy or JAX arrays
    tokenizer: Tokenizer
    chat_template: str | None = None  # Jinja
    begin_ids: tuple[int, ...] = ()  # what every text begins with, such as <s>
    stop_ids: tuple[int, ...] = ()  # tokens that end a text or a turn
    files: Mapping[str, bytes] = MappingProxyType({})  # the tokenizer's, as Hugging Face names them


def load(path: str | Path, *, place: Place | None = None, merged: bool = False) -> Loaded:
    """Opens a model by what its path is.

    Args:
        place: see hf.load; what other formats hold is passed through it too.
        merged: adapters become part of their base; otherwise they stand beside it.

    Raises:
        ValueError: nothing we know, damaged files, or settings that our model does not have.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"checkpoint={path}: does not exist")
    if rundir.is_run(path):
        files = own_files(tokenizer_files.read(path))
        params = _placed(_read_run(path, merged), place)
        return _with_tokenizer(rundir.model_config(path), params, files)
    if peft_hf.is_adapter(path):
        base = load(peft_hf.base_of(path), merged=True)
        params = peft_hf.load(path, base.config, base.params)
        return base._replace(params=_placed(peft.merge(params) if merged else params, place))
    if path.is_dir():
        _require_model(path)
        cfg, params = hf.load(path, place=place)
        settings = tensors.read_json(path / "config.json")
        return _with_tokenizer(cfg, params, tokenizer_files.read(path), settings)
    cfg, params, files = _reader(path)(path, place=place)
    return _with_tokenizer(cfg, params, files)


def _require_model(path: Path) -> None:
    if (path / "config.json").is_file():
        return
    found = [file.name for pattern in FILES for file in sorted(path.glob(pattern))]
    hint = f"; name a file in it, such as {path / found[0]}" if found else ""
    raise ValueError(
        f"checkpoint={path}: holds neither a run (config.yaml) nor a Hugging Face model "
        f"(config.json){hint}"
    )


def _reader(path: Path) -> Callable[..., tuple[ModelConfig, Params, dict[str, bytes]]]:
    """What reads a single file."""
    with path.open("rb") as file:
        begin = file.read(4)
    if path.suffix == ".safetensors":
        raise ValueError(f"checkpoint={path}: give its directory, where config.json is")
    if begin[:2] == b"PK" or path.suffix in PICKLED:
        raise ValueError(
            f"checkpoint={path}: pickled weights can run code when they are loaded; convert them "
            "to safetensors (transformers' save_pretrained writes it)"
        )
    return gguf.load if begin == b"GGUF" or path.suffix == ".gguf" else llama2c.load


def model_config(path: str | Path) -> ModelConfig:
    """The shape of a model on disk; the weights are read only where nothing else tells it."""
    path = Path(path)
    if rundir.is_run(path):
        return rundir.model_config(path)
    if (path / "config.json").is_file():
        return hf.config_from_hf(tensors.read_json(path / "config.json"))
    return load(path, merged=True).config


def _read_run(path: Path, merged: bool) -> Params:
    """A run's weights, together with those that it builds on."""
    trained, base = rundir.read_params(path), rundir.read_base(path)
    if base is None:
        return trained
    source, cfg = base
    under = load(source, place=peft.place(cfg), merged=True).params
    params = peft.restore(cfg, under, tree.flatten(trained))
    return peft.merge(params) if merged else params


def _placed(params: Params, place: Place | None) -> Params:
    return tree.map_named(place, params) if place else params


def own_files(files: dict[str, bytes]) -> dict[str, bytes]:
    """The files of a tokenizer of ours, with the settings that tokenizer.json cannot hold."""
    if "tokenizer_config.json" in files:
        return files
    special = _special(files)
    known = lambda token: token if token in special else None
    return tokenizer_files.with_settings(
        files,
        eos_token=known(END_OF_TEXT),
        pad_token=known("<|pad|>"),
        chat_template=chat.CHATML if IM_START in special else None,
    )


def _with_tokenizer(
    cfg: ModelConfig,
    params: Params,
    files: dict[str, bytes],
    settings: Mapping = MappingProxyType({}),
) -> Loaded:
    """Args:
    settings: config.json, which tells the end token where no other file does.
    """
    with tempfile.TemporaryDirectory() as directory:
        for name, content in files.items():
            (Path(directory) / name).write_bytes(content)
        tokenizer = tokenizers.load(directory)
    ids = tokenizer_files.special_ids(files)
    end = ids.get("eos_token_id", settings.get("eos_token_id"))
    template = tokenizer_files.chat_template(files)
    stops = {*end} if isinstance(end, list) else {tokenizer.eos_id if end is None else end}
    if template and IM_END in template and IM_END in tokenizer.special:
        stops.add(tokenizer.special[IM_END])
    begin = _begin_ids(tokenizer, files, ids.get("bos_token_id", settings.get("bos_token_id")))
    return Loaded(cfg, params, tokenizer, template, begin, tuple(sorted(stops)), files)


def _begin_ids(tokenizer: Tokenizer, files: dict[str, bytes], bos: int | None) -> tuple[int, ...]:
    """What the tokenizer puts before a text by itself, or is told to put there."""
    told = json.loads(files.get("tokenizer_config.json", b"{}"))
    if isinstance(tokenizer, HuggingFace):
        own = tuple(tokenizer.engine.encode("", add_special_tokens=True).ids)
        if own:
            return own[:1]  # what follows, such as </s>, ends the text
    return (bos,) if told.get("add_bos_token") and bos is not None else ()


def _special(files: dict[str, bytes]) -> set[str]:
    added = json.loads(files.get("tokenizer.json", b"{}")).get("added_tokens", [])
    return {token["content"] for token in added}
