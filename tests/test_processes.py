"""Several real processes on this machine: stopping, being killed, and starting again."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxgpt import checkpoint, metrics, sharding
from jaxgpt.config import MeshConfig
from jaxgpt.machine import processes

ROOT = Path(__file__).parents[1]
WORKER = ["tests/process_worker.py"]
PRETRAIN = [
    "scripts/pretrain.py", "--data.tokenizer=byte", "--model.num_layers=1", "--model.model_dim=16",
    "--model.num_heads=2", "--model.context_length=16", "--train.batch_size=8", "--eval.every=0",
    "--eval.batches=1", "--sample.prompts=[]", "--log.every=1", "--optim.warmup_steps=2",
    "--mesh.fsdp=2", "--train.steps=120", "--checkpoint.every=10", "--checkpoint.keep=100",
]  # fmt: skip


def start(
    command: list[str],
    directory: Path,
    count: int,
    devices: int = 1,
    apart: bool = False,
    odd: tuple[str, ...] = (),
) -> list:
    """`count` processes with `devices` each; what they print goes to directory/NUMBER.txt.

    Args:
        apart: each works in a folder of its own, directory/hostNUMBER.
        odd: arguments of the last one alone.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = []
    for number in range(count):
        env = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "PYTHONPATH": str(ROOT),
        }
        if count > 1:
            env |= {
                "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                "JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(number),
            }  # fmt: skip
        with (directory / f"{number}.txt").open("w") as output:
            own = [str(ROOT / command[0]), *command[1:], *(odd if number == count - 1 else ())]
            folder = directory / f"host{number}" if apart else ROOT
            folder.mkdir(exist_ok=True)
            started.append(subprocess.Popen(
                [sys.executable, *own], env=env, cwd=folder, stdout=output, stderr=output
            ))  # fmt: skip
    return started


def wait_for(condition, started: list, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end or any(process.poll() is not None for process in started):
            raise AssertionError(f"nothing happens: {codes(started, 0.1)}")
        time.sleep(0.1)


def codes(started: list, seconds: float = 120) -> list[int]:
    try:
        return [process.wait(seconds) for process in started]
    except subprocess.TimeoutExpired:
        raise AssertionError(f"running: {[process.poll() for process in started]}") from None
    finally:
        for process in started:
            process.kill()


def steps(run: Path) -> list[int]:
    return checkpoint.Checkpoints(run / "checkpoints").steps()


def test_sigterm_on_one_process_stops_all_at_the_same_step(tmp_path):
    run = tmp_path / "run"
    started = start([*WORKER, str(run)], tmp_path, 2)
    wait_for(lambda: steps(run), started)
    started[1].send_signal(signal.SIGTERM)
    assert codes(started) == [0, 0]
    last = steps(run)[-1]
    assert f"stopped and saved at step {last};" in (tmp_path / "0.txt").read_text()
    checkpoint.verify(run / "checkpoints" / str(last))


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_the_others_end_with_one_line_when_one_is_killed(tmp_path, victim):
    """Process 0 coordinates: without it the runtime aborts, and its stack trace is replaced."""
    run = tmp_path / "run"
    started = start([*WORKER, str(run)], tmp_path, 4)
    wait_for(lambda: steps(run), started)
    started[victim].kill()
    killed = time.monotonic()
    found = codes(started)
    assert time.monotonic() - killed < 20
    assert found.pop(victim) == -signal.SIGKILL
    assert all(code in (1, -signal.SIGABRT) for code in found)
    for number in {0, 1, 2, 3} - {victim}:
        output = (tmp_path / f"{number}.txt").read_text()
        lines = [line for line in re.split(r"[\r\n]+", output) if line]
        quiet = [n for n in lines if not n.startswith(("[Gloo]", "step "))]
        assert quiet == [processes.LOST]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_the_others_end_when_one_stands_still(tmp_path, victim):
    """A process that answers nothing any more, as on a machine that hangs."""
    run = tmp_path / "run"
    started = start([*WORKER, str(run)], tmp_path, 2)
    wait_for(lambda: steps(run), started)
    started[victim].send_signal(signal.SIGSTOP)
    stopped, other = time.monotonic(), started[1 - victim]
    try:
        assert other.wait(120) in (1, -signal.SIGABRT)
        assert time.monotonic() - stopped < 60
    finally:
        for process in started:
            process.kill()
            process.wait()
    assert processes.LOST in (tmp_path / f"{1 - victim}.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [((2, 2), (4, 1)), ((4, 1), (1, 4))])
def test_a_killed_run_goes_on_in_other_processes_as_if_it_had_not_been(tmp_path, first, then):
    text = tmp_path / "text.txt"
    text.write_text("".join(np.random.default_rng(0).choice(list("abcd "), 4000)))
    command = lambda run: [*PRETRAIN, f"--data.path={text}", f"--run={tmp_path / run}"]
    assert codes(start(command("whole"), tmp_path, 1, 4), 600) == [0]

    started = start(command("cut"), tmp_path, *first)
    wait_for(lambda: len(steps(tmp_path / "cut")) > 1, started)
    started[-1].kill()
    codes(started)
    assert steps(tmp_path / "cut")[-1] < 120
    again = start(command("cut"), tmp_path, *then)
    assert codes(again, 600) == [0] * then[0], (tmp_path / "0.txt").read_text()

    logs = [metrics.read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("whole", "cut")]
    losses = [
        {line["step"]: line["train/loss"] for line in log if "train/loss" in line} for log in logs
    ]
    assert losses[0].keys() == losses[1].keys() == set(range(1, 121))
    for step, loss in losses[0].items():
        np.testing.assert_allclose(losses[1][step], loss, atol=1e-4, err_msg=f"step {step}")


@pytest.mark.slow
def test_processes_practise_together_on_what_another_run_learned(tmp_path):
    """Weights of another run are read, and answers written and judged, by all at the same time."""
    begun = [
        "scripts/sft.py", f"--run={tmp_path / 'start'}", "--model.num_layers=1",
        "--model.model_dim=16", "--model.num_heads=2", "--model.context_length=64",
        "--train.steps=2", "--train.batch_size=4", "--eval.every=0", "--sample.every=0",
    ]  # fmt: skip
    assert codes(start(begun, tmp_path, 1), 600) == [0], (tmp_path / "0.txt").read_text()
    practise = [
        "scripts/grpo.py", f"--init={tmp_path / 'start'}", "--train.steps=4",
        "--train.batch_size=16", "--rollout.updates=2", "--rollout.samples=4",
        "--rollout.max_new_tokens=24", "--eval.every=2", "--eval.batches=1", "--log.every=1",
        "--mesh.data=2", "--checkpoint.every=2", "--optim.learning_rate=1e-3",
    ]  # fmt: skip
    for name, count in (("one", 1), ("two", 2)):
        command = [*practise, f"--run={tmp_path / name}"]
        ended = codes(start(command, tmp_path, count, 2 // count), 600)
        assert ended == [0] * count, (tmp_path / "0.txt").read_text()
    one, two = (metrics.read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    for name in ("train/loss", "rollout/reward", "rollout/length", "val/exact_match"):
        values = [[line[name] for line in log if name in line] for log in (one, two)]
        assert values[0]
        np.testing.assert_allclose(*values, atol=1e-4, err_msg=name)


def assert_all_end(started: list, directory: Path, reason: str, seconds: float = 60) -> None:
    """Every process ends within the time, with this reason in its last line and no success."""
    found = codes(started, seconds)
    for number, code in enumerate(found):
        lines = (directory / f"{number}.txt").read_text().splitlines()
        assert code in (1, 2) and re.search(reason, lines[-1]), (found, lines[-3:])


@pytest.mark.slow
def test_another_setting_on_one_host_is_refused_by_name(tmp_path):
    command = [*PRETRAIN, f"--run={tmp_path / 'run'}", "--optim.learning_rate=1e-3"]
    started = start(command, tmp_path, 2, odd=("--optim.learning_rate=1e-2", "--seed=5"))
    reason = r"seed=0 in process 0, 5 in process 1; optim.learning_rate=0.001 in process 0, 0.01 in"
    assert_all_end(started, tmp_path, reason, 120)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_hosts_without_a_shared_disk_are_told_so(tmp_path):
    started = start([*PRETRAIN, "--run=run"], tmp_path, 2, apart=True)
    assert_all_end(started, tmp_path, r"run=run: is not the folder of process 0", 120)


@pytest.mark.slow
@pytest.mark.parametrize("missing", [0, 1])
def test_a_text_that_one_host_lacks_ends_all(tmp_path, missing):
    (tmp_path / f"host{1 - missing}").mkdir()
    text = "".join(np.random.default_rng(0).choice(list("abcd "), 4000))
    (tmp_path / f"host{1 - missing}" / "text.txt").write_text(text)
    command = [*PRETRAIN, f"--run={tmp_path / 'run'}", "--data.path=text.txt"]
    assert_all_end(
        start(command, tmp_path, 2, apart=True), tmp_path, r"text.txt: no such file", 120
    )


@pytest.mark.slow
@pytest.mark.parametrize("failing", ["0", "1"])
def test_an_error_in_a_step_of_one_ends_all_with_it(tmp_path, monkeypatch, failing):
    monkeypatch.setenv("FAILING_PROCESS", failing)
    started = start([*WORKER, str(tmp_path / "run")], tmp_path, 2)
    assert_all_end(
        started, tmp_path, r"error: (process \d on \S+ ended this run: )?row 7 is odd", 120
    )


FATAL = """step 3/9  loss 1\rstep 4/9  loss 1
E1124 17:00:00.1 123 coordination_service_agent.cc:1] Polled an error from coordination service
Additional GRPC error information from remote target coordination_service while calling /GetKey:
:UNKNOWN:Error received from peer  {grpc_status:14, grpc_message:"Socket closed"}. Check the logs.
F1124 17:00:00.2 123 client.h:80] Terminating process because the JAX distributed service detected
fatal errors.
*** Check failure stack trace: ***
    @     0x7fa262120634  absl::lts_20260107::log_internal::LogMessage::SendToLog()
"""


def test_the_runtimes_last_words_become_one_line():
    command = [sys.executable, "-c", processes._FILTER, processes.LOST, processes._GONE]
    done = subprocess.run(command, input=FATAL, capture_output=True, text=True, timeout=30)
    assert done.stderr == f"step 3/9  loss 1\nstep 4/9  loss 1\n{processes.LOST}\n"


def test_ordinary_errors_and_logs_pass_unchanged():
    text = "E1124 17:00:00.1 1 other.cc:1] no space\nTraceback\nwarning: unfinished"
    command = [sys.executable, "-c", processes._FILTER, processes.LOST, processes._GONE]
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=30)
    assert done.stderr == text


def test_a_process_that_fails_tells_the_others_why_and_ends(monkeypatch):
    told = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(processes, "_end_with_others", lambda ended: None)
    for name in ("_tell", "_leave"):
        monkeypatch.setattr(processes, name, lambda *given: told.append(given))
    with processes.end_together():
        raise ValueError("data.path=mine: is not there")
    assert told == [
        ("data.path=mine: is not there", 2),
        ("error: data.path=mine: is not there", 2),
    ]


def test_alone_a_vote_is_ones_own():
    vote = processes.make_vote(sharding.make_mesh(MeshConfig()))
    assert [vote(False), vote(True), vote(False)] == [False, True, False]


def test_many_votes_are_counted_some_calls_later(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    vote = processes.make_vote(sharding.make_mesh(MeshConfig(tensor=2)))
    asked = [False, True, False, False, False]
    assert [vote(yes) for yes in asked] == [False, False, False, True, False]


@pytest.mark.parametrize(
    "wrong",
    [{"JAX_PROCESS_ID": "2"}, {"JAX_PROCESS_ID": ""}, {"JAX_COORDINATOR_ADDRESS": ""},
     {"JAX_NUM_PROCESSES": "two"}],
)  # fmt: skip
def test_a_wrong_environment_is_refused_by_name(monkeypatch, wrong):
    right = {
        "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1", "JAX_COORDINATOR_ADDRESS": "host:1"
    }  # fmt: skip
    for name, value in (right | wrong).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"JAX_NUM_PROCESSES="):
        processes.join()
