"""The loop on a small stage, and the pretraining command under kill -9, SIGTERM and damage."""

import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import checkpoint, metrics, rundir, sharding, train
from jaxgpt.config import (
    CheckpointConfig,
    EvalConfig,
    LogConfig,
    MeshConfig,
    OptimConfig,
    RunConfig,
    SampleConfig,
    TrainConfig,
)  # fmt: skip
from jaxgpt.runlog import Diverged
from jaxgpt.train import Stage
from jaxgpt.types import Report

ROOT = Path(__file__).parents[1]
GOAL = np.linspace(-1, 1, 6, dtype=np.float32)[:, None]


def batch_of(step: int) -> dict:
    """Linear regression: rows and what the goal makes of them."""
    rows_BD = np.random.default_rng(step).normal(size=(8, 6)).astype(np.float32)
    return {"tokens": rows_BD, "targets": rows_BD @ GOAL}


def regression(**changes) -> Stage:
    """A stage whose carry counts the steps, and whose loss is noisy by its keys."""

    def loss(params, batch, rng_B):
        noise_B = jax.vmap(jax.random.normal)(rng_B)
        guess_B = (batch["tokens"] @ params["policy"]["score"]["kernel"])[:, 0] + 0.1 * noise_B
        error_B = (guess_B - batch["targets"][:, 0]) ** 2
        return error_B.sum(), jnp.float32(error_B.size), {"count": (params["carry"]["steps"], 1.0)}

    stage = Stage(
        params={"policy": {"score": {"kernel": jnp.zeros((6, 1))}}},
        trainable="^policy/",
        loss=loss,
        next_batch=lambda params, carry, step: batch_of(step),
        evaluate=lambda params: {"loss": distance(params)},
        carry={"steps": jnp.float32(0)},
        after_step=lambda carry, sums: {"steps": carry["steps"] + 1},
    )
    return stage._replace(**changes)


def distance(params) -> float:
    return float(np.abs(np.asarray(params["policy"]["score"]["kernel"]) - GOAL).max())


def run_of(path: Path, steps: int = 12, **changes) -> RunConfig:
    settings = {
        "train": TrainConfig(steps=steps, batch_size=8),
        "optim": OptimConfig(learning_rate=0.1, warmup_steps=2, weight_decay=0.0),
        "checkpoint": CheckpointConfig(every=4, keep=2),
        "eval": EvalConfig(every=5),
        "sample": SampleConfig(every=6),
        "log": LogConfig(every=2),
    }
    return RunConfig(run=str(path), **{**settings, **changes})


def fit(stage: Stage, cfg: RunConfig, sample=None) -> None:
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    Path(cfg.run).mkdir(exist_ok=True)
    with jax.set_mesh(mesh):
        train.fit(stage._replace(sample=sample), cfg, mesh)


def arrays_of(run: Path, step: int) -> dict[str, np.ndarray]:
    return checkpoint.read_arrays(run / "checkpoints" / str(step))


def assert_same_arrays(one: Path, other: Path, step: int) -> None:
    first, second = arrays_of(one, step), arrays_of(other, step)
    assert first.keys() == second.keys() and len(first) > 3
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name], err_msg=name)


def lines_of(run: Path, kind: str) -> list[int]:
    """Steps of the log lines that have a measure."""
    return [line["step"] for line in metrics.read_jsonl(run / "metrics.jsonl") if kind in line]


def test_the_loop_does_everything_when_it_is_due(tmp_path):
    sampled = []
    fit(regression(), run_of(tmp_path), lambda params: sampled.append(distance(params)) or ["text"])
    assert lines_of(tmp_path, "train/loss") == [2, 4, 6, 8, 10, 12]
    assert lines_of(tmp_path, "val/loss") == [0, 5, 10, 12]
    assert [step for step, _ in metrics.read_samples(tmp_path / "samples.md")] == [6, 12]
    assert checkpoint.Checkpoints(tmp_path / "checkpoints").steps() == [8, 12]
    losses = [line.get("val/loss") for line in metrics.read_jsonl(tmp_path / "metrics.jsonl")]
    losses = [loss for loss in losses if loss is not None]
    assert losses[-1] < losses[0] and sampled[-1] == losses[-1]
    counts = [line["train/count"] for line in metrics.read_jsonl(tmp_path / "metrics.jsonl")
              if "train/count" in line]  # fmt: skip
    assert counts == [1, 3, 5, 7, 9, 11]


class Killed(BaseException):
    """Ends the process as far as the loop can tell."""


def killed_at(step: int, stage: Stage) -> Stage:
    def next_batch(params, carry, number):
        if number == step:
            raise Killed
        return batch_of(number)

    return stage._replace(next_batch=next_batch)


@pytest.mark.parametrize(
    ("at", "ema", "moments"), [(2, 0.0, "float32"), (7, 0.9, "bfloat16"), (11, 0.0, "float32")]
)
def test_a_killed_run_ends_as_if_it_had_not_been(tmp_path, at, ema, moments):
    cfg = lambda name: run_of(
        tmp_path / name,
        optim=OptimConfig(learning_rate=0.1, warmup_steps=2, ema=ema, moments=moments),
        log=LogConfig(every=1),
    )
    sample = lambda params: ["text"]
    fit(regression(), cfg("whole"), sample)
    with pytest.raises(Killed):
        fit(killed_at(at, regression()), cfg("killed"), sample)
    for thread in threading.enumerate():  # a real kill would end a save under way
        if "_finish" in thread.name:
            thread.join()
    fit(regression(), cfg("killed"), sample)
    assert_same_arrays(tmp_path / "whole", tmp_path / "killed", 12)
    for kind in ("train/loss", "val/loss"):
        steps = lines_of(tmp_path / "killed", kind)
        assert steps == lines_of(tmp_path / "whole", kind) == sorted(set(steps))
    read = lambda name: metrics.read_samples(tmp_path / name / "samples.md")
    assert read("killed") == read("whole")


def test_a_finished_run_is_left_as_it_is(tmp_path):
    fit(regression(), run_of(tmp_path))
    before = (tmp_path / "metrics.jsonl").read_text()
    refuse = lambda *_: pytest.fail("trained, evaluated or sampled again")
    fit(regression(next_batch=refuse, evaluate=refuse), run_of(tmp_path), refuse)
    assert (tmp_path / "metrics.jsonl").read_text() == before


def enter(cfg: RunConfig, **changes) -> None:
    """As a command does it: the directory is asked first."""
    rundir.enter(cfg)
    fit(regression(**changes), cfg)


def rates(schedule: str, **changes) -> OptimConfig:
    return OptimConfig(
        learning_rate=0.1, warmup_steps=2, weight_decay=0.0, schedule=schedule, **changes
    )


@pytest.mark.parametrize(
    ("optim", "steps"),
    [
        (rates("constant"), 12), (rates("wsd"), 12), (rates("wsd", decay_fraction=0.5, ema=0.9), 9),
        (rates("cosine", decay_steps=24), 12), (rates("constant"), 7),
    ],
)  # fmt: skip
def test_a_finished_run_goes_on_as_if_it_had_been_longer(tmp_path, optim, steps):
    for name, numbers in (("in two", (steps, 24)), ("at once", (24,))):
        for number in numbers:
            enter(run_of(tmp_path / name, number, optim=optim))
    assert_same_arrays(tmp_path / "in two", tmp_path / "at once", 24)
    logged = lines_of(tmp_path / "in two", "train/loss")
    assert logged[-1] == 24 and logged == sorted(set(logged))


@pytest.mark.parametrize("at", [10, 11, 13])
def test_going_on_may_be_killed_before_it_saves(tmp_path, at):
    """The decayed checkpoint of step 12 is still there, and must not be taken."""
    optim, save = rates("wsd", decay_fraction=0.3), CheckpointConfig(every=50)
    cfg = lambda name, steps: run_of(tmp_path / name, steps, optim=optim, checkpoint=save)
    enter(cfg("killed", 12))
    rundir.enter(cfg("killed", 24))
    with pytest.raises(Killed):
        fit(killed_at(at, regression()), cfg("killed", 24))
    enter(cfg("killed", 24))
    enter(cfg("whole", 24))
    assert_same_arrays(tmp_path / "killed", tmp_path / "whole", 24)


def test_a_cosine_goes_on_only_if_it_is_told_how(tmp_path):
    run = tmp_path / "run"
    enter(run_of(run, 12, optim=rates("cosine")))
    with pytest.raises(ValueError, match=r"ends at step 12; give --optim\.decay_steps 12 .* 24 to"):
        enter(run_of(run, 24, optim=rates("cosine")))
    assert "steps: 12" in (run / "config.yaml").read_text(), "nothing was changed"
    for decay_steps, then in ((12, 0.01), (24, 0.1 * (0.1 + 0.9 * 0.5))):
        copy = shutil.copytree(run, tmp_path / str(decay_steps))
        enter(run_of(copy, 24, optim=rates("cosine", decay_steps=decay_steps)))
        log = {line["step"]: line for line in metrics.read_jsonl(copy / "metrics.jsonl")
               if "train/learning_rate" in line}  # fmt: skip
        assert log[14]["train/learning_rate"] == pytest.approx(then, rel=0.15)
        assert int(arrays_of(copy, 24)["step"]) == 24


def test_fewer_steps_than_are_done_and_other_settings_are_refused(tmp_path):
    run = tmp_path / "run"
    enter(run_of(run, 12, optim=rates("constant")))
    with pytest.raises(ValueError, match=r"train\.steps=8: 12 steps are done; give more"):
        rundir.enter(run_of(run, 8, optim=rates("constant")))
    with pytest.raises(ValueError, match=r"optim\.learning_rate: 0\.1 -> 0.2"):
        changed = replace(rates("constant"), learning_rate=0.2)
        rundir.enter(run_of(run, 24, optim=changed))


def test_wsd_whose_stable_checkpoint_is_gone_is_refused(tmp_path):
    run = tmp_path / "run"
    enter(run_of(run, 12, optim=rates("wsd")))
    for step in checkpoint.Checkpoints(run / "checkpoints").steps():
        if step < 12:
            shutil.rmtree(run / "checkpoints" / str(step))
    with pytest.raises(ValueError, match=r"no checkpoint is left from before .* --init"):
        enter(run_of(run, 24, optim=rates("wsd")))


def test_evaluation_uses_the_average(tmp_path):
    seen = []
    cfg = run_of(tmp_path, optim=OptimConfig(learning_rate=0.1, warmup_steps=0, ema=0.9))
    fit(regression(evaluate=lambda p: seen.append(distance(p)) or {}), cfg)
    arrays = arrays_of(tmp_path, 12)
    gap = lambda name: float(np.abs(arrays[f"{name}/policy/score/kernel"] - GOAL).max())
    assert seen[-1] == gap("ema") != gap("params")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_same_command_goes_on(tmp_path, number, capsys):
    def sample(params):
        signal.raise_signal(number)  # between two steps, at step 6
        return ["text"]

    before = signal.getsignal(number)  # ignored in some background shells
    fit(regression(), run_of(tmp_path / "stopped"), sample)
    said = capsys.readouterr().err
    stopped = int(re.search(r"stopped and saved at step (\d+)", said)[1])
    assert 6 <= stopped <= 7
    assert checkpoint.Checkpoints(tmp_path / "stopped" / "checkpoints").steps()[-1] == stopped
    assert signal.getsignal(number) == before
    fit(regression(), run_of(tmp_path / "stopped"))
    fit(regression(), run_of(tmp_path / "whole"))
    assert_same_arrays(tmp_path / "stopped", tmp_path / "whole", 12)


def poisoned(step: int, value: float) -> Stage:
    def next_batch(params, carry, number):
        batch = batch_of(number)
        return batch if number != step else {**batch, "targets": batch["targets"] * value}

    return regression(next_batch=next_batch)


@pytest.mark.parametrize(("step", "value"), [(7, np.nan), (7, 1e5), (9, np.inf)])
def test_a_lost_loss_stops_with_the_step_the_checkpoint_and_a_hint(tmp_path, step, value):
    """The eighth step has both the bad loss and a checkpoint due: the fourth's stays the last."""
    with pytest.raises(Diverged) as error:
        fit(poisoned(step, value), run_of(tmp_path))
    good = 4 if step == 7 else 8
    for part in (f"step {step + 1}:", f"checkpoint is {good};", "learning_rate"):
        assert part in str(error.value)
    assert checkpoint.Checkpoints(tmp_path / "checkpoints").steps()[-1] == good
    assert all(np.isfinite(array).all() for array in arrays_of(tmp_path, good).values())


def test_a_lost_gradient_stops_although_the_loss_is_finite(tmp_path):
    def loss(params, batch, rng_B):
        kernel = params["policy"]["score"]["kernel"]
        return jnp.sqrt(kernel**2).sum(), jnp.float32(1), {}  # whose slope at zero is 0 / 0

    with pytest.raises(Diverged, match=r"step 1: the gradient"):
        fit(regression(loss=loss), run_of(tmp_path))


def test_a_lost_held_out_loss_stops_too(tmp_path):
    with pytest.raises(Diverged, match="step 0: the held-out loss is nan"):
        fit(regression(evaluate=lambda params: {"loss": float("nan")}), run_of(tmp_path))


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, capsys):
    fit(regression(), run_of(tmp_path / "run"))
    shutil.copytree(tmp_path / "run", tmp_path / "whole")
    data = max(
        (tmp_path / "run/checkpoints/12/arrays").rglob("d/*"), key=lambda file: file.stat().st_size
    )
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    capsys.readouterr()
    fit(regression(), run_of(tmp_path / "run"))
    said = capsys.readouterr().err
    assert "warning: skipping a checkpoint" in said and "12 is damaged" in said
    assert_same_arrays(tmp_path / "run", tmp_path / "whole", 12)


def with_reference(value: float) -> Stage:
    stage = regression()
    reference = {"score": {"kernel": jnp.full((6, 1), value)}}
    return stage._replace(params={**stage.params, "reference": reference})


def test_other_frozen_weights_are_refused(tmp_path):
    fit(with_reference(1.0), run_of(tmp_path))
    with pytest.raises(ValueError, match="frozen weights"):
        fit(with_reference(1.5), run_of(tmp_path))
    assert not [name for name in arrays_of(tmp_path, 12) if "reference" in name]


def test_a_failing_batch_is_raised_where_it_is_needed(tmp_path):
    def next_batch(params, carry, step):
        if step == 3:
            raise ValueError("data.path=x: cut short")
        return batch_of(step)

    with pytest.raises(ValueError, match=r"data\.path=x"):
        fit(regression(next_batch=next_batch), run_of(tmp_path))


def test_an_on_policy_batch_sees_the_newest_parameters_and_the_carry(tmp_path):
    seen = []

    def next_batch(params, carry, step):
        seen.append((step, float(carry["steps"]), distance(params)))
        return batch_of(step)

    fit(regression(next_batch=next_batch, updates_per_rollout=1), run_of(tmp_path, steps=5))
    assert [(step, count) for step, count, _ in seen] == [(n, n) for n in range(5)]
    assert len({gap for *_, gap in seen}) == 5


def test_the_number_of_compilations_does_not_grow_with_the_steps(tmp_path):
    counted = itertools.count()
    event = "/jax/core/compile/backend_compile_duration"
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: next(counted) if name == event else None
    )

    def compiled(steps: int) -> int:
        before = next(counted)
        fit(regression(), run_of(tmp_path / str(steps), steps, log=LogConfig(every=1)))
        return next(counted) - before

    compiled(3)  # whatever is compiled once per process
    assert compiled(4) == compiled(13) > 1


def test_the_profiler_traces_the_asked_steps(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda path: calls.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))

    def next_batch(params, carry, step):
        calls.append(step)
        return batch_of(step)

    stage = regression(next_batch=next_batch, updates_per_rollout=1)
    fit(stage, run_of(tmp_path / "a", steps=5, log=LogConfig(profile="1:2")))
    assert calls == [0, "start", 1, 2, "stop", 3, 4]
    calls.clear()
    fit(stage, run_of(tmp_path / "b", steps=3, log=LogConfig(profile="2:9")))
    assert calls == [0, 1, "start", 2, "stop"]


# ---- the command, in processes of its own

TINY = """
seed: 5
model: {context_length: 16, num_layers: 2, model_dim: 16, num_heads: 2}
train: {steps: 24, batch_size: 4}
checkpoint: {every: 5}
eval: {every: 8, batches: 1}
sample: {every: 8, max_new_tokens: 4}
log: {every: 1}
"""
KINDS = {
    "plain": [],
    "accumulation-dropout": ["--train.micro_batches", "2", "--model.dropout", "0.2"],
    "mixture-bias": ["--model.num_experts", "4", "--model.balance", "bias"],
    "ema": ["--optim.ema", "0.9"],
    "all": [
        "--train.micro_batches", "2", "--model.dropout", "0.2", "--optim.ema", "0.9",
        "--model.num_experts", "4", "--model.balance", "bias",
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """Text and settings, and one compilation cache for all processes."""
    folder = tmp_path_factory.mktemp("pretrain")
    words = random.Random(0).choices(["the", "cat", "sat", "on", "a", "mat", "\n"], k=4000)
    (folder / "text.txt").write_text(" ".join(words))
    (folder / "tiny.yaml").write_text(TINY)
    return folder


def start(workplace: Path, run: str, *options: str) -> subprocess.Popen:
    command = [
        sys.executable, str(ROOT / "scripts/pretrain.py"), "--config", "tiny.yaml", "--run", run,
        "--data.path", "text.txt", "--data.tokenizer", "byte", *options,
    ]  # fmt: skip
    env = {
        **os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": "",
        "JAX_COMPILATION_CACHE_DIR": str(workplace / "cache"),
    }  # fmt: skip
    return subprocess.Popen(
        command, cwd=workplace, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def wait_for_step(process: subprocess.Popen, step: int) -> str:
    """Reads the progress lines up to one of that step."""
    seen = []
    for line in process.stderr:
        seen.append(line)
        found = re.match(r"step +(\d+)/", line)
        if found and int(found[1]) >= step:
            return "".join(seen)
    raise AssertionError("".join(seen))


def complete(workplace: Path, run: str, *options: str) -> tuple[str, str]:
    code, out, err = finish(start(workplace, run, *options))
    assert code == 0, err
    return out, err


@pytest.mark.parametrize(
    "kind",
    [name if name == "all" else pytest.param(name, marks=pytest.mark.slow) for name in KINDS],
)
def test_kill_9_and_the_same_command_give_the_same_bits(workplace, kind):
    whole, killed = workplace / f"{kind}-whole", workplace / f"{kind}-killed"
    complete(workplace, whole.name, *KINDS[kind])
    process = start(workplace, killed.name, *KINDS[kind])
    wait_for_step(process, random.randrange(3, 23))
    process.kill()
    assert process.wait() == -signal.SIGKILL
    process.communicate()
    reached = checkpoint.Checkpoints(killed / "checkpoints").steps()
    complete(workplace, killed.name, *KINDS[kind])
    assert reached == [] or reached[-1] < 24
    assert_same_arrays(whole, killed, 24)
    for kind_ in ("train/loss", "val/loss"):
        assert lines_of(killed, kind_) == lines_of(whole, kind_)
    assert (killed / "samples.md").read_text() == (whole / "samples.md").read_text()
    assert metrics.read_samples(killed / "samples.md")[-1][1] != []


@pytest.mark.slow
def test_a_terminated_command_saves_says_so_and_goes_on(workplace):
    long = ("--train.steps", "100000", "--checkpoint.every", "100000")
    process = start(workplace, "terminated", *long)
    wait_for_step(process, 5)
    process.send_signal(signal.SIGTERM)
    code, _, err = finish(process)
    assert code == 0, err
    stopped = int(re.search(r"stopped and saved at step (\d+)", err)[1])
    assert checkpoint.Checkpoints(workplace / "terminated/checkpoints").steps() == [stopped]
    process = start(workplace, "terminated", *long)
    wait_for_step(process, stopped + 1)
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert code == 0 and "stopped and saved" in err


@pytest.mark.slow
def test_a_finished_command_only_reports(workplace):
    out, _ = complete(workplace, "finished")
    before = (workplace / "finished/metrics.jsonl").read_text()
    began = time.perf_counter()
    again, err = complete(workplace, "finished")
    assert time.perf_counter() - began < 60 and "step" not in err
    assert again == out and (workplace / "finished/metrics.jsonl").read_text() == before
    assert json.loads(before.splitlines()[0])["step"] == 0


def sampling(on_rollout=lambda step: None) -> Stage:
    """Three updates a rollout; what a rollout drew is kept beside the loop, as a sampler does."""
    drawn: dict[int, float] = {}

    def next_batch(params, carry, step):
        if step % 3 == 0:
            on_rollout(step)
            drawn.clear()
            drawn[step] = distance(params)
        (scale,) = drawn.values()
        batch = batch_of(step)
        batch["tokens"] = batch["tokens"] * np.float32(scale)
        report = Report({"rollout/scale": scale}, [f"drawn at {step}"])
        return {**batch, "report": report} if step % 3 == 0 else batch

    return regression(next_batch=next_batch, updates_per_rollout=3)


def test_a_stage_that_samples_is_stopped_and_resumed_between_rollouts(tmp_path, capsys):
    ask = lambda step: signal.raise_signal(signal.SIGTERM) if step == 3 else None
    cfg = lambda name: run_of(tmp_path / name, checkpoint=CheckpointConfig(every=6))
    fit(sampling(ask), cfg("stopped"))
    assert "stopped and saved at step 3" in capsys.readouterr().err  # the rollout is dropped
    fit(sampling(), cfg("stopped"))
    fit(sampling(), cfg("whole"))
    assert_same_arrays(tmp_path / "stopped", tmp_path / "whole", 12)
    for name in ("stopped", "whole"):
        # Logged with the first update that learns from it.
        assert lines_of(tmp_path / name, "rollout/scale") == [1, 4, 7, 10]
        samples = metrics.read_samples(tmp_path / name / "samples.md")
        assert samples == [(6, ["drawn at 3"]), (12, ["drawn at 9"])]


def test_checkpoints_within_a_rollout_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"checkpoint\.every=4: must be a multiple of 3"):
        fit(sampling(lambda step: pytest.fail("sampled")), run_of(tmp_path))


@pytest.mark.parametrize("skips", [True, False])
def test_a_batch_of_weight_zero_changes_nothing_where_it_may(tmp_path, skips):
    whole = regression().loss

    def loss(params, batch, rng_B):
        total, weight, sums = whole(params, batch, rng_B)
        return total * batch["alive"][0], weight * batch["alive"][0], sums

    def next_batch(params, carry, step):
        return {**batch_of(step), "alive": np.full(8, step != 1, np.float32)}

    stage = regression(loss=loss, next_batch=next_batch, skips=skips)
    cfg = run_of(tmp_path, steps=2, checkpoint=CheckpointConfig(every=1))
    if not skips:
        with pytest.raises(Diverged, match="step 2"):
            fit(stage, cfg)
        return
    fit(stage, cfg)
    before, after = (arrays_of(tmp_path, step) for step in (1, 2))
    changed = {name for name in before if (before[name] != after[name]).any()}
    assert changed == {"step", "carry/steps"}
