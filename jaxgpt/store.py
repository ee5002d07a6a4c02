"""Object stores: what files.py needs where a path is no file of this machine.

A store renames nothing and appends nothing. A file there is put whole, in one request or in parts
that appear together, so nobody sees half of it; a folder is complete once the file in it that is
written last is there. Requests that fail for a while (503, a lost connection) are made again by
the libraries, for about a minute. Credentials are the cloud's own defaults.
"""

import atexit
import contextlib
import errno
import fcntl
import functools
import logging
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

B = TypeVar("B")

AT_ONCE = 32  # requests
PART = 16_000_000  # bytes that one request asks for
# Listings are never kept: other processes write too. boto's 12 tries take about a minute.
_OPTIONS: dict[str, dict[str, Any]] = {
    "s3": {"config_kwargs": {"retries": {"max_attempts": 12, "mode": "standard"}}},
}
_CHECKSUMS = ("ETag", "crc32c", "etag")  # as s3fs, gcsfs and adlfs call what their store computes
# Packages whose errors are no OSErrors: no credentials, no such bucket, no network.
_CLOUDS = {"aiobotocore", "aiohttp", "azure", "botocore", "gcsfs", "google"}


def is_cloud_error(error: BaseException) -> bool:
    """Whether a cloud's library says that something is missing, forbidden or out of reach."""
    return type(error).__module__.partition(".")[0] in _CLOUDS


def open_path(text: str) -> Any:
    """A universal_pathlib path."""
    from upath import UPath

    scheme = text.partition(":")[0]
    if scheme == "gs":
        # Else every call asks, by another service, for the kind of bucket, and says so if refused.
        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs what it raises
    options = _OPTIONS.get(scheme, {})
    if scheme != "memory":
        options = {"use_listings_cache": False, **options}
    return UPath(text.rstrip("/"), **options)


def write(path: Any, content: bytes) -> Any:
    """Puts a whole file.

    Raises:
        OSError: naming `path`.
    """
    with _named(path):
        path.fs.pipe_file(path.path, content)
    return path


def create(path: Any, content: bytes) -> bool:
    """Puts a file unless one of that name is there; of several processes one succeeds."""
    with _named(path):
        try:
            path.fs.pipe_file(path.path, content, mode="create")
        except FileExistsError:
            return False
    return True


def delete(path: Any) -> None:
    """Deletes a file, if it is there."""
    with _named(path):
        path.unlink(missing_ok=True)


def find(pattern: str) -> list[Any]:
    """The paths that a glob names."""
    scheme, _, rest = pattern.partition("://")
    bucket, _, inside = rest.partition("/")
    return list(open_path(f"{scheme}://{bucket}").glob(inside))


def listing(path: Any) -> dict[str, dict[str, Any]]:
    """What the store tells of every file in a folder, by the file's name from there on; of a file
    its own, under the name "".
    """
    root = path.path.rstrip("/")
    found = path.fs.find(root, detail=True)
    return {
        name.removeprefix(root).lstrip("/"): info
        for name, info in sorted(found.items())
        if info.get("type") == "file" and not name.endswith("/")
    }


def note_checksums(path: Any, entries: dict[str, dict[str, Any]]) -> None:
    """Adds the store's own checksum of every file to its entry, where the store has some."""
    there = listing(path)
    for name, entry in entries.items():
        entry["stored"] = _checksum(there[name])


def is_as_noted(path: Any, entries: dict[str, dict[str, Any]]) -> bool:
    """Whether one listing shows every file with its size and its checksum; nothing is read.

    False as well where the store has no checksums, or others, such as those of a copy.
    """
    there = listing(path)
    return all(
        name in there
        and there[name]["size"] == entry["bytes"]
        and entry.get("stored", "") == _checksum(there[name]) != ""
        for name, entry in entries.items()
    )


def new_folder() -> Path:
    """An empty folder of this machine, which goes when this process ends."""
    return Path(tempfile.mkdtemp(dir=_scratch()))


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A folder of this machine that is gone afterwards."""
    folder = new_folder()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def copy(path: Any) -> Iterator[Path]:
    """A copy of a file or a folder, with its name, that is gone afterwards."""
    with scratch() as folder:
        fetch(path, folder / path.name)
        yield folder / path.name


def fetch(path: Any, target: Path) -> None:
    """Copies a file or a folder to this machine.

    Raises:
        OSError: naming `path`.
    """
    with _named(path):
        root = path.path.rstrip("/")
        names = list(listing(path))
        if not names:
            raise FileNotFoundError(2, "is not there", str(path))
        for name in names:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
        theirs = [f"{root}/{name}".rstrip("/") for name in names]
        together(path.fs.get_file, theirs, [str(target / name) for name in names])


def read_range(path: Any, first: int, end: int) -> bytes:
    """A file's bytes from `first` to before `end`, asked for in parts at the same time.

    Raises:
        OSError: naming `path`.
    """
    starts = range(first, end, PART)
    get = lambda start: path.fs.cat_file(path.path, start=start, end=min(start + PART, end))
    with _named(path):
        return b"".join(together(get, starts))


def upload(source: Path, path: Any, last: str = "") -> None:
    """Copies a file or a folder to the store.

    Args:
        last: name of the file that is put when all others are there.

    Raises:
        OSError: naming `path`.
    """
    with _named(path):
        found = sorted(f for f in source.rglob("*") if f.is_file()) if source.is_dir() else [source]
        for part in (
            [f for f in found if f.name != last], [f for f in found if f.name == last]
        ):  # fmt: skip
            theirs = [
                f"{path.path}/{file.relative_to(source).as_posix()}".removesuffix("/.")
                for file in part
            ]
            together(path.fs.put_file, list(map(str, part)), theirs)


def remove(path: Any, first: str = "") -> None:
    """Deletes a folder, if it is there.

    Args:
        first: name of the file without which the others count for nothing; it goes first.
    """
    with _named(path):
        if first and (path / first).exists():
            (path / first).unlink()
        if found := [f"{path.path}/{name}" for name in listing(path)]:
            path.fs.rm(found)


def together(call: Callable[..., B], *arguments: Sequence[Any]) -> list[B]:
    """call(a, …) of every tuple of arguments, many at a time; the answers are in their order."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(call, *arguments))


class Shard:
    """A file of tokens, sliced as an array is: by requests of ranges until it is here as well."""

    def __init__(self, path: Any, dtype: str, count: int, offset: int = 0) -> None:
        self._path, self._dtype, self._offset = path, np.dtype(dtype), offset
        self.size = count
        self.nbytes = offset + count * self._dtype.itemsize
        self._here: np.ndarray | None = None

    def __getitem__(self, cut: slice) -> np.ndarray:
        if self._here is not None:
            return self._here[cut]
        start, stop, _ = cut.indices(self.size)
        if stop <= start:
            return np.zeros(0, self._dtype)
        first, end = (self._offset + n * self._dtype.itemsize for n in (start, stop))
        with _named(self._path):
            content = self._path.fs.cat_file(self._path.path, start=first, end=end)
        return np.frombuffer(content, self._dtype)

    def keep(self) -> None:
        """Copies the file to this machine, where it is read from now on."""
        target = new_folder() / self._path.name
        fetch(self._path, target)
        offset, shape = self._offset, (self.size,)
        self._here = np.asarray(np.memmap(target, self._dtype, "r", offset=offset, shape=shape))


def keep_near(shards: Iterable[Shard], most: float) -> None:
    """Copies shards to this machine in the background, as long as they are `most` bytes or less.

    What is read does not change, only from where.
    """

    def copy_all(chosen: list[Shard]) -> None:
        try:
            for shard in chosen:
                shard.keep()
        except OSError as error:  # a full disk, such as a small /tmp
            print(f"warning: data.cache: {error}; reading on from the store", file=sys.stderr)

    chosen, left = [], most
    for shard in shards:
        if shard.size and shard.nbytes <= left:
            chosen.append(shard)
            left -= shard.nbytes
    if chosen:
        threading.Thread(target=copy_all, args=(chosen,), daemon=True).start()


@functools.cache
def _scratch() -> Path:
    """This process's folder for copies; it goes when the process ends, or with the next one.

    A process holds a lock on its folder, which the system lets go of even if it is killed.
    """
    for left in Path(tempfile.gettempdir()).glob("jaxgpt-*/lock"):
        with contextlib.suppress(OSError), left.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left.parent, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix="jaxgpt-"))
    lock = (folder / "lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)

    def end() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        lock.close()

    atexit.register(end)
    return folder


def _checksum(info: dict[str, Any]) -> str:
    return next((str(info[name]) for name in _CHECKSUMS if info.get(name)), "")


@contextlib.contextmanager
def _named(path: Any) -> Iterator[None]:
    """Turns what a cloud's library raises into an OSError that names the path."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError) and not is_cloud_error(error):
            raise
        reason = getattr(error, "strerror", "") or str(error) or type(error).__name__
        raise OSError(getattr(error, "errno", 0) or errno.EIO, reason, str(path)) from error
