"""Comparisons claim what chance does not explain, and nothing else; listings select and sort."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy import stats

from jaxgpt.life import compare, runs


def make(folder, name, seed, values, **settings):
    """A run directory with a loss at a few steps."""
    run = folder / f"{name}-{seed}"
    run.mkdir(parents=True)
    optim = {"learning_rate": 1e-3} | settings
    config = {"run": str(run), "seed": seed, "optim": optim, "train": {"steps": len(values)},
              "log": {"every": seed + 1}}  # fmt: skip
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    lines = [{"step": n + 1, "val/loss": value} for n, value in enumerate(values)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(run)


@pytest.fixture
def eight(tmp_path):
    """Four seeds of two learning rates; the seed moves both, by more than the rate does."""
    noise = [0.0, 0.3, -0.2, 0.5]
    small = [0.01, -0.01, 0.005, 0.0]
    a = [make(tmp_path, "a", s, [3.0, 2.0 + noise[s] + small[s]]) for s in range(4)]
    b = [make(tmp_path, "b", s, [3.0, 2.1 + noise[s]], learning_rate=3e-3) for s in range(4)]
    return a, b


def test_a_difference_is_paired_by_seed(eight, command):
    a, b = eight
    code, out, err = command("compare.py", *a, "--against", *b, "--output", "page.html")
    assert code == 0, err
    result = json.loads(out.splitlines()[-1])
    (found,) = result["comparisons"]
    ours, theirs = ([group["values"] for group in result["groups"]][n] for n in (0, 1))
    reference = stats.ttest_rel(ours, theirs)
    low, high = reference.confidence_interval(0.95)
    assert found["paired"] and found["verdict"] == "told apart"
    np.testing.assert_allclose(found["interval"], [low, high])
    np.testing.assert_allclose([found["p"], found["difference"]], [reference.pvalue, -0.09875])
    assert result["differing"] == {"optim.learning_rate": {"a": 0.001, "b": 0.003}}
    page = Path("page.html").read_text()
    assert "optim.learning_rate" in page and "<polygon" in page and "<script" not in page


def test_other_seeds_are_compared_as_welch_does(tmp_path):
    rng = np.random.default_rng(0)
    ours = dict(enumerate(rng.normal(0, 1, 5)))
    theirs = {seed + 10: value for seed, value in enumerate(rng.normal(1, 3, 7))}
    found = compare.difference(ours, theirs)
    reference = stats.ttest_ind([*ours.values()], [*theirs.values()], equal_var=False)
    low, high = reference.confidence_interval(0.95)
    np.testing.assert_allclose([found.low, found.high, found.p], [low, high, reference.pvalue])
    assert found.pairs == 0


@pytest.mark.parametrize("paired", [True, False])
def test_chance_is_told_apart_in_at_most_a_twentieth_and_two_deviations_nearly_always(paired):
    rng = np.random.default_rng(7)
    shift = 0 if paired else 100

    def claims(apart: float) -> float:
        told = 0
        for _ in range(200):
            ours = dict(enumerate(rng.normal(0, 1, 12)))
            theirs = {s + shift: v for s, v in enumerate(rng.normal(apart, 1, 12))}
            told += compare.difference(ours, theirs).verdict == "told apart"
        return told / 200

    assert claims(0.0) <= 0.05
    assert claims(2.0) >= 0.95


def test_one_run_each_is_no_claim(eight, command):
    a, b = eight
    code, out, _ = command("compare.py", a[0], "--against", b[0], "--output", "")
    (found,) = json.loads(out.splitlines()[-1])["comparisons"]
    assert code == 0 and found["verdict"] == "no claim" and found["interval"] is None
    assert "n = 1" in out and "told apart" not in out


def test_equal_groups_are_not_told_apart_however_equal():
    same = dict.fromkeys(range(3), 1.0)
    found = compare.difference(same, same)
    assert found.verdict == "not told apart" and (found.low, found.high) == (0.0, 0.0)


def test_what_cannot_be_compared_is_one_line(eight, command, tmp_path):
    a, b = eight
    shutil.copytree(a[0], tmp_path / "twin")
    shorter = make(tmp_path, "c", 0, [3.0], learning_rate=1.0)
    for args, named in (
        ((*a, "--against", *b, "--metric", "val/acc"), "metric=val/acc"),
        ((*a, "--against", *b, *a), "against: holds 2 configs (optim.learning_rate"),
        ((*a, str(tmp_path / "twin"), "--against", *b), "seed=0; drop one"),
        ((*a, "--against", str(tmp_path)), "is no run"),
    ):
        code, _, err = command("compare.py", *args)
        assert code == 2 and named in err and err.count("\n") == 1, err
    _, out, _ = command("compare.py", *a, shorter, "--against", *b, "--output", "")
    assert f"warning: {shorter} ends at step 1, others at 2" in out


def test_runs_are_listed_selected_and_sorted(eight, command, tmp_path):
    code, out, _ = command("runs.py", ".", "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and len(rows) == 8 and rows[0]["val/loss"] == 2.01
    wanted = ("--where", "val/loss<2.2", "--where", "optim.learning_rate=0.003")
    _, out, _ = command("runs.py", ".", *wanted, "--sort=-val/loss", "--json")
    found = [json.loads(line) for line in out.splitlines()]
    assert [row["run"] for row in found] == ["b-0", "b-2"]
    _, out, _ = command("runs.py", ".", "--where", "run~b-[12]", "--sort", "seed")
    assert [line.split()[0] for line in out.splitlines()] == ["run", "b-1", "b-2"]
    code, _, err = command("runs.py", ".", "--where", "val/los<2")
    assert code == 2 and "where=val/los" in err
    code, _, err = command("runs.py", ".", "--where", "seed")
    assert code == 2 and "COLUMN=VALUE" in err
    (tmp_path / "empty").mkdir()
    assert command("runs.py", "empty")[1] == "no runs\n"


def test_conditions_of_another_kind_hold_for_no_row():
    rows = [{"a": 1.0, "b": "x"}, {"a": None, "b": "y"}, {"b": "z", "a": 3}]
    assert runs.select(rows, ["a>2"]) == [rows[2]]
    assert runs.select(rows, ["b<2"]) == []
    assert runs.select(rows, ["a!=1"]) == [rows[1], rows[2]]
    assert runs.select(rows, [], "-a") == [rows[2], rows[0], rows[1]]
    assert math.isclose(runs.select(rows, ["a<=1"])[0]["a"], 1)
