"""Files by their path: of this machine, or of an object store (s3://, gs://, az://, memory://).

`path` is the one way from a text to a file. On this machine a file is written whole or not at all;
what a store needs is in store.py.
"""

import contextlib
import glob
import hashlib
import importlib.util
import os
import re
import uuid
from collections.abc import Iterator
from pathlib import Path

PARTIAL = ".part"
# What opens a scheme beside universal_pathlib, and the extra of pyproject.toml that installs both.
PACKAGES = {
    "s3": ("s3fs", "s3"), "gs": ("gcsfs", "gcs"), "az": ("adlfs", "azure"),
    "memory": ("fsspec", "s3"),
}  # fmt: skip
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(/+)([^/]*)")


def path(text: str | Path) -> Path:
    """The file or folder of that name; file:///a/b is /a/b, and hf://… is what hub.py fetches.

    Of a store it is universal_pathlib's UPath, which has the methods of a Path and is no Path:
    `Path(text)` would make a folder named "s3:" of it, and refuses a UPath.

    Raises:
        ValueError: a scheme that nothing here opens.
    """
    if not isinstance(text, str):
        return Path(text) if isinstance(text, os.PathLike) else text
    found = _SCHEME.match(text)
    if found is None:
        return Path(text)
    if found[1] == "hf":
        from jaxgpt import hub

        return hub.path(text)
    if told := problem(text):
        raise ValueError(f"{text}: {told}")
    if found[1] == "file":
        return Path(text[len("file://") :])
    from jaxgpt import store

    return store.open_path(text)


def is_local(place: str | Path) -> bool:
    """Whether it is a file or folder of this machine."""
    if not isinstance(place, str):
        return isinstance(place, Path)
    found = _SCHEME.match(place)
    return found is None or found[1] == "file"


def problem(path: str | Path) -> str:
    """Why a path can be no file of this machine and of no store; or "".

    Without this, a mistyped scheme would quietly become a folder of that name.
    """
    found = _SCHEME.match(str(path))
    if not found:
        return ""
    scheme, slashes, place = found.groups()
    if scheme not in (*PACKAGES, "file"):
        hint = ", or owner/name of a Hub data set" if scheme == "hf" else ""
        known = "file:///…, " + ", ".join(f"{name}://…" for name in PACKAGES)
        return f"{scheme}:// is not supported; give a path on this machine{hint}, or {known}"
    if scheme == "file":
        return "" if slashes == "///" else "must be file:///… with three slashes"
    if slashes != "//" or not place:
        return f"must name a bucket, as in {scheme}://bucket/folder"
    package, extra = PACKAGES[scheme]
    for name, module in ((package, package), ("universal_pathlib", "upath")):
        if importlib.util.find_spec(module) is None:
            return f'{scheme}:// needs the package {name}: pip install "jaxgpt[{extra}]"'
    return ""


def model_problem(path: str | Path) -> str:
    """Why a path can be no model: as `problem`, but a model may be on the Hub."""
    return "" if str(path).startswith("hf://") else problem(path)


def absolute(path_: str | Path) -> str:
    """A path as it can be written down: from the root on, or hf://… as it is."""
    text = str(path_)
    return text if text.startswith("hf://") else str(path(path_).absolute())


def local_problem(path: str | Path) -> str:
    """Why a path cannot be one of this machine's own; or ""."""
    found = _SCHEME.match(str(path))
    return f"{found[1]}:// is not supported here; give a path on this machine" if found else ""


def require_local(setting: str, path: str | Path) -> None:
    """Raises ValueError, naming the setting, where a path has a scheme."""
    if found := local_problem(path):
        raise ValueError(f"{setting}={path}: {found}")


def write(file: str | Path, content: str | bytes) -> Path:
    """Writes a file, or leaves what was there: also when the power fails or others write it too.

    Text is written as UTF-8.

    Raises:
        OSError: of that file, such as a full disk; nothing half-written stays.
        ValueError: a scheme that nothing here opens.
    """
    target = path(file)
    content = content.encode() if isinstance(content, str) else content
    if not is_local(target):
        from jaxgpt import store

        return store.write(target, content)
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}{PARTIAL}")
    try:
        with partial.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        return partial.replace(target)
    except OSError as error:
        partial.unlink(missing_ok=True)  # on a full disk, give the room back
        raise OSError(error.errno, error.strerror, str(target)) from None


def make_folder(folder: Path) -> None:
    """Makes a folder and those above it, unless it is there; a store needs none."""
    if is_local(folder):
        folder.mkdir(parents=True, exist_ok=True)


def find(pattern: str) -> list[Path]:
    """The files and folders that a glob names, in no order."""
    if not is_local(pattern):
        from jaxgpt import store

        return store.find(pattern)
    return [Path(name) for name in glob.glob(pattern, recursive=True)]


def sha256(file: str | Path) -> str:
    """The hash of a file's bytes, in hexadecimal."""
    with path(file).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def is_partial(path: Path) -> bool:
    """Whether `write` is at this file or was killed there; a user's x.part is not one."""
    return path.name.startswith(".") and path.suffix == PARTIAL


@contextlib.contextmanager
def here(place: Path) -> Iterator[Path]:
    """A path of this machine, for what reads no store: itself, or a copy that goes again."""
    if is_local(place):
        yield place
        return
    from jaxgpt import store

    with store.copy(place) as copy:
        yield copy


@contextlib.contextmanager
def staged(place: Path, last: str = "", over: bool = False) -> Iterator[Path]:
    """A path of this machine to write to: itself, or one whose files go to the store at the end.

    Args:
        last: name of the file that makes the others complete, which is stored after them.
        over: whether it may take the place of what is there.

    Raises:
        ValueError: the store has something there already.
    """
    if is_local(place):
        yield place
        return
    from jaxgpt import store

    if not over and place.exists():
        raise ValueError(f"{place}: is there already; choose another, or delete it")
    with store.scratch() as folder:
        yield folder / place.name
        store.upload(folder / place.name, place, last)
