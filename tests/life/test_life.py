"""A life goes on where it was, stops where it misses, and its card is what its runs hold."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from jaxgpt import files
from jaxgpt.life import card as cards
from jaxgpt.life import check
from jaxgpt.life import life as lives

ROOT = Path(__file__).parents[2]
ONE = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}  # one device
LIFE = {
    "evaluations": {"sums": "evaluate.py --task arithmetic --data arithmetic --chat"},
    "stages": [
        {"name": "words", "command": "train_tokenizer.py --output {self}/tokenizer.json"},
        {"name": "base", "command": "pretrain.py --data.tokenizer {words}/tokenizer.json",
         "measures": {"val/loss": "< 3"}},
        {"name": "tuned", "command": "sft.py --init {base}",
         "measures": {"sums/exact_match": ">= 0.5", "val/loss": None}},
    ],
}  # fmt: skip


def written(folder: Path, life: dict) -> lives.Life:
    path = folder / "life.yaml"
    path.write_text(yaml.safe_dump(life))
    return lives.read(path)


class Commands:
    """In the place of `perform`: writes what a command would, and remembers what was asked."""

    def __init__(self, loss: float = 2.0, right: float = 0.8) -> None:
        self.loss, self.right, self.asked = loss, right, []
        self.killed_at = 0  # the number of the command that never returns

    def __call__(self, command: list[str], log: Path, prefix: str = "") -> str:
        self.asked.append(command)
        if len(self.asked) == self.killed_at:
            raise KeyboardInterrupt
        if command[0] == "train_tokenizer.py":
            path = Path(command[command.index("--output") + 1])
            path.parent.mkdir(parents=True)
            path.write_text("{}")
        elif command[0] == "evaluate.py":
            return json.dumps({"exact_match": self.right, "exact_match_stderr": 0.1, "count": 5})
        else:
            run = Path(command[command.index("--run") + 1])
            run.mkdir(parents=True, exist_ok=True)
            (run / "config.yaml").write_text("seed: 0\n")
            (run / "metrics.jsonl").write_text(
                json.dumps({"step": 4, "val/loss": self.loss}) + "\n"
            )
            result = {"step": 4, "sha256": f"{command[0]} {self.loss}"}
            files.write(run / "lineage.json", json.dumps({"result": result}))
        return ""

    @property
    def scripts(self) -> list[str]:
        return [command[0] for command in self.asked]


@pytest.fixture
def commands(monkeypatch) -> Commands:
    made = Commands()
    monkeypatch.setattr(lives, "perform", made)
    return made


WHOLE = ["train_tokenizer.py", "pretrain.py", "sft.py", "evaluate.py"]


def test_stages_run_in_order_with_their_folders_filled_in(commands, tmp_path):
    life = written(tmp_path, LIFE)
    assert lives.live(life, tmp_path / "run", seed=7) == []
    assert commands.scripts == WHOLE
    run = tmp_path / "run"
    assert commands.asked[1] == [
        "pretrain.py", "--data.tokenizer", f"{run}/words/tokenizer.json", "--run", f"{run}/base",
        "--seed", "7",
    ]  # fmt: skip
    assert commands.asked[3][-2:] == ["--checkpoint", f"{run}/tuned"]


def test_a_finished_life_runs_nothing_again(commands, tmp_path):
    life = written(tmp_path, LIFE)
    lives.live(life, tmp_path / "run", 0)
    lives.live(life, tmp_path / "run", 0)
    assert commands.scripts == WHOLE


@pytest.mark.parametrize("number", range(1, 5))
def test_a_life_goes_on_from_any_command(commands, tmp_path, number):
    life = written(tmp_path, LIFE)
    commands.killed_at = number
    with pytest.raises(KeyboardInterrupt):
        lives.live(life, tmp_path / "run", 0)
    before = commands.scripts[:-1]
    commands.asked, commands.killed_at = [], 0
    lives.live(life, tmp_path / "run", 0)
    assert before + commands.scripts == WHOLE


def test_a_missed_target_ends_the_life_with_one_line(commands, tmp_path):
    life, commands.loss = written(tmp_path, LIFE), 3.5
    with pytest.raises(lives.Missed, match=r"base: val/loss is 3\.5, the target is < 3") as error:
        lives.live(life, tmp_path / "run", 0)
    assert "\n" not in str(error.value) and commands.scripts == WHOLE[:2]


def test_keep_going_lists_what_was_missed(commands, tmp_path, capsys):
    life, commands.loss, commands.right = written(tmp_path, LIFE), 3.5, 0.1
    missed = lives.live(life, tmp_path / "run", 0, keep_going=True)
    assert [line.split()[:2] for line in missed] == [
        ["base:", "val/loss"], ["tuned:", "sums/exact_match"],
    ]  # fmt: skip
    assert capsys.readouterr().out.count("MISSED") == 2


def test_a_stage_made_from_what_has_changed_since_is_refused(commands, tmp_path):
    life = written(tmp_path, LIFE)
    lives.live(life, tmp_path / "run", 0)
    shutil.rmtree(tmp_path / "run" / "base")
    commands.loss = 1.5  # another base
    with pytest.raises(ValueError, match="tuned: was made from another base"):
        lives.live(life, tmp_path / "run", 0)


def test_two_lives_do_not_share_a_folder(commands, tmp_path):
    life = written(tmp_path, LIFE)
    with lives._alone(tmp_path), pytest.raises(ValueError, match="another life is at work"):
        lives.live(life, tmp_path, 0)


def changed(**fields) -> dict:
    """LIFE whose last stage has other fields."""
    whole = json.loads(json.dumps(LIFE))
    whole["stages"][-1] |= fields
    return whole


BAD = {
    "no stages": ({"run": "x"}, "list of stages"),
    "unknown field": (LIFE | {"stagse": []}, "has no stagse"),
    "unknown stage field": (changed(targets={}), "stage tuned: has no targets"),
    "no command": (changed(command=""), "a name and a command"),
    "unknown command": (changed(command="tune.py"), "no command tune"),
    "a name twice": (changed(name="base"), "stage base"),
    "a name that is a path": (changed(name="../x"), "stage ../x"),
    "a target": (changed(measures={"val/loss": "about 3"}), "target 'about 3'"),
    "a number": (changed(measures={"val/loss": "< three"}), "target '< three'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_mistake_in_the_yaml_is_one_line(tmp_path, name):
    life, named = BAD[name]
    with pytest.raises(ValueError) as error:
        written(tmp_path, life)
    assert named in str(error.value) and "\n" not in str(error.value)


def test_a_measure_without_a_number_is_named(commands, tmp_path):
    life = written(tmp_path, changed(measures={"sums/f1": None}))
    with pytest.raises(ValueError, match=r"tuned: measures sums/f1.*exact_match"):
        lives.live(life, tmp_path / "run", 0)


def test_every_life_of_ours_is_read():
    for path in (ROOT / "configs" / "life").glob("*.yaml"):
        life = lives.read(path)
        for stage in life.stages:
            command = lives.command_of(life, stage, Path("r"), 0)
            assert not [part for part in command if "{" in part and "}" in part], command


def test_intervals_hold_shares_and_means():
    low, high = cards._interval(1.0, 0.0, 20)
    assert 0.83 < low < 0.85 and high == 1.0  # Wilson: 20 of 20
    low, high = cards._interval(3.0, 0.5, 10)
    assert (round(low, 3), round(high, 3)) == (2.02, 3.98)
    assert cards._interval(3.0, None, 0) == (None, None)


def test_the_first_difference_of_two_cards_is_named():
    old = {"a": 1, "b": [{"c": 2}, {"c": 3}]}
    assert check.difference(old, json.loads(json.dumps(old))) == ""
    new = {"a": 1, "b": [{"c": 2}, {"c": 4}]}
    assert check.difference(old, new) == "b[1].c is 3, the runs say 4"
    assert check.difference(old, {"a": 1}).startswith("b is [")


@pytest.fixture(scope="module")
def smoke(tmp_path_factory) -> Path:
    """All stages of a life, a few steps each."""
    run = tmp_path_factory.mktemp("lives") / "smoke"
    done = command("--run", run)
    assert done.returncode == 0, done.stdout + done.stderr
    return run


def command(*args) -> subprocess.CompletedProcess:
    script = [sys.executable, ROOT / "scripts" / "life.py", "--config",
              ROOT / "configs" / "life" / "smoke.yaml"]  # fmt: skip
    return subprocess.run([*script, *map(str, args)], env=ONE, capture_output=True, text=True)


@pytest.mark.timeout(1200)
def test_a_small_life_has_a_card_that_holds(smoke):
    card = json.loads((smoke / "card.json").read_text())
    names = [stage["name"] for stage in card["stages"]]
    assert names == ["tokenizer", "pretrain", "sft", "reward", "dpo", "distill", "export"]
    assert card["complete"] and not card["missed"]
    page, text = (smoke / "card.html").read_text(), (smoke / "card.md").read_text()
    for name in names:
        assert f"<b>{name}</b>" in page and f"| {name} |" in text
    assert "<script" not in page and 'src="http' not in page
    asked = [stage["name"] for stage in card["stages"] if stage["answers"]]
    assert asked == ["pretrain", "sft", "dpo", "distill"]
    done = command("--run", smoke, "--check")
    assert done.returncode == 0 and "as the card says" in done.stdout, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_flipped_bit_anywhere_is_found(smoke, tmp_path):
    life = lives.read(ROOT / "configs" / "life" / "smoke.yaml")
    run = tmp_path / "copy"
    shutil.copytree(smoke, run)
    weights = next(f for f in (run / "dpo/checkpoints/2/arrays").rglob("*") if f.is_file())
    shard = next((run / "pretrain" / "data").rglob("train-*.bin"))
    export = next((run / "export").glob("*.safetensors"))
    for file in (weights, shard, export, run / "card.html", run / "card.json", run / "card.md",
                 run / "tokenizer/tokenizer.json"):  # fmt: skip
        before = file.read_bytes()
        after = bytearray(before)
        after[len(after) // 2] ^= 1
        file.write_bytes(after)
        found = check.check(life, run, compute=False)
        first = next((pair for pair in found if pair[1]), ("", ""))
        named = " ".join(first)
        folder = "tokenizer" if file.name == "tokenizer.json" else file.name
        assert folder in named, (file, first)
        file.write_bytes(before)
    assert not [pair for pair in check.check(life, run, compute=False) if pair[1]]


@pytest.mark.slow
def test_killed_at_random_moments_the_card_is_the_same_but_for_times(smoke, tmp_path):
    run, moments = tmp_path / "killed", random.Random(0)
    script = [sys.executable, ROOT / "scripts" / "life.py", "--config",
              ROOT / "configs" / "life" / "smoke.yaml", "--run", run]  # fmt: skip
    for _ in range(10):
        process = subprocess.Popen(
            script, env=ONE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(moments.uniform(1, 15))
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    done = command("--run", run)
    assert done.returncode == 0, done.stdout + done.stderr
    ours, theirs = (json.loads((path / "card.json").read_text()) for path in (run, smoke))
    for card, path in ((ours, run), (theirs, smoke)):
        del card["costs"], card["pages"]
        for stage in card["stages"]:
            del stage["costs"]
            stage["command"] = stage["command"].replace(str(path), "")
            for measure in stage["measures"]:
                measure["command"] = measure["command"].replace(str(path), "")
            for entry in stage["data"]:
                entry["path"] = entry["path"].replace(str(path), "")
    assert check.difference(theirs, ours) == ""
