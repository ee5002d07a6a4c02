"""One run, one writer: a lock in the run's directory, which says who writes there.

    lock.json   host, process, when it began; touched every BEAT seconds while the run goes on

The kernel holds the lock and drops it with the process, however that ends, so the same command
goes on at once after a kill. Of another host, with which a disk may be shared, only the touches are
seen: a file that is not touched for SILENCE seconds belongs to no one.

A store has no such locks, but a file there can be created by one process only. Its holder puts it
anew every BEAT seconds; one that stays the same for three times SILENCE belongs to no one, nor does
that of a process of this host which is gone.
"""

import contextlib
import datetime
import fcntl
import itertools
import json
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from jaxgpt import files, store

NAME = "lock.json"
BEAT = 5.0
SILENCE = 20.0


@contextlib.contextmanager
def hold(run: Path) -> Iterator[None]:
    """The lock of a run's directory.

    Raises:
        ValueError: another process trains in it.
    """
    with _on_disk(run) if files.is_local(run) else _in_store(run):
        yield


@contextlib.contextmanager
def _on_disk(run: Path) -> Iterator[None]:
    file = run / NAME
    with _locked(run, file) as stream:
        holder = _read(file)
        elsewhere = holder and holder.get("host") != platform.node()
        if elsewhere and _beats(file, lambda: file.stat().st_mtime_ns, SILENCE):
            raise ValueError(_refusal(run, holder))
        stream.truncate(0)
        stream.write(json.dumps(_own()))
        stream.flush()
        try:
            with _beating(lambda: os.utime(file)):
                yield
        finally:
            file.unlink(missing_ok=True)


@contextlib.contextmanager
def _in_store(run: Path) -> Iterator[None]:
    file, own = run / NAME, _own()
    while not store.create(file, json.dumps(own).encode()):
        holder = _read(file)
        gone = holder.get("host") == platform.node() and not _runs(holder["process"])
        if not gone and _beats(file, lambda: _read(file), 3 * SILENCE):  # requests may be retried
            raise ValueError(_refusal(run, holder))
        if _read(file) == holder:  # else another process has taken it over meanwhile
            store.delete(file)
    beat = itertools.count(1)
    try:
        with _beating(lambda: store.write(file, json.dumps(own | {"beat": next(beat)}).encode())):
            yield
    finally:
        with contextlib.suppress(OSError):  # the run is saved all the same
            store.delete(file)


def _own() -> dict[str, Any]:
    return {"host": platform.node(), "process": os.getpid(), "begun": _now().isoformat()}


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True


def _locked(run: Path, file: Path) -> TextIO:
    """The file, locked, which is still the one of that name."""
    while True:
        stream = file.open("a")
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.close()
            raise ValueError(_refusal(run, _read(file))) from None
        except OSError:  # a disk without such locks, as of some networks: the touches remain
            return stream
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(file.stat(), os.fstat(stream.fileno())):
                return stream
        stream.close()  # the one before us has just deleted it


def _read(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):  # empty: its writer has only just begun
        return {}


def _beats(file: Path, sign: Callable[[], Any], seconds: float) -> bool:
    """Whether someone keeps the file fresh: watched for some seconds, by no clock but ours.

    Args:
        sign: what changes with every beat.
    """
    before = sign()
    for _ in range(round(seconds)):
        if not file.exists():
            return False
        time.sleep(1.0)
        with contextlib.suppress(FileNotFoundError):
            if sign() != before:
                return True
    return False


@contextlib.contextmanager
def _beating(beat: Callable[[], Any]) -> Iterator[None]:
    """Calls `beat` every BEAT seconds from a thread; one that fails is made up for by the next."""
    ended = threading.Event()

    def work() -> None:
        while not ended.wait(BEAT):
            with contextlib.suppress(OSError):
                beat()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _refusal(run: Path, holder: dict[str, Any]) -> str:
    if not holder:
        return f"run={run}: another process trains here; wait for it, or choose another --run"
    began = datetime.datetime.fromisoformat(holder["begun"])
    minutes = max((_now() - began).total_seconds(), 0) / 60
    return (
        f"run={run}: process {holder['process']} on {holder['host']} trains here, since "
        f"{minutes:.0f} minutes; stop it, or choose another --run"
    )


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
