"""Any model on disk: a run directory, a Hugging Face directory, a GGUF or a llama2.c file."""

import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxgpt import files as paths
from jaxgpt import hub, peft, rundir, tree
from jaxgpt.config import ModelConfig, PeftConfig
from jaxgpt.convert import byte_pairs, gguf, hf, llama2c, peft_hf, spm, tensors, tokenizer_files
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


def load(
    path: str | Path, *, place: Place | None = None, merged: bool = False, stored: bool = False
) -> Loaded:
    """Opens a model by what its path is.

    Args:
        place: see hf.load; what other formats hold is passed through it too.
        merged: adapters become part of their base; otherwise they stand beside it.
        stored: a GGUF file's kernels stay in its blocks (`kernels.blocks`).

    Raises:
        ValueError: nothing we know, damaged files, or settings that our model does not have.
    """
    path = paths.path(hub.find("checkpoint", path))
    if not path.exists():
        raise ValueError(f"checkpoint={path}: does not exist; a model on the Hub is named org/name")
    exported = (path / "config.json").is_file() and not peft_hf.is_adapter(path)
    if not paths.is_local(path) and not rundir.is_run(path) and not exported:
        return _load_copy(path, place, merged, stored)
    if rundir.is_run(path):
        files = own_files(tokenizer_files.read(path))
        params = _placed(_read_run(path, merged), place)
        return _with_tokenizer(rundir.model_config(path), params, files, path)
    if peft_hf.is_adapter(path):
        base = load(peft_hf.base_of(path), merged=True)
        params = peft_hf.load(path, base.config, base.params)
        return base._replace(params=_placed(peft.merge(params) if merged else params, place))
    if path.is_dir():
        _require_model(path)
        cfg, params = hf.load(path, place=place)
        settings = tensors.read_json(path / "config.json")
        return _with_tokenizer(cfg, params, tokenizer_files.read(path), path, settings)
    reader = _reader(path)
    if stored and reader is gguf.load:
        reader = partial(gguf.load, stored=True)
    cfg, params, files = reader(path, place=place)
    return _with_tokenizer(cfg, params, files, path)


def _load_copy(path: Path, place: Place | None, merged: bool, stored: bool) -> Loaded:
    """`load` by way of a copy: weights are mapped into memory, which may outlive their file."""
    parts = re.sub(r"-\d{5}-of-", "-*-of-", path.name)  # a GGUF file may come in several
    with paths.here(path) as copy:
        for pattern in (parts, "tok*.bin") if path.is_file() else ():
            for file in path.parent.glob(pattern):
                with paths.here(file) as beside:
                    beside.replace(copy.with_name(file.name))
        try:
            return load(copy, place=place, merged=merged, stored=stored)
        except ValueError as error:
            raise ValueError(str(error).replace(str(copy), str(path))) from None


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
    found = str(hub.find("checkpoint", path))
    # Of the Hub only the small files are fetched, where they tell it.
    small = found.startswith(hub.SCHEME) and not found.endswith(".gguf")
    path = hub.path(found, weights=False) if small else paths.path(path)
    if rundir.is_run(path):
        return rundir.model_config(path)
    if (path / "config.json").is_file():
        return hf.config_from_hf(tensors.read_json(path / "config.json"))
    return load(path, merged=True).config


def source_of(path: str | Path) -> str | Path | None:
    """The base that an adapter was trained on; None if `path` is no adapter."""
    if peft_hf.is_adapter(path):
        return peft_hf.base_of(path)
    found = rundir.read_base(path) if rundir.is_run(path) else None
    return found and found[0]


def load_with_adapters(
    path: str | Path, adapters: Iterable[str | Path], stored: bool = False
) -> tuple[Loaded, list[Params]]:
    """A base, and the network of each adapter on it; all of them share the base's arrays.

    Args:
        adapters: runs with --peft.kind lora or qlora on this base, or directories that PEFT wrote.

    Raises:
        ValueError: no adapter, one of another base, or bases quantised in different ways.
    """
    runs: dict[Path, PeftConfig] = {}
    places = [paths.path(hub.find("adapter", adapter)) for adapter in adapters]
    for adapter in places:
        if not peft_hf.is_adapter(adapter):
            runs[adapter] = _adapter_settings(adapter, path)
    quantized = {cfg.quantize if cfg.kind == "qlora" else "" for cfg in runs.values()}
    if len(quantized) > 1:
        raise ValueError(f"adapter: {', '.join(map(str, runs))} store their base differently")
    place = peft.place(next(iter(runs.values()))) if runs else None
    # An adapter that was trained on a quantised base wants that one.
    base = load(path, place=place, merged=True, stored=stored and place is None)
    base = base._replace(params=jax.tree.map(jnp.asarray, base.params))
    if runs:  # its conversations have the form that the first of them was taught
        files = own_files(tokenizer_files.read(next(iter(runs))))
        base = _with_tokenizer(base.config, base.params, files, path)

    def beside(adapter: Path) -> Params:
        if adapter not in runs:
            with paths.here(adapter) as copy:
                return peft_hf.load(copy, base.config, base.params)
        return peft.restore(runs[adapter], base.params, tree.flatten(rundir.read_params(adapter)))

    return base, [beside(adapter) for adapter in places]


def _adapter_settings(path: Path, base: str | Path) -> PeftConfig:
    found = rundir.read_base(path) if rundir.is_run(path) else None
    if found is None or found[1].kind == "adapter":
        raise ValueError(
            f"adapter={path}: is neither a run with --peft.kind lora or qlora nor a directory that "
            "PEFT wrote"
        )
    source, cfg = found
    if rundir.fingerprint(source) != rundir.fingerprint(base):
        raise ValueError(f"adapter={path}: was trained on {source}, whose weights are not {base}'s")
    return cfg


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
    name: str | Path,
    settings: Mapping = MappingProxyType({}),
) -> Loaded:
    """Args:
    name: of what was opened, for error messages.
    settings: config.json, which tells the end token where no other file does.

    Raises:
        ValueError: the tokenizer has ids beyond the embedding, or no vocabulary.
    """
    try:
        files = byte_pairs.complete(spm.complete(files))
        tokenizer = tokenizers.from_files(files, "tokenizer")
        check_vocabulary(cfg, tokenizer)
    except ValueError as error:
        raise ValueError(f"checkpoint={name}: {error}") from None
    own, told = tokenizer_files.own_ids(files), tokenizer_files.special_ids(files)
    end = told.get("eos_token_id", settings.get("eos_token_id"))
    stops = {*end} if isinstance(end, list) else {tokenizer.eos_id if end is None else end}
    if "eos_token_id" in own:  # also where generation_config.json names others
        stops.add(own["eos_token_id"])
    template = tokenizer_files.chat_template(files)
    if template and IM_END in template and IM_END in tokenizer.special:
        stops.add(tokenizer.special[IM_END])
    if not all(0 <= token < cfg.vocab_size for token in stops):
        raise ValueError(
            f"checkpoint={name}: eos_token_id={sorted(stops)}: must lie below the "
            f"{cfg.vocab_size} rows of the embedding; mend generation_config.json"
        )
    begin = _begin_ids(tokenizer, files, told.get("bos_token_id", settings.get("bos_token_id")))
    return Loaded(cfg, params, tokenizer, template, begin, tuple(sorted(stops)), files)


def check_vocabulary(cfg: ModelConfig, tokenizer: Tokenizer) -> None:
    """Refuses a tokenizer with ids for which the network has no embedding; fewer ids are fine."""
    if tokenizer.vocab_size > cfg.vocab_size:
        top = tokenizer.vocab_size - 1
        raise ValueError(
            f"model.vocab_size={cfg.vocab_size}: the tokenizer has ids up to {top} "
            f"({tokenizer.decode([top])!r}); use 0 to take its size in a new model, enlarge a "
            "trained one (transformers' resize_token_embeddings), or take its own tokenizer"
        )


def _begin_ids(tokenizer: Tokenizer, files: dict[str, bytes], bos: int | None) -> tuple[int, ...]:
    """What transformers puts before a text: as tokenizer.json says, else tokenizer_config.json."""
    if isinstance(tokenizer, HuggingFace):
        text = tokenizer.engine.encode("a", add_special_tokens=True)
        added = zip(text.ids, text.special_tokens_mask, strict=True)
        # What is added behind the text, such as </s>, is no beginning.
        if own := tuple(i for i, _ in itertools.takewhile(lambda pair: pair[1], added)):
            return own
    told = json.loads(files.get("tokenizer_config.json", b"{}"))
    return (bos,) if told.get("add_bos_token") and bos is not None else ()


def _special(files: dict[str, bytes]) -> set[str]:
    added = json.loads(files.get("tokenizer.json", b"{}")).get("added_tokens", [])
    return {token["content"] for token in added}
