"""Our own program for a CPU, blocks.cc, compiled by the user's compiler when it is first needed.

The compiled library is kept beside XLA's compiled programs. Its name holds a hash of everything
that it depends on, and it is put there whole, so that processes may do it at the same time.
"""

import ctypes
import hashlib
import os
import platform as machine
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import jax
import jaxlib

SOURCE = Path(__file__).with_name("blocks.cc")
COMPILERS = ("c++", "g++", "clang++")
SECONDS = 300  # in which a compiler must be done


def load() -> str:
    """The name under which JAX calls the program; "" where there is none."""
    return _load(os.environ.get("CXX", ""))


@cache
def _load(chosen: str) -> str:
    try:
        library = _library(chosen)
        program = ctypes.CDLL(str(library)).jaxgpt_multiply
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        print(f"note: quantised weights are read slower here: {error}", file=sys.stderr)
        return ""
    name = f"jaxgpt_multiply_{library.stem}"
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(program), platform="cpu")
    return name


def _library(chosen: str) -> Path:
    """The compiled library.

    Raises:
        ValueError: no compiler, or one that fails.
    """
    compiler = next((found for name in ((chosen,) if chosen else COMPILERS)
                     if (found := shutil.which(name))), None)  # fmt: skip
    if compiler is None:
        raise ValueError(f"no C++ compiler is found ({chosen or ', '.join(COMPILERS)})")
    native = "-mcpu=native" if machine.machine() in ("arm64", "aarch64") else "-march=native"
    flags = ["-std=c++17", "-O3", native, "-shared", "-fPIC", "-w"]
    parts = [SOURCE.read_text(), compiler, *flags, jaxlib.__version__, _processor()]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    folder = Path.home() / ".cache" / "jaxgpt" / "kernels"
    library = folder / f"{key}.so"
    if library.is_file():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        made = Path(place) / library.name
        command = [compiler, *flags, f"-I{jax.ffi.include_dir()}", str(SOURCE), "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["nothing"])[0]
            raise ValueError(f"{compiler} fails: {said:.200}")
        made.replace(library)
    return library


def _processor() -> str:
    """What -march=native looks at: one home directory may serve several kinds of machine."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = ("model name", "flags", "Features", "CPU part")
    found = {line for line in lines if line.startswith(named)}
    return "\n".join([machine.machine(), *sorted(found)])
