"""A sweep runs what is missing, once, and compares; it can be printed for an array job."""

import itertools
import json
import shlex

import pytest

from jaxgpt.life import sweep

TINY = (
    "--model.context_length", "16", "--model.num_layers", "1", "--model.model_dim", "16",
    "--model.num_heads", "2", "--train.steps", "2", "--train.batch_size", "8", "--eval.batches",
    "1", "--sample.prompts", "[]", "--log.every", "1", "--data.tokenizer", "byte", "--data.path",
    "text.txt",
)  # fmt: skip


def test_every_combination_has_a_folder_and_a_command(command):
    code, out, _ = command(
        "sweep.py", "--stage", "sft", "--grid", "optim.learning_rate=1e-3,3e-3", "--grid",
        "sample.prompts=[[a], [b c]]", "--seeds", "0", "7", "--runs", "s", "--print", "--",
        "--train.steps", "3",
    )  # fmt: skip
    lines = [shlex.split(line) for line in out.splitlines()]
    assert code == 0 and len(lines) == 2 * 2 * 2
    runs = {line[line.index("--run") + 1] for line in lines}
    assert len(runs) == 8
    last = lines[-1]
    assert last[1:5] == ["-P", "-m", "jaxgpt", "sft"]
    assert ("--optim.learning_rate", "3e-3") in itertools.pairwise(last)
    assert ("--seed", "7") in itertools.pairwise(last)
    assert ("--train.steps", "3") in itertools.pairwise(last)


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (("--stage", "tune"), "stage=tune"),
        (("--grid", "optim.learning_rate"), "grid=optim.learning_rate"),
        (("--grid", "seed=,"), "grid=seed=,"),
        (("--grid", "a=1,2", "--grid", "a=3"), "names a twice"),
        (("--grid", "a=x/y,x?y"), "the same folder"),
        (("--config", "absent.yaml"), "config=absent.yaml"),
        (("--jobs", "0"), "jobs=0"),
    ],
)
def test_a_mistake_is_one_line_and_starts_nothing(command, args, named):
    code, _, err = command("sweep.py", *args)
    assert code == 2 and named in err and err.count("\n") == 1


def test_what_is_missing_is_run_and_compared(command, tmp_path):
    (tmp_path / "text.txt").write_text("the cat sat on the mat\n" * 100)
    args = ("sweep.py", "--stage", "pretrain", "--runs", "s", "--grid",
            "optim.learning_rate=1e-3,1e-1", "--jobs", "2", "--", *TINY)  # fmt: skip
    code, out, err = command(*args)
    assert code == 0, out + err
    result = json.loads(out.splitlines()[-1])
    assert result["differing"] == {
        "optim.learning_rate": {
            "optim.learning_rate=1e-1": 0.1, "optim.learning_rate=1e-3": 0.001,
        }
    }  # fmt: skip
    assert result["comparisons"][0]["verdict"] == "no claim"  # of one seed each
    assert (tmp_path / "s" / "compare.html").is_file()
    code, again, _ = command(*args)
    assert code == 0 and again.count("is there") == 2
    assert again.splitlines()[-1] == out.splitlines()[-1]


def test_a_run_that_fails_is_named(command, tmp_path):
    (tmp_path / "text.txt").write_text("the cat sat on the mat\n" * 100)
    code, out, err = command(
        "sweep.py", "--stage", "pretrain", "--runs", "s", "--grid", "train.batch_size=7", "--",
        *TINY, "--model.num_heads", "3",
    )  # fmt: skip
    assert code == 1 and "model.num_heads=3" in out and "1 of 1 runs failed" in err
    (job,) = sweep.jobs("pretrain", "", ["train.batch_size=7"], [0], "s")
    assert job.run.with_name(f"{job.run.name}.log").is_file()
