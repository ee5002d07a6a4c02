"""Several processes as one run: joining, deciding together, and ending together.

Where one fails, it tells the others why, and all end. A process that loses another one ends with
one line. Where a collective notices (on CPUs, at once)
that is an exception; else the runtime aborts after HEARTBEAT_SECONDS, or at once if it was the
process that coordinates, and what it prints is replaced.
"""

import contextlib
import functools
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import traceback
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxgpt import files
from jaxgpt.config.command_line import said

HEARTBEAT_SECONDS = 40  # silence after which the runtime calls a process lost
SHUTDOWN_SECONDS = 120  # how long the others wait for the one that writes the report
ANSWER_SECONDS = 300  # how long one waits for another to begin
_SETTINGS, _FAILED = "jaxgpt/settings/{}", "jaxgpt/failed"
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
    _met().set()


@contextlib.contextmanager
def end_together() -> Iterator[None]:
    """One fails, all end: with its reason in one line on every host, and a status that is not 0.

    The reason goes by the service by which the processes met, since those that wait for a
    collective compute nothing more. A process that is lost tells no reason.
    """
    ended = threading.Event()
    threading.Thread(target=_end_with_others, args=(ended,), daemon=True).start()
    try:
        yield
    except Exception as error:
        if jax.process_count() == 1:
            raise
        ended.set()
        lost = re.search(_GONE, str(error)) and not isinstance(error, OSError)
        if lost:  # most likely because another one failed, which may tell its reason by now
            found = None
            with contextlib.suppress(RuntimeError):  # process 0 is the one that is lost
                found = _failure_of_another(seconds=5)
            line, status = found or (LOST, 1)
        else:
            line, status = f"error: {' '.join(said(error).split())}", _status(error)
            _tell(line.removeprefix("error: "), status)
            if not isinstance(error, ValueError | OSError | FloatingPointError):
                traceback.print_exception(error)
        _leave(line, status)
    finally:
        ended.set()


def agree(settings: Mapping[str, Any], seconds: float = ANSWER_SECONDS) -> None:
    """Returns when all processes have come here with the same settings.

    Raises:
        ValueError: on every process, naming what differs; or nobody answered for `seconds`.
    """
    if jax.process_count() == 1:
        return
    client, own = _service(), {name: str(value) for name, value in settings.items()}
    wait = lambda key, times: client.blocking_key_value_get(key, int(times * seconds * 1000))
    try:
        client.key_value_set(_SETTINGS.format(jax.process_index()), json.dumps(own))
        if jax.process_index() == 0:
            others = range(1, jax.process_count())
            told = [_difference(own, json.loads(wait(_SETTINGS.format(n), 1)), n) for n in others]
            client.key_value_set(_SETTINGS.format("all"), next(filter(None, told), ""))
        problem = wait(_SETTINGS.format("all"), 2)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"the processes did not all begin within {seconds:.0f} s: {reason}"
        ) from None
    if problem:
        raise ValueError(problem)


def require_shared(folder: Path, setting: str, seconds: float = 30.0) -> None:
    """Raises ValueError unless every process sees what process 0 writes into `folder`.

    Else each would make a folder of its own, and wait for the others' part of a checkpoint.
    """
    if jax.process_count() == 1:
        return
    client = _service()
    if jax.process_index() == 0:
        mark = files.write(folder / f".seen-{uuid.uuid4().hex}{files.PARTIAL}", "")
        client.key_value_set("jaxgpt/mark", mark.name)
        for number in range(1, jax.process_count()):
            client.blocking_key_value_get(f"jaxgpt/sees/{number}", int(2000 * seconds))
        mark.unlink()
        return
    mark = folder / client.blocking_key_value_get("jaxgpt/mark", int(2000 * seconds))
    end = time.monotonic() + seconds  # network disks show a new file late
    while not mark.exists():
        if time.monotonic() > end:
            raise ValueError(
                f"{setting}={folder}: is not the folder of process 0; give all processes one on a "
                "shared disk, or a bucket"
            )
        time.sleep(0.2)
    client.key_value_set(f"jaxgpt/sees/{jax.process_index()}", "")


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


@functools.cache
def _met() -> threading.Event:
    """Set when this process has joined others."""
    return threading.Event()


def _service() -> Any:
    """What the processes met at: it keeps short texts by name, which all can read."""
    from jax._src import distributed

    return distributed.global_state.client


def _difference(own: Mapping[str, str], other: Mapping[str, str], number: int) -> str:
    """What differs between process 0 and another, in one line; or ""."""
    names = [name for name in {**own, **other} if own.get(name) != other.get(name)]
    told = [f"{n}={own.get(n)} in process 0, {other.get(n)} in process {number}" for n in names]
    return f"{'; '.join(told[:5])}: give all processes the same" if told else ""


def _tell(reason: str, status: int) -> None:
    """Lets the others know why this process ends; the first to do so is heard."""
    told = {"process": jax.process_index(), "host": socket.gethostname(), "reason": reason,
            "status": status}  # fmt: skip
    with contextlib.suppress(RuntimeError):  # another one has told before, or is lost
        _service().key_value_set(_FAILED, json.dumps(told))


def _failure_of_another(seconds: float = 0.0) -> tuple[str, int] | None:
    """(line, status) of the process that failed first; None if no other has told within `seconds`.

    Raises:
        RuntimeError: process 0 is lost.
    """
    end = time.monotonic() + seconds
    while True:
        try:
            told = json.loads(_service().key_value_try_get(_FAILED))
        except RuntimeError as error:
            if time.monotonic() >= end:
                if "NOT_FOUND" in str(error):
                    return None
                raise
            time.sleep(0.2)
            continue
        if told["process"] == jax.process_index():
            return None
        who = f"process {told['process']} on {told['host']}"
        return f"error: {who} ended this run: {told['reason']}", told["status"]


def _end_with_others(ended: threading.Event) -> None:
    """Ends this process when another one has failed, whatever it waits for."""
    while not ended.wait(1.0):
        if not _met().is_set():  # the service aborts a process that asks too early
            continue
        try:
            found = _failure_of_another()
        except RuntimeError:  # the runtime ends what has lost process 0
            return
        if found and not ended.is_set():
            _leave(*found)


def _leave(line: str, status: int) -> None:
    """Prints the line and ends at once: an ordinary exit waits for the others, and is aborted.

    Process 0, by which the others learn, goes last.
    """
    print(line, file=sys.stderr, flush=True)
    client, count = _service(), jax.process_count()
    with contextlib.suppress(RuntimeError):
        client.key_value_set(f"jaxgpt/left/{jax.process_index()}", "")
        for number in range(1, count) if jax.process_index() == 0 else ():
            client.blocking_key_value_get(f"jaxgpt/left/{number}", 10_000)
    os._exit(status)


def _status(error: Exception) -> int:
    return 2 if isinstance(error, ValueError | OSError) else 1


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
