"""Object stores, by the one that is in memory; real ones are in test_buckets.py."""

import dataclasses
import gzip
import importlib.util
import json
import os
import platform
import tempfile
import threading
import time
from pathlib import Path

import chex
import fsspec
import jax
import numpy as np
import pytest

import jaxgpt
from jaxgpt import checkpoint, files, metrics, store
from jaxgpt.checkpoint import Checkpoints
from jaxgpt.convert import hf
from jaxgpt.data import batches, rows, token_files
from jaxgpt.data import tokenizer as tokenizers
from jaxgpt.data.documents import Corpus
from jaxgpt.evals.records import Results
from jaxgpt.machine import lock
from jaxgpt.model import gpt

pytest.importorskip("upath")

PRETRAIN = (
    "--data.tokenizer=byte", "--model.num_layers=1", "--model.model_dim=16", "--model.num_heads=2",
    "--model.context_length=16", "--train.batch_size=8", "--eval.every=2", "--eval.batches=1",
    "--sample.every=2", "--sample.max_new_tokens=4", "--log.every=1", "--checkpoint.every=2",
)  # fmt: skip


@pytest.fixture
def bucket():
    """A folder in a store; nothing is left of it."""
    yield files.path("memory://bucket/folder")
    fsspec.filesystem("memory").store.clear()


def same_metrics(one, other) -> None:
    """All that two runs logged, but for their speed."""
    lines = [
        [
            {name: value for name, value in line.items() if not name.startswith("speed/")}
            for line in metrics.read_jsonl(run / "metrics.jsonl")
        ]
        for run in (one, other)
    ]
    assert lines[0] == lines[1] != []


def test_a_path_is_of_this_machine_or_of_a_store(tmp_path):
    assert files.path("a/b") == files.path(Path("a/b")) == Path("a/b")
    assert files.path(f"file://{tmp_path}/x") == tmp_path / "x"
    assert files.is_local("a/b") and files.is_local(tmp_path) and files.is_local("file:///x")
    stored = files.path("memory://bucket/a/")
    assert str(stored / "b") == "memory://bucket/a/b" and stored.name == "a"
    assert not files.is_local(stored) and not files.is_local("s3://bucket/a")
    assert files.path(stored) is stored
    with pytest.raises(TypeError):  # so that none becomes a folder "memory:"
        Path(stored)


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("runs/a", ""),
        ("C:/runs", ""),
        ("memory://b/x", ""),
        ("file:///x", ""),
        ("file://x/y", "must be file:///… with three slashes"),
        ("s3:/b/x", "must name a bucket, as in s3://bucket/folder"),
        ("gs://", "must name a bucket, as in gs://bucket/folder"),
        ("hf://a/b", "hf:// is not supported; give a path on this machine, or owner/name of"),
        ("ftp://h/x", "ftp:// is not supported; give a path on this machine, or file:///…, s3://…"),
    ],
)
def test_what_no_path_can_be_is_said_in_one_line(path, problem):
    assert files.problem(path).startswith(problem) and bool(files.problem(path)) == bool(problem)


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in ("s3fs", "upath") else find(name)
    )
    assert files.problem("s3://b/x") == 's3:// needs the package s3fs: pip install "jaxgpt[s3]"'
    assert "universal_pathlib" in files.problem("memory://b/x")


def test_a_file_is_put_whole_and_found(bucket):
    assert files.write(bucket / "a.txt", "Grüße") == bucket / "a.txt"
    files.write(f"{bucket}/deep/b.txt", b"\xff")
    assert (bucket / "a.txt").read_text(encoding="utf-8") == "Grüße"
    assert set(files.find(f"{bucket}/*.txt")) == {bucket / "a.txt"}
    assert set(files.find(f"{bucket}/**/*.txt")) >= {bucket / "deep" / "b.txt"}
    assert list(store.listing(bucket)) == ["a.txt", "deep/b.txt"]


def test_what_needs_this_machine_has_a_copy_there(bucket):
    files.write(bucket / "model" / "a.txt", "1")
    files.write(bucket / "model" / "deep" / "b.txt", "2")
    with files.here(bucket / "model") as copy:
        assert copy.name == "model" and (copy / "deep" / "b.txt").read_text() == "2"
    assert not copy.exists()
    with files.here(bucket / "model" / "a.txt") as copy:
        assert copy.is_file() and copy.name == "a.txt"


def test_a_folder_is_complete_when_its_last_file_is_there(bucket, monkeypatch):
    put, order = type(bucket.fs).put_file, []

    def noted(fs, source, target, **options):
        order.append(target.rsplit("/", 1)[1])
        return put(fs, source, target, **options)

    monkeypatch.setattr(type(bucket.fs), "put_file", noted)
    with files.staged(bucket / "out", last="config.json") as place:
        place.mkdir()
        for name in ("a", "config.json", "z"):
            (place / name).write_text(name)
        assert not (bucket / "out").exists()
    assert order[-1] == "config.json" and set(order) == {"a", "z", "config.json"}
    with pytest.raises(ValueError, match=r"out: is there already"), files.staged(bucket / "out"):
        pass


def test_a_store_that_fails_is_one_error_with_the_path(bucket, monkeypatch):
    def refuse(*_, **__):
        raise OSError(13, "Access Denied")

    monkeypatch.setattr(type(bucket.fs), "pipe_file", refuse)
    with pytest.raises(OSError, match="Access Denied") as caught:
        files.write(bucket / "a", "x")
    assert caught.value.filename == str(bucket / "a")


def test_a_log_is_written_again_by_time_and_when_asked(bucket, monkeypatch):
    path = bucket / "metrics.jsonl"
    log = metrics.MetricsLog(path)
    log(1, {"loss": 1.0})
    assert metrics.read_jsonl(path) == []
    log.flush()
    assert [line["step"] for line in metrics.read_jsonl(path)] == [1]
    later = time.monotonic() + metrics.STORE_SECONDS + 1
    monkeypatch.setattr(time, "monotonic", lambda: later)
    log(2, {"loss": 0.5})
    assert [line["step"] for line in metrics.read_jsonl(path)] == [1, 2]
    again = metrics.MetricsLog(path, resume_step=1)
    again(2, {"loss": 0.25})
    again.flush()
    assert [line["loss"] for line in metrics.read_jsonl(path)] == [1.0, 0.25]


def state(step: int) -> dict:
    return {"params": {"w": np.arange(6, dtype=np.float32).reshape(2, 3) + step}}


def saved(bucket, steps, **options) -> Checkpoints:
    checkpoints = Checkpoints(bucket / "checkpoints", **options)
    for step in steps:
        checkpoints.save(step, state(step), {"step": step})
    checkpoints.wait()
    return checkpoints


def test_a_checkpoint_in_a_store_is_restored_to_the_bit(bucket):
    checkpoints = saved(bucket, [1, 2, 3], keep=2)
    assert checkpoints.steps() == [2, 3] and checkpoints.latest_valid() == 3
    assert checkpoints.meta(3) == {"step": 3}
    found = Checkpoints(bucket / "checkpoints").restore(3, state(0))
    np.testing.assert_array_equal(found["params"]["w"], state(3)["params"]["w"])
    arrays = checkpoint.read_arrays(f"{bucket}/checkpoints/2")
    np.testing.assert_array_equal(arrays["params/w"], state(2)["params"]["w"])
    assert not [name for name in store.listing(bucket) if name.startswith("checkpoints/1/")]


def test_any_flipped_byte_is_skipped(bucket, capfd):
    saved(bucket, [1, 2])
    folder = bucket / "checkpoints" / "2"
    for name in store.listing(folder):
        before = (folder / name).read_bytes()
        flipped = bytearray(before)
        flipped[len(flipped) // 2] ^= 1
        (folder / name).write_bytes(bytes(flipped))
        assert Checkpoints(bucket / "checkpoints").latest_valid() == 1, name
        assert f"{folder} " in capfd.readouterr().err
        (folder / name).write_bytes(before)
    assert Checkpoints(bucket / "checkpoints").latest_valid() == 2


def test_what_was_not_put_whole_is_no_checkpoint_and_goes(bucket):
    saved(bucket, [1, 2])
    (bucket / "checkpoints" / "2" / "manifest.json").unlink()
    checkpoints = Checkpoints(bucket / "checkpoints")
    assert checkpoints.steps() == [1] and checkpoints.latest_valid() == 1
    saved(bucket, [3])
    assert {name.split("/")[1] for name in store.listing(bucket)} == {"1", "3"}


def test_a_store_that_does_not_answer_is_no_damage(bucket, monkeypatch):
    """Else a run would begin again from an older checkpoint, or from nothing."""
    checkpoints = saved(bucket, [1, 2])

    def fail(*_, **__):
        raise OSError(5, "503 Slow Down")

    monkeypatch.setattr(type(bucket.fs), "_open", fail)
    with pytest.raises(OSError, match="Slow Down"):
        checkpoints.latest_valid()


def test_a_save_that_fails_is_reported_by_the_next_call(bucket, monkeypatch):
    checkpoints = saved(bucket, [1])

    def fail(*_, **__):
        raise OSError(5, "503 Slow Down")

    monkeypatch.setattr(type(bucket.fs), "put_file", fail)
    checkpoints.save(2, state(2), {})
    with pytest.raises(OSError, match=r"cannot write checkpoint memory://.*2: .*; checkpoint 1 is"):
        checkpoints.wait()
    assert checkpoints.steps() == [1]


@pytest.fixture
def texts(bucket, tmp_path):
    """The same files on this machine and in the store."""
    text = "".join(f"line {n} of a text that is long enough\n" for n in range(400))
    packed = gzip.compress("\n".join(json.dumps({"text": text[n:]}) for n in range(3)).encode())
    for name, content in (("b/x.txt", text.encode()), ("b.txt", b"short"), ("c.jsonl.gz", packed)):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(content)
        files.write(bucket / "in" / name, content)
    return tmp_path / "in", bucket / "in"


def prepared(texts) -> list:
    """Token files of the texts, here and there."""
    for place in texts:
        corpus = Corpus((str(place),), val_fraction=0.3)
        token_files.write_tokens(corpus, tokenizers.load("byte"), place.parent / "tokens", "byte")
    return [place.parent / "tokens" for place in texts]


def test_texts_are_read_alike(texts):
    here, there = texts
    pieces = [list(Corpus((str(place),)).pieces()) for place in texts]
    assert pieces[0] == pieces[1] != []
    found = [[row for row, _ in rows.read(str(place / "*.gz"))] for place in texts]
    assert found[0] == found[1] and len(found[0]) == 3
    assert rows.read_text(str(there / "b.txt")) == rows.read_text(here / "b.txt") == "short"
    with pytest.raises(ValueError, match=r"memory://.*none: no such file or folder"):
        list(rows.read(str(there / "none")))


def test_parquet_is_read_from_a_store(bucket):
    import pyarrow as pa
    import pyarrow.parquet as pq

    with (bucket / "a.parquet").open("wb") as file:
        pq.write_table(pa.table({"text": ["one", "two"]}), file)
    assert [row["text"] for row, _ in rows.read(f"{bucket}/a.parquet")] == ["one", "two"]


def test_token_files_have_the_same_bytes_and_the_same_batches(texts):
    here, there = prepared(texts)
    for name in store.listing(there):
        if name != "manifest.json":  # which names its inputs
            assert (there / name).read_bytes() == (here / name).read_bytes(), name
    byte = tokenizers.load("byte")
    local, stored, cached = (
        batches.windows(str(place), byte, batch_size=4, context_length=32, cache=cache)
        for place, cache in ((here, 0.0), (there, 0.0), (there, 1.0))
    )
    wait_until(lambda: all(s._here is not None for s in cached.files[0].train.shards))
    for step in range(20):
        for other in (stored, cached):
            for name, array in local.rows(step, np.arange(4)).items():
                np.testing.assert_array_equal(other.rows(step, np.arange(4))[name], array)
    for other in (stored, cached):
        held = other.held_out(0, np.arange(4))
        np.testing.assert_array_equal(held["tokens"], local.held_out(0, np.arange(4))["tokens"])


def wait_until(holds, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_windows_are_asked_for_at_once(texts, monkeypatch):
    """A store answers each request late, however many there are."""
    _, there = prepared(texts)
    windows = batches.windows(str(there), tokenizers.load("byte"), 16, 32)
    read, meeting = type(there.fs).cat_file, threading.Barrier(16)

    def late(fs, *args, **options):
        meeting.wait(20)  # passes when 16 requests are under way
        return read(fs, *args, **options)

    monkeypatch.setattr(type(there.fs), "cat_file", late)
    assert windows.rows(0, np.arange(16))["tokens"].shape == (16, 32)


def test_the_cache_is_bounded(texts):
    _, there = prepared(texts)
    opened = token_files.open_tokens(there, cache=5e-6)  # 5 kB: less than the training part
    time.sleep(0.2)
    assert all(shard._here is None for shard in opened.train.shards)


def test_results_are_kept_and_continued(bucket):
    path, question = bucket / "r.jsonl", {"task": "x"}
    results = Results(path, question)
    results.add(0, {"ok": 1})
    results.close()
    again = Results(path, question)
    assert again.found == {0: {"ok": 1}}
    again.add(1, {"ok": 0})
    again.close()
    assert len(path.read_text().splitlines()) == 3
    with pytest.raises(ValueError, match="holds the results of another evaluation"):
        Results(path, {"task": "y"})


def test_a_run_lives_in_a_store_as_it_does_here(bucket, command, tmp_path):
    """Trained, resumed, sampled, evaluated and converted, with no file of its own here."""
    files.write(bucket / "in.txt", (text := "some words to learn, again and again\n" * 200))
    (tmp_path / "in.txt").write_text(text)
    run, local = bucket / "run", tmp_path / "local"
    for place, steps, read in (
        (run, 2, bucket / "in.txt"), (run, 4, bucket / "in.txt"), (local, 4, tmp_path / "in.txt")
    ):  # fmt: skip
        code, out, err = command(
            "pretrain.py", f"--run={place}", f"--data.path={read}", f"--train.steps={steps}",
            "--optim.schedule=constant", "--optim.warmup_steps=1", *PRETRAIN,
        )  # fmt: skip
        assert code == 0, err
    same_metrics(run, local)
    assert metrics.read_samples(run / "samples.md") == metrics.read_samples(local / "samples.md")
    assert checkpoint.content(run / "checkpoints" / "4") == checkpoint.content(
        local / "checkpoints" / "4"
    )
    assert json.loads((run / "lineage.json").read_text())["result"]["step"] == 4

    code, out, err = command("sample.py", f"--checkpoint={run}", "--prompt=some", "--seed=1")
    assert code == 0, err
    assert out == command("sample.py", f"--checkpoint={local}", "--prompt=some", "--seed=1")[1]
    found = [
        command("evaluate.py", f"--checkpoint={place}", f"--data={text}", "--task=perplexity")
        for place, text in ((run, bucket / "in.txt"), (local, tmp_path / "in.txt"))
    ]
    assert found[0][1].splitlines()[-1] == found[1][1].splitlines()[-1], found[0][2]
    assert len(list((run / "evals").glob("*.json"))) == 1

    code, _, err = command("convert.py", f"--checkpoint={run}", f"--output={bucket}/hf")
    assert code == 0, err
    assert "model.safetensors" in store.listing(bucket / "hf")
    code, _, err = command("convert.py", f"--checkpoint={run}", f"--output={bucket}/hf")
    assert code == 2 and "is there already" in err
    both = (jaxgpt.load(place, dtype="float32") for place in (f"{bucket}/hf", str(local)))
    one, other = both
    np.testing.assert_array_equal(one.logits([[1, 2, 3]]), other.logits([[1, 2, 3]]))
    code, out, err = command("lineage.py", str(run))
    assert code == 0 and "pretrain, seed 0: step 4" in out, err
    assert not list(tmp_path.glob("memory*"))


def test_what_writes_its_own_files_is_refused_by_name(command):
    for setting in ("--log.tensorboard=true", "--log.profile=1:2"):
        code, _, err = command("pretrain.py", "--run=memory://bucket/run", setting)
        name = setting[2:].partition("=")[0]
        assert code == 2 and err.startswith(f"error: {name}="), err
        assert "memory://bucket/run; drop it" in err
    code, _, err = command("life.py", "--run=s3://bucket/life", "--plan")
    assert code == 2 and "run=s3://bucket/life: s3:// is not supported here" in err


def test_what_a_killed_process_left_goes_and_no_one_elses(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "jaxgpt-dead").mkdir()
    (tmp_path / "jaxgpt-dead" / "lock").touch()
    first = store._scratch.__wrapped__()
    second = store._scratch.__wrapped__()
    assert {path.name for path in tmp_path.iterdir()} == {first.name, second.name}


def test_one_run_in_a_store_has_one_writer(bucket, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.3)
    monkeypatch.setattr(lock, "SILENCE", 1.0)
    file = bucket / lock.NAME
    with lock.hold(bucket):
        ours = json.loads(file.read_text())
        assert ours["process"] == os.getpid()
        for host in (platform.node(), "another host"):
            monkeypatch.setattr(lock.platform, "node", lambda host=host: host)
            with pytest.raises(ValueError, match=rf"process {os.getpid()} on .* trains here"):
                lock.hold(bucket).__enter__()
        monkeypatch.undo()
    assert not file.exists()


@pytest.mark.parametrize(
    "holder",
    [
        {"host": "far away", "process": 1, "begun": "2026-01-01T00:00:00+00:00"},
        {"host": platform.node(), "process": 2**22 + 1, "begun": "2026-01-01T00:00:00+00:00"},
        {},
    ],
    ids=["silent", "gone", "unreadable"],
)
def test_a_run_in_a_store_is_taken_over_from_one_that_is_gone(bucket, monkeypatch, holder):
    monkeypatch.setattr(lock, "SILENCE", 0.4)
    files.write(bucket / lock.NAME, json.dumps(holder) if holder else "{")
    with lock.hold(bucket):
        assert json.loads((bucket / lock.NAME).read_text())["process"] == os.getpid()
    assert not (bucket / lock.NAME).exists()


def test_weights_of_a_directory_go_tensor_by_tensor_and_not_by_the_disk(
    bucket, tiny, tmp_path, monkeypatch
):
    """Equal to those of the same directory here, from shards, without a copy of one of them."""
    cfg = dataclasses.replace(tiny, num_kv_heads=4)
    params = gpt.init(cfg, jax.random.key(0))
    hf.save(tmp_path / "hf", cfg, params, shard_bytes=20_000)
    for file in (tmp_path / "hf").iterdir():
        files.write(bucket / "hf" / file.name, file.read_bytes())
    monkeypatch.setattr(store, "PART", 1000)  # several requests for a tensor
    monkeypatch.setattr(store, "fetch", None)
    placed = []
    place = lambda name, leaf: placed.append(name) or leaf
    found_cfg, found = hf.load(bucket / "hf", place=place)
    here_cfg, here = hf.load(tmp_path / "hf")
    assert found_cfg == here_cfg and len(placed) == len(jax.tree.leaves(here))
    chex.assert_trees_all_equal(found, here)
    assert not list(store._scratch().glob("*/*.safetensors"))


@pytest.mark.parametrize(
    "damage", [lambda b: b[:5], lambda b: b[:-8], lambda b: b"\xff" * 8 + b[8:]]
)
def test_damaged_weights_in_a_store_are_one_line(bucket, tiny, tmp_path, damage):
    cfg = dataclasses.replace(tiny, num_kv_heads=4)
    hf.save(tmp_path / "hf", cfg, gpt.init(cfg, jax.random.key(0)))
    for file in (tmp_path / "hf").iterdir():
        content = file.read_bytes()
        harmed = damage(content) if file.suffix == ".safetensors" else content
        files.write(bucket / "hf" / file.name, harmed)
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        hf.load(bucket / "hf")
