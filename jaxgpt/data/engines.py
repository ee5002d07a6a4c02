"""What runs a tokenizer: tiktoken, or Hugging Face's `tokenizers`; and the form of tokenizer.json.

Both have the same methods; their meaning is written at `Bpe`.
"""

import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

from jaxgpt import files

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+\z|\s+(?!\S)|\s"
# GPT-2's pattern with every digit on its own: numbers of any length look alike to the model.
# A run of white space ending the text has its own branch, or the look-ahead is quadratic in it.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+\z|\s+(?!\S)|\s"

END_OF_TEXT = "<|endoftext|>"
# The chat turns and the padding are in the vocabulary from the start, so that a base model can
# be tuned to chat without growing its embedding.
SPECIAL = (END_OF_TEXT, "<|im_start|>", "<|im_end|>", "<|pad|>")
# How other vocabularies call the end of a text, likeliest first.
END_NAMES = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "<|eot_id|>", "<|im_end|>")

LONG_BLANK = 200_000  # tiktoken panics at a run of a million
REPLACEMENT = "\ufffd".encode()

Span = tuple[int, int]  # first character of a stretch, and the one behind its last


@dataclass(frozen=True)
class Bpe:
    """Byte-level BPE, run by tiktoken; without merges the tokens are the bytes themselves."""

    engine: Any  # tiktoken.Encoding
    ranks: dict[bytes, int]  # token -> id; pairs merge in order of the id they make
    special: dict[str, int]
    pattern: str  # what cuts the text into words before merging

    @property
    def vocab_size(self) -> int:
        """Largest id + 1, special tokens included."""
        return self.engine.n_vocab

    @cached_property
    def eos_id(self) -> int:
        """The document separator, which also ends a text."""
        return _end_of_text(self.special)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of what decides the ids: equal fingerprints give equal ids for any text."""
        return fingerprint_of(build(self.pattern, self.ranks, self.special))

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Ids of the text; special tokens written in it are plain text unless allowed."""
        _utf8(text)
        # Not encode_batch, which starts threads: a conversation is encoded in many short parts.
        encode = partial(self.engine.encode, allowed_special="all")
        if not allow_special:
            encode = self.engine.encode_ordinary
        parts = [encode(piece) for piece in _pieces(text)]
        return list(itertools.chain(*parts))

    def encode_with_starts(
        self, text: str, literal: Sequence[Span] = ()
    ) -> tuple[list[int], list[int]]:
        """Ids of a text whose special tokens count, and the character at which each id begins.

        Args:
            literal: places where the text of a special token stands that is plain text.
        """
        _utf8(text)
        ids: list[int] = []
        for part, special in _parts(text, self.special, literal):
            ids += [self.special[part]] if special else self.encode(part)
        ends = itertools.accumulate(map(len, self.engine.decode_tokens_bytes(ids)))
        char_of = [i for i, char in enumerate(text) for _ in char.encode()]
        return ids, [char_of[start] for start in [0, *ends][:-1]]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of every text, on all cores."""
        for text in texts:
            _utf8(text)
        pieces = [_pieces(text) for text in texts]
        encoded = iter(
            self.engine.encode_ordinary_batch(
                list(itertools.chain(*pieces)), num_threads=os.cpu_count() or 1
            )
        )
        return [
            next(encoded) if len(cut) == 1 else list(itertools.chain(*[next(encoded) for _ in cut]))
            for cut in pieces
        ]

    def decode(self, ids: Iterable[int]) -> str:
        """The text; bytes that are not UTF-8, and ids that are no token, become U+FFFD."""
        return self.decode_bytes(ids).decode(errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes, for streaming: a character may be spread over several tokens."""
        ids = [int(i) for i in ids]
        try:
            return self.engine.decode_bytes(ids)
        except KeyError:  # an id in a gap of the vocabulary, or in a padded embedding's tail
            return b"".join(map(self._bytes_of, ids))

    def save(self, path: str | Path) -> None:
        """Writes a Hugging Face tokenizer.json that `load` and transformers read."""
        merges = merges_of(self.ranks)
        _write_json(path, build(self.pattern, self.ranks, self.special, merges))

    def _bytes_of(self, token: int) -> bytes:
        try:
            return self.engine.decode_single_token_bytes(token)
        except KeyError:
            return REPLACEMENT


@dataclass(frozen=True)
class HuggingFace:
    """Any other tokenizer.json, run by the `tokenizers` library."""

    engine: Any  # tokenizers.Tokenizer
    end_of_text: str = ""  # name of the end-of-text token; empty: the likeliest of END_NAMES

    @cached_property
    def vocab_size(self) -> int:
        return max(self.engine.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def special(self) -> dict[str, int]:
        added = self.engine.get_added_tokens_decoder()
        return {token.content: i for i, token in added.items() if token.special}

    @cached_property
    def eos_id(self) -> int:
        if not self.end_of_text:
            return _end_of_text(self.special)
        found = self.engine.token_to_id(self.end_of_text)
        if found is None:
            raise ValueError(
                f"tokenizer_config.json: eos_token={self.end_of_text!r} is not in the vocabulary"
            )
        return found

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint_of(json.loads(self.engine.to_str()))

    @cached_property
    def _plain(self) -> Any:
        """The same tokenizer, to which special tokens are ordinary text: no text has their names.

        Where the vocabulary holds one as an ordinary piece, too, as sentencepiece's do with </s>,
        the library's own setting would still find it.
        """
        return _renamed(self.engine, {token: f"\U0010ffff{i}" for token, i in self.special.items()})

    @cached_property
    def _stand_ins(self) -> dict[int, Any]:
        """The same tokenizers by the character after which their special tokens are renamed."""
        return {}

    @cached_property
    def _byte_of(self) -> dict[str, int] | None:
        """The bytes behind a token's characters, where the vocabulary is byte-level."""
        decoder = json.loads(self.engine.to_str())["decoder"]
        byte_level = decoder is not None and decoder["type"] == "ByteLevel"
        return {char: byte for byte, char in byte_chars().items()} if byte_level else None

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        _utf8(text)
        engine = self.engine if allow_special else self._plain
        return engine.encode(text, add_special_tokens=False).ids

    def encode_with_starts(
        self, text: str, literal: Sequence[Span] = ()
    ) -> tuple[list[int], list[int]]:
        _utf8(text)
        if not literal:
            found = self.engine.encode(text, add_special_tokens=False)
            return found.ids, [start for start, _ in found.offsets]
        # A tokenizer whose special tokens have other names reads their texts as any other text.
        first = next(
            first for first in range(0xF0000, 0x10FFFE, len(self.special))
            if not any(first <= ord(char) < first + len(self.special) for char in text)
        )  # fmt: skip
        name_of = {token: chr(first + i) for i, token in enumerate(self.special)}
        if first not in self._stand_ins:
            self._stand_ins[first] = _renamed(self.engine, name_of)
        parts = _parts(text, self.special, literal)
        swapped = [(name_of[part] if special else part) for part, special in parts]
        found = self._stand_ins[first].encode("".join(swapped), add_special_tokens=False)
        begins = [0, *itertools.accumulate(len(part) for part, _ in parts)]
        at = list(itertools.chain(*(
            [begin] if special else range(begin, begin + len(part))
            for begin, (part, special) in zip(begins, parts, strict=False)
        )))  # fmt: skip
        return found.ids, [([*at, len(text)])[start] for start, _ in found.offsets]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        for text in texts:
            _utf8(text)
        batch = self._plain.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in batch]

    def decode(self, ids: Iterable[int]) -> str:
        if self._byte_of is not None:
            return self.decode_bytes(ids).decode(errors="replace")
        return self.engine.decode([int(i) for i in ids], skip_special_tokens=False)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        if self._byte_of is None:
            return self.decode(ids).encode()
        return b"".join(map(self._bytes_of, ids))

    def save(self, path: str | Path) -> None:
        _write_json(path, json.loads(self.engine.to_str()))

    def _bytes_of(self, token: int) -> bytes:
        text, byte_of = self.engine.id_to_token(int(token)), self._byte_of or {}
        if text is None:
            return REPLACEMENT
        if any(char not in byte_of for char in text) or text in self.special:
            return text.encode()
        return bytes(byte_of[char] for char in text)


def bpe(pattern: str, ranks: dict[bytes, int], special: dict[str, int]) -> Bpe:
    """A tiktoken tokenizer of these tokens, where pairs merge in order of their ids."""
    import tiktoken

    engine = tiktoken.Encoding(
        "jaxgpt", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special
    )
    return Bpe(engine, ranks, special, pattern)


@cache
def byte_level() -> Bpe:
    """The trivial tokenizer: ids 0..255 are the bytes of UTF-8, the special tokens follow."""
    special = {text: 256 + i for i, text in enumerate(SPECIAL)}
    return bpe(PATTERN, {bytes([b]): b for b in range(256)}, special)


def parse_json(content: bytes, name: str) -> dict[str, Any]:
    """A JSON object from bytes that nobody vouches for."""
    try:
        found = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: not JSON ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{name}: must be a JSON object")
    return found


def read_bpe(definition: dict[str, Any]) -> tuple[str, dict[bytes, int], dict[str, int]] | None:
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
    """The content of tokenizer.json for byte-level BPE."""
    chars, byte_level = byte_chars(), {"add_prefix_space": False, "trim_offsets": True}
    vocab = {"".join(chars[b] for b in token): i for token, i in ranks.items()}
    # `tokenizers` numbers added tokens one after another, so a gap (cl100k_base) needs a stand-in.
    known = {*ranks.values(), *special.values()}
    gaps = {f"<|unused_{i}|>": i for i in range(max(known, default=0)) if i not in known}
    added = sorted((special | gaps).items(), key=lambda item: item[1])
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    return definition(
        [(i, text, True) for text, i in added],
        bpe_model(vocab, [list(pair) for pair in merges]),
        pre_tokenizer={
            "type": "Sequence",
            "pretokenizers": [
                {**split, "invert": False},
                {"type": "ByteLevel", **byte_level, "use_regex": False},
            ],
        },
        decoder={"type": "ByteLevel", **byte_level, "use_regex": True},
    )


def definition(
    added: Iterable[tuple[int, str, bool]],
    model: dict[str, Any],
    *,
    pre_tokenizer: dict[str, Any] | None,
    decoder: dict[str, Any],
    normalizer: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The content of tokenizer.json.

    Args:
        added: (id, text, whether it is special) of tokens that are cut out of a text first.
    """
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": text, **plain, "special": special} for i, text, special in added
        ],
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": model,
    }


def bpe_model(vocab: dict[str, int], merges: list[list[str]], **settings: Any) -> dict[str, Any]:
    """The `model` of a tokenizer.json that merges pairs; `settings` change the defaults."""
    return {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
        "ignore_merges": False, **settings, "vocab": vocab, "merges": merges,
    }  # fmt: skip


def fingerprint_of(definition: dict[str, Any]) -> str:
    """sha256 of what decides the ids: equal fingerprints give equal ids for any text."""
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


def _utf8(text: str) -> bytes:
    """UTF-8, refusing the lone surrogates that Python lets into a string."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text holds a lone surrogate, {text[error.start]!r}, at character "
            f"{error.start}: it is not Unicode text"
        ) from None


def _pieces(text: str) -> list[str]:
    """The text, cut inside runs of white space so long that they overflow the regex's stack."""
    starts = range(LONG_BLANK, len(text) - LONG_BLANK, LONG_BLANK)
    cuts = [i for i in starts if text[i : i + LONG_BLANK].isspace()]
    return [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]


def _parts(
    text: str, special: Iterable[str], literal: Sequence[Span] = ()
) -> list[tuple[str, bool]]:
    """The text cut at its special tokens, each part with whether it is one."""
    pattern = _any_of(tuple(special))
    parts: list[tuple[str, bool]] = []
    done = start = 0
    while found := pattern.search(text, start):
        over = [b for a, b in literal if a < found.end() and found.start() < b]
        if over:
            start = max(over)
            continue
        parts += [(text[done : found.start()], False), (found[0], True)]
        done = start = found.end()
    return [part for part in [*parts, (text[done:], False)] if part[0]]


@lru_cache(64)
def _any_of(texts: tuple[str, ...]) -> re.Pattern[str]:
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def _renamed(engine: Any, name_of: Mapping[str, str]) -> Any:
    """The tokenizer whose special tokens have other names, and the same ids."""
    import tokenizers

    definition = json.loads(engine.to_str())
    definition["post_processor"] = None  # it names special tokens, and adds some
    for token in definition["added_tokens"]:
        if token["special"]:
            token |= {"content": name_of[token["content"]], "normalized": False}
    model = definition["model"]
    rename = lambda token: name_of.get(token, token)
    if isinstance(model["vocab"], dict):
        model["vocab"] = {rename(token): i for token, i in model["vocab"].items()}
    else:
        model["vocab"] = [[rename(token), score] for token, score in model["vocab"]]
    if isinstance(model.get("unk_token"), str):
        model["unk_token"] = rename(model["unk_token"])
    if "merges" in model:
        pairs = [pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"]]
        model["merges"] = [pair for pair in pairs if not {*pair, "".join(pair)} & name_of.keys()]
    return tokenizers.Tokenizer.from_str(json.dumps(definition))


def _end_of_text(special: dict[str, int]) -> int:
    found = next((special[name] for name in END_NAMES if name in special), None)
    if found is None:
        raise ValueError(f"the tokenizer has no end-of-text token among {', '.join(END_NAMES)}")
    return found


def _write_json(path: str | Path, definition: dict[str, Any]) -> None:
    files.write(path, json.dumps(definition, ensure_ascii=False, indent=1))
