"""Files of this machine, written whole or not at all."""

import hashlib
import os
import re
import uuid
from pathlib import Path

PARTIAL = ".part"


def problem(path: str | Path) -> str:
    """Why a path cannot be one of this machine's files: it names a bucket or a protocol; or "".

    Without this, s3://bucket/run would quietly become a folder named "s3:".
    """
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/", str(path))  # Path makes :// a single slash
    if not found:
        return ""
    hint = ", or owner/name of a Hub data set" if found[1] == "hf" else ""
    return f"{found[1]}:// is not supported; give a path on this machine{hint}"


def require_local(setting: str, path: str | Path) -> None:
    """Raises ValueError, naming the setting, where a path has a scheme."""
    if found := problem(path):
        raise ValueError(f"{setting}={path}: {found}")


def write(path: str | Path, content: str | bytes) -> Path:
    """Writes a file, or leaves what was there: also when the power fails or others write it too.

    Text is written as UTF-8.

    Raises:
        OSError: of `path`, such as a full disk; nothing half-written stays.
        ValueError: the path names a bucket.
    """
    require_local("file", path)
    path = Path(path)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{PARTIAL}")
    try:
        with partial.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        return partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)  # on a full disk, give the room back
        raise OSError(error.errno, error.strerror, str(path)) from None


def sha256(path: str | Path) -> str:
    """The hash of a file's bytes, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_partial(path: Path) -> bool:
    """Whether `write` is at this file or was killed there; a user's x.part is not one."""
    return path.name.startswith(".") and path.suffix == PARTIAL
