"""Checkpoints: Orbax arrays, hashed, visible only when complete, restored onto any mesh.

    checkpoints/<step>/arrays/        Orbax data of a flat dict {leaf name: array}
                       index.json     step, best_value, shape and dtype of every array
                       meta.json      what the caller wants to remember
                       manifest.json  size and SHA-256 of every other file

Orbax restores flipped bytes without a word, so nothing is read before its manifest agrees.

On this machine a checkpoint is written beside its place and renamed. A store renames nothing:
there it is written in a folder of this machine, whose files are put into the store, the manifest
last; what has no manifest is no checkpoint. It is read through a copy on this machine. Several
processes share no folder then, so each puts the files of its own shards.
"""

import functools
import hashlib
import json
import logging
import math
import os
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxgpt import files, tree
from jaxgpt.files import sha256

Accept = Callable[[int, dict[str, Any]], bool]

MANIFEST = "manifest.json"
_PART = "part-{}.json"  # in a store: what a process has put, until the manifest is there
_UNFINISHED = ".tmp"  # suffix of a step directory that is being written or deleted


class Checkpoints:
    """The checkpoints of one run: the last `keep` and the one with the lowest best_value.

    Args:
        pinned: a step whose checkpoint is kept as well.
    """

    def __init__(self, directory: str | Path, keep: int = 2, pinned: int | None = None) -> None:
        self.directory = files.path(directory).absolute()
        self.keep, self.pinned = keep, pinned
        self._writer: Any = None  # Orbax's checkpointer, made by the first save
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._verified: set[int] = set()
        self._in_store = not files.is_local(self.directory)

    def steps(self) -> list[int]:
        """Steps that have a complete directory, oldest first; their content is not verified."""
        if not self.directory.is_dir():
            return []
        found = (p for p in self.directory.iterdir() if p.name.isdecimal())
        return sorted(int(p.name) for p in found if not self._in_store or _is_complete(p))

    def save(
        self, step: int, state: Any, meta: dict[str, Any], best_value: float | None = None
    ) -> None:
        """Copies the arrays on the host, then writes in the background.

        The caller may donate or change the arrays as soon as this returns.

        Raises:
            OSError: this save cannot start, or the one before it failed.
        """
        self.wait()
        arrays = _to_host(tree.flatten(state))
        unfinished = self._staging / f"{step}{_UNFINISHED}"
        if jax.process_index() == 0 or self._in_store:
            self._staging.mkdir(parents=True, exist_ok=True)
            for leftover in self._staging.glob(f"*{_UNFINISHED}"):
                shutil.rmtree(leftover)
            unfinished.mkdir()
            _write_json(unfinished / "meta.json", meta)
            _write_json(unfinished / "index.json", _index(step, arrays, best_value))
        ocp = _orbax()
        if self._writer is None:
            self._writer = _writer(apart=self._in_store and jax.process_count() > 1)
        try:  # returns when Orbax has a copy of every array
            self._writer.save(unfinished / "arrays", args=ocp.args.PyTreeSave(arrays))
        except Exception as error:
            raise self._failure(step, error) from error
        barrier = ocp.multihost.get_barrier_sync_fn()
        self._thread = threading.Thread(target=self._finish, args=(step, barrier))
        self._thread.start()

    def wait(self) -> None:
        """Returns when the last save is on disk, or raises what stopped it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def latest_valid(self, accept: Accept = lambda step, meta: True) -> int | None:
        """The newest step whose files are intact; damaged ones are named on stderr and skipped.

        Args:
            accept: (step, meta) -> whether it may be taken.
        """
        self.wait()
        found = self._find_valid(accept)
        if found is not None:
            self._verified.add(found)
        return found

    def agreed_latest(self, accept: Accept = lambda step, meta: True) -> int | None:
        """`latest_valid` where all processes ask: the first one reads and hashes for all."""
        if jax.process_count() == 1:
            return self.latest_valid(accept)
        from jax.experimental import multihost_utils

        own = self.latest_valid(accept) if jax.process_index() == 0 else None
        found = int(multihost_utils.broadcast_one_to_all(np.int32(-1 if own is None else own)))
        if found < 0:
            return None
        self._verified.add(found)
        return found

    def best(self) -> int | None:
        """The step with the lowest best_value, None if no save had one."""
        return self._best_of(self.steps())

    def _best_of(self, steps: list[int]) -> int | None:
        values = {step: _read_index(self._path(step)).get("best_value") for step in steps}
        scored = {step: value for step, value in values.items() if value is not None}
        return min(scored, key=lambda step: scored[step]) if scored else None

    def meta(self, step: int) -> dict[str, Any]:
        """What was passed to `save` beside the arrays."""
        self._verify(step)
        return _read_json(self._path(step) / "meta.json")

    def restore(self, step: int, like: Any) -> Any:
        """The saved tree, shaped as `like`, on whatever mesh the shardings of `like` name.

        Args:
            like: arrays or ShapeDtypeStructs; a leaf without a sharding comes back as NumPy.

        Raises:
            ValueError: damaged files, or a parameter that is missing, left over or of another
                shape or dtype.
        """
        self.wait()
        self._verify(step)
        wanted = tree.flatten(like)
        _check_arrays(self._path(step), _read_index(self._path(step))["arrays"], wanted)
        return tree.unflatten(like, _read(self._path(step), wanted))

    @functools.cached_property
    def _staging(self) -> Path:
        """Where a checkpoint is written before it appears in its place."""
        if not self._in_store:
            return self.directory
        from jaxgpt import store

        return store.new_folder()

    def _path(self, step: int) -> Path:
        return self.directory / str(step)

    def _find_valid(self, accept: Accept) -> int | None:
        for step in reversed(self.steps()):
            try:
                verify(self._path(step))
            except ValueError as error:
                print(f"warning: skipping a checkpoint: {error}", file=sys.stderr)
            else:
                if accept(step, _read_json(self._path(step) / "meta.json")):
                    return step
        return None

    def _verify(self, step: int) -> None:
        if step not in self._verified:
            verify(self._path(step))
            self._verified.add(step)

    def _finish(self, step: int, barrier: Any) -> None:
        """The background part of a save, on every process. What comes next begins when all have
        done, or failed in, what is before it."""
        parts = (self._clear, self._put, self._complete) if self._in_store else (self._commit,)
        for number, part in enumerate(parts):
            try:
                if number == 0:
                    self._writer.wait_until_finished()  # all processes have written their shards
                if self._error is None:
                    part(step)
            except Exception as error:
                self._error = self._failure(step, error)
            barrier(key=f"checkpoint_{self.directory}_{step}_{number}", timeout_ms=600_000)
        if self._in_store or (self._error and jax.process_index() == 0):
            shutil.rmtree(self._staging / f"{step}{_UNFINISHED}", ignore_errors=True)
        if self._in_store and self._error is None and not _is_complete(self._path(step)):
            self._error = self._failure(step, OSError("another process could not put its part"))

    def _commit(self, step: int) -> None:
        """Lets a checkpoint of this machine appear in its place."""
        if jax.process_index() > 0:
            return
        unfinished, final = self._staging / f"{step}{_UNFINISHED}", self._path(step)
        _write_json(unfinished / MANIFEST, {"files": _digests(unfinished)})
        if final.exists():
            _discard(final)
        unfinished.rename(final)
        self._retain(step)

    def _clear(self, step: int) -> None:
        """Deletes what a store has in the checkpoint's place, and what kills left half there."""
        if jax.process_index() > 0 or not self.directory.is_dir():
            return
        for folder in self.directory.iterdir():
            if folder.name == str(step) or (folder.name.isdecimal() and not _is_complete(folder)):
                _discard(folder)

    def _put(self, step: int) -> None:
        """Puts this process's files into the store, and a list of them with their checksums."""
        from jaxgpt import store

        unfinished, final = self._staging / f"{step}{_UNFINISHED}", self._path(step)
        if jax.process_index() > 0:  # what every process writes is put by the first
            for file in (unfinished / "arrays").glob("*"):
                if file.name.startswith("_") or file.name == "commit_success.txt":
                    file.unlink()
        entries = _digests(unfinished)
        store.upload(unfinished, final)
        store.note_checksums(final, entries)
        files.write(final / _PART.format(jax.process_index()), json.dumps(entries))

    def _complete(self, step: int) -> None:
        """Writes the manifest in the store, from the lists of all processes."""
        if jax.process_index() > 0:
            return
        parts = [self._path(step) / _PART.format(n) for n in range(jax.process_count())]
        if missing := [n for n, part in enumerate(parts) if not part.is_file()]:
            raise OSError(f"process {missing[0]} could not put its part")
        entries = {name: entry for part in parts for name, entry in _read_json(part).items()}
        files.write(self._path(step) / MANIFEST, json.dumps({"files": entries}, indent=1))
        for part in parts:
            part.unlink()
        self._retain(step)

    def _retain(self, step: int) -> None:
        """Deletes what need not be kept now that `step` is written."""
        self._verified.discard(step)
        # A later step is damaged, or of a run that ended there before it was given more steps:
        # this run was resumed in front of it.
        past = [s for s in self.steps() if s <= step]
        kept = {*past[-self.keep :], self._best_of(past), self.pinned}
        for stale in set(self.steps()) - kept:
            _discard(self._path(stale))

    def _failure(self, step: int, error: Exception) -> OSError:
        """One line for Orbax's page, with what is still there."""
        lines = [line for line in str(error).splitlines() if line.strip()]
        full = "No space left on device"
        reason = full if full in str(error) else (lines or [type(error).__name__])[0]
        left = "no earlier checkpoint exists"
        try:
            if intact := [s for s in self.steps() if s != step]:
                left = f"checkpoint {intact[-1]} is intact"
        except Exception:  # the store that did not take it does not answer either
            left = "the earlier ones cannot be listed"
        return OSError(f"cannot write checkpoint {self._path(step)}: {reason}; {left}")


def verify(path: str | Path) -> None:
    """Raises ValueError unless every file of the checkpoint is what its manifest says."""
    path = files.path(path)
    try:
        found = json.loads((path / MANIFEST).read_text())["files"]
        expected = {name: (int(entry["bytes"]), entry["sha256"]) for name, entry in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        silent = isinstance(error, OSError) and not isinstance(error, FileNotFoundError)
        if silent and not files.is_local(path):
            raise  # a store that does not answer says nothing about its files
        raise ValueError(f"{path} has no readable manifest.json") from None
    if not files.is_local(path):
        from jaxgpt import store

        if not store.is_as_noted(path, found):
            with store.copy(path) as copy:
                _verify_copy(copy, path)
        return
    for name, (size, digest) in expected.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != size or sha256(file) != digest:
            raise ValueError(f"{path} is damaged: {name} differs from its manifest")


def read_arrays(path: str | Path, prefix: str = "") -> dict[str, np.ndarray]:
    """The verified arrays of one checkpoint whose names start with `prefix`, as NumPy.

    Args:
        path: a step directory, such as `runs/demo/checkpoints/500`.
    """
    path = files.path(path).absolute()
    verify(path)
    index = _read_index(path)["arrays"]
    names = [name for name in index if name.startswith(prefix)]
    if not names:
        groups = sorted({name.rsplit("/", 1)[0] for name in index})
        raise ValueError(f"{path} has no array named {prefix}…; it has {', '.join(groups[:8])}")
    return _read(path, dict.fromkeys(names))


def content(path: str | Path) -> str:
    """sha256 of the weights in a step directory, whatever files Orbax put them into.

    Empty where no hash is known: arrays over several processes, or checkpoints of old versions.
    """
    known = _read_index(files.path(path)).get("arrays", {})
    weights = {name: entry for name, entry in known.items() if "sha256" in entry}
    lines = [f"{name} {weights[name]['sha256']}\n" for name in sorted(weights)]
    return hashlib.sha256("".join(lines).encode()).hexdigest() if lines else ""


@functools.cache
def _orbax() -> Any:
    """Orbax, imported on first use (0.5 s) and kept from writing to the terminal."""
    import orbax.checkpoint as ocp

    logging.getLogger("absl").addFilter(_not_from_orbax)
    # When a disk is full, every write under way ends in one of these after the first was raised.
    uncaught, unraisable = sys.excepthook, sys.unraisablehook

    def report(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        if not _of_closed_loop(error):
            uncaught(kind, error, trace)

    def report_unraisable(found: Any) -> None:
        if not _of_closed_loop(found.exc_value):
            unraisable(found)

    sys.excepthook, sys.unraisablehook = report, report_unraisable
    return ocp


def _writer(apart: bool) -> Any:
    """Orbax's checkpointer.

    Args:
        apart: processes share no folder: each then writes the chunks of its own shards, as plain
            files, so that those of all together are the arrays.
    """
    ocp = _orbax()
    options = ocp.options.MultiprocessingOptions(primary_host=None if apart else 0)
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=not apart, multiprocessing_options=options)
    return ocp.AsyncCheckpointer(handler, multiprocessing_options=options)


def _of_closed_loop(error: BaseException | None) -> bool:
    return isinstance(error, RuntimeError) and str(error) == "Event loop is closed"


def _not_from_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname


def _to_host(arrays: dict[str, Any]) -> dict[str, Any]:
    """NumPy where this process has all of an array, which Orbax writes faster than shards."""
    local = {
        name: leaf
        for name, leaf in arrays.items()
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable
    }
    for leaf in local.values():
        if isinstance(leaf, jax.Array):
            leaf.copy_to_host_async()
    return arrays | {name: np.asarray(leaf) for name, leaf in local.items()}


def _index(step: int, arrays: dict[str, Any], best_value: float | None) -> dict[str, Any]:
    scored = best_value is not None and math.isfinite(best_value)
    known = {n: {"shape": list(a.shape), "dtype": str(a.dtype)} for n, a in arrays.items()}
    for name, array in arrays.items():
        # Orbax's files differ from save to save; what they hold does not. Moments are no weights.
        if isinstance(array, np.ndarray) and name.startswith(("params/", "ema/")):
            known[name]["sha256"] = _content_hash(array)
    return {"step": step, "best_value": best_value if scored else None, "arrays": known}


def _content_hash(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).view(np.uint8).data).hexdigest()


def _read_json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text())


def _read_index(path: Path) -> dict[str, Any]:
    """Empty if there is none, so that retention survives a damaged neighbour."""
    try:
        return _read_json(path / "index.json")
    except (OSError, ValueError):
        return {}


def _check_arrays(path: Path, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name, leaf in wanted.items():
        if name not in saved:
            raise ValueError(f"{path} has no {name}, which this config needs")
        there = tuple(saved[name]["shape"]), saved[name]["dtype"]
        here = tuple(leaf.shape), str(np.dtype(leaf.dtype))
        if there != here:
            (shape, dtype), (new_shape, new_dtype) = there, here
            raise ValueError(
                f"{path}: {name} is {dtype}{list(shape)} there, but this config makes it "
                f"{new_dtype}{list(new_shape)}"
            )
    extra = sorted(set(saved) - set(wanted))
    if extra:
        raise ValueError(f"{path} holds {extra[0]}, which this config has no place for")


def _read(path: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """Named arrays, each placed as its value's sharding says (NumPy where it has none)."""
    ocp = _orbax()
    how = {
        name: ocp.RestoreArgs(restore_type=np.ndarray)
        if getattr(leaf, "sharding", None) is None
        else ocp.ArrayRestoreArgs(restore_type=jax.Array, sharding=leaf.sharding)
        for name, leaf in wanted.items()
    }
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=True)
    args = ocp.args.PyTreeRestore(item=how, restore_args=how, partial_restore=True)
    try:
        with files.here(path) as copy, ocp.Checkpointer(handler) as reader:
            if copy != path:
                _verify_copy(copy, path)
            return reader.restore(copy / "arrays", args=args)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} cannot be read: {reason}") from error


def _digests(directory: Path) -> dict[str, dict[str, Any]]:
    """Size and hash of every file, which is forced to disk: an older checkpoint goes next."""
    entries = {}
    for file in sorted(p for p in directory.rglob("*") if p.is_file()):
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
        name = file.relative_to(directory).as_posix()
        entries[name] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
    return entries


def _is_complete(path: Path) -> bool:
    return (path / MANIFEST).is_file()


def _verify_copy(copy: Path, path: Path) -> None:
    try:
        verify(copy)
    except ValueError as error:
        raise ValueError(str(error).replace(str(copy), str(path))) from None


def _discard(path: Path) -> None:
    """Deletes a step directory such that a kill halfway leaves nothing that looks like one."""
    if not files.is_local(path):
        from jaxgpt import store

        store.remove(path, first=MANIFEST)
        return
    doomed = path.with_name(f"{path.name}.old{_UNFINISHED}")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed)


def _write_json(file: Path, content: dict[str, Any]) -> None:
    with file.open("w") as stream:
        json.dump(content, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
