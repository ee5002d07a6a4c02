"""The data commands as a user runs them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jaxgpt import config
from jaxgpt.data import token_files, tokenizer

ROOT = Path(__file__).parents[1]


def command(script, *args):
    return [sys.executable, str(ROOT / "scripts" / script), *map(str, args)]


def run(script, *args, cwd):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command(script, *args), cwd=cwd, env=env, capture_output=True, text=True)


def test_lists_are_given_as_one_types_them():
    join = lambda *args: config.join_lists(args, "--input")
    expected = ["--output", "x", '--input=["a", "b"]']
    assert join("--input", "a", "b", "--output", "x") == expected
    assert join("--input", "a", "--output", "x", "--input", "b") == expected
    assert join("--input=a", "--input=b", "--output", "x") == expected
    assert join("--input", "[a") == ['--input=["[a"]']  # a name, not YAML
    assert join("--output", "x") == ["--output", "x"]


def test_a_vocabulary_is_trained_and_used(tmp_path):
    (tmp_path / "a.txt").write_text("the cat sat on the mat\n" * 200)
    (tmp_path / "b.txt").write_text("the dog sat on the cat\n" * 200)
    done = run(
        "train_tokenizer.py", "--input", "a.txt", "b.txt", "--vocab_size", 270,
        "--output", "tokenizer.json", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0 and "270 ids" in done.stdout, done.stderr
    done = run(
        "prepare_data.py", "--input", "a.txt", "b.txt", "--tokenizer", "tokenizer.json",
        "--output", "out", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0 and "bytes per token" in done.stdout, done.stderr
    found, trained = token_files.open_tokens(tmp_path / "out"), tokenizer.load(tmp_path / "out")
    text = trained.decode(found.train.read(0, found.train.size))
    assert text.startswith("the cat sat") and text.count("<|endoftext|>") == 2


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--input", "missing.txt"], "missing.txt: no such file"),
        (["--input", "empty.txt"], "empty.txt: the file is empty"),
        (["--input", "latin.txt"], "latin.txt: byte 3 is not UTF-8"),
        (["--input", "good.txt", "--output", "good.txt"], "good.txt"),
        (["--input", "good.txt", "--tokenizer", "nope"], "tokenizer=nope"),
        (["--input", "good.txt", "--colour", "red"], "colour"),
        (["--input", "good.txt", "--val_fraction", "many"], "val_fraction"),
    ],
)
def test_bad_input_is_one_line_and_status_2(tmp_path, args, message):
    (tmp_path / "good.txt").write_text("good text " * 10)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "latin.txt").write_bytes(b"abc\xff")
    done = run("prepare_data.py", "--tokenizer", "byte", "--output", "out", *args, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.slow
def test_kill_9_and_the_same_command_again_give_the_same_bytes(tmp_path):
    words = np.random.default_rng(0).integers(0, 10**9, 1 << 21)
    (tmp_path / "a.txt").write_text("\n".join(map("word {}".format, words)))
    (tmp_path / "b.txt").write_text("\n".join(map("more {}".format, words)))
    args = ["--input", "a.txt", "b.txt", "--tokenizer", "byte", "--shard_tokens", 1]
    assert run("prepare_data.py", *args, "--output", "whole", cwd=tmp_path).returncode == 0

    cut = tmp_path / "cut"
    process = subprocess.Popen(
        command("prepare_data.py", *args, "--output", "cut"), cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while not any(cut.glob("train-00002.bin")):
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert json.loads((cut / "progress.json").read_text())["shards"]
    assert run("prepare_data.py", *args, "--output", "cut", cwd=tmp_path).returncode == 0
    whole = {file.name: file.read_bytes() for file in (tmp_path / "whole").iterdir()}
    assert {file.name: file.read_bytes() for file in cut.iterdir()} == whole
