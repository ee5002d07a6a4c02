"""batch(step): a permutation, exact mixtures, held-out text, foreign formats."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxgpt.data import batches, token_files
from jaxgpt.data.engines import byte_level
from jaxgpt.data.tokenizer import train_bpe

BYTES = byte_level()


def held_out(source: batches.Batches, limit: int = 0):
    """All held-out batches in order, each with all its rows."""
    rows = np.arange(source.batch_size)
    return [source.held_out(n, rows, limit) for n in range(source.num_held_out(limit))]


def nanogpt(folder, train, val=()):
    """nanoGPT's files: headerless uint16."""
    folder.mkdir(exist_ok=True)
    np.asarray(train, np.uint16).tofile(folder / "train.bin")
    if len(val):
        np.asarray(val, np.uint16).tofile(folder / "val.bin")
    return folder


def all_rows(source, steps):
    return [source.rows(step, np.arange(source.batch_size))["tokens"] for step in range(steps)]


@given(size=st.integers(1, 5000), key=st.integers(0, 2**64 - 1))
def test_permute_is_a_bijection(size, key):
    assert sorted(batches.permute(np.arange(size), size, key)) == list(range(size))


def test_permute_scatters_and_depends_on_the_key():
    size = 1000
    first, second = (batches.permute(np.arange(size), size, key) for key in (1, 2))
    assert (first == second).mean() < 0.02
    # A random order has neighbours |i - j| = 1 with probability 2 / size.
    assert (np.abs(np.diff(first)) == 1).mean() < 0.02
    assert abs(np.corrcoef(first, np.arange(size))[0, 1]) < 0.15


def test_an_epoch_visits_every_window_once(tmp_path):
    tokens = np.arange(16 * 25) % 60000  # every token says where it stood
    source = batches.windows(nanogpt(tmp_path / "a", tokens), wide(), 4, 16, seed=3)
    windows = (tokens.size - 16) // 16
    rows = np.concatenate(all_rows(source, 2 * windows // 4))
    for epoch in (rows[:windows], rows[windows : 2 * windows]):
        assert len(np.unique(epoch)) == windows * 16
        assert (np.diff(np.sort(epoch[:, 0])) == 16).all()
    assert not (rows[:windows] == rows[windows : 2 * windows]).all()


def test_targets_are_the_next_tokens(tmp_path):
    source = batches.windows(nanogpt(tmp_path / "a", np.arange(500)), wide(), 4, 16)
    batch = source.rows(7, np.arange(4))
    assert (batch["targets"] == batch["tokens"] + 1).all() and (batch["mask"] == 1).all()
    assert batch["tokens"].dtype == batch["targets"].dtype == np.int32


def test_rows_do_not_depend_on_who_asks(tmp_path):
    source = batches.windows(nanogpt(tmp_path / "a", np.arange(5000)), wide(), 8, 16, seed=1)
    whole = source.rows(123, np.arange(8))
    for part in (np.arange(3), np.arange(3, 8), np.array([5])):
        mine = source.rows(123, part)
        for name, values in whole.items():
            np.testing.assert_array_equal(mine[name], values[part])


def test_seeds_give_other_orders(tmp_path):
    folder = nanogpt(tmp_path / "a", np.arange(5000))
    first, second = (batches.windows(folder, wide(), 8, 16, seed=s) for s in (0, 1))
    assert (all_rows(first, 1)[0] != all_rows(second, 1)[0]).any()


@given(st.lists(st.floats(0.01, 1.0), min_size=1, max_size=5))
def test_a_mixture_counts_every_source_from_zero_without_gaps(weights):
    shares = np.array(weights) / sum(weights)
    choice, counts = batches.choose(np.arange(400, dtype=np.uint64), shares)
    for number, share in enumerate(shares):
        mine = counts[choice == number]
        np.testing.assert_array_equal(mine, np.arange(mine.size))
        assert abs(mine.size - share * 400) <= len(weights)


def test_a_mixture_keeps_each_source_without_replacement(tmp_path):
    a = nanogpt(tmp_path / "a", np.arange(0, 1000))
    b = nanogpt(tmp_path / "b", np.arange(1000, 3000))
    source = batches.windows({str(a): 1.0, str(b): 3.0}, wide(), 8, 10, seed=2)
    first = np.concatenate(all_rows(source, 30))[:, 0]
    from_a, from_b = first[first < 1000], first[first >= 1000]
    assert from_a.size == 60 and from_b.size == 180
    assert np.unique(from_a).size == 60 and np.unique(from_b).size == 180


def test_validation_covers_every_held_out_target_once(tmp_path):
    folder = nanogpt(tmp_path / "a", np.arange(500), np.arange(1000, 1105))
    source = batches.windows(folder, wide(), 4, 16)
    found = list(held_out(source))
    assert len(found) == source.num_held_out() == 2
    targets = np.concatenate([b["targets"][b["mask"] == 1] for b in found])
    np.testing.assert_array_equal(targets, np.arange(1001, 1105))


def test_a_limited_validation_is_spread_over_the_split(tmp_path):
    folder = nanogpt(tmp_path / "a", np.arange(500), np.arange(1000, 1000 + 16 * 100 + 1))
    source = batches.windows(folder, wide(), 4, 16)
    found = list(held_out(source, 5))
    starts = np.concatenate([b["tokens"][:, 0] for b in found])
    np.testing.assert_array_equal(starts, 1000 + 16 * 5 * np.arange(20))
    assert all(b["mask"].all() for b in found)


def test_training_never_reads_the_held_out_text(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("a" * 900 + "z" * 100)
    folder = token_files.prepare(text, tmp_path / "out", "byte")
    source = batches.windows(folder, BYTES, 8, 16)
    rows = np.concatenate(all_rows(source, 40))
    assert set(rows.ravel()) == {ord("a")}
    assert {t for b in held_out(source) for t in b["targets"][b["mask"] == 1]} == {ord("z")}


def test_documents_restart_and_their_ends_predict_nothing(tmp_path):
    rows = [{"text": letter * 7} for letter in "abcdefghij" * 10]
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    folder = token_files.prepare(file, tmp_path / "out", "byte")
    source = batches.windows(folder, BYTES, 4, 24, documents=True)
    batch = source.rows(3, np.arange(4))
    ends = batch["tokens"] == BYTES.eos_id
    assert ends.any() and (batch["mask"] == ~ends).all()
    assert (batch["positions"][:, 1:][ends[:, :-1]] == 0).all() and batch["positions"].max() == 7
    assert (np.diff(batch["segments"]) == ends[:, :-1]).all()
    assert (batch["segments"][:, 0] == 1).all()
    *_, last = held_out(source)
    assert (last["segments"][last["mask"].sum(1) == 0] == 0).all()


def test_llm_c_headers_are_read(tmp_path):
    for magic, dtype, name in ((20240520, np.uint16, "gpt2"), (20240801, np.uint32, "")):
        header = np.zeros(256, np.int32)
        header[:3] = magic, 1, 300
        for split, first in (("train", 0), ("val", 500)):
            tokens = np.arange(first, first + 300, dtype=dtype)
            file = tmp_path / f"tiny_{split}.bin"
            file.write_bytes(header.tobytes() + tokens.tobytes())
        found = token_files.open_tokens(tmp_path / "tiny_train.bin")
        assert found.tokenizer == name
        np.testing.assert_array_equal(found.train.read(290, 310), np.arange(290, 300))
        np.testing.assert_array_equal(found.val.read(0, 3), [500, 501, 502])


@given(st.lists(st.integers(0, 9), min_size=1), st.data())
def test_shards_read_as_one_array(sizes, data):
    whole = np.arange(sum(sizes) + 1)
    tokens = token_files.Tokens(tuple(np.split(whole, np.cumsum(sizes))))
    start = data.draw(st.integers(0, whole.size - 1))
    stop = data.draw(st.integers(start + 1, whole.size))
    np.testing.assert_array_equal(tokens.read(start, stop), whole[start:stop])


def test_text_shorter_than_the_context_is_refused(tmp_path):
    folder = nanogpt(tmp_path / "a", np.arange(16))
    with pytest.raises(ValueError, match=r"16 training tokens.*context_length=16 \+ 1"):
        batches.windows(folder, wide(), 4, 16)
    batches.windows(folder, wide(), 4, 15).rows(0, np.arange(4))


def test_another_tokenizer_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("some text, " * 100)
    folder = token_files.prepare(tmp_path / "a.txt", tmp_path / "out", "byte")
    with pytest.raises(ValueError, match=r"another tokenizer.*data\.tokenizer"):
        batches.windows(folder, train_bpe(["some text"], 270), 4, 16)


def test_a_token_beyond_the_vocabulary_is_refused(tmp_path):
    source = batches.windows(nanogpt(tmp_path / "a", np.full(100, 300)), BYTES, 4, 16)
    with pytest.raises(ValueError, match="holds token 300, but the tokenizer has only 260"):
        source.rows(0, np.arange(4))


@pytest.mark.parametrize("damage", ["missing", "empty", "odd", "cut", "shard"])
def test_damaged_files_are_refused(tmp_path, damage):
    path = tmp_path / "train.bin"
    if damage == "empty":
        path.touch()
    if damage == "odd":
        path.write_bytes(b"abc")
    if damage == "cut":
        path.write_bytes(np.array([20240520, 1, 9999] + [0] * 253, np.int32).tobytes())
    if damage == "shard":
        (tmp_path / "a.txt").write_text("some text, " * 100)
        path = token_files.prepare(tmp_path / "a.txt", tmp_path / "out", "byte")
        (path / "train-00000.bin").write_bytes(b"abc")
    with pytest.raises(ValueError, match=r"neither|is empty|whole number|cut short"):
        token_files.open_tokens(path)


def wide():
    """A tokenizer of 60,000 ids, to which the test tokens are known."""

    class Wide:
        vocab_size, eos_id, fingerprint = 60000, 59999, "wide"

    return Wide()
