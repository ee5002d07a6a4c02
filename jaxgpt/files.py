"""Files that are written whole or not at all."""

import os
import uuid
from pathlib import Path

PARTIAL = ".part"


def write(path: str | Path, content: str | bytes) -> Path:
    """Writes a file, or leaves what was there: also when the power fails or others write it too.

    Text is written as UTF-8.

    Raises:
        OSError: of `path`, such as a full disk; nothing half-written stays.
    """
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


def is_partial(path: Path) -> bool:
    """Whether `write` is at this file or was killed there; a user's x.part is not one."""
    return path.name.startswith(".") and path.suffix == PARTIAL
