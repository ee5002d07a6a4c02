"""Text to token ids and back: bytes, tiktoken's encodings, our own BPE, any tokenizer.json.

Byte-level BPE runs in tiktoken (25 MB/s on two cores); everything is saved in Hugging Face's
tokenizer.json format, so that transformers reads it too.
"""

import itertools
import json
import re
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxgpt import files as paths
from jaxgpt.data import engines
from jaxgpt.data.engines import PATTERN, SPECIAL, Bpe, HuggingFace, parse_json

PAIRS = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))  # GPT-2's, under two names
FILES = ("tokenizer.json", "tokenizer_config.json", *itertools.chain(*PAIRS))
DOWNLOAD_SECONDS = 60  # tiktoken itself waits for ever


Tokenizer = Bpe | HuggingFace  # the same methods, described at Bpe


def load(name: str | Path) -> Tokenizer:
    """`byte`, a tiktoken encoding, a tokenizer.json, or a directory with one (or GPT-2's files).

    Raises:
        ValueError: no such tokenizer, or its vocabulary cannot be had without a network.
    """
    import tiktoken

    if name == "byte":
        return engines.byte_level()
    if name in tiktoken.list_encoding_names():
        return _load_tiktoken(str(name))
    path = paths.path(name)
    if path.is_dir():
        found = {file: path / file for file in FILES if (path / file).is_file()}
        return from_files({file: found[file].read_bytes() for file in found}, f"tokenizer={name}")
    if path.is_file():
        settings = path.with_name("tokenizer_config.json")
        beside = {settings.name: settings.read_bytes()} if settings.is_file() else {}
        return from_files({"tokenizer.json": path.read_bytes(), **beside}, f"tokenizer={name}")
    raise ValueError(
        f"tokenizer={name}: no such file, and not one of byte, "
        + ", ".join(tiktoken.list_encoding_names())
    )


def from_files(files: Mapping[str, bytes], name: str) -> Tokenizer:
    """The tokenizer of a directory, from its files' contents by name.

    Args:
        name: of the directory or file, for error messages.

    Raises:
        ValueError: none of these files holds a vocabulary, or one is damaged.
    """
    if "tokenizer.json" in files:
        definition = parse_json(files["tokenizer.json"], f"{name}: tokenizer.json")
        if "model" not in definition:
            raise ValueError(f"{name}: tokenizer.json: has no model")
        told = parse_json(
            files.get("tokenizer_config.json", b"{}"), f"{name}: tokenizer_config.json"
        )
        end = told.get("eos_token")
        end = end.get("content") if isinstance(end, dict) else end
        try:
            return _from_definition(definition, end if isinstance(end, str) else "")
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    for vocab, merges in PAIRS:
        if vocab in files and merges in files:
            content = parse_json(files[vocab], f"{name}: {vocab}")
            return _from_gpt2_files(content, files[merges].decode("utf-8"))
    raise ValueError(f"{name}: holds no tokenizer.json and no vocab.json + merges.txt")


def train_bpe(texts: Iterable[str], vocab_size: int) -> Bpe:
    """Byte-level BPE of `vocab_size` ids learned from the texts; fewer if pairs run out."""
    import tokenizers
    from tokenizers import models, pre_tokenizers, trainers

    smallest = 256 + len(SPECIAL)
    if vocab_size < smallest:
        raise ValueError(
            f"vocab_size={vocab_size}: must be at least {smallest} (256 bytes and "
            f"{len(SPECIAL)} special tokens)"
        )
    learner = tokenizers.Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    ranks = engines.ranks_of(learner.get_vocab())
    return engines.bpe(PATTERN, ranks, {text: len(ranks) + i for i, text in enumerate(SPECIAL)})


def _load_tiktoken(name: str) -> Bpe:
    """A named encoding, from tiktoken's cache or the network, never waiting long for it."""
    import tiktoken

    outcome: list[Any] = []

    def fetch() -> None:
        try:
            outcome.append(tiktoken.get_encoding(name))
        except (OSError, ValueError) as error:  # no network; or a damaged download
            outcome.append(error)

    worker = threading.Thread(target=fetch, daemon=True)
    worker.start()
    worker.join(DOWNLOAD_SECONDS)
    if not outcome or isinstance(outcome[0], Exception):
        raise ValueError(
            f"tokenizer={name}: its vocabulary is not cached here and cannot be downloaded; set "
            "TIKTOKEN_CACHE_DIR to a folder that holds it, or give a folder with vocab.json + "
            "merges.txt, or train one with scripts/train_tokenizer.py, or use byte"
        )
    found = outcome[0]
    pattern, ranks = _without_possessives(found._pat_str), found._mergeable_ranks
    return Bpe(found, ranks, dict(found._special_tokens), pattern)


def _without_possessives(pattern: str) -> str:
    """tiktoken's pattern as Hugging Face's regular expressions read it.

    There `+` after a quantifier repeats instead of being possessive, and `$` matches before
    every line break; the possessive forms are for speed only.
    """
    return re.sub(r"([+*?}])\+", r"\1", pattern).replace("$", r"\z")


def _from_gpt2_files(vocab: dict[str, int], merges_text: str) -> Tokenizer:
    lines = merges_text.split("\n")
    merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    made = {left + right for left, right in merges} | set(engines.byte_chars().values())
    special = {token: i for token, i in vocab.items() if token not in made}
    ranks = {token: i for token, i in vocab.items() if token in made}
    return _from_definition(
        engines.build(engines.GPT2_PATTERN, engines.ranks_of(ranks), special, merges), ""
    )


def _from_definition(definition: dict[str, Any], end_of_text: str) -> Tokenizer:
    """Our own form runs in tiktoken, whatever else in `tokenizers`."""
    import tokenizers

    ours = engines.read_bpe(definition)
    if ours is None:
        try:
            return HuggingFace(tokenizers.Tokenizer.from_str(json.dumps(definition)), end_of_text)
        except Exception as error:  # `tokenizers` raises nothing more precise
            raise ValueError(f"not a tokenizer.json that `tokenizers` reads: {error}") from None
    return engines.bpe(*ours)
