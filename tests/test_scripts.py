"""The commands as a user types them: bad input in one line, and the whole way from text to text."""

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxgpt import metrics

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))
TINY = (
    "--model.context_length", "16", "--model.num_layers", "2", "--model.model_dim", "16",
    "--model.num_heads", "2", "--train.steps", "4", "--train.batch_size", "8", "--eval.batches",
    "1", "--sample.max_new_tokens", "3", "--log.every", "1", "--data.tokenizer", "byte",
)  # fmt: skip


def words() -> str:
    return " ".join(random.Random(0).choices(["the", "cat", "sat", "on", "a", "mat", "\n"], k=900))


def write(folder: Path) -> None:
    """The files that the bad inputs name."""
    (folder / "good.txt").write_text(words())
    (folder / "empty.txt").write_text("")
    (folder / "short.txt").write_text("short")
    (folder / "latin.txt").write_bytes(b"first line\ncaf\xe9\n" + words().encode())
    (folder / "folder").mkdir()
    np.arange(4000, dtype=np.uint16).tofile(folder / "large.bin")
    (folder / "unknown.yaml").write_text("model:\n  layers: 3\n")


GOOD = ("--data.path", "good.txt")
BAD = {
    "missing file": (("--data.path", "absent.txt"), ["absent.txt"]),
    "empty file": (("--data.path", "empty.txt"), ["empty"]),
    "empty folder": (("--data.path", "folder"), ["folder"]),
    "short text": (("--data.path", "short.txt"), ["short"]),
    "invalid UTF-8": (("--data.path", "latin.txt"), ["latin.txt", "14"]),  # the byte's place
    "missing config": (("--config", "absent.yaml"), ["absent.yaml"]),
    "unknown key in a file": (("--config", "unknown.yaml"), ["layers"]),
    "unknown key": ((*GOOD, "--model.depth", "3"), ["model.depth"]),
    "wrong type": ((*GOOD, "--train.steps", "many"), ["train.steps"]),
    "heads": ((*GOOD, "--model.num_heads", "3"), ["model.num_heads=3", "model.model_dim=16"]),
    "negative": ((*GOOD, "--train.batch_size", "-4"), ["train.batch_size=-4"]),
    "profile": ((*GOOD, "--log.profile", "soon"), ["log.profile=soon"]),
    "run is a file": ((*GOOD, "--run", "good.txt"), ["run=good.txt"]),
    "run inside a file": ((*GOOD, "--run", "good.txt/run"), ["good.txt"]),
    "foreign folder": ((*GOOD, "--run", "."), ["run=."]),
    "missing init": ((*GOOD, "--init", "absent"), ["absent"]),
    "unknown tokenizer": ((*GOOD, "--data.tokenizer", "gpt17"), ["gpt17"]),
    "small vocabulary": ((*GOOD, "--model.vocab_size", "50"), ["model.vocab_size=50"]),
    "another vocabulary": (("--data.path", "large.bin"), ["large.bin", "token"]),
    "batch on a mesh": ((*GOOD, "--train.batch_size", "12"), ["train.batch_size=12"]),
    "mesh": ((*GOOD, "--mesh.data", "3"), ["mesh=data 3", "here are 8", "--mesh.data -1"]),
    "parameters on a mesh": (
        (*GOOD, "--mesh.fsdp", "8", "--model.model_dim", "12"), ["mesh.fsdp=8", "kernel"],
    ),
    "long prompt": (
        (*GOOD, "--sample.prompts", '["a prompt of more than sixteen bytes"]'), ["prompt", "16"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_status_2(command, tmp_path, name):
    write(tmp_path)
    args, named = BAD[name]
    code, out, err = command("pretrain.py", *TINY, "--run", "run", *args)
    assert code == 2, out + err
    line = err.splitlines()[-1]
    assert line.startswith("error: ") and err.count("error: ") == 1 and "Traceback" not in err
    assert all(part in line for part in named), line
    assert not metrics.read_jsonl(tmp_path / "run" / "metrics.jsonl"), "it began to train"


def test_a_mistake_can_be_mended_in_the_same_directory(command, tmp_path):
    write(tmp_path)
    command("pretrain.py", *TINY, "--run", "run", "--data.path", "absent.txt")
    code, _, err = command("pretrain.py", *TINY, "--run", "run", *GOOD, "--train.steps", "1")
    assert code == 0, err


def test_text_becomes_a_model_that_writes(command, tmp_path):
    """Train, finish again, refuse another config, write, and refuse to write badly."""
    write(tmp_path)
    train = ("pretrain.py", *TINY, "--run", "run", *GOOD)
    code, out, err = command(*train)
    assert code == 0, err
    run = tmp_path / "run"
    for part in ("validation loss: ", " before, ", "report.html"):
        assert part in out
    assert {"config.yaml", "metrics.jsonl", "samples.md", "report.html", "tokenizer.json"} <= {
        file.name for file in run.iterdir()
    }
    (step, texts), *_ = reversed(metrics.read_samples(run / "samples.md"))
    assert step == 4 and len(texts) == 1 and texts[0] in (run / "report.html").read_text()

    before = (run / "metrics.jsonl").read_text()
    code, again, _ = command(*train)
    assert (code, again) == (0, out) and (run / "metrics.jsonl").read_text() == before

    code, _, err = command(*train, "--optim.learning_rate", "0.5", "--seed", "3")
    assert code == 2 and "optim.learning_rate: 0.02 -> 0.5" in err and "seed: 0 -> 3" in err

    sample = ("sample.py", "--checkpoint", "run", "--max_new_tokens", "5")
    one = command(*sample, "--prompt", "the cat", "--temperature", "0")
    assert one[0] == 0 and one[1].startswith("the cat")
    both = command(*sample, "--prompt", "the cat", "--prompt", "a", "--temperature", "0")
    assert both[0] == 0 and one[1].rstrip("\n") in both[1]
    seeds = [command(*sample, "--prompt", "the", "--seed", seed)[1] for seed in ("1", "1", "2")]
    assert seeds[0] == seeds[1] != seeds[2]

    for args, named in (
        (("--checkpoint", "absent", "--prompt", "a"), "absent"),
        (("--checkpoint", "run", "--prompt", "the cat sat on the mat"), "context"),
        (("--checkpoint", "run", "--prompt", "a", "--top_p", "2"), "top_p"),
        (("--checkpoint", "run", "--prompt", "a", "--heat", "2"), "heat"),
        (("--checkpoint", "run", "--prompt", "a", "--draft", "absent"), "draft=absent: does"),
        (("--checkpoint", "run", "--chat", "--tools", "calculator", "--draft", "prompt"), "draft"),
    ):
        code, _, err = command("sample.py", *args)
        assert code == 2 and err.startswith("error: ") and named in err and err.count("\n") == 1


def pairs(folder: Path) -> tuple[str, ...]:
    """Writes preferences; what trains `pre` on them for a step."""
    rows = [{"prompt": f"What is {n}?", "chosen": f"{n}.", "rejected": "No."} for n in range(40)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ("--init", "pre", "--data.path", "pairs.jsonl", "--train.steps", "1", "--eval.batches",
            "1", "--train.batch_size", "8", "--sample.max_new_tokens", "2")  # fmt: skip


WIDE = ("--model.context_length", "160", "--checkpoint.every", "9", "--train.z_loss", "0.1")


def test_steps_that_cannot_be_right_are_named(command, tmp_path):
    """A pretrained run that is to chat, settings without effect, and a reward model that writes."""
    write(tmp_path)
    code, _, err = command("pretrain.py", *TINY, *GOOD, "--run", "pre", *WIDE, "--peft.rank", "3")
    assert code == 0 and "warning: optim.warmup_steps=40: is no shorter than train.steps=4" in err
    assert "warning: peft.rank=3: has no effect; is for peft.kind=lora and qlora" in err
    assert "warning: checkpoint.every=9: is beyond train.steps=4; it saves only the last" in err

    code, _, err = command("sample.py", "--checkpoint", "pre", "--chat", "--prompt", "a",
                           "--max_new_tokens", "1")  # fmt: skip
    assert (
        code == 0 and "warning: checkpoint=pre: was never tuned to chat; run scripts/sft.py" in err
    )

    tune = pairs(tmp_path)
    assert command("reward.py", *tune, "--run", "reward")[0] == 0
    for script, args in (
        ("sample.py", ("--checkpoint", "reward", "--prompt", "a")),
        ("evaluate.py", ("--checkpoint", "reward", "--task", "perplexity", "--data", "good.txt")),
        ("sft.py", ("--init", "reward", "--run", "sft")),
        ("distill.py", ("--teacher", "reward", "--run", "distilled")),
    ):
        code, _, err = command(script, *args)
        assert code == 2 and "=reward: is a reward model, which gives answers a number" in err


@pytest.mark.slow
def test_preferences_of_a_model_that_never_chatted_are_learned_with_a_warning(command, tmp_path):
    write(tmp_path)
    assert command("pretrain.py", *TINY, *GOOD, "--run", "pre", *WIDE)[0] == 0
    tune = pairs(tmp_path)
    code, _, err = command("dpo.py", *tune, "--run", "dpo", "--model.num_layers", "3")
    assert code == 0 and "warning: init=pre: was never tuned to chat" in err
    assert "warning: model.num_layers=3: has no effect; init=pre has 2" in err
    assert "19?" in (tmp_path / "dpo" / "samples.md").read_text(), "held-out prompts are answered"


@pytest.mark.slow
def test_every_option_at_once(command, tmp_path):
    """Documents, a mixture with a selection bias, Muon, bfloat16, accumulation, EMA, a mesh."""
    write(tmp_path)
    code, _, err = command(
        "pretrain.py", *TINY, *GOOD, "--run", "run", "--data.documents", "true",
        "--model.num_experts", "4", "--model.balance", "bias", "--optim.name", "muon",
        "--model.dtype", "bfloat16", "--train.micro_batches", "2", "--optim.ema", "0.9",
        "--mesh.fsdp", "2", "--mesh.tensor", "2", "--model.remat", "full", "--train.z_loss",
        "1e-4", "--model.vocab_size", "288", "--model.dropout", "0.1",
    )  # fmt: skip
    assert code == 0, err
    last = metrics.read_jsonl(tmp_path / "run" / "metrics.jsonl")
    losses = [line["train/loss"] for line in last if "train/loss" in line]
    assert len(losses) == 4 and losses[-1] < losses[0]


def test_a_text_too_short_to_hold_out_trains_without_evaluation(command, tmp_path):
    (tmp_path / "text.txt").write_text("0123456789" * 3)
    code, out, err = command(
        "pretrain.py", *TINY, "--run", "run", "--data.path", "text.txt", "--data.val_fraction",
        "0.01", "--train.steps", "1",
    )  # fmt: skip
    assert code == 0, err
    assert "validation loss" not in out


def test_a_loss_that_explodes_ends_with_one_line_and_status_1(command, tmp_path):
    write(tmp_path)
    code, _, err = command("pretrain.py", *TINY, *GOOD, "--run", "run", "--train.max_loss", "1.5")
    line = err.splitlines()[-1]
    assert code == 1 and line.startswith("error: step 1: the loss is 5.")
    assert "last good checkpoint is none" in line and "learning_rate" in line


HELP = """
import contextlib, io, runpy, sys
for script in sys.argv[1:]:
    sys.argv[1:] = ["--help"]
    shown = io.StringIO()
    try:
        with contextlib.redirect_stdout(shown):
            runpy.run_path(script, run_name="__main__")
    except SystemExit as stop:
        assert stop.code == 0, (script, stop.code)
    assert "usage: " in shown.getvalue(), script
    heavy = {"jax", "flax", "torch", "datasets", "transformers", "matplotlib"} & set(sys.modules)
    assert not heavy, (script, heavy)
"""


def test_help_needs_nothing_heavy():
    done = subprocess.run(
        [sys.executable, "-c", HELP, *map(str, SCRIPTS)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
