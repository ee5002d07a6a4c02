"""One run, one writer: a lock in the run's directory, which says who writes there.

    lock.json   host, process, when it began; touched every BEAT seconds while the run goes on

The kernel holds the lock and drops it with the process, however that ends, so the same command
goes on at once after a kill. Of another host, with which a disk may be shared, only the touches are
seen: a file that is not touched for SILENCE seconds belongs to no one.
"""

import contextlib
import datetime
import fcntl
import json
import os
import platform
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

NAME = "lock.json"
BEAT = 5.0
SILENCE = 20.0


@contextlib.contextmanager
def hold(run: Path) -> Iterator[None]:
    """The lock of a run's directory, on a disk of this machine.

    Raises:
        ValueError: another process trains in it.
    """
    file = run / NAME
    with _locked(run, file) as stream:
        holder = _read(file)
        if holder and holder.get("host") != platform.node() and _beats(file):
            raise ValueError(_refusal(run, holder))
        own = {"host": platform.node(), "process": os.getpid(), "begun": _now().isoformat()}
        stream.truncate(0)
        stream.write(json.dumps(own))
        stream.flush()
        ended = threading.Event()
        thread = threading.Thread(target=_beat, args=(file, ended), daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            file.unlink(missing_ok=True)


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


def _beats(file: Path) -> bool:
    """Whether the file is touched by someone: watched for SILENCE seconds, by no clock but ours."""
    before = file.stat().st_mtime_ns
    for _ in range(round(SILENCE)):
        time.sleep(1.0)
        with contextlib.suppress(FileNotFoundError):
            if file.stat().st_mtime_ns != before:
                return True
    return False


def _beat(file: Path, ended: threading.Event) -> None:
    while not ended.wait(BEAT):
        with contextlib.suppress(OSError):
            os.utime(file)


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
