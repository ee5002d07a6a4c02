"""llama2.c's model files (version 0: a header of seven integers, then float32) and vocabularies."""

import itertools
import math
import struct
from pathlib import Path

import numpy as np

from jaxgpt.config import ModelConfig
from jaxgpt.convert import table, tokenizer_files
from jaxgpt.types import Params

HEADER = struct.Struct("<7i")
LARGEST_VOCABULARY = 64_000_000  # bytes

# In the order of the file. RoPE's pairs are neighbours there, and i and i + H/2 here.
# The last two before the head are RoPE's tables, which are computed here.
TABLE: tuple[table.Row, ...] = (
    *table.rows("""
        embed/embedding                 token_embedding        vocab dim
        blocks/attention_norm/scale     rms_attention.{layer}  dim
        blocks/attention/query/kernel  wq.{layer}  (heads half two) dim -> dim (heads two half)
        blocks/attention/key/kernel  wk.{layer}  (kv_heads half two) dim -> dim (kv_heads two half)
        blocks/attention/value/kernel  wv.{layer}  (kv_heads width) dim -> dim (kv_heads width)
        blocks/attention/output/kernel  wo.{layer}  dim (heads width) -> (heads width) dim
        blocks/mlp_norm/scale           rms_mlp.{layer}        dim
        blocks/mlp/gate/kernel          w1.{layer}             mlp dim -> dim mlp
        blocks/mlp/down/kernel          w2.{layer}             dim mlp -> mlp dim
        blocks/mlp/up/kernel            w3.{layer}             mlp dim -> dim mlp
        final_norm/scale                rms_final              dim
    """),
    ((), "cosines", "position half"),
    ((), "sines", "position half"),
    ("head/kernel", "classifier", "vocab dim -> dim vocab"),
)  # fmt: skip


def load(
    path: str | Path, tokenizer: str | Path | None = None, *, place: table.Place | None = None
) -> tuple[ModelConfig, Params, dict[str, bytes]]:
    """The model, and the tokenizer as the files that Hugging Face would have for it.

    Args:
        tokenizer: llama2.c's tokenizer file; default: tokenizer.bin or tok*.bin beside the model.

    Raises:
        ValueError: not such a file, or not a whole one.
    """
    path = Path(path)
    cfg = _config(path)
    params = table.read(TABLE, cfg, _Source(path, cfg), place)
    return cfg, params, read_tokenizer(_find(path, tokenizer), cfg.vocab_size)


def read_tokenizer(path: Path, vocab_size: int) -> dict[str, bytes]:
    """A sentencepiece vocabulary: a score and a piece for every id."""
    if path.stat().st_size > LARGEST_VOCABULARY:
        raise ValueError(f"{path}: too large for a vocabulary")
    content, offset = path.read_bytes(), 4  # after the length of the longest piece
    pieces, scores = [], []
    try:
        for _ in range(vocab_size):
            score, size = struct.unpack_from("<fi", content, offset)
            piece = content[offset + 8 : offset + 8 + size]
            if size < 0 or len(piece) < size or not math.isfinite(score):
                raise ValueError("a damaged entry")
            pieces.append(piece.decode("utf-8"))
            scores.append(score)
            offset += 8 + size
        if offset != len(content):
            raise ValueError("more pieces than the model knows")
    except (struct.error, ValueError) as error:
        raise ValueError(f"{path}: not a llama2.c vocabulary of {vocab_size} ({error})") from None
    # <unk>, <s> and </s>; llama2.c's file has line breaks around the last two.
    tokens = [piece.strip("\n") for piece in pieces[:3]]
    tokens += [piece.replace(" ", tokenizer_files.SPACE) for piece in pieces[3:]]
    files = tokenizer_files.sentencepiece(tokens, scores, range(3), unknown=0)
    # A story begins with <s> and is followed by the next one's <s>: that is what ends a text.
    return tokenizer_files.with_settings(
        files, bos_token=tokens[1], eos_token=tokens[1], unk_token=tokens[0], add_bos_token=True
    )


class _Source:
    """The file's arrays by name, mapped and not read."""

    def __init__(self, path: Path, cfg: ModelConfig):
        axes = table.sizes(cfg)
        rows = [row for row in TABLE if row[0] != "head/kernel" or not cfg.tie_embeddings]
        counts = {"layer": cfg.num_layers}
        total = HEADER.size // 4 + sum(
            math.prod(table.their_shape(row[2], axes)) * (counts["layer"] if "{" in row[1] else 1)
            for row in rows
        )
        if path.stat().st_size != 4 * total:
            raise ValueError(
                f"{path}: not a llama2.c model: {path.stat().st_size} bytes, where its header asks "
                f"for {4 * total}"
            )
        self._data = np.memmap(path, "<f4", "r")
        self._start: dict[str, int] = {}
        self.shapes: dict[str, table.Shape] = {}
        offset = HEADER.size // 4
        for row in rows:
            for name, _ in table.pieces(row, cfg):
                shape = table.their_shape(row[2], axes)
                if row[0]:
                    self._start[name], self.shapes[name] = offset, shape
                offset += math.prod(shape)

    def read(self, name: str) -> np.ndarray:
        start, shape = self._start[name], self.shapes[name]
        return np.asarray(self._data[start : start + math.prod(shape)]).reshape(shape)


def _config(path: Path) -> ModelConfig:
    with path.open("rb") as file:
        header = file.read(HEADER.size)
    if len(header) < HEADER.size:
        raise ValueError(f"{path}: too short for a llama2.c model")
    dim, mlp_dim, layers, heads, kv_heads, vocab_size, context = HEADER.unpack(header)
    if min(dim, mlp_dim, layers, heads, kv_heads, abs(vocab_size), context) < 1:
        raise ValueError(
            f"{path}: not a llama2.c model (version 0): a size of its header is not positive"
        )
    try:
        return ModelConfig(
            vocab_size=abs(vocab_size), context_length=context, num_layers=layers, model_dim=dim,
            num_heads=heads, num_kv_heads=kv_heads, mlp_dim=mlp_dim, mlp="gated", activation="silu",
            norm="rmsnorm", position="rope",
            tie_embeddings=vocab_size > 0,  # the sign is the flag
        )  # fmt: skip
    except ValueError as error:
        raise ValueError(f"{path}: not a llama2.c model ({error})") from None


def _find(path: Path, tokenizer: str | Path | None) -> Path:
    if tokenizer is not None:
        return Path(tokenizer)
    found = sorted(itertools.chain(path.parent.glob("tokenizer.bin"), path.parent.glob("tok*.bin")))
    if not found:
        raise ValueError(f"{path}: no tokenizer.bin or tok*.bin beside it; name the tokenizer")
    return found[0]
