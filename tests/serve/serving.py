"""A tiny network, and a server in a process of its own."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx

from jaxgpt.config import ModelConfig

ROOT = Path(__file__).parents[2]
TINY = ModelConfig(
    vocab_size=260, context_length=1024, num_layers=2, model_dim=24, num_heads=4, num_kv_heads=2,
    mlp_dim=40, mlp="gated", activation="silu", norm="rmsnorm", position="rope",
)  # fmt: skip


@contextmanager
def running(
    *args: str, program: Sequence[str] = ("scripts/serve.py",), seconds: float = 240
) -> Iterator[tuple[str, subprocess.Popen]]:
    """The address of a server process, which is gone afterwards."""
    command = [sys.executable, *program, "--port", "0", *args]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        cwd=ROOT,
    )
    # A pipe that nobody reads fills up, and then whoever writes into it waits.
    reader = threading.Thread(target=process.stdout.read, daemon=True)
    try:
        lines, end = [], time.monotonic() + seconds
        while time.monotonic() < end:
            line = process.stdout.readline()
            lines.append(line)
            if line.startswith("ready: ") or not line:
                break
        assert lines[-1].startswith("ready: "), "".join(lines)
        reader.start()
        yield lines[-1].split()[1].removesuffix("/v1"), process
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(20)
        if reader.is_alive():
            reader.join()
        process.stdout.close()


def idle(address: str) -> bool:
    """Whether all slots are free again, soon."""
    for _ in range(200):
        health = httpx.get(f"{address}/health", timeout=60).json()
        if health["free"] == health["slots"] and not health["waiting"]:
            return True
        time.sleep(0.05)
    return False
