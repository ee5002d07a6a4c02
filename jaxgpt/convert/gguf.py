"""GGUF files: weights, de-quantised by the `gguf` library, settings, tokenizer, chat template.

The header is parsed here: the library's own reader trusts the counts in it, and a damaged file
makes it loop until memory runs out.
"""

import math
import struct
from pathlib import Path
from typing import Any

import numpy as np

from jaxgpt.config import ModelConfig, RopeScaling
from jaxgpt.convert import table, tokenizer_files
from jaxgpt.types import Params

# Value types of the metadata; 8 is a string, 9 an array.
SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
STRING, ARRAY = 8, 9
LARGEST_ARRAY = 2**22  # entries; the largest vocabularies have a quarter of a million
READABLE = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K")

LAYER = "blk.{layer}."
ROPE_FACTORS = "rope_freqs.weight"

MIXTURE: tuple[table.Row, ...] = (
    ("blocks/moe/router/kernel", LAYER + "ffn_gate_inp.weight", "expert dim -> dim expert"),
    (
        "blocks/moe/gate/kernel",
        LAYER + "ffn_gate_exps.weight",
        "expert mlp dim -> expert dim mlp",
    ),
    ("blocks/moe/up/kernel", LAYER + "ffn_up_exps.weight", "expert mlp dim -> expert dim mlp"),
    (
        "blocks/moe/down/kernel",
        LAYER + "ffn_down_exps.weight",
        "expert dim mlp -> expert mlp dim",
    ),
    ("blocks/moe/shared_gate/kernel", LAYER + "ffn_gate_inp_shexp.weight", "(dim one) -> dim one"),
    (
        "blocks/moe/shared/gate/kernel",
        LAYER + "ffn_gate_shexp.weight",
        "shared dim -> dim shared",
    ),
    ("blocks/moe/shared/up/kernel", LAYER + "ffn_up_shexp.weight", "shared dim -> dim shared"),
    (
        "blocks/moe/shared/down/kernel",
        LAYER + "ffn_down_shexp.weight",
        "dim shared -> shared dim",
    ),
)
QKV = tuple(f"blocks/attention/{name}" for name in ("query", "key", "value"))
GPT2: tuple[table.Row, ...] = (
    ("embed/embedding", "token_embd.weight", "vocab dim"),
    ("positions/embedding", "position_embd.weight", "position dim"),
    ("blocks/attention_norm/scale", LAYER + "attn_norm.weight", "dim"),
    ("blocks/attention_norm/bias", LAYER + "attn_norm.bias", "dim"),
    (
        tuple(f"{name}/kernel" for name in QKV),
        LAYER + "attn_qkv.weight",
        "(part heads width) dim -> part dim (heads width)",
    ),
    (
        tuple(f"{name}/bias" for name in QKV),
        LAYER + "attn_qkv.bias",
        "(part heads width) -> part (heads width)",
    ),
    (
        "blocks/attention/output/kernel",
        LAYER + "attn_output.weight",
        "dim (heads width) -> (heads width) dim",
    ),
    ("blocks/attention/output/bias", LAYER + "attn_output.bias", "dim"),
    ("blocks/mlp_norm/scale", LAYER + "ffn_norm.weight", "dim"),
    ("blocks/mlp_norm/bias", LAYER + "ffn_norm.bias", "dim"),
    ("blocks/mlp/up/kernel", LAYER + "ffn_up.weight", "mlp dim -> dim mlp"),
    ("blocks/mlp/up/bias", LAYER + "ffn_up.bias", "mlp"),
    ("blocks/mlp/down/kernel", LAYER + "ffn_down.weight", "dim mlp -> mlp dim"),
    ("blocks/mlp/down/bias", LAYER + "ffn_down.bias", "dim"),
    ("final_norm/scale", "output_norm.weight", "dim"),
    ("final_norm/bias", "output_norm.bias", "dim"),
    ("head/kernel", "output.weight", "vocab dim -> dim vocab"),
)


def _rows(query: str, key: str) -> tuple[table.Row, ...]:
    """Llama's layout; architectures differ in how the rows of query and key are ordered."""
    return (
        ("embed/embedding", "token_embd.weight", "vocab dim"),
        ("blocks/attention_norm/scale", LAYER + "attn_norm.weight", "dim"),
        ("blocks/attention/query/kernel", LAYER + "attn_q.weight", query),
        ("blocks/attention/query/bias", LAYER + "attn_q.bias", "(heads width)"),
        ("blocks/attention/query_norm/scale", LAYER + "attn_q_norm.weight", "width"),
        ("blocks/attention/key/kernel", LAYER + "attn_k.weight", key),
        ("blocks/attention/key/bias", LAYER + "attn_k.bias", "(kv_heads width)"),
        ("blocks/attention/key_norm/scale", LAYER + "attn_k_norm.weight", "width"),
        (
            "blocks/attention/value/kernel",
            LAYER + "attn_v.weight",
            "(kv_heads width) dim -> dim (kv_heads width)",
        ),
        ("blocks/attention/value/bias", LAYER + "attn_v.bias", "(kv_heads width)"),
        (
            "blocks/attention/output/kernel",
            LAYER + "attn_output.weight",
            "dim (heads width) -> (heads width) dim",
        ),
        ("blocks/mlp_norm/scale", LAYER + "ffn_norm.weight", "dim"),
        ("blocks/mlp/gate/kernel", LAYER + "ffn_gate.weight", "mlp dim -> dim mlp"),
        ("blocks/mlp/up/kernel", LAYER + "ffn_up.weight", "mlp dim -> dim mlp"),
        ("blocks/mlp/down/kernel", LAYER + "ffn_down.weight", "dim mlp -> mlp dim"),
        *MIXTURE,
        ("final_norm/scale", "output_norm.weight", "dim"),
        ("head/kernel", "output.weight", "vocab dim -> dim vocab"),
    )


# Llama's query and key rows stand in RoPE's interleaved order, the others' in the half-split one.
INTERLEAVED = _rows(
    "(heads half two) dim -> dim (heads two half)",
    "(kv_heads half two) dim -> dim (kv_heads two half)",
)
SPLIT = _rows(
    "(heads width) dim -> dim (heads width)", "(kv_heads width) dim -> dim (kv_heads width)"
)
LIKE_LLAMA = {"mlp": "gated", "activation": "silu", "norm": "rmsnorm", "position": "rope"}
LIKE_GPT2 = {"activation": "gelu_tanh", "norm": "layernorm", "position": "learned", "bias": "all"}
# The rows, and the fields of ModelConfig that all models of an architecture share.
ARCHITECTURES: dict[str, tuple[tuple[table.Row, ...], dict[str, Any]]] = {
    "gpt2": (GPT2, LIKE_GPT2),
    "llama": (INTERLEAVED, LIKE_LLAMA),  # Mixtral too
    "qwen2": (SPLIT, LIKE_LLAMA | {"bias": "qkv"}),
    "qwen2moe": (SPLIT, LIKE_LLAMA | {"bias": "qkv", "normalize_expert_weights": False}),
    "qwen3": (SPLIT, LIKE_LLAMA | {"qk_norm": True}),
    "qwen3moe": (SPLIT, LIKE_LLAMA | {"qk_norm": True}),
}


def load(
    path: str | Path, *, place: table.Place | None = None, dtype: str = "float32"
) -> tuple[ModelConfig, Params, dict[str, bytes]]:
    """The model, and the tokenizer as the files that Hugging Face would have for it.

    Raises:
        ValueError: not a whole GGUF file, or one of an architecture, a setting, a quantisation or
            a tokenizer that jaxgpt does not have.
    """
    path = Path(path)
    metadata, source = _open(path)
    try:
        architecture = metadata.get("general.architecture")
        if architecture not in ARCHITECTURES:
            raise ValueError(
                f"general.architecture={architecture!r:.80}: must be one of "
                + ", ".join(ARCHITECTURES)
            )
        rows, fixed = ARCHITECTURES[architecture]
        cfg = _config(metadata, architecture, fixed, source)
        files = _tokenizer(metadata)
        return cfg, table.read(rows, cfg, source, place, dtype), files
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _config(
    metadata: dict[str, Any], architecture: str, fixed: dict[str, Any], source: "_Source"
) -> ModelConfig:
    def get(key: str, kind: type, default: Any = None) -> Any:
        value = metadata.get(f"{architecture}.{key}", default)
        if type(value) is not kind or not 0 < value < 2**31:
            raise ValueError(
                f"{architecture}.{key}={value!r:.80}: must be a positive {kind.__name__}"
            )
        # Stored as float32: 1e-5, not 9.999999747e-06.
        return float(str(np.float32(value))) if kind is float else value

    for key, neutral in (("rope.scaling.type", "none"), ("attention.sliding_window", 0)):
        value = metadata.get(f"{architecture}.{key}", neutral)
        if value != neutral:
            raise ValueError(f"{architecture}.{key}={value!r:.80}: jaxgpt reads only {neutral}")
    dim, heads = get("embedding_length", int), get("attention.head_count", int)
    width = get("attention.key_length", int, dim // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if get(key, int, width) != width:
            raise ValueError(f"{architecture}.{key}: must be the width of a head, {width}")
    if "token_embd.weight" not in source.shapes:
        raise ValueError("the weights lack token_embd.weight")
    some = lambda key: get(key, int) if metadata.get(f"{architecture}.{key}") else 0
    num_experts = some("expert_count")
    if num_experts:
        fixed = fixed | {
            "num_experts": num_experts,
            "experts_per_token": get("expert_used_count", int),
            "shared_mlp_dim": some("expert_shared_feed_forward_length"),
        }
    base = get("rope.freq_base", float, 10000.0)
    eps = "epsilon" if fixed["norm"] == "layernorm" else "rms_epsilon"
    return ModelConfig(
        vocab_size=source.shapes["token_embd.weight"][0],
        context_length=get("context_length", int),
        num_layers=get("block_count", int),
        model_dim=dim,
        num_heads=heads,
        num_kv_heads=get("attention.head_count_kv", int, heads),
        head_dim=width,
        mlp_dim=some("expert_feed_forward_length") or get("feed_forward_length", int),
        norm_eps=get(f"attention.layer_norm_{eps}", float),
        rope_base=base,
        rope_scaling=_rope_scaling(source, base, width),
        tie_embeddings="output.weight" not in source.shapes,
        **fixed,
    )  # fmt: skip


def _rope_scaling(source: "_Source", base: float, width: int) -> RopeScaling | None:
    """Llama 3's stretching; a file has what it divides each frequency by, not the settings.

    All of Meta's models differ in the factor alone, which is the largest of these.
    """
    if ROPE_FACTORS not in source.shapes:
        return None
    found_H = source.read(ROPE_FACTORS).astype(np.float64)
    del source.shapes[ROPE_FACTORS]
    if found_H.shape != (width // 2,) or not np.all((found_H >= 1) & (found_H < 1e6)):
        raise ValueError(f"{ROPE_FACTORS}: must be {width // 2} factors of 1 and more")
    scaling = RopeScaling(factor=float(found_H.max()))
    frequency_H = base ** (-np.arange(width // 2) / (width // 2))
    turns_H = scaling.original_context * frequency_H / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep_H = np.clip((turns_H - low) / (high - low), 0, 1)
    expected_H = 1 / (keep_H + (1 - keep_H) / scaling.factor)
    if not np.allclose(found_H, expected_H, rtol=1e-5):
        raise ValueError(f"{ROPE_FACTORS}: is not Llama 3's stretching of rotary positions")
    return scaling


def _tokenizer(metadata: dict[str, Any]) -> dict[str, bytes]:
    """tokenizer.json and tokenizer_config.json from the metadata."""
    get = lambda key: metadata.get(f"tokenizer.ggml.{key}")
    tokens = _list(metadata, "tokens", str)
    kinds = _list(metadata, "token_type", int) if get("token_type") else [1] * len(tokens)
    special = [i for i, kind in enumerate(kinds[: len(tokens)]) if kind in (3, 4)]  # control, user
    name_of = lambda i: tokens[i] if type(i) is int and 0 <= i < len(tokens) else None
    sentencepiece = get("model") == "llama"
    if sentencepiece:
        scores, unknown = _list(metadata, "scores", float), get("unknown_token_id") or 0
        if len(scores) != len(tokens) or name_of(unknown) is None:
            raise ValueError("tokenizer.ggml: scores or unknown_token_id do not fit the tokens")
        files = tokenizer_files.sentencepiece(tokens, scores, special, unknown)
    elif get("model") == "gpt2":
        merges = _list(metadata, "merges", str)
        files = tokenizer_files.byte_level(tokens, merges, special, str(get("pre") or "default"))
    else:
        raise ValueError(f"tokenizer.ggml.model={get('model')!r:.80}: must be gpt2 or llama")
    template, add_bos = metadata.get("tokenizer.chat_template"), get("add_bos_token")
    return tokenizer_files.with_settings(
        files,
        bos_token=name_of(get("bos_token_id")),
        eos_token=name_of(get("eos_token_id")),
        pad_token=name_of(get("padding_token_id")),
        add_bos_token=sentencepiece if add_bos is None else bool(add_bos),
        chat_template=template if isinstance(template, str) else None,
    )


def _list(metadata: dict[str, Any], key: str, kind: type) -> list[Any]:
    values = metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(values, list) or any(type(value) is not kind for value in values):
        raise ValueError(f"tokenizer.ggml.{key}: must be a list of {kind.__name__}")
    return values


class _Source:
    """The tensors by name; each is de-quantised when it is read."""

    def __init__(self, data: np.ndarray):
        self.shapes: dict[str, table.Shape] = {}
        self._data = data
        self._stored: dict[str, tuple[Any, int, int]] = {}  # quantisation, start, bytes

    def add(self, name: str, shape: table.Shape, kind: int, start: int) -> None:
        import gguf

        names = {member.value: member.name for member in gguf.GGMLQuantizationType}
        if names.get(kind) not in READABLE:
            raise ValueError(
                f"{name} is stored as {names.get(kind, kind)}; only {', '.join(READABLE)} are read"
            )
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
        if shape[-1] % block or name in self.shapes:
            raise ValueError(
                f"{name}: {shape[-1]} does not fill blocks of {block}, or stands twice"
            )
        length = math.prod(shape) // block * size
        if start + length > len(self._data):
            raise ValueError(f"{name} ends behind the end of the file")
        self.shapes[name] = shape
        self._stored[name] = (gguf.GGMLQuantizationType(kind), start, length)

    def read(self, name: str) -> np.ndarray:
        from gguf import quants

        kind, start, length = self._stored[name]
        rows = math.prod(self.shapes[name][:-1])
        stored = np.asarray(self._data[start : start + length]).reshape(rows, -1)
        if kind.name in ("F32", "F16"):
            return stored.view(np.float32 if kind.name == "F32" else np.float16).reshape(
                self.shapes[name]
            )
        return quants.dequantize(stored, kind).reshape(self.shapes[name])


def _open(path: Path) -> tuple[dict[str, Any], _Source]:
    """Metadata and tensors; every count is held against the file's length before it is used."""
    if path.stat().st_size < 24:
        raise ValueError(f"{path}: too short for a GGUF file")
    data = np.memmap(path, np.uint8, "r")
    try:
        header = _Header(data)
        if data[:4].tobytes() != b"GGUF" or header.scalar("I", skip=4) not in (2, 3):
            raise ValueError("not a GGUF file of version 2 or 3")
        num_tensors, num_values = header.scalar("Q"), header.scalar("Q")
        metadata = {}
        for _ in range(num_values):
            key = header.string()
            metadata[key] = header.value(header.scalar("I"))
        infos = [header.tensor() for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"general.alignment={alignment!r:.80}: must be a power of two")
        start = -(-header.offset // alignment) * alignment
        source = _Source(data)
        for name, shape, kind, offset in infos:
            if offset % alignment:
                raise ValueError(f"{name} does not begin at a multiple of {alignment} bytes")
            source.add(name, shape, kind, start + offset)
    except (ValueError, struct.error) as error:
        raise ValueError(f"{path}: {error}") from None
    return metadata, source


class _Header:
    """A cursor over the file; reading beyond the end raises struct.error or ValueError."""

    def __init__(self, data: np.ndarray):
        self._data = memoryview(data)  # type: ignore[arg-type]
        self.offset = 0

    def scalar(self, code: str, skip: int = 0) -> Any:
        self.offset += skip
        (value,) = struct.unpack_from("<" + code, self._data, self.offset)
        self.offset += struct.calcsize("<" + code)
        return value

    def string(self) -> str:
        return str(self._take(self.scalar("Q")), "utf-8")

    def value(self, kind: int) -> Any:
        if kind in SCALARS:
            return self.scalar(SCALARS[kind])
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            raise ValueError(f"unknown type {kind} of a value")
        kind, count = self.scalar("I"), self.scalar("Q")
        if count > LARGEST_ARRAY:
            raise ValueError(f"an array of {count} values is too long for metadata")
        if kind == STRING:
            return [self.string() for _ in range(count)]
        if kind not in SCALARS:
            raise ValueError(f"unknown type {kind} of an array")
        bytes_ = self._take(count * struct.calcsize("<" + SCALARS[kind]))
        return [value for (value,) in struct.iter_unpack("<" + SCALARS[kind], bytes_)]

    def tensor(self) -> tuple[str, table.Shape, int, int]:
        name, rank = self.string(), self.scalar("I")
        if not 1 <= rank <= 4:
            raise ValueError(f"{name}: has {rank} axes")
        shape = tuple(self.scalar("Q") for _ in range(rank))[::-1]
        return name, shape, self.scalar("I"), self.scalar("Q")

    def _take(self, size: int) -> memoryview:
        if size > len(self._data) - self.offset:
            raise ValueError("the header ends behind the end of the file")
        self.offset += size
        return self._data[self.offset - size : self.offset]
