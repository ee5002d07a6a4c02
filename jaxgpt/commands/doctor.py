"""Look whether all is well on this machine: versions, devices, caches, disk, a short training.

    jaxgpt doctor [--run DIR]

Every line is one thing that was looked at. The exit status is 1 if something must be mended; its
line then says what to do.
"""

import argparse
import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jaxgpt
from jaxgpt import config

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "libtpu")
LOW_DISK = 2e9  # bytes: a run of GPT-2 124M keeps two checkpoints of 1.5 GB
SHORT = (
    "--model.num_layers=2", "--model.model_dim=32", "--model.num_heads=2",
    "--model.context_length=32", "--data.tokenizer=byte", "--train.steps=20", "--eval.every=0",
    "--eval.batches=1", "--optim.warmup_steps=0", "--optim.learning_rate=1e-2",
    "--sample.prompts=[]", "--log.every=1",
)  # fmt: skip


class Finding(NamedTuple):
    """One line of the list."""

    name: str
    said: str
    good: bool = True


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--run", default="runs", help="folder of your runs, whose disk is looked at"
    )
    config.complete(parser)
    args = parser.parse_args()
    bad = 0
    for finding in look(Path(args.run)):
        print(f"{'ok ' if finding.good else 'BAD'}  {finding.name:12}  {finding.said}", flush=True)
        bad += not finding.good
    if bad:
        raise FloatingPointError(f"{bad} of these must be mended")


def look(runs: Path) -> Iterator[Finding]:
    """What there is to say, the quick things first."""
    yield Finding("jaxgpt", f"{jaxgpt.__version__}, {Path(jaxgpt.__file__).parent}")
    yield Finding("Python", f"{platform.python_version()}, {sys.executable}")
    yield Finding("packages", ", ".join(_version(name) for name in PACKAGES if _version(name)))
    yield Finding("extras", _extras())
    compilers = [found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))]
    without = "none; quantised weights are multiplied slower on a CPU without one"
    yield Finding("C++", compilers[0] if compilers else without)
    for name, folder in (("runs", runs), ("temporary", Path(tempfile.gettempdir()))):
        yield _disk(name, folder)
    yield from _devices()
    yield from _cache()
    yield _training()


def _version(package: str) -> str:
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return ""


def _extras() -> str:
    """Which of the extras that add a feature are here."""
    known = config.extras()
    if not known:
        return "unknown, since jaxgpt itself is not installed (pip install -e .)"
    said = []
    for name in ("serve", "log", "notes", "completion"):
        lacking = [package for package in known.get(name, ()) if not _version(package)]
        hint = f' lacks {" ".join(lacking)} (pip install "jaxgpt[{name}]")'
        said.append(name + (hint if lacking else " is here"))
    return ", ".join(said)


def _disk(name: str, folder: Path) -> Finding:
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if not os.access(there, os.W_OK):
        return Finding(name, f"{there} cannot be written; choose another folder with --run", False)
    said = f"{there}: {free / 1e9:.1f} GB free"
    return Finding(name, said if free > LOW_DISK else f"{said}; make room", free > LOW_DISK)


def _devices() -> Iterator[Finding]:
    import jax

    from jaxgpt import machine

    try:
        machine.prepare()
        devices = jax.devices()
    except (RuntimeError, ValueError) as error:
        yield Finding("devices", f"{error!s:.300}; JAX_PLATFORMS=cpu runs without", False)
        return
    first = devices[0]
    memory = (first.memory_stats() or {}).get("bytes_limit", 0)
    each = f", {memory / 1e9:.1f} GB each" if memory else ""
    version = first.client.platform_version.splitlines()[0]
    yield Finding(
        "devices", f"{len(devices)} of {first.device_kind!r}{each}, platform {first.platform}"
    )
    yield Finding("compiler", f"XLA of jaxlib, {version}")
    cards, vendor = shutil.which("nvidia-smi"), Path("/dev/accel0").exists()
    if first.platform == "cpu" and (cards or vendor):
        extra = "cuda" if cards else "tpu"
        said = f'JAX uses none of this machine\'s accelerators; pip install "jaxgpt[{extra}]"'
        yield Finding("accelerator", said, "cpu" in os.environ.get("JAX_PLATFORMS", ""))


def _cache() -> Iterator[Finding]:
    """Where compiled programs lie, whose loss costs only time."""
    import jax

    folder = Path(str(jax.config.jax_compilation_cache_dir))  # pyright: ignore[reportAttributeAccessIssue]
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    yield Finding("cache", f"{folder}: {size / 1e6:.0f} MB (JAX_COMPILATION_CACHE_DIR chooses it)")
    yield _disk("cache", folder)


def _training() -> Finding:
    """A tiny network for a few steps, of whose text half a page suffices to be learned."""
    import contextlib

    from jaxgpt import metrics, run

    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        text.write_text("the cat sat on the mat and the dog ran after the cat again\n" * 400)
        given = [*SHORT, f"--data.path={text}", f"--run={folder}/run"]
        began = time.perf_counter()
        try:
            with (Path(folder) / "said").open("w") as said, contextlib.redirect_stdout(said), \
                 contextlib.redirect_stderr(said):  # fmt: skip
                run.launch("pretrain", config.parse(config.PretrainConfig, "", given))
        except Exception as error:
            return Finding("training", f"{type(error).__name__}: {error!s:.300}", False)
        seconds = time.perf_counter() - began
        lines = metrics.read_jsonl(Path(folder) / "run" / "metrics.jsonl")
        losses = [line["train/loss"] for line in lines if "train/loss" in line]
    said = f"20 steps in {seconds:.1f} s, the loss from {losses[0]:.2f} to {losses[-1]:.2f}"
    learned = losses[-1] < losses[0] - 0.5
    return Finding("training", said if learned else f"{said}: nothing was learned", learned)
