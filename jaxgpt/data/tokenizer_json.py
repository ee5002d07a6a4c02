"""Hugging Face's tokenizer.json, for byte-level BPE: written, recognised, fingerprinted."""

import hashlib
import itertools
import json
from collections.abc import Sequence
from typing import Any

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+\z|\s+(?!\S)|\s"
# GPT-2's pattern with every digit on its own: numbers of any length look alike to the model.
# A run of white space ending the text has its own branch, or the look-ahead is quadratic in it.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+\z|\s+(?!\S)|\s"


def read_bpe(
    definition: dict[str, Any],
) -> tuple[str, dict[bytes, int], dict[str, int]] | None:
    """(pattern, ranks, special) if tiktoken gives the same ids: our layout, merges by id."""
    special = {token["content"]: token["id"] for token in definition.get("added_tokens", [])}
    model, alphabet = definition["model"], set(byte_chars().values())
    if not isinstance(model.get("vocab"), dict):
        return None
    vocab = {token: i for token, i in model["vocab"].items() if token not in special}
    if not alphabet <= vocab.keys() or not alphabet >= set().union(*vocab):
        return None
    pairs = [pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"]]
    made = [vocab.get("".join(pair)) for pair in pairs]
    if made != sorted(i for token, i in vocab.items() if len(token) > 1):
        return None
    for pattern in (PATTERN, GPT2_PATTERN):
        ranks = ranks_of(vocab)
        expected = build(pattern, ranks, special)
        same = [definition.get(k) == expected[k] for k in ("added_tokens", "pre_tokenizer")]
        plain = {**model, "vocab": {}, "merges": []} == {**expected["model"], "vocab": {}}
        if all(same) and plain and definition.get("normalizer") is None:
            return pattern, ranks, special
    return None


def build(
    pattern: str,
    ranks: dict[bytes, int],
    special: dict[str, int],
    merges: Sequence[Sequence[str]] = (),
) -> dict[str, Any]:
    """The content of tokenizer.json."""
    chars, byte_level = byte_chars(), {"add_prefix_space": False, "trim_offsets": True}
    vocab = {"".join(chars[b] for b in token): i for token, i in ranks.items()}
    # `tokenizers` numbers added tokens one after another, so a gap (cl100k_base) needs a stand-in.
    known = {*ranks.values(), *special.values()}
    gaps = {f"<|unused_{i}|>": i for i in range(max(known, default=0)) if i not in known}
    added = [
        {
            "id": i, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": True,
        }
        for text, i in sorted((special | gaps).items(), key=lambda item: item[1])
    ]  # fmt: skip
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {**split, "invert": False},
                {"type": "ByteLevel", **byte_level, "use_regex": False},
            ],
        },
        "post_processor": None,
        "decoder": {"type": "ByteLevel", **byte_level, "use_regex": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
            "ignore_merges": False, "vocab": vocab, "merges": [list(pair) for pair in merges],
        },
    }  # fmt: skip


def fingerprint(definition: dict[str, Any]) -> str:
    # The merges follow from the order of the ids, and a decoder changes no id.
    special = {token["content"]: token["id"] for token in definition["added_tokens"]}
    model = definition["model"]
    vocab = model["vocab"]
    pairs = vocab.items() if isinstance(vocab, dict) else enumerate(map(str, vocab))
    plain = sorted([str(a), str(b)] for a, b in pairs if a not in special)
    parts = [plain, special, definition["normalizer"], definition["pre_tokenizer"]]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def byte_chars() -> dict[int, str]:
    """GPT-2's printable stand-in for every byte: itself where printable, else from U+0100 up."""
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    hidden = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(hidden)}


def ranks_of(vocab: dict[str, int]) -> dict[bytes, int]:
    byte_of = {char: byte for byte, char in byte_chars().items()}
    tokens = sorted(vocab.items(), key=lambda item: item[1])
    return {bytes(byte_of[char] for char in token): i for token, i in tokens}


def merges_of(ranks: dict[bytes, int]) -> list[tuple[str, str]]:
    """The pair that makes each token: what is left when its bytes merge by all earlier ranks."""
    chars, pairs = byte_chars(), []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) == 1:
            continue
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            made = [ranks.get(a + b, rank) for a, b in itertools.pairwise(parts)]
            first = min(range(len(made)), key=made.__getitem__)
            assert made[first] < rank, f"no two tokens make {token!r}"
            parts[first : first + 2] = [parts[first] + parts[first + 1]]
        pairs.append(tuple("".join(chars[b] for b in part) for part in parts))
    return pairs
