"""One run, one writer; and a run that is asked to end leaves what it is at."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from test_resume import assert_same_arrays, fit, regression, run_of

from jaxgpt import metrics
from jaxgpt.checkpoint import Checkpoints
from jaxgpt.machine import lock

ROOT = Path(__file__).parents[1]
HOLDER = """
import sys, time
from pathlib import Path
from jaxgpt.machine import lock
with lock.hold(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def holder(run: Path) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, run], stdout=subprocess.PIPE, cwd=ROOT
    )
    assert process.stdout is not None and process.stdout.readline() == b"held\n"
    return process


def test_the_second_writer_is_told_who_the_first_one_is_and_a_killed_one_holds_nothing(tmp_path):
    first = holder(tmp_path)
    try:
        said = rf"process {first.pid} on .* trains here"
        with pytest.raises(ValueError, match=said) as error, lock.hold(tmp_path):
            pass
        assert "\n" not in str(error.value)
    finally:
        first.send_signal(signal.SIGKILL)
        first.communicate()
    assert (tmp_path / lock.NAME).exists()
    began = time.monotonic()
    with lock.hold(tmp_path):
        assert json.loads((tmp_path / lock.NAME).read_text())["process"] == os.getpid()
    assert time.monotonic() - began < 2
    assert not (tmp_path / lock.NAME).exists()


def test_another_hosts_lock_counts_while_it_is_touched(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "SILENCE", 2.0)
    file = tmp_path / lock.NAME
    theirs = {"host": "elsewhere", "process": 7, "begun": "2026-01-01T00:00:00+00:00"}
    file.write_text(json.dumps(theirs))
    with lock.hold(tmp_path):
        assert json.loads(file.read_text())["host"] != "elsewhere"  # nobody touched it
    file.write_text(json.dumps(theirs))
    ended = threading.Event()

    def touch() -> None:
        while not ended.wait(0.2):
            os.utime(file)

    thread = threading.Thread(target=touch)
    thread.start()
    try:
        with pytest.raises(ValueError, match="process 7 on elsewhere"), lock.hold(tmp_path):
            pass
    finally:
        ended.set()
        thread.join()


def evaluating(stop_at: int, seen: list[int]):
    """A stage whose evaluation number `stop_at` would take ten minutes without a signal."""

    def evaluate(params) -> dict[str, float]:
        seen.append(len(seen))
        if len(seen) == stop_at:
            threading.Timer(0.3, os.kill, [os.getpid(), signal.SIGTERM]).start()
            time.sleep(600)
        return {"loss": float(abs(params["policy"]["score"]["kernel"]).sum())}

    return regression(evaluate=evaluate)


def test_an_evaluation_is_left_at_once_and_made_by_the_run_that_goes_on(tmp_path):
    began = time.monotonic()
    fit(evaluating(2, []), run_of(tmp_path / "stopped"))
    assert time.monotonic() - began < 300
    stopped = Checkpoints(tmp_path / "stopped" / "checkpoints").steps()[-1]
    assert 0 < stopped < 12
    fit(evaluating(0, []), run_of(tmp_path / "stopped"))
    fit(evaluating(0, []), run_of(tmp_path / "whole"))
    assert_same_arrays(tmp_path / "stopped", tmp_path / "whole", 12)
    lines = [
        [{k: v for k, v in line.items() if "speed" not in k} for line in metrics.read_jsonl(file)]
        for file in (tmp_path / "stopped" / "metrics.jsonl", tmp_path / "whole" / "metrics.jsonl")
    ]
    assert lines[0] == lines[1]


def test_a_rollout_is_dropped(tmp_path):
    def next_batch(params, carry, step, stops=True):
        if step == 5 and stops:
            threading.Timer(0.3, os.kill, [os.getpid(), signal.SIGTERM]).start()
            time.sleep(600)
        return plain.next_batch(params, carry, step)

    plain = regression()
    stage = regression(next_batch=next_batch, updates_per_rollout=1)
    fit(stage, run_of(tmp_path))
    assert Checkpoints(tmp_path / "checkpoints").steps()[-1] == 5


GRACE = """
import hashlib, os, signal, sys, threading
sys.path.insert(0, "tests")
import conftest
from test_resume import fit, regression, run_of
from pathlib import Path
from jaxgpt.config import CheckpointConfig
calls = []
def evaluate(params):
    calls.append(1)
    if len(calls) == 2:
        threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGTERM]).start()
        hashlib.pbkdf2_hmac("sha512", b"a", b"b", 2**31 - 1)  # a program that hears no signal
    return {"loss": 1.0}
soon = CheckpointConfig(every=4, grace=1.0)
fit(regression(evaluate=evaluate), run_of(Path(sys.argv[1]), checkpoint=soon))
"""


@pytest.mark.slow
def test_after_the_grace_period_a_thread_saves_and_ends_the_process(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", GRACE, tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0 and "after the grace period" in done.stderr, done.stderr
    assert Checkpoints(tmp_path / "checkpoints").latest_valid() is not None
