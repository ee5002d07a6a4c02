"""A short benchmark against torch on this machine: a guard against large losses of speed."""

import re
import subprocess
import sys

import pytest


def test_training_keeps_its_pace_beside_torch():
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    done = subprocess.run(
        [
            sys.executable, "benchmarks/train.py", "--workload", "smoke", "--dtype", "float32",
            "--variant", "fp32 eager", "--pairs", "3", "--at_least", "0.3",
        ],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    # Seen alone: 0.9 to 1.0. Beside other tests a ratio is worth little, so only a third is asked.
    assert re.search(r"smoke: .* ratio \d", done.stdout)
