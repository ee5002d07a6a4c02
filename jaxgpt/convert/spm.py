"""sentencepiece's tokenizer.model, as the tokenizer.json that computes the same.

The file is a protocol buffer, of which three messages matter here: the pieces with their scores,
the kind of model, and how a text is normalised first (sentencepiece_model.proto).
"""

import base64
import struct
from collections.abc import Iterator
from typing import Any

from jaxgpt.convert import tokenizer_files

PIECES, TRAINER, NORMALIZER = 1, 2, 3  # fields of the whole
UNIGRAM, BPE = 1, 2
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4  # kinds of a piece
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # how a field is stored


def complete(files: dict[str, bytes]) -> dict[str, bytes]:
    """The files of a tokenizer, with a tokenizer.json where tokenizer.model alone has the pieces.

    Raises:
        ValueError: a damaged file, or a model of words or characters.
    """
    if "tokenizer.model" not in files or files.keys() & {"tokenizer.json", "vocab.json"}:
        return files
    pieces, trainer, normalizer = read(files["tokenizer.model"])
    kind = trainer.get(3, UNIGRAM)
    if kind not in (UNIGRAM, BPE) or not pieces:
        raise ValueError(f"tokenizer.model: a model of kind {kind}, where 1 or 2 can be read")
    tokens = [text for text, _, _ in pieces]
    scores = [score for _, score, _ in pieces]
    special = [i for i, (_, _, kind) in enumerate(pieces) if kind in (UNKNOWN, CONTROL)]
    made = tokenizer_files.sentencepiece(
        tokens,
        scores,
        special,
        unknown=next((i for i, piece in enumerate(pieces) if piece[2] == UNKNOWN), 0),
        unigram=kind == UNIGRAM,
        whole=[i for i, piece in enumerate(pieces) if piece[2] == USER_DEFINED],
        space_prefix=bool(normalizer.get(3, True)),
        single_spaces=bool(normalizer.get(4, True)),
        characters=base64.b64encode(normalizer.get(2, b"")).decode(),
        byte_fallback=bool(trainer.get(35, False)),
    )
    name = lambda field, usual: tokens[i] if (i := _id(trainer, field, usual)) >= 0 else None
    made = tokenizer_files.with_settings(
        made, bos_token=name(41, 1), eos_token=name(42, 2), pad_token=name(43, -1)
    )
    return made | files


def read(content: bytes) -> tuple[list[tuple[str, float, int]], dict[int, Any], dict[int, Any]]:
    """(text, score, kind) of every piece, and the settings by their number.

    Raises:
        ValueError: a damaged file.
    """
    pieces, settings = [], {TRAINER: {}, NORMALIZER: {}}
    try:
        for field, value in _fields(content):
            if field == PIECES:
                piece = dict(_fields(value))
                (score,) = struct.unpack("<f", piece.get(2, bytes(4)))
                pieces.append((piece.get(1, b"").decode("utf-8"), score, piece.get(3, 1)))
            elif field in settings:
                settings[field] = dict(_fields(value))
    except (IndexError, TypeError, AttributeError, UnicodeDecodeError, struct.error) as error:
        raise ValueError(f"tokenizer.model: not sentencepiece's ({error})") from None
    return pieces, settings[TRAINER], settings[NORMALIZER]


def _fields(content: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of every field of a message: a whole number, or bytes."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = content[at]
            value |= (byte & 127) << shift
            at, shift = at + 1, shift + 7
            if byte < 128:
                return value
            if shift > 63:
                raise IndexError("a number without end")

    while at < len(content):
        key = varint()
        kind = key & 7
        if kind == VARINT:
            yield key >> 3, varint()
            continue
        sizes = {FIXED64: 8, FIXED32: 4}
        size = varint() if kind == BYTES else sizes.get(kind, len(content))
        if at + size > len(content):
            raise IndexError("a field ends behind the end")
        yield key >> 3, content[at : at + size]
        at += size


def _id(trainer: dict[int, Any], field: int, usual: int) -> int:
    """An id; negative ones, which stand for none, are stored as 64 bits."""
    value = trainer.get(field, usual)
    return value - 2**64 if value >= 2**63 else value
