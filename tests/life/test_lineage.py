"""A run's lineage: complete, printed down to the texts, and every flipped byte is found."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import jaxgpt
from jaxgpt import checkpoint, lineage, machine, metrics

TINY = (
    "--train.batch_size", "8", "--eval.batches", "1", "--sample.every", "0",
    "--sample.prompts", "[]", "--log.every", "1", "--checkpoint.every", "2",
)  # fmt: skip
ROOT = Path(__file__).parents[2]
SHAPE = (
    "--model.context_length", "64", "--model.num_layers", "1", "--model.model_dim", "16",
    "--model.num_heads", "2", "--data.tokenizer", "byte",
)  # fmt: skip
FIRST = ("pretrain.py", *TINY, *SHAPE, "--run", "first", "--data.path", "text.txt",
         "--train.steps", "4")  # fmt: skip
SECOND = ("sft.py", *TINY, "--run", "second", "--init", "first", "--data.path", "rows.jsonl",
          "--train.steps", "2")  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A pretrained run on a text, and one that was tuned from it on rows of a file."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "text.txt").write_text("the cat sat on the mat\n" * 200)
    rows = [{"prompt": f"{n}?", "completion": f"{n}!"} for n in range(64)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for args in (FIRST, SECOND):
        script, *rest = args
        done = subprocess.run(
            [sys.executable, ROOT / "scripts" / script, *rest],
            cwd=folder,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def two_runs(trained, command, tmp_path, monkeypatch) -> Path:
    """A copy of `trained`, to be spoiled. Paths are kept as absolute ones: the texts move too."""
    shutil.copytree(trained, tmp_path / "copy")
    for run in ("first", "second"):
        file = tmp_path / "copy" / run / "lineage.json"
        file.write_text(file.read_text().replace(str(trained), str(tmp_path / "copy")))
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


def flip(file: Path) -> bytes:
    """Changes one bit in the middle; gives what was there."""
    before = file.read_bytes()
    after = bytearray(before)
    after[len(after) // 2] ^= 1
    file.write_bytes(after)
    return before


def test_a_run_says_where_it_comes_from(two_runs, command):
    found = lineage.tree(two_runs / "second")
    (parent,) = found["parents"]
    assert parent["role"] == "init" and parent["weights"]["step"] == 4
    assert parent["weights"]["sha256"] == parent["lineage"]["result"]["sha256"]
    (entry,) = found["data"]
    assert entry["setting"] == "data.path" and entry["path"].endswith("rows.jsonl")
    (text,) = parent["lineage"]["data"]
    assert text["path"].endswith("text.txt") and len(text["sha256"]) == 64
    assert found["stage"] == "sft" and found["seed"] == 0 and "--init first" in found["command"]
    assert found["code"].keys() == {"commit", "changes"}
    code, out, err = command("lineage.py", "second")
    assert code == 0, out + err
    for part in ("second", "first", "rows.jsonl", "text.txt", "as recorded: "):
        assert part in out


def test_time_and_tokens_are_counted_by_kind(two_runs):
    (session,) = lineage.read(two_runs / "first")["sessions"]
    assert (session["start"], session["stop"]) == (0, 4)
    assert session["tokens"] == {"step": 4 * 8 * 64}
    assert {"compile", "step", "data", "evaluation", "saving"} <= session["seconds"].keys()
    assert all(seconds >= 0 for seconds in session["seconds"].values())


FLIPPED = {
    "the parent's text": "text.txt",
    "the rows": "rows.jsonl",
    "token files": "first/data/0/train-00000.bin",
    "a checkpoint": "second/checkpoints/2/index.json",
    "the parent's weights": "first/checkpoints/4/index.json",
    "the tokenizer": "second/tokenizer.json",
}


def test_a_flipped_bit_is_found_and_named(two_runs, command):
    for what, name in FLIPPED.items():
        before = flip(two_runs / name)
        code, out, err = command("lineage.py", "second")
        assert code == 1, f"{what}: {out}{err}"
        line = out.splitlines()[-1]
        place = name.rsplit("/", 1)[0] if "checkpoints" in name else name
        assert place in line and "as recorded" not in out, line
        (two_runs / name).write_bytes(before)
    arrays = next(f for f in (two_runs / "first/checkpoints/4/arrays").rglob("*") if f.is_file())
    flip(arrays)
    code, out, _ = command("lineage.py", "second")
    assert code == 1 and arrays.name in out.splitlines()[-1]


def test_changed_settings_and_lost_texts_are_found(two_runs, command):
    file = two_runs / "first" / "config.yaml"
    before = file.read_text()
    file.write_text(before.replace("learning_rate: 0.02", "learning_rate: 0.03"))
    code, out, _ = command("lineage.py", "second")
    assert code == 1 and "first/config.yaml" in out.splitlines()[-1]
    file.write_text(before)
    (two_runs / "text.txt").unlink()
    code, out, _ = command("lineage.py", "second")
    assert code == 1 and "text.txt: is gone" in out.splitlines()[-1]


def test_a_folder_of_runs_may_move(two_runs, command):
    (two_runs / "elsewhere").mkdir()
    for name in ("first", "second"):
        shutil.move(two_runs / name, two_runs / "elsewhere" / name)
    code, out, _ = command("lineage.py", "elsewhere/second")
    assert code == 0, out


def test_an_export_carries_the_tree_and_a_card(two_runs, command):
    code, _, err = command("convert.py", "--checkpoint", "second", "--output", "export")
    if code:  # the smallest network of the tests is of no family
        pytest.fail(err)
    card = (two_runs / "export" / "README.md").read_text()
    for part in ("rows.jsonl", "text.txt", "pretrain, 4 steps", "sft, 2 steps"):
        assert part in card
    shutil.rmtree(two_runs / "second")
    shutil.rmtree(two_runs / "first")
    code, out, _ = command("lineage.py", "export")  # whose ancestors need not be here
    assert code == 0 and "text.txt" in out, out
    flip(next((two_runs / "export").glob("*.safetensors")))
    code, out, _ = command("lineage.py", "export")
    assert code == 1 and ".safetensors" in out.splitlines()[-1]
    again = jaxgpt.load(str(two_runs / "export"))
    again.save(str(two_runs / "again"), format="jaxgpt")
    assert lineage.tree(two_runs / "again")["parents"]


def test_a_resumed_run_keeps_its_sessions_and_names_changed_data(two_runs, command):
    rows = two_runs / "rows.jsonl"
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[:-1]))
    shutil.rmtree(two_runs / "second" / "checkpoints" / "2")
    _, _, err = command(*SECOND)
    assert "rows.jsonl: has changed since second began" in err
    sessions = lineage.read(two_runs / "second")["sessions"]
    assert [(session["start"], session["stop"]) for session in sessions] == [(0, 2), (0, 2)]


def test_what_has_no_lineage_is_one_line(command, tmp_path):
    (tmp_path / "empty").mkdir()
    code, _, err = command("lineage.py", "empty")
    assert code == 2 and err.startswith("error: empty: holds no lineage.json")


def test_weights_have_the_same_hash_whatever_files_hold_them(tmp_path):
    state = {"params": {"policy": {"w": np.arange(6.0)}}, "moments": np.ones(2)}
    hashes = []
    for name, moments in (("one", 1.0), ("two", 2.0)):
        kept = checkpoint.Checkpoints(tmp_path / name)
        kept.save(3, state | {"moments": moments * state["moments"]}, meta={"by": name})
        kept.wait()
        hashes.append(checkpoint.content(tmp_path / name / "3"))
    assert hashes[0] == hashes[1] and len(hashes[0]) == 64
    kept.save(4, {"params": {"policy": {"w": np.arange(6.0) + 1}}}, meta={})
    kept.wait()
    assert checkpoint.content(tmp_path / "two" / "4") != hashes[0]


def test_the_clock_gives_inner_time_to_the_inner_kind():
    times = iter([0.0, 1.0, 3.0, 6.0, 10.0, 15.0])
    clock = metrics.Clock(clock=lambda: next(times))
    with clock("evaluation"), clock("saving"):
        pass
    assert clock.seconds() == {"step": 1.0 + 5.0, "evaluation": 2.0 + 4.0, "saving": 3.0}


def test_uncommitted_changes_have_a_hash():
    assert machine.uncommitted() is None or len(machine.uncommitted()) in (0, 64)
