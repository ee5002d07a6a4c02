"""What a repetition of a run needs to be the same: versions, processor, commit, command."""

import hashlib
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def command() -> str:
    """What was typed to start this process: `python scripts/sft.py …`, or `jaxgpt sft …`."""
    program, rest = sys.argv[0], shlex.join(sys.argv[1:])
    said = program if program.startswith("jaxgpt ") else f"python {shlex.quote(program)}"
    return f"{said} {rest}".strip()


def versions_used() -> dict[str, Any]:
    """The versions of what computes."""
    packages = ("jaxgpt", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    return {"python": platform.python_version()} | {name: _version(name) for name in packages}


def environment() -> dict[str, Any]:
    """What a bit-identical repetition of the run needs, and the command."""
    import jax

    device = jax.devices()[0]
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return {
        **versions_used(),
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "device": device.device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "visible_cores": len(affinity(0)) if affinity else os.cpu_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "git_commit": _git_commit(),
        "command": command(),
    }


def environment_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """`jax: 0.10.2 -> 0.11.0` for all that may change the numbers of a resumed run."""
    names = [name for name in {**old, **new} if name != "command"]
    return [f"{n}: {old.get(n)} -> {new.get(n)}" for n in names if old.get(n) != new.get(n)]


def uncommitted() -> str | None:
    """sha256 of what differs from the commit that jaxgpt runs from; empty: nothing does."""
    if not (_git_commit() or "").endswith("+"):
        return "" if _git_commit() else None
    git = ["git", "-C", str(Path(__file__).parent)]
    changes = subprocess.run([*git, "diff", "HEAD", "--binary"], capture_output=True).stdout
    return hashlib.sha256(changes).hexdigest()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    """The CPU's model: XLA compiles for its instruction set."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor()


def _git_commit() -> str | None:
    """The commit that jaxgpt runs from, with + if files differ from it; None if installed."""
    source = Path(__file__)
    tracked = ["ls-files", "--error-unmatch", source.name]  # else the commit of somebody else
    describe = ["describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
    for command in (tracked, describe):
        try:
            done = subprocess.run(
                ["git", "-C", str(source.parent), *command], capture_output=True, text=True
            )
        except OSError:  # no git on this machine
            return None
        if done.returncode != 0:
            return None
    return done.stdout.strip()
