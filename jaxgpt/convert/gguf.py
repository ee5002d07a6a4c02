"""GGUF files: weights, de-quantised by the `gguf` library, settings, tokenizer, chat template."""

import json
import math
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxgpt.config import ModelConfig, RopeScaling
from jaxgpt.convert import gguf_file, table, tokenizer_files, words
from jaxgpt.convert.gguf_file import Source
from jaxgpt.kernels import compiled
from jaxgpt.kernels.blocks import FORMATS, LANES, Blocks, tiled
from jaxgpt.kernels.platform import platform
from jaxgpt.types import Params

# Settings that change the function in ways the model does not have, with what does not.
NEUTRAL = {
    "attention.sliding_window": 0, "attention.causal": True, "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0, "attention.scale": 0.0, "use_parallel_residual": False,
    "attn_logit_softcapping": 0.0, "final_logit_softcapping": 0.0, "logit_scale": 1.0,
    "residual_scale": 1.0, "embedding_scale": 1.0, "expert_weights_scale": 1.0,
    "expert_gating_func": 1, "leading_dense_block_count": 0, "nextn_predict_layers": 0,
    "rope.scaling.yarn_log_multiplier": 0.0, "rope.scaling.yarn_ext_factor": 1.0,
    "pooling_type": 0,
}  # fmt: skip
# Settings that are read here, or that say what the tensors say too.
KNOWN = """
    attention.head_count attention.head_count_kv attention.key_length attention.value_length
    attention.layer_norm_epsilon attention.layer_norm_rms_epsilon block_count context_length
    embedding_length expert_count expert_feed_forward_length expert_used_count expert_weights_norm
    expert_shared_feed_forward_length feed_forward_length rope.dimension_count rope.freq_base
    rope.scale_linear rope.scaling.attn_factor rope.scaling.factor rope.scaling.finetuned
    rope.scaling.original_context_length rope.scaling.type rope.scaling.yarn_beta_fast
    rope.scaling.yarn_beta_slow tensor_data_layout vocab_size
"""
HUGGING_FACE = "tokenizer.huggingface.json"  # the whole tokenizer.json
END_IDS = ("eos_token_id", "eot_token_id", "eom_token_id")

LAYER = "blk.{layer}."
ROPE_FACTORS = "rope_freqs.weight"
LONG_FACTORS = ("rope_factors_short.weight", "rope_factors_long.weight")

AROUND = table.rows("""
    embed/embedding      token_embd.weight     vocab dim
    positions/embedding  position_embd.weight  position dim
    final_norm/scale     output_norm.weight    dim
    final_norm/bias      output_norm.bias      dim
    head/kernel          output.weight         vocab dim -> dim vocab
""")
# What all architectures share of a block.
BLOCK = table.rows("""
    attention_norm/scale     attn_norm.weight    dim
    attention/output/kernel  attn_output.weight  dim (heads width) -> (heads width) dim
    mlp_norm/scale           ffn_norm.weight     dim
    mlp/up/kernel            ffn_up.weight       mlp dim -> dim mlp
    mlp/down/kernel          ffn_down.weight     dim mlp -> mlp dim
""", LAYER)  # fmt: skip
MIXTURE = table.rows("""
    moe/router/kernel       ffn_gate_inp.weight        expert dim -> dim expert
    moe/gate/kernel         ffn_gate_exps.weight       expert mlp dim -> expert dim mlp
    moe/up/kernel           ffn_up_exps.weight         expert mlp dim -> expert dim mlp
    moe/down/kernel         ffn_down_exps.weight       expert dim mlp -> expert mlp dim
    moe/shared_gate/kernel  ffn_gate_inp_shexp.weight  (dim one) -> dim one
    moe/shared/gate/kernel  ffn_gate_shexp.weight      shared dim -> dim shared
    moe/shared/up/kernel    ffn_up_shexp.weight        shared dim -> dim shared
    moe/shared/down/kernel  ffn_down_shexp.weight      dim shared -> shared dim
""", LAYER)  # fmt: skip
GPT2 = AROUND + BLOCK + table.rows("""
    attention_norm/bias    attn_norm.bias    dim
    attention/{query,key,value}/kernel  attn_qkv.weight  \
        (part heads width) dim -> part dim (heads width)
    attention/{query,key,value}/bias  attn_qkv.bias  (part heads width) -> part (heads width)
    attention/output/bias  attn_output.bias  dim
    mlp_norm/bias          ffn_norm.bias     dim
    mlp/up/bias            ffn_up.bias       mlp
    mlp/down/bias          ffn_down.bias     dim
""", LAYER)  # fmt: skip


def _rows(half: str) -> tuple[table.Row, ...]:
    """Llama's layout; architectures differ in how the rows of query and key are ordered.

    Args:
        half: the two axes of a head's width as they stand in the file.
    """
    ours = " ".join(reversed(half.split()))
    return AROUND + BLOCK + MIXTURE + table.rows(f"""
        attention/query/kernel      attn_q.weight  (heads {half}) dim -> dim (heads {ours})
        attention/query/bias        attn_q.bias         (heads width)
        attention/query_norm/scale  attn_q_norm.weight  width
        attention/key/kernel        attn_k.weight  (kv_heads {half}) dim -> dim (kv_heads {ours})
        attention/key/bias          attn_k.bias         (kv_heads width)
        attention/key_norm/scale    attn_k_norm.weight  width
        attention/value/kernel      attn_v.weight  (kv_heads width) dim -> dim (kv_heads width)
        attention/value/bias        attn_v.bias         (kv_heads width)
        mlp/gate/kernel             ffn_gate.weight     mlp dim -> dim mlp
    """, LAYER)  # fmt: skip


POST_NORMS = table.rows("""
    attention_post_norm/scale  post_attention_norm.weight  dim
    mlp_post_norm/scale        post_ffw_norm.weight        dim
""", LAYER)  # fmt: skip
# Llama's query and key rows stand in RoPE's interleaved order, the others' in the half-split one.
INTERLEAVED, SPLIT = _rows("half two"), _rows("width")
OLMO2 = tuple(row for row in SPLIT if not re.search(r"(attention|mlp|query|key)_norm", str(row[0])))
OLMO2 += table.rows("""
    attention_norm/scale        post_attention_norm.weight  dim
    mlp_norm/scale              post_ffw_norm.weight        dim
    attention/query_norm/scale  attn_q_norm.weight          (heads width)
    attention/key_norm/scale    attn_k_norm.weight          (kv_heads width)
""", LAYER)  # fmt: skip
PHI3 = AROUND + tuple(row for row in BLOCK if "/up/" not in row[0]) + table.rows("""
    attention/{query,key,value}/kernel  attn_qkv.weight  \
        (heads+kv_heads+kv_heads width) dim -> dim (heads+kv_heads+kv_heads width)
    mlp/{gate,up}/kernel  ffn_up.weight  (part mlp) dim -> part dim mlp
""", LAYER)  # fmt: skip
LIKE_LLAMA = {"mlp": "gated", "activation": "silu", "norm": "rmsnorm", "position": "rope"}
LIKE_GPT2 = {"activation": "gelu_tanh", "norm": "layernorm", "position": "learned", "bias": "all"}
LIKE_GEMMA = LIKE_LLAMA | {"activation": "gelu_tanh", "norm_offset": 1.0}
# The rows, and the fields of ModelConfig that all models of an architecture share.
ARCHITECTURES: dict[str, tuple[tuple[table.Row, ...], dict[str, Any]]] = {
    "gpt2": (GPT2, LIKE_GPT2),
    "llama": (INTERLEAVED, LIKE_LLAMA),  # Mixtral too
    "qwen2": (SPLIT, LIKE_LLAMA | {"bias": "qkv"}),
    "qwen2moe": (SPLIT, LIKE_LLAMA | {"bias": "qkv", "normalize_expert_weights": False}),
    "qwen3": (SPLIT, LIKE_LLAMA | {"qk_norm": True}),
    "qwen3moe": (SPLIT, LIKE_LLAMA | {"qk_norm": True}),
    "granite": (INTERLEAVED, LIKE_LLAMA),
    "smollm3": (INTERLEAVED, LIKE_LLAMA | {"rope_skip": 4}),
    "olmo2": (OLMO2, LIKE_LLAMA | {
        "norm_place": "after", "qk_norm": True, "qk_norm_over": "width",
    }),
    "phi3": (PHI3, LIKE_LLAMA),
    "gemma": (SPLIT, LIKE_GEMMA),
    "gemma2": (SPLIT + POST_NORMS, LIKE_GEMMA | {"norm_place": "both", "layer_pattern": "LG"}),
    "gemma3": (SPLIT + POST_NORMS, LIKE_GEMMA | {
        "norm_place": "both", "qk_norm": True, "layer_pattern": "LLLLLG", "rope_local_base": 1e4,
    }),
}  # fmt: skip
# Settings that an architecture reads where others have them neutral, and ours.
OWN: dict[str, dict[str, str]] = {
    "granite": {
        "embedding_scale": "embedding_scale", "residual_scale": "residual_scale",
        "logit_scale": "logit_divisor", "attention.scale": "attention_scale",
    },
    "phi3": {"attention.sliding_window": "sliding_window"},
    "gemma2": {
        "attention.sliding_window": "sliding_window",
        "attn_logit_softcapping": "attention_softcap", "final_logit_softcapping": "logit_softcap",
    },
    "gemma3": {
        "attention.sliding_window": "sliding_window", "final_logit_softcapping": "logit_softcap",
    },
}  # fmt: skip
LARGEST_GEMMA = {"gemma2": 46, "gemma3": 62}  # layers of those that scale scores in another way
MIXTURES = ("llama", "qwen2moe", "qwen3moe")  # architectures that may have experts
UNTIED = ("qwen2moe", "olmo2")  # which llama.cpp does not open without a head of their own


# What `stored` leaves in blocks: dense kernels, and the table of embeddings.
BLOCKS = re.compile(r"^embed/embedding$|^head/kernel$|^blocks/(attention|mlp)/\w+/kernel$")


def load(
    path: str | Path,
    *,
    place: table.Place | None = None,
    dtype: str = "float32",
    stored: bool = False,
) -> tuple[ModelConfig, Params, dict[str, bytes]]:
    """The model, and the tokenizer as the files that Hugging Face would have for it.

    Args:
        stored: kernels stay in the file's blocks, where a program here reads these.

    Raises:
        ValueError: not a whole GGUF file, or one of an architecture, a setting, a quantisation or
            a tokenizer that jaxgpt does not have.
    """
    path = Path(path)
    metadata, source = gguf_file.open_file(path)
    try:
        architecture = metadata.get("general.architecture")
        if architecture not in ARCHITECTURES:
            raise ValueError(
                f"general.architecture={architecture!r:.80}: must be one of "
                + ", ".join(ARCHITECTURES)
            )
        rows, _ = ARCHITECTURES[architecture]
        cfg = config(metadata, architecture, source)
        if unknown := _Settings(metadata, architecture).unknown():
            print(f"warning: {path}: {', '.join(unknown)}: not read", file=sys.stderr)
        files = _tokenizer(metadata)
        keep = partial(_blocks, cfg, source) if stored and platform() == "cpu" else None
        shifted = Shifted(source) if cfg.norm_offset else source
        return cfg, table.read(rows, cfg, shifted, place, dtype, keep), files
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def config(metadata: dict[str, Any], architecture: str, source: Source) -> ModelConfig:
    """The ModelConfig of a file.

    Raises:
        ValueError: a setting that is missing, or that the model does not have.
    """
    fixed = ARCHITECTURES[architecture][1]
    get = _Settings(metadata, architecture)
    own = OWN.get(architecture, {})
    for key, neutral in NEUTRAL.items():
        if key in own:
            continue
        value = metadata.get(f"{architecture}.{key}", neutral)
        if value != neutral:
            raise ValueError(f"{architecture}.{key}={value!r:.80}: jaxgpt reads only {neutral}")
    dim, heads = get("embedding_length", int), get("attention.head_count", int)
    width = get("attention.key_length", int, dim // heads)
    if get("attention.value_length", int, width) != width:
        raise ValueError(f"{architecture}.attention.value_length: must be key_length, {width}")
    rotary = get("rope.dimension_count", int, width)
    if rotary > width or int(width * (rotary / width)) != rotary:
        raise ValueError(f"{architecture}.rope.dimension_count={rotary}: must be {width} or less")
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
    if fixed["position"] == "rope":
        base = get("rope.freq_base", float, 10000.0)
        scaling = _rope_scaling(get, source, base, rotary)
        fixed = fixed | {"rope_base": base, "rope_scaling": scaling, "rope_share": rotary / width}
    for key, field in own.items():
        if metadata.get(f"{architecture}.{key}"):
            fixed = fixed | {field: get(key, int if field == "sliding_window" else float)}
    if "layer_pattern" in fixed and "sliding_window" not in fixed:
        fixed = fixed | {"layer_pattern": "", "rope_local_base": None}
    if architecture.startswith("gemma"):
        fixed = fixed | {"embedding_scale": float(dim) ** 0.5}
    if LARGEST_GEMMA.get(architecture) == get("block_count", int):
        fixed = fixed | {"attention_scale": (dim / heads) ** -0.5}
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
        tie_embeddings="output.weight" not in source.shapes,
        **fixed,
    )  # fmt: skip


def _blocks(cfg: ModelConfig, source: Source, row: table.Row) -> Blocks | None:
    """A parameter as the file has it; None, if it has no blocks of one kind for it."""
    (name, *more), theirs = table.parameters(row), list(table.pieces(row, cfg))
    kinds = {source.kind(tensor) for tensor, _ in theirs}
    kind, pattern = kinds.pop(), table.by_row(row[2], "byte")
    known = not more and not kinds and kind in FORMATS and BLOCKS.search(name)
    if not known or pattern is None or not compiled.load():
        return None
    num_rows, C = source.rows(theirs[0][0]).shape
    if num_rows % LANES:
        return None
    lead = (cfg.num_layers,) if "{layer}" in row[1] else ()
    tiles = table.aligned((*lead, num_rows // LANES, C, LANES), "uint8")
    for tensor, index in theirs:
        axes = table.sizes(cfg) | {"byte": C}
        tiles[index] = tiled(table.rearrange(source.rows(tensor), pattern, axes))
    return Blocks(jax.device_put(tiles), kind)


class Shifted:
    """A source whose norms are stored with the 1 that our model adds to them."""

    def __init__(self, source: Source):
        self.source, self.shapes = source, source.shapes

    def read(self, name: str) -> np.ndarray:
        tensor = self.source.read(name)
        return tensor - 1 if name.endswith("norm.weight") else tensor


class _Settings:
    """The metadata of one architecture, each value of the asked kind and positive."""

    def __init__(self, metadata: dict[str, Any], architecture: str):
        self.metadata, self.architecture = metadata, architecture

    def __call__(self, key: str, kind: type, default: Any = None) -> Any:
        value = self.metadata.get(f"{self.architecture}.{key}", default)
        if type(value) is not kind or not 0 < value < 2**31:
            raise ValueError(
                f"{self.architecture}.{key}={value!r:.80}: must be a positive {kind.__name__}"
            )
        # Stored as float32: 1e-5, not 9.999999747e-06.
        return float(str(np.float32(value))) if kind is float else value

    def unknown(self) -> list[str]:
        """Settings of the architecture that are read nowhere here."""
        begin = f"{self.architecture}."
        own = [key.removeprefix(begin) for key in self.metadata if key.startswith(begin)]
        return [begin + key for key in own if key not in NEUTRAL and key not in KNOWN.split()]


def _rope_scaling(get: _Settings, source: Source, base: float, rotary: int) -> RopeScaling | None:
    """What the settings say, or what the factors that are stored as a tensor stand for."""
    state = lambda key: get.metadata.get(f"{get.architecture}.rope.{key}")
    kind = state("scaling.type")
    if get.architecture == "phi3" and LONG_FACTORS[0] in source.shapes:
        return _longrope(get, source)
    factor_key = "scaling.factor" if state("scaling.factor") is not None else "scale_linear"
    if kind is None and state(factor_key) not in (None, 0, 1):
        kind = "linear"  # as llama.cpp reads a factor alone
    if kind in (None, "none"):
        return _llama3_scaling(source, base, rotary)
    if kind not in ("linear", "yarn"):
        raise ValueError(
            f"{get.architecture}.rope.scaling.type={kind!r:.80}: must be none, linear or yarn"
        )
    factor = get(f"rope.{factor_key}", float)
    if kind == "linear":
        return RopeScaling(kind="linear", factor=factor)
    strength = 1 + 0.1 * math.log(factor) if factor > 1 else 1.0
    return RopeScaling(
        kind="yarn",
        factor=factor,
        original_context=get(
            "rope.scaling.original_context_length", int, get("context_length", int)
        ),
        attention_factor=get("rope.scaling.attn_factor", float, 1.0) * strength,
        beta_fast=get("rope.scaling.yarn_beta_fast", float, 32.0),
        beta_slow=get("rope.scaling.yarn_beta_slow", float, 1.0),
    )


def _longrope(get: _Settings, source: Source) -> RopeScaling:
    """Phi-3's stretching, whose factors are two tensors."""
    short_H, long_H = (source.read(name).astype(np.float64) for name in LONG_FACTORS)
    for name in LONG_FACTORS:
        del source.shapes[name]
    original = get("rope.scaling.original_context_length", int)
    return RopeScaling(
        kind="longrope",
        factor=max(get("context_length", int) / original, 1.0),
        original_context=original,
        attention_factor=get("rope.scaling.attn_factor", float, 1.0),
        short_factors=tuple(float(str(np.float32(x))) for x in short_H),
        long_factors=tuple(float(str(np.float32(x))) for x in long_H),
    )


def _llama3_scaling(source: Source, base: float, width: int) -> RopeScaling | None:
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
    expected_H = rope_factors(scaling, frequency_H)
    if not np.allclose(found_H, expected_H, rtol=1e-5):
        raise ValueError(f"{ROPE_FACTORS}: is not Llama 3's stretching of rotary positions")
    return scaling


def rope_factors(scaling: RopeScaling, frequency_H: np.ndarray) -> np.ndarray:
    """What Llama 3's stretching divides each frequency by."""
    turns_H = scaling.original_context * frequency_H / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep_H = np.clip((turns_H - low) / (high - low), 0, 1)
    return 1 / (keep_H + (1 - keep_H) / scaling.factor)


def _tokenizer(metadata: dict[str, Any]) -> dict[str, bytes]:
    """tokenizer.json and tokenizer_config.json from the metadata."""
    get = lambda key: metadata.get(f"tokenizer.ggml.{key}")
    tokens = _list(metadata, "tokens", str)
    kinds = _list(metadata, "token_type", int) if get("token_type") else [1] * len(tokens)
    numbered = list(enumerate(kinds[: len(tokens)]))
    # Control tokens, and those that users defined, such as <think>. Text spells only these.
    special = [i for i, kind in numbered if kind == 3 or (kind == 4 and _is_turn(tokens[i]))]
    whole = [i for i, kind in numbered if kind == 4 and not _is_turn(tokens[i])]
    name_of = lambda i: tokens[i] if type(i) is int and 0 <= i < len(tokens) else None
    sentencepiece, cut = get("model") == "llama", str(get("pre") or "default")
    if sentencepiece:
        scores, unknown = _list(metadata, "scores", float), get("unknown_token_id") or 0
        if len(scores) != len(tokens) or name_of(unknown) is None:
            raise ValueError("tokenizer.ggml: scores or unknown_token_id do not fit the tokens")
        prefix = get("add_space_prefix")
        files = tokenizer_files.sentencepiece(
            tokens, scores, special, unknown, whole=whole,
            space_prefix=True if prefix is None else bool(prefix),
        )  # fmt: skip
    elif get("model") == "gpt2":
        merges = _list(metadata, "merges", str)
        if len(merges) == 1 and merges[0].replace(" ", "", 1) not in tokens:
            merges = []  # of bytes alone, for which llama.cpp wants one that never happens
        files = tokenizer_files.byte_level(tokens, merges, special, cut, whole)
    else:
        raise ValueError(f"tokenizer.ggml.model={get('model')!r:.80}: must be gpt2 or llama")
    ends = sorted({i for i in map(get, END_IDS) if i is not None and name_of(i) is not None})
    if len(ends) > 1:  # a text's and a turn's
        told = json.dumps({"eos_token_id": ends})
        files |= {"generation_config.json": told.encode()}
    if isinstance(whole_file := metadata.get(HUGGING_FACE), str):  # says more than the rest
        files |= {"tokenizer.json": whole_file.encode()}
    template, add_bos = metadata.get("tokenizer.chat_template"), get("add_bos_token")
    begins = sentencepiece or words.KINDS[cut].begins
    return tokenizer_files.with_settings(
        files,
        bos_token=name_of(get("bos_token_id")),
        eos_token=name_of(get("eos_token_id")),
        pad_token=name_of(get("padding_token_id")),
        add_bos_token=begins if add_bos is None else bool(add_bos),
        chat_template=template if isinstance(template, str) else None,
    )


def _is_turn(token: str) -> bool:
    """Whether a token looks like <|im_start|>, which some converters note as the users' own."""
    return token[:2] in ("<|", "<\uff5c") and token[-2:] in ("|>", "\uff5c>")  # DeepSeek's are wide


def _list(metadata: dict[str, Any], key: str, kind: type) -> list[Any]:
    values = metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(values, list) or any(type(value) is not kind for value in values):
        raise ValueError(f"tokenizer.ggml.{key}: must be a list of {kind.__name__}")
    return values
