"""Token files: exact content, restarts, and what is never written over."""

import json
from pathlib import Path

import numpy as np
import pytest

from jaxgpt import files
from jaxgpt.data import token_files
from jaxgpt.data.documents import Corpus
from jaxgpt.data.engines import Bpe, byte_level
from jaxgpt.data.token_files import prepare, write_tokens
from jaxgpt.data.tokenizer import load, train_bpe

BYTES = byte_level()
PARTS = (BYTES.engine, BYTES.ranks, BYTES.special, BYTES.pattern)
SHAKESPEARE = Path(__file__).parents[2] / "../shared/data/text/tinyshakespeare.txt"


@pytest.fixture
def rows(tmp_path) -> Corpus:
    generator = np.random.default_rng(0)
    lines = [
        {"text": f"{n} " + "word é, " * int(generator.integers(1, 40))} for n in range(300)
    ]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return Corpus((str(tmp_path / "rows.jsonl"),))


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_token_files_hold_every_document_and_its_end(rows, tmp_path):
    manifest = write_tokens(rows, BYTES, tmp_path / "out", "byte", shard_tokens=5000)
    found = token_files.open_tokens(tmp_path / "out")
    for split, tokens in (("train", found.train), ("val", found.val)):
        expected = [p.text for p in rows.pieces() if p.held_out == (split == "val")]
        ids = [i for text in expected for i in [*text.encode(), 256]]
        np.testing.assert_array_equal(tokens.read(0, tokens.size), ids)
        assert manifest[split] == {"tokens": len(ids), "documents": len(expected)}
    assert found.fingerprint == BYTES.fingerprint == load(found.tokenizer).fingerprint


@pytest.mark.skipif(not SHAKESPEARE.exists(), reason="../shared/data is missing")
def test_shakespeare_by_bytes_is_nanogpts_character_split(tmp_path):
    prepare(SHAKESPEARE, tmp_path / "out", "byte")
    found = token_files.open_tokens(tmp_path / "out")
    data = SHAKESPEARE.read_bytes()
    assert (found.train.size, found.val.size) == (1003854, 111540)
    assert found.train.read(0, found.train.size).astype(np.uint8).tobytes() == data[:1003854]
    assert found.val.read(0, found.val.size).astype(np.uint8).tobytes() == data[1003854:]


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_an_interrupted_run_continues_to_the_same_bytes(rows, tmp_path, monkeypatch, stop):
    monkeypatch.setattr(token_files, "CHUNK", 1000)
    write_tokens(rows, BYTES, tmp_path / "whole", "byte", shard_tokens=9000)

    encoded, write = [], files.write

    def dying_write(path, content):
        if path.name == f"train-{stop:05d}.bin" and path.parent.name == "cut":
            (path.parent / f".half{files.PARTIAL}").write_bytes(content[:99])
            raise KeyboardInterrupt
        write(path, content)

    monkeypatch.setattr(files, "write", dying_write)
    with pytest.raises(KeyboardInterrupt):
        write_tokens(rows, BYTES, tmp_path / "cut", "byte", shard_tokens=9000)
    assert not (tmp_path / "cut" / "manifest.json").exists()
    with pytest.raises(ValueError, match="neither a token directory"):
        token_files.open_tokens(tmp_path / "cut")

    class Counting(Bpe):
        def encode_batch(self, texts):
            encoded.extend(texts)
            return super().encode_batch(texts)

    monkeypatch.setattr(files, "write", write)
    write_tokens(rows, Counting(*PARTS), tmp_path / "cut", "byte", shard_tokens=9000)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    assert len(encoded) < 300  # the finished shards were not made again


def test_preparing_again_changes_nothing(rows, tmp_path, monkeypatch):
    first = write_tokens(rows, BYTES, tmp_path / "out", "byte")
    monkeypatch.setattr(Corpus, "pieces", lambda self: pytest.fail("read the text again"))
    assert write_tokens(rows, BYTES, tmp_path / "out", "byte") == first


def test_another_data_set_is_never_written_over(rows, tmp_path):
    write_tokens(rows, BYTES, tmp_path / "out", "byte")
    before = contents(tmp_path / "out")
    other = train_bpe(["words"], 262)
    with pytest.raises(ValueError, match=r"holds another data set \(other tokenizer\)"):
        write_tokens(rows, other, tmp_path / "out", "bpe")
    (tmp_path / "rows.jsonl").write_text('{"text": "changed"}')
    with pytest.raises(ValueError, match=r"holds another data set \(other sha256\)"):
        write_tokens(rows, BYTES, tmp_path / "out", "byte")
    assert contents(tmp_path / "out") == before


def test_a_folder_with_other_files_is_refused(rows, tmp_path):
    for name in ("thesis.doc", "film.part"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
        with pytest.raises(ValueError, match="holds other files"):
            write_tokens(rows, BYTES, tmp_path / name, "byte")
        assert (tmp_path / name / name).exists()


def test_a_large_vocabulary_takes_wider_integers(tmp_path):
    class Wide(Bpe):
        vocab_size = 1 << 17

        def encode_batch(self, texts):
            return [[100_000] * 50 for _ in texts]

    (tmp_path / "a.txt").write_text("a" * 100)
    manifest = write_tokens(
        Corpus((str(tmp_path / "a.txt"),)), Wide(*PARTS), tmp_path / "out", "wide"
    )
    assert manifest["dtype"] == "uint32"
    assert token_files.open_tokens(tmp_path / "out").train.read(0, 1)[0] == 100_000


def test_too_few_documents_to_hold_one_out_is_an_error_that_leaves_nothing(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' * 5)
    with pytest.raises(ValueError, match=r"val_fraction=0\.1: holds out none of 5 documents"):
        write_tokens(Corpus((str(tmp_path / "a.jsonl"),)), BYTES, tmp_path / "out", "byte")
    assert not contents(tmp_path / "out")


def test_prepare_returns_token_files_as_they_are(rows, tmp_path):
    write_tokens(rows, BYTES, tmp_path / "out", "byte")
    assert prepare(tmp_path / "out", tmp_path / "unused") == tmp_path / "out"
    np.arange(9, dtype=np.uint16).tofile(tmp_path / "train.bin")
    for path in (tmp_path, tmp_path / "train.bin"):
        assert prepare(path, tmp_path / "unused") == path
    assert not (tmp_path / "unused").exists()


def test_prepare_trains_a_vocabulary_on_training_text_alone(tmp_path, monkeypatch):
    text = tmp_path / "a.txt"
    text.write_text("abab cdcd\n" * 900 + "zqzq\n" * 200)
    folder = prepare(text, tmp_path / "out", vocab_size=265)
    trained = load(folder)
    assert trained.vocab_size == 265 and len(trained.encode("abab")) == 1
    assert len(trained.encode("zqzq")) == 4
    monkeypatch.setattr("jaxgpt.data.tokenizer.train_bpe", lambda *_: pytest.fail("trained again"))
    assert prepare(text, tmp_path / "out", vocab_size=265) == folder


def test_a_sample_is_spread_over_a_long_corpus(rows):
    size = sum(len(p.text) for p in rows.pieces())
    taken = list(token_files.sample(rows, size // 4))
    held_out = {p.text for p in rows.pieces() if p.held_out}
    assert not held_out & set(taken)
    assert int(taken[-1].split()[0]) > 250 and sum(map(len, taken)) < size // 2
