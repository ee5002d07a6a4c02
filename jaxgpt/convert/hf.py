"""Hugging Face model directories: config.json, safetensors and the tokenizer's files."""

import contextlib
import dataclasses
import json
import re
import shutil
import sys
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxgpt import files, tree
from jaxgpt.config import ModelConfig
from jaxgpt.convert import family as families
from jaxgpt.convert import quantized, rope, table, tensors
from jaxgpt.convert import tokenizer_files as side_files
from jaxgpt.convert.deepseek import DEEPSEEK2, DEEPSEEK3, GLM4_LITE
from jaxgpt.convert.family import Family
from jaxgpt.convert.gemma import GEMMA, GEMMA2, GEMMA3
from jaxgpt.convert.gpt2 import GPT2, OPT
from jaxgpt.convert.gpt_oss import GPT_OSS
from jaxgpt.convert.llama import (
    ERNIE45,
    GRANITE,
    LLAMA,
    MINISTRAL,
    MINISTRAL3,
    MISTRAL,
    SEED_OSS,
    SMOLLM3,
)
from jaxgpt.convert.mixtral import MIXTRAL
from jaxgpt.convert.neox import NEOX, STARCODER2
from jaxgpt.convert.olmo import EXAONE4, OLMO2, OLMO3
from jaxgpt.convert.phi import GLM, GLM4, PHI3
from jaxgpt.convert.qwen3 import QWEN2, QWEN2_MOE, QWEN3, QWEN3_MOE, VISION_TEXTS
from jaxgpt.types import Params

FAMILIES = (
    GPT2, LLAMA, MISTRAL, QWEN2, QWEN2_MOE, QWEN3, QWEN3_MOE, MIXTRAL, GRANITE, SMOLLM3, GEMMA,
    GEMMA2, GEMMA3, OLMO2, OLMO3, EXAONE4, NEOX, STARCODER2, MINISTRAL, MINISTRAL3, PHI3,
    ERNIE45, GLM, GLM4, SEED_OSS, GPT_OSS, DEEPSEEK3, DEEPSEEK2, GLM4_LITE, OPT,
)  # fmt: skip
# Directories that hold more than a language model, and the type of that model, if it is unsaid.
COMPOSITE = {
    "gemma3": "gemma3_text", "mistral3": "mistral", "qwen2_vl": "qwen2_vl_text",
    "qwen2_5_vl": "qwen2_5_vl_text", "qwen3_vl": "qwen3_vl_text",
}  # fmt: skip
SEEING = r"^(model\.)?(visual|vision_tower|vision_model|multi_modal_projector)\."  # their tensors
WITHIN = (  # names of the language model in such a directory -> their own
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^(model\.language_model|language_model\.model|language_model)\.", "model."),
)
PRODUCER = {"exported_by": "jaxgpt"}  # in config.json: this directory is ours to replace


def load(
    path: str | Path, *, place: table.Place | None = None, dtype: str = "float32"
) -> tuple[ModelConfig, Params]:
    """The model of a Hugging Face directory, read tensor by tensor.

    Args:
        place: puts a finished parameter, known by its name, where it belongs, such as a mesh;
            default: the first device.
        dtype: of the parameters in memory.

    Raises:
        ValueError: a setting the model does not have, tensors missing or left over, or a
            damaged file.
    """
    path = files.path(path)
    whole = tensors.read_json(path / "config.json")
    settings, stored = _text(whole)
    family = _family(settings)
    cfg = families.read(family, settings)
    if unknown := families.unknown(family, settings):
        print(
            f"warning: {path / 'config.json'}: {', '.join(unknown)}: no settings of a "
            f"{family.model_type}; they change nothing here, as in transformers",
            file=sys.stderr,
        )
    with tensors.Tensors(path, quantized.STORED if stored else ()) as found:
        if whole.get("model_type") in COMPOSITE:
            _pick_text(found)
            if "tie_word_embeddings" not in settings:
                cfg = dataclasses.replace(cfg, tie_embeddings="lm_head.weight" not in found.shapes)
            print(
                f"note: {path}: is a {whole['model_type']}; its language model "
                f"({family.model_type}) is read, and what sees is left out",
                file=sys.stderr,
            )
        source = quantized.Decoded(found, stored) if stored else found
        return cfg, table.read(family.table, cfg, _Canonical(source, family, cfg), place, dtype)


def save(
    path: str | Path,
    cfg: ModelConfig,
    params: Params,
    *,
    tokenizer_files: Mapping[str, bytes] | None = None,
    special_ids: Mapping[str, Any] | None = None,
    dtype: str | None = None,
    shard_bytes: int = tensors.SHARD_BYTES,
) -> None:
    """Writes a directory that transformers' AutoModelForCausalLM opens; whole, or not at all.

    Args:
        tokenizer_files: content by file name, as `tokenizer_files.read` gives it.
        special_ids: bos_token_id, eos_token_id, pad_token_id for the two config files; default:
            what the tokenizer's files tell.
        dtype: of the weights on disk; default: the parameters' own.
    """
    path = Path(path)
    _refuse_foreign(path)
    settings, family = config_to_hf(cfg), _express(cfg)
    cfg, params = _complete(family, cfg, params)
    dtype_of = lambda leaf: tensors.as_dtype(dtype or jnp.dtype(leaf.dtype).name)
    kinds = {dtype_of(leaf).name for leaf in tree.flatten(params).values()}
    if special_ids is None:
        special_ids = side_files.special_ids(dict(tokenizer_files or {}))
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, **special_ids}
    settings |= {"dtype": "float32" if len(kinds) > 1 else kinds.pop(), **ids, **PRODUCER}
    files = {
        "config.json": _json(settings),
        "generation_config.json": _json({k: v for k, v in ids.items() if v is not None}),
        **(tokenizer_files or {}),
    }
    with _replacing(path) as partial:
        for name, content in files.items():
            (partial / name).write_bytes(content)
        sizes = dict(_sizes(family, cfg, params, dtype_of))
        cast = (
            (name, array.astype(dtype_of(array), copy=False))
            for name, array in table.write(family.table, cfg, params)
        )
        tensors.save(partial, cast, sizes, shard_bytes)


def config_from_hf(settings: Mapping[str, Any]) -> ModelConfig:
    """The ModelConfig of a config.json; refuses by name what the model does not have."""
    settings, _ = _text(settings)
    return families.read(_family(settings), settings)


def config_to_hf(cfg: ModelConfig) -> dict[str, Any]:
    """The config.json of the one family that computes the same function."""
    return families.write(_express(cfg), cfg)


def _text(whole: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The settings of the language model, and how its matrices are stored, if not as numbers."""
    settings = _of_text(whole)
    stored = settings.get("quantization_config", whole.get("quantization_config"))
    if stored is None:
        return settings, {}
    quantized.check(stored)
    return {key: settings[key] for key in settings if key != "quantization_config"}, stored


def _of_text(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings of the language model, where config.json is about more than that."""
    usual = COMPOSITE.get(str(settings.get("model_type")))
    if usual is None:
        return settings
    inner = settings.get("text_config")
    if inner is None:  # the first Qwen-VL have all in one table
        others = ("vision", "image_", "video_")
        inner = {key: value for key, value in settings.items() if not key.startswith(others)}
        inner["model_type"] = usual
    if not isinstance(inner, dict):
        raise ValueError(f"config.json: text_config={inner!r:.80}: must be a table of settings")
    text = {"model_type": usual} | inner
    if "tie_word_embeddings" in settings and not text.get("tie_word_embeddings"):
        text["tie_word_embeddings"] = settings["tie_word_embeddings"]
    for key in rope.TABLES:  # three positions a token, which are one where all is text
        if isinstance(told := text.get(key), dict) and "mrope_section" in told:
            kind = told.get("rope_type", told.get("type", "default"))
            kept = {k: v for k, v in told.items() if k != "type" and not k.startswith("mrope_")}
            text[key] = kept | {"rope_type": "default" if kind == "mrope" else kind}
    return text


def _pick_text(files: tensors.Tensors) -> None:
    """Leaves the tensors of the language model, under the names that they have alone."""
    names: dict[str, str] = {}
    for name in files.shapes:
        if not re.search(SEEING, name):
            own = name
            for pattern, begin in WITHIN:
                own = re.sub(pattern, begin, own)
            names[own] = name
    files.rename(names)


def _family(settings: Mapping[str, Any]) -> Family:
    kind = settings.get("model_type")
    for family in FAMILIES + VISION_TEXTS:
        if family.model_type == kind:
            return family
    known = ", ".join([*(family.model_type for family in FAMILIES), *COMPOSITE])
    raise ValueError(f"config.json: model_type={kind!r:.80}: must be one of {known}")


def _express(cfg: ModelConfig) -> Family:
    """The family that can have this config, or the nearest one's obstacles."""
    found = [(families.differences(family, cfg), family) for family in FAMILIES]
    obstacles, nearest = min(found, key=lambda pair: len(pair[0]))
    if not obstacles:
        return nearest
    stated = ", ".join(f"model.{name}={getattr(cfg, name)}" for name in obstacles)
    raise ValueError(
        f"{stated}: no Hugging Face family has this; the nearest is {nearest.model_type}"
    )


class _Canonical:
    """A source under the table's names: full prefixes, no buffers, no copy of a tied head."""

    def __init__(self, files: table.Source, family: Family, cfg: ModelConfig):
        self._files = files
        self._names: dict[str, str] = {}
        for name in files.shapes:
            if not re.search(family.buffers, name):
                full = name.startswith((family.prefix, "lm_head."))
                self._names[name if full else family.prefix + name] = name
        if cfg.tie_embeddings and "lm_head.weight" in self._names:
            self._drop_tied_head(family)
        self.shapes = {name: files.shapes[stored] for name, stored in self._names.items()}

    def read(self, name: str) -> np.ndarray:
        return self._files.read(self._names[name])

    def _drop_tied_head(self, family: Family) -> None:
        embedding = next(row[1] for row in family.table if row[0] == "embed/embedding")
        if embedding in self._names and not np.array_equal(
            self.read("lm_head.weight"), self.read(embedding)
        ):
            raise ValueError(
                f"tie_word_embeddings=True, but lm_head.weight is not {embedding}: set it to false"
            )
        del self._names["lm_head.weight"]


def _complete(family: Family, cfg: ModelConfig, params: Params) -> tuple[ModelConfig, Params]:
    """Checks the parameters against the config and gives GPT-2 the biases it cannot be without."""
    leaves = dict(tree.flatten(params))
    expected = table.parameter_shapes(cfg)
    found = {name: tuple(leaf.shape) for name, leaf in leaves.items()}
    if found != expected:
        odd = sorted(
            name for name in found.keys() | expected if found.get(name) != expected.get(name)
        )
        raise ValueError(
            f"parameters that are not the config's: {', '.join(odd[:8])}; merge adapters and "
            "de-quantise before exporting"
        )
    if family.fixed.get("bias") != "all" or cfg.bias == "all":
        return cfg, params
    cfg = dataclasses.replace(cfg, bias="all")
    for name, shape in table.parameter_shapes(cfg).items():
        leaves.setdefault(name, np.zeros(shape, np.float32))
    return cfg, tree.nest(leaves)


def _sizes(family: Family, cfg: ModelConfig, params: Params, dtype_of: Any) -> Iterator:
    """Bytes of every tensor to be written, in order."""
    leaves = tree.flatten(params)
    for row in table.select(family.table, leaves):
        first, *others = table.parameters(row)
        shape = table.their_shape(row[2], table.sizes(cfg, 1 + len(others)))
        for name, _ in table.pieces(row, cfg):
            yield name, tensors.size_of(shape, dtype_of(leaves[first]))


def _refuse_foreign(path: Path) -> None:
    if not path.exists():
        return
    if not path.is_dir():
        raise ValueError(f"{path}: is a file; give a directory to write")
    settings = path / "config.json"
    ours = settings.is_file() and tensors.read_json(settings).get("exported_by") == "jaxgpt"
    if any(path.iterdir()) and not ours:
        raise ValueError(f"{path}: holds something else than an export of jaxgpt; give another")


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A directory to fill, which takes the place of `path` when all went well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    partial.mkdir()
    try:
        yield partial
        if path.exists():
            old = partial.with_suffix(".old")
            path.rename(old)
            partial.rename(path)
            shutil.rmtree(old)
        else:
            partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
