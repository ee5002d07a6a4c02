"""Token files, written and read: shards of plain integers and a manifest, restartable, any size.

    DIR/manifest.json    counts, types, hashes; written last, so its presence means complete
    DIR/tokenizer.json   what made the tokens
    DIR/train-00000.bin  uint16 or uint32, documents joined by the end-of-text token
    DIR/val-00000.bin    the held-out part that came by while train-00000 was filled

A killed run leaves finished shards and progress.json. The same command continues after the last
shard and ends with the same bytes; another data set is never written over.
"""

import functools
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from jaxgpt import files, store
from jaxgpt.data import tokenizer as tokenizers
from jaxgpt.data.documents import Advice, Corpus, Piece
from jaxgpt.data.rows import Paths, names
from jaxgpt.data.tokenizer import Tokenizer

MANIFEST = "manifest.json"
LLMC_MAGIC = {20240520: ("uint16", "gpt2"), 20240801: ("uint32", "")}  # llm.c: GPT-2, Llama 3
LLMC_HEADER = 256  # int32: magic, version, count, zeros
PROGRESS = "progress.json"
FORMAT = 1
SHARD_TOKENS = 1 << 25  # 64 MiB of uint16: seconds of work to lose, few files
CHUNK = 1 << 22  # characters encoded at a time, enough to keep all threads busy
TRAINING_CHARACTERS = 1 << 23  # a BPE is learned from; more hardly changes it

# What pretraining offers against text that cannot be read as it is.
TRAINING = Advice(
    ", or prepare it with scripts/prepare_data.py --errors replace",
    'choose with --data.columns \'{"text": "NAME"}\'',
)


@dataclass(frozen=True)
class Tokens:
    """Shards on disk or in a store, read as one long array."""

    shards: tuple[np.ndarray | store.Shard, ...] = ()

    @functools.cached_property
    def size(self) -> int:
        return sum(shard.size for shard in self.shards)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start … stop - 1, fewer beyond the end."""
        parts, first = [], 0
        for shard in self.shards:
            if start < first + shard.size and stop > first:
                parts.append(shard[max(start - first, 0) : stop - first])
            first += shard.size
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def in_store(self) -> bool:
        """Whether a read may wait for a store, so that many are better made at once."""
        return any(isinstance(shard, store.Shard) for shard in self.shards)


@dataclass(frozen=True)
class TokenFile:
    """What one path holds."""

    path: str
    train: Tokens
    val: Tokens
    vocab_size: int  # 0: not recorded
    eos_id: int | None
    tokenizer: str  # what tokenizer.load takes; empty: not recorded
    fingerprint: str  # of the tokenizer; empty: not recorded
    source_sha256: str  # of the text; empty: not recorded


def is_tokens(path: Any) -> TypeGuard[str | Path]:
    """Whether a path holds tokens already: ours, nanoGPT's or llm.c's."""
    if isinstance(path, list | tuple):
        return False
    path = files.path(path)
    return (path / MANIFEST).is_file() or path.suffix == ".bin" or (path / "train.bin").is_file()


def prepare(
    path: Paths | Path,
    out_dir: str | Path,
    tokenizer: str = "",
    vocab_size: int = 2048,
    val_fraction: float = 0.1,
    column: str = "text",
) -> Path:
    """Token files for any `--data.path`: the path itself, or out_dir after tokenising its text.

    An empty path is Python's standard library; an empty tokenizer is our BPE trained on the text.
    """
    inputs = tuple(names([*path] if isinstance(path, list | tuple) else str(path)))
    if len(inputs) == 1 and is_tokens(inputs[0]):
        return files.path(inputs[0])
    out_dir = files.path(out_dir)
    corpus = Corpus(inputs, val_fraction, column=column, advice=TRAINING)
    name = tokenizer or f"BPE of {vocab_size} ids, trained on the text"
    source = corpus.describe()
    if tokenizer:
        chosen = tokenizers.load(tokenizer)
    elif _is_under_way(out_dir, name, source):
        chosen = tokenizers.load(out_dir / "tokenizer.json")
    else:
        chosen = tokenizers.train_bpe(sample(corpus), vocab_size)
    write_tokens(corpus, chosen, out_dir, name, source=source)
    return out_dir


def sample(corpus: Corpus, characters: int = TRAINING_CHARACTERS) -> Iterator[str]:
    """Text to learn a vocabulary from: of a long corpus every n-th piece, and nothing held out."""
    pieces = (piece.text for piece in corpus.pieces() if not piece.held_out)
    seen = 0
    for text in itertools.islice(pieces, 0, None, -(-corpus.size() // characters) or 1):
        yield text
        seen += len(text)
        if seen >= characters:  # a Hub data set does not say how long it is
            return


def write_tokens(
    corpus: Corpus,
    tokenizer: Tokenizer,
    out_dir: str | Path,
    name: str,
    shard_tokens: int = SHARD_TOKENS,
    source: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Tokenises the corpus into `out_dir` and returns the manifest; nothing to do if it is there.

    Args:
        name: how the user named the tokenizer, for the manifest.
        source: `corpus.describe()`, if it is known.
    """
    out_dir = files.path(out_dir)
    state = {
        "format": FORMAT,
        "dtype": "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32",
        "tokenizer": {
            "name": name, "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size, "eos_id": tokenizer.eos_id,
        },
        "source": corpus.describe() if source is None else source,
        "shard_tokens": shard_tokens,
    }  # fmt: skip
    if (out_dir / MANIFEST).is_file():
        manifest = json.loads((out_dir / MANIFEST).read_text())
        _require_same(manifest, state, out_dir)
        return manifest
    files.make_folder(out_dir)
    there = list(out_dir.iterdir()) if out_dir.exists() else []  # no folder is empty in a store
    progress = {**state, "pieces": 0, "text_bytes": 0, "shards": []}
    if (out_dir / PROGRESS).is_file():
        unfinished = json.loads((out_dir / PROGRESS).read_text())
        if unfinished["shards"]:  # else there is nothing to lose in starting over
            _require_same(unfinished, state, out_dir)
            progress = unfinished
    elif not all(map(files.is_partial, there)):
        raise ValueError(f"output={out_dir}: the folder holds other files; choose an empty one")
    for file in filter(files.is_partial, there):  # left by a run that was killed
        file.unlink()
    tokenizer.save(out_dir / "tokenizer.json")
    files.write(out_dir / PROGRESS, json.dumps(progress, indent=1))
    for _ in _fill_shards(corpus, tokenizer, out_dir, progress):
        files.write(out_dir / PROGRESS, json.dumps(progress, indent=1))
    corpus.found.report(corpus.column)
    return _finish(out_dir, progress)


def open_tokens(path: str | Path, cache: float = 0.0) -> TokenFile:
    """A directory of prepare_data.py, llm.c's .bin, or nanoGPT's .bin (or the folder of them).

    A file named …train… takes its sibling …val… as the held-out split.

    Args:
        cache: GB of a store's files that are copied to this machine while others are read.
    """
    path = files.path(path)
    if (path / MANIFEST).is_file():
        found = _open_directory(path)
    else:
        path = path / "train.bin" if (path / "train.bin").is_file() else path
        if not path.is_file() or path.suffix != ".bin":
            raise ValueError(f"data.path={path}: neither a token directory nor a .bin file")
        found = _open_bin(path)
    shards = (*found.val.shards, *found.train.shards)  # the held-out ones are read again and again
    store.keep_near((shard for shard in shards if isinstance(shard, store.Shard)), cache * 1e9)
    return found


def check_vocab(file: TokenFile, tokenizer: Tokenizer) -> None:
    """Refuses a tokenizer that the token files were not made with."""
    if file.fingerprint and file.fingerprint != tokenizer.fingerprint:
        raise ValueError(
            f"data.path={file.path}: made with another tokenizer ({file.vocab_size} ids, not "
            f"{tokenizer.vocab_size} of data.tokenizer); leave data.tokenizer empty to use theirs"
        )


def _fill_shards(
    corpus: Corpus, tokenizer: Tokenizer, out_dir: Path, progress: dict[str, Any]
) -> Iterator[None]:
    """Writes shards and counts them in `progress`, which is whole at every yield."""
    from tqdm import tqdm

    number = len({shard["file"][-9:] for shard in progress["shards"]})
    total = progress["source"]["bytes"] or None
    with tqdm(
        total=total,
        initial=progress["text_bytes"],
        unit="B",
        unit_scale=True,
        desc="tokenise",
        delay=0.5,
    ) as bar:
        pieces = itertools.islice(corpus.pieces(), progress["pieces"], None)
        for group in _groups(pieces, tokenizer, progress, bar):
            for split, held_out in (("train", False), ("val", True)):
                tokens = np.concatenate([t for t, h in group if h == held_out] or [[]])
                tokens = tokens.astype(progress["dtype"])
                if tokens.size:
                    file = f"{split}-{number:05d}.bin"
                    files.write(out_dir / file, tokens.tobytes())
                    progress["shards"].append(
                        {
                            "file": file, "split": split, "tokens": tokens.size,
                            "documents": int((tokens == tokenizer.eos_id).sum()),
                            "sha256": hashlib.sha256(tokens.tobytes()).hexdigest(),
                        }
                    )  # fmt: skip
            number += 1
            yield


def _groups(
    pieces: Iterable[Piece], tokenizer: Tokenizer, progress: dict[str, Any], bar: Any
) -> Iterator[list[tuple[np.ndarray, bool]]]:
    """Encoded pieces, (tokens, held out), in groups of a shard's size."""
    dtype, end = progress["dtype"], [tokenizer.eos_id]
    group: list[tuple[np.ndarray, bool]] = []
    tokens = 0
    for chunk in _chunks(pieces):
        for piece, ids in zip(chunk, tokenizer.encode_batch([p.text for p in chunk]), strict=True):
            group.append((np.array(ids + end if piece.ends else ids, dtype), piece.held_out))
            tokens += group[-1][0].size
        size = sum(len(piece.text.encode()) for piece in chunk)
        progress["pieces"] += len(chunk)
        progress["text_bytes"] += size
        bar.update(size)
        if tokens >= progress["shard_tokens"]:
            yield group
            group, tokens = [], 0
    if group:
        yield group


def _chunks(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    chunk: list[Piece] = []
    size = 0
    for piece in pieces:
        chunk.append(piece)
        size += len(piece.text)
        if size >= CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _finish(out_dir: Path, progress: dict[str, Any]) -> dict[str, Any]:
    counts = {
        split: {
            key: sum(shard[key] for shard in progress["shards"] if shard["split"] == split)
            for key in ("tokens", "documents")
        }
        for split in ("train", "val")
    }
    source, fraction = progress["source"]["inputs"], progress["source"]["val_fraction"]
    if not counts["train"]["tokens"] or (fraction and not counts["val"]["tokens"]):
        for file in ("tokenizer.json", PROGRESS, *(shard["file"] for shard in progress["shards"])):
            (out_dir / file).unlink()
    if not counts["train"]["tokens"]:
        raise ValueError(f"input={' '.join(source)}: holds no text to train on")
    if fraction and not counts["val"]["tokens"]:
        raise ValueError(
            f"val_fraction={fraction}: holds out none of {counts['train']['documents']} documents; "
            "choose a larger fraction, or 0 for no validation split"
        )
    manifest = {**progress, **counts}
    files.write(out_dir / MANIFEST, json.dumps(manifest, indent=1))
    (out_dir / PROGRESS).unlink()
    return manifest


def _require_same(found: dict[str, Any], wanted: dict[str, Any], out_dir: Path) -> None:
    """Refuses to mix two data sets; where the files lie does not matter, their bytes do."""
    found, wanted = (
        {**state, **state["source"], "tokenizer": state["tokenizer"]["fingerprint"], "inputs": 0}
        for state in (found, wanted)
    )
    keys = ["format", "tokenizer", "sha256", "val_fraction", "errors", "column", "shard_tokens"]
    different = [key for key in keys if found[key] != wanted[key]]
    if different:
        raise ValueError(
            f"output={out_dir}: holds another data set (other {', '.join(different)}); choose "
            "another folder or delete it"
        )


def _is_under_way(out_dir: Path, name: str, source: dict[str, Any]) -> bool:
    """Whether out_dir already has the tokenizer that was trained for this text."""
    for file in (out_dir / MANIFEST, out_dir / PROGRESS):
        if file.is_file() and (out_dir / "tokenizer.json").is_file():
            state = json.loads(file.read_text())
            same = all(state["source"][key] == source[key] for key in ("sha256", "val_fraction"))
            return same and state["tokenizer"]["name"] == name
    return False


def _open_directory(path: Path) -> TokenFile:
    manifest = json.loads((path / MANIFEST).read_text())
    splits: dict[str, list[np.ndarray | store.Shard]] = {"train": [], "val": []}
    sizes = _sizes(path)
    for shard in manifest["shards"]:
        file = path / shard["file"]
        size = sizes.get(file.name, 0)
        if size != shard["tokens"] * np.dtype(manifest["dtype"]).itemsize:
            raise ValueError(
                f"data.path={path}: {file.name} is missing or cut short; prepare again"
            )
        splits[shard["split"]].append(_memory_map(file, manifest["dtype"], shard["tokens"]))
    return TokenFile(
        path=str(path),
        train=Tokens(tuple(splits["train"])),
        val=Tokens(tuple(splits["val"])),
        vocab_size=manifest["tokenizer"]["vocab_size"],
        eos_id=manifest["tokenizer"]["eos_id"],
        tokenizer=str(path / "tokenizer.json"),
        fingerprint=manifest["tokenizer"]["fingerprint"],
        source_sha256=manifest["source"]["sha256"],
    )


def _sizes(path: Path) -> dict[str, int]:
    """Bytes of every file of a folder; in a store by one listing."""
    if files.is_local(path):
        return {file.name: file.stat().st_size for file in path.iterdir() if file.is_file()}
    return {name: info["size"] for name, info in store.listing(path).items()}


def _open_bin(path: Path) -> TokenFile:
    tokens, tokenizer = _read_bin(path)
    sibling = path.with_name(path.name.replace("train", "val"))
    val = _read_bin(sibling)[0] if sibling != path and sibling.is_file() else None
    return TokenFile(
        str(path), Tokens((tokens,)), Tokens(() if val is None else (val,)), 0, None, tokenizer,
        "", "",
    )  # fmt: skip


def _read_bin(path: Path) -> tuple[np.ndarray | store.Shard, str]:
    size = path.stat().st_size
    if size == 0:
        raise ValueError(f"data.path={path}: the file is empty")
    header = np.zeros(3, np.int32)
    if size >= 4 * LLMC_HEADER:
        with path.open("rb") as file:
            header = np.frombuffer(file.read(12), np.int32)
    if int(header[0]) not in LLMC_MAGIC:
        if size % 2:
            raise ValueError(f"data.path={path}: {size} bytes is not a whole number of uint16")
        return _memory_map(path, "uint16", size // 2), "gpt2"
    dtype, tokenizer = LLMC_MAGIC[int(header[0])]
    count = int(header[2])
    if size < 4 * LLMC_HEADER + count * np.dtype(dtype).itemsize:
        raise ValueError(f"data.path={path}: its header says {count} tokens, but it is cut short")
    return _memory_map(path, dtype, count, 4 * LLMC_HEADER), tokenizer


def _memory_map(path: Path, dtype: str, count: int, offset: int = 0) -> np.ndarray | store.Shard:
    if count == 0:  # which a memory map refuses
        return np.zeros(0, dtype)
    if not files.is_local(path):
        return store.Shard(path, dtype, count, offset)
    # A plain array on the same pages: slicing np.memmap itself is ten times slower.
    return np.asarray(np.memmap(path, dtype, "r", offset=offset, shape=(count,)))
