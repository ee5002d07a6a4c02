"""A model as one GGUF file, for llama.cpp, Ollama and LM Studio."""

import dataclasses
import json
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxgpt.config import ModelConfig, RopeScaling
from jaxgpt.convert import gguf, peft_hf, spm, table, tokenizer_files, words
from jaxgpt.convert.family import resolve, unlike
from jaxgpt.convert.gguf_file import Source, open_file
from jaxgpt.files import PARTIAL
from jaxgpt.types import Params

# What the library quantises; the others need llama.cpp's own tool.
TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # kinds of a token
OURS = "jaxgpt"  # general.quantized_by of files that we may replace


def save(
    path: str | Path,
    cfg: ModelConfig,
    params: Params,
    files: Mapping[str, bytes],
    kind: str = "f16",
    ends: tuple[int, ...] = (),
) -> None:
    """Writes the file whole, or not at all; norms, biases and routers stay float32.

    Args:
        files: the tokenizer's, by the names of Hugging Face.
        kind: one of TYPES. A matrix whose rows do not fill the type's blocks becomes f16; beside
            4 and 5 bits, the embedding and the head have 8.
        ends: tokens that end a text or a turn.

    Raises:
        ValueError: no architecture of llama.cpp has this model, or no tokenizer of it this one.
    """
    import gguf as library

    if kind not in TYPES:
        raise ValueError(
            f"type={kind}: must be one of {', '.join(TYPES)}; for others, write f16 and run "
            "llama.cpp's llama-quantize on it"
        )
    path = _writable(path)
    architecture, settings = _express(cfg)
    if cfg.tie_embeddings and architecture in gguf.UNTIED:
        cfg = dataclasses.replace(cfg, tie_embeddings=False)
        params = {**params, "head": {"kernel": np.asarray(params["embed"]["embedding"]).T}}
    named = "ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"
    metadata = {
        "general.name": path.stem,
        "general.quantized_by": OURS,
        "general.file_type": int(library.LlamaFileType[named]),
        "general.quantization_version": library.GGML_QUANT_VERSION,
        **{f"{architecture}.{key}": value for key, value in settings.items()},
        **_tokenizer(dict(files), cfg.vocab_size, ends),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}{PARTIAL}")
    writer = library.GGUFWriter(partial, architecture)
    for key, value in metadata.items():
        _add(writer, key, value)
    try:
        _write(writer, gguf.ARCHITECTURES[architecture][0], cfg, params, kind)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def save_adapter(path: str | Path, cfg: ModelConfig, params: Params) -> None:
    """Writes low-rank changes as llama.cpp's --lora takes them, in float32; whole, or not at all.

    Raises:
        ValueError: there are none, or llama.cpp has no place for one of them.
    """
    import gguf as library

    path = _writable(path)
    architecture, _ = _express(cfg)
    names = [n for n in table.parameter_shapes(cfg) if n.endswith("kernel") and "moe/" not in n]
    rows = table.select(gguf.ARCHITECTURES[architecture][0], dict.fromkeys(names))
    changes = list(peft_hf.changes(rows, cfg, params))
    if any(change.length is not None for change in changes):
        raise ValueError("GGUF has no DoRA adapters; merge it (--merge_lora)")
    alpha = max(change.strength * len(change.a_RD) for change in changes)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}{PARTIAL}")
    writer = library.GGUFWriter(partial, architecture)
    for key, value in {
        "general.type": "adapter", "general.name": path.stem, "general.quantized_by": OURS,
        "adapter.type": "lora", "adapter.lora.alpha": float(alpha),
    }.items():  # fmt: skip
        _add(writer, key, value)
    try:
        for change in changes:  # a tensor's factor is alpha / rank: what is left of it goes into b
            rest = change.strength * len(change.a_RD) / alpha
            writer.add_tensor(f"{change.theirs}.lora_a", change.a_RD.astype(np.float32))
            writer.add_tensor(f"{change.theirs}.lora_b", (change.b_FR * rest).astype(np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _writable(path: str | Path) -> Path:
    """The path of a GGUF file that is new, or ours to replace."""
    path = Path(path)
    if path.suffix != ".gguf":
        raise ValueError(f"output={path}: give the name of a file that ends in .gguf")
    if path.exists() and open_file(path)[0].get("general.quantized_by") != OURS:
        raise ValueError(f"output={path}: is not a file that jaxgpt wrote; give another name")
    return path


def _write(
    writer: Any, rows: tuple[table.Row, ...], cfg: ModelConfig, params: Params, kind: str
) -> None:
    """First what every tensor will be, then the tensors, one at a time."""
    from gguf import GGML_QUANT_SIZES, quants

    chosen = table.select(rows, table.parameter_shapes(cfg))
    shapes = {
        name: table.their_shape(row[2], table.sizes(cfg, len(table.parameters(row))))
        for row in chosen
        for name, _ in table.pieces(row, cfg)
    }
    factors = _rope_tensor(cfg)
    shapes |= {name: array.shape for name, array in factors.items()}
    stored = {name: _stored(name, shape, kind) for name, shape in shapes.items()}
    for name, shape in shapes.items():
        block, size = GGML_QUANT_SIZES[stored[name]]
        length = math.prod(shape) // block * size
        writer.add_tensor_info(name, shape, np.dtype(np.float32), length, stored[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, array in _tensors(rows, cfg, params, factors):
        flat = np.asarray(array, np.float32)
        writer.write_tensor_data(np.ascontiguousarray(quants.quantize(flat, stored[name])))
    writer.close()


def _tensors(
    rows: tuple[table.Row, ...], cfg: ModelConfig, params: Params, factors: dict[str, np.ndarray]
) -> Iterator[tuple[str, np.ndarray]]:
    for name, tensor in table.write(rows, cfg, params):
        # Gemma's norms are stored with the 1 that is added to them.
        yield name, tensor + 1 if cfg.norm_offset and name.endswith("norm.weight") else tensor
    yield from factors.items()


def _stored(name: str, shape: tuple[int, ...], kind: str) -> Any:
    """The library's type for one tensor."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if len(shape) == 1 or "ffn_gate_inp" in name or name == "position_embd.weight":
        kind = "f32"  # as llama.cpp's converter does
    elif kind[:2] in ("q4", "q5") and name in ("token_embd.weight", "output.weight"):
        kind = "q8_0"
    found = GGMLQuantizationType[kind.upper()]
    return found if shape[-1] % GGML_QUANT_SIZES[found][0] == 0 else GGMLQuantizationType.F16


def _express(cfg: ModelConfig) -> tuple[str, dict[str, Any]]:
    """The architecture of llama.cpp that computes the same, and its settings.

    Raises:
        ValueError: there is none.
    """
    asked, odd = resolve(cfg), {}
    for name, (rows, fixed) in gguf.ARCHITECTURES.items():
        # What llama.cpp reads there and does not use, and what it refuses elsewhere.
        wrong = cfg.sliding_window if name == "phi3" else cfg.rope_share < 1
        if wrong or (cfg.num_experts and name not in gguf.MIXTURES):
            continue
        settings = _settings(cfg, fixed["norm"])
        for key, field in gguf.OWN.get(name, {}).items():
            if value := getattr(asked, field):
                settings[key] = value if field == "sliding_window" else float(value)
        try:
            table.select(rows, table.parameter_shapes(cfg))
            told = resolve(_read_back(name, settings, cfg))
        except (AssertionError, ValueError):  # without a place for a tensor, or a setting
            continue
        odd[name] = [field for field in unlike(told, asked) if not _near(field, told, asked)]
        if not odd[name]:
            return name, settings
    nearest = min(odd.values(), key=len, default=["position"])
    stated = ", ".join(f"model.{field}={getattr(cfg, field)}" for field in nearest)
    raise ValueError(
        f"{stated or 'the model'}: no architecture that jaxgpt writes as GGUF has this"
    )


def _near(field: str, told: ModelConfig, asked: ModelConfig) -> bool:
    """Whether a field is the same but for the float32 in which GGUF holds numbers."""
    one, other = getattr(told, field), getattr(asked, field)
    if isinstance(one, RopeScaling) and isinstance(other, RopeScaling):
        both = [np.hstack(dataclasses.astuple(scaling)[1:]) for scaling in (one, other)]
        alike = one.kind == other.kind and len(both[0]) == len(both[1])
        return alike and np.allclose(*both, rtol=1e-6, atol=0)
    return (
        isinstance(one, float)
        and isinstance(other, float)
        and math.isclose(one, other, rel_tol=1e-6)
    )


def _read_back(architecture: str, settings: dict[str, Any], cfg: ModelConfig) -> ModelConfig:
    """What our own reader makes of the settings."""
    source = Source()
    source.shapes = {"token_embd.weight": (cfg.vocab_size, cfg.model_dim)}
    if not cfg.tie_embeddings:
        source.shapes["output.weight"] = (cfg.vocab_size, cfg.model_dim)
    for name, array in _rope_tensor(cfg).items():
        source.hold(name, array)
    metadata = {f"{architecture}.{key}": value for key, value in settings.items()}
    return gguf.config(metadata, architecture, source)


def _settings(cfg: ModelConfig, norm: str) -> dict[str, Any]:
    eps = "epsilon" if norm == "layernorm" else "rms_epsilon"
    settings: dict[str, Any] = {
        "vocab_size": cfg.vocab_size,
        "context_length": cfg.context_length,
        "embedding_length": cfg.model_dim,
        "block_count": cfg.num_layers,
        "feed_forward_length": cfg.mlp_width,
        "attention.head_count": cfg.num_heads,
        "attention.head_count_kv": cfg.kv_heads,
        f"attention.layer_norm_{eps}": float(cfg.norm_eps),
    }
    if cfg.position == "rope":
        settings |= {
            "attention.key_length": cfg.head_width,
            "attention.value_length": cfg.head_width,
            "rope.dimension_count": cfg.rotary_width,
            "rope.freq_base": float(cfg.rope_base),
            **_scaling(cfg.rope_scaling),
        }
    if cfg.num_experts:
        settings |= {
            "expert_count": cfg.num_experts,
            "expert_used_count": cfg.experts_per_token,
            "expert_feed_forward_length": cfg.mlp_width,
        }
    if cfg.shared_mlp_dim:
        settings["expert_shared_feed_forward_length"] = cfg.shared_mlp_dim
    return settings


def _scaling(scaling: RopeScaling | None) -> dict[str, Any]:
    if scaling is not None and scaling.kind == "longrope":
        return {
            "rope.scaling.original_context_length": scaling.original_context,
            "rope.scaling.attn_factor": scaling.attention_factor,
        }
    if scaling is None or scaling.kind not in ("linear", "yarn"):
        return {}  # Llama 3's is a tensor; others are found missing when the settings are read back
    found = {"rope.scaling.type": scaling.kind, "rope.scaling.factor": scaling.factor}
    if scaling.kind == "yarn":
        usual = 1 + 0.1 * math.log(scaling.factor)
        found |= {
            "rope.scaling.original_context_length": scaling.original_context,
            "rope.scaling.attn_factor": scaling.attention_factor / usual,
            "rope.scaling.yarn_beta_fast": scaling.beta_fast,
            "rope.scaling.yarn_beta_slow": scaling.beta_slow,
        }
    return found


def _rope_tensor(cfg: ModelConfig) -> dict[str, np.ndarray]:
    """Llama 3's and Phi-3's stretching, which GGUF holds as what divides each frequency."""
    scaling = cfg.rope_scaling
    if cfg.position == "rope" and scaling is not None and scaling.kind == "longrope":
        both = (scaling.short_factors, scaling.long_factors)
        return {
            name: np.array(factors, np.float32)
            for name, factors in zip(gguf.LONG_FACTORS, both, strict=True)
        }
    if cfg.position != "rope" or scaling is None or scaling.kind != "llama3":
        return {}
    half = cfg.rotary_width // 2
    frequency_H = cfg.rope_base ** (-np.arange(half) / half)
    return {gguf.ROPE_FACTORS: gguf.rope_factors(scaling, frequency_H).astype(np.float32)}


def _tokenizer(files: dict[str, bytes], size: int, ends: tuple[int, ...]) -> dict[str, Any]:
    """The metadata of a tokenizer, padded with unused tokens to the rows of the embedding."""
    definition = json.loads(files.get("tokenizer.json", b"{}"))
    model = definition.get("model", {})
    if model.get("type") != "BPE":
        raise ValueError(
            f"tokenizer.json: model {model.get('type')!r:.80}: GGUF as jaxgpt writes it holds "
            "byte-level and sentencepiece's BPE"
        )
    added = {token["id"]: token for token in definition["added_tokens"]}
    texts = {i: text for text, i in model["vocab"].items()}
    texts |= {i: token["content"] for i, token in added.items()}
    own = {i: CONTROL if token["special"] else USER_DEFINED for i, token in added.items()}
    kinds = [own.get(i, NORMAL if i in texts else UNUSED) for i in range(size)]
    tokens = [texts.get(i, f"[PAD{i}]") for i in range(size)]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    ids, named = tokenizer_files.own_ids(files), tokenizer_files.special_tokens(files)
    found: dict[str, Any] = {}
    if model["byte_fallback"]:
        unknown = model["vocab"].get(model["unk_token"], 0)
        kinds = [BYTE if len(text) == 6 and text[:3] == "<0x" else kind
                 for text, kind in zip(tokens, kinds, strict=True)]  # fmt: skip
        kinds[unknown] = UNKNOWN
        found |= {
            "model": "llama", "unknown_token_id": unknown,
            "scores": _scores(files, tokens, merges),
            "add_space_prefix": "Prepend" in json.dumps(definition.get("normalizer")),
        }  # fmt: skip
    else:
        found |= {"model": "gpt2", "pre": _cut(definition), "merges": merges or [_no_merge(tokens)]}
    begins = json.dumps(definition.get("post_processor") or {})
    told = json.loads(files.get("tokenizer_config.json", b"{}"))
    first = named.get("bos_token", "")
    found |= {
        "tokens": tokens, "token_type": kinds, **ids,
        "add_bos_token": bool(first and first in begins) or bool(told.get("add_bos_token")),
    }  # fmt: skip
    if "pad_token_id" in found:
        found["padding_token_id"] = found.pop("pad_token_id")
    others = [token for token in ends if token != found.setdefault("eos_token_id", token)]
    if others:
        found["eot_token_id"] = others[-1]
    metadata = {f"tokenizer.ggml.{key}": value for key, value in found.items()}
    metadata[gguf.HUGGING_FACE] = files["tokenizer.json"].decode()
    if template := tokenizer_files.chat_template(files):
        metadata["tokenizer.chat_template"] = template
    return metadata


def _cut(definition: dict[str, Any]) -> str:
    """llama.cpp's name for how a text is cut into words; the nearest, with a warning, if none."""
    if name := words.name_of(definition):
        return name
    print(
        "warning: tokenizer.json: cuts words in a way that llama.cpp has no name for; it will read "
        "some texts as other tokens (written as smollm: digits apart, words as GPT-2's)",
        file=sys.stderr,
    )
    return "smollm"


def _no_merge(tokens: list[str]) -> str:
    """A pair that no token comes of: llama.cpp wants at least one."""
    return f"{tokens[0]} {tokens[0]}"


def _scores(files: dict[str, bytes], tokens: list[str], merges: list[str]) -> list[float]:
    """sentencepiece's own scores where its file is here; else the order of the merges says it."""
    if "tokenizer.model" in files:
        found = [score for _, score, _ in spm.read(files["tokenizer.model"])[0]]
        return [*found, *[0.0] * (len(tokens) - len(found))][: len(tokens)]
    ranks: dict[str, float] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault(merge.replace(" ", ""), -float(rank))
    return [ranks.get(token, 0.0) for token in tokens]


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
