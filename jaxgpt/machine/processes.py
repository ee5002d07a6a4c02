"""Several processes as one run: joining, deciding together, and ending together.

A process that loses another one ends with one line. Where a collective notices (on CPUs, at once)
that is an exception; else the runtime aborts after HEARTBEAT_SECONDS, or at once if it was the
process that coordinates, and what it prints is replaced.
"""

import contextlib
import os
import re
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

HEARTBEAT_SECONDS = 60  # silence after which the runtime calls a process lost
SHUTDOWN_SECONDS = 120  # how long the others wait for the one that writes the report
LOST = (
    "error: another process of this run was lost, so this one stopped; start all of them again "
    "to go on from the last checkpoint"
)
# What an exception says, or the runtime's log, when the other side of a connection is gone.
_GONE = (
    r"Gloo|gloo|[Cc]onnection (closed|reset|refused)|coordination service|CoordinationService|"
    r"distributed service|heartbeat|DEADLINE_EXCEEDED|UNAVAILABLE"
)
# Copies standard input to standard error; from the runtime's last words on, one line of ours. It
# passes on the unfinished lines of a progress bar after a moment.
_FILTER = r"""
import os, re, select, signal, sys
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
lost, gone = (text.encode() for text in sys.argv[1:])
fatal = re.compile(rb"F\d{4} |\*\*\* (Check failure|SIG)|    @ +0x")
noise = re.compile(rb"[IWE]\d{4} .*(" + gone + rb")|Additional GRPC error|:\w+:Error received from")
rest, ended = b"", False
def show(text):
    global ended
    if ended or noise.match(text):
        return
    ended = bool(fatal.match(text)) or lost in text
    os.write(2, lost + b"\n" if ended else text)
while True:
    ready, _, _ = select.select([0], [], [], 0.2 if rest else None)
    data = os.read(0, 65536) if ready else b""
    if ready and not data:
        break
    *lines, rest = re.split(rb"(?<=[\n\r])", rest + data)
    for line in lines:
        show(line)
    if not ready and not re.match(rb"[IWEF]\d|\*| ", rest):
        show(rest)
        rest = b""
show(rest)
"""


def join() -> None:
    """Joins the other processes, if the environment names more than one.

    Slurm and GKE's TPU slices are recognised; with JAX_NUM_PROCESSES=auto JAX looks for more, such
    as a TPU pod; anything else sets JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.

    Raises:
        ValueError: a variable is missing or no number, or the others do not come.
    """
    env = os.environ
    asked = env.get("JAX_NUM_PROCESSES", "")
    by_hand = asked not in ("", "auto")
    counted = _number("JAX_NUM_PROCESSES" if by_hand else "SLURM_NTASKS") or 1
    if counted < 2 and asked != "auto" and "," not in env.get("TPU_WORKER_HOSTNAMES", ""):
        return
    own = _number("JAX_PROCESS_ID") if by_hand else None
    if by_hand and (own is None or own >= counted or not env.get("JAX_COORDINATOR_ADDRESS")):
        raise ValueError(
            f"JAX_NUM_PROCESSES={counted}: needs JAX_PROCESS_ID, counted from 0, and "
            "JAX_COORDINATOR_ADDRESS=HOST:PORT of process 0"
        )
    _filter_stderr()
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            num_processes=counted if by_hand else None,
            process_id=own,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"JAX_COORDINATOR_ADDRESS: the processes did not meet: {reason}") from None


@contextlib.contextmanager
def end_together() -> Iterator[None]:
    """Turns the loss of another process into one line and exit status 1."""
    try:
        yield
    except Exception as error:
        if jax.process_count() == 1 or not re.search(_GONE, str(error)):
            raise
        print(LOST, file=sys.stderr, flush=True)
        # An ordinary exit would wait for the lost one, and then be aborted by the runtime.
        os._exit(1)


@contextlib.contextmanager
def first_process_first(name: str) -> Iterator[None]:
    """Runs the body in process 0, then, seeing what it wrote, in the others."""
    if jax.process_count() == 1:
        yield
        return
    from jax.experimental import multihost_utils

    if jax.process_index() > 0:
        multihost_utils.sync_global_devices(name)
    yield
    if jax.process_index() == 0:
        multihost_utils.sync_global_devices(name)


def make_vote(mesh: Mesh, lag: int = 2) -> Callable[[bool], bool]:
    """Whether any process has said yes, the same answer on all of them, if all ask equally often.

    Args:
        lag: calls after which an answer is known. The devices are then not waited for.
    """
    if jax.process_count() == 1:
        return bool
    everybody = NamedSharding(mesh, P(mesh.axis_names))
    count = jax.jit(lambda votes: votes.sum(), out_shardings=NamedSharding(mesh, P()))
    pending: deque[jax.Array] = deque()

    def vote(yes: bool) -> bool:
        own = lambda index: np.full(1, yes, np.int32)
        pending.append(count(jax.make_array_from_callback((mesh.size,), everybody, own)))
        return len(pending) > lag and int(pending.popleft()) > 0

    return vote


def _number(name: str) -> int | None:
    text = os.environ.get(name)
    if not text:
        return None
    if not text.isdecimal():
        raise ValueError(f"{name}={text}: must be a whole number")
    return int(text)


def _filter_stderr() -> None:
    """Sends standard error, the runtime's own included, through a process that reads it first."""
    command = [sys.executable, "-S", "-E", "-c", _FILTER, LOST, _GONE]
    reader = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    assert reader.stdin is not None
    os.dup2(reader.stdin.fileno(), 2)
