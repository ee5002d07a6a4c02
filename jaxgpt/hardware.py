"""The machine: how fast it could be, and what a repetition of the run needs to be the same."""

import functools
import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Dense bfloat16 FLOP/s of one jax.Device, first match in device_kind wins. NVIDIA data sheets
# (half of the "with sparsity" figure; GeForce: Ada and Blackwell white papers, float32
# accumulation); cloud.google.com/tpu/docs. In jax a TPU v2 or v3 device is half a chip.
_PEAK_FLOPS = (
    ("TPU v6", 918e12), ("TPU v5 lite", 197e12), ("TPU v5e", 197e12), ("TPU v5", 459e12),
    ("TPU v4", 275e12), ("TPU v3", 61.5e12), ("TPU v2", 22.5e12),
    ("GB200", 2500e12), ("B200", 2250e12), ("H200", 989.5e12), ("H100 NVL", 835e12),
    ("H100 PCIe", 756e12), ("H100", 989.5e12), ("A100", 312e12), ("L40S", 362e12),
    ("A10G", 70e12), ("A10", 125e12), ("L4", 121e12),
    ("RTX 5090", 209.5e12), ("RTX 4090", 165.2e12), ("RTX 3090", 71e12),
)  # fmt: skip


def peak_flops(device: Any) -> float | None:
    """Dense bfloat16 FLOP/s of a jax.Device by its data sheet, None if it is not listed.

    A CPU has no such sheet: the best matrix product measured here, shared over the virtual
    devices. On a busy machine that is too low, and MFU too high.
    """
    if device.platform == "cpu":
        import jax

        return _measured_cpu_flops() / jax.local_device_count()
    return next((peak for kind, peak in _PEAK_FLOPS if kind in device.device_kind), None)


@functools.cache
def _measured_cpu_flops() -> float:
    """The faster of float32 and bfloat16 products of 1024 x 1024, in about 0.2 s."""
    import jax
    import jax.numpy as jnp

    size, best = 1024, 0.0
    for dtype in (jnp.float32, jnp.bfloat16):
        square = jnp.ones((size, size), dtype)
        multiply = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32))
        multiply(square, square).block_until_ready()  # compiles
        end = time.perf_counter() + 0.05
        while (start := time.perf_counter()) < end:
            multiply(square, square).block_until_ready()
            best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def use_compilation_cache() -> None:
    """Keeps compiled programs between runs; JAX_COMPILATION_CACHE_DIR chooses the folder."""
    import jax

    if jax.config.jax_compilation_cache_dir is None:  # pyright: ignore[reportAttributeAccessIssue]
        folder = Path.home() / ".cache" / "jaxgpt" / "xla"
        jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def environment() -> dict[str, Any]:
    """What a bit-identical repetition of the run needs, and the command."""
    import jax

    packages = ("jaxgpt", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    device = jax.devices()[0]
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return {
        "python": platform.python_version(),
        **{package: _version(package) for package in packages},
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "device": device.device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "visible_cores": len(affinity(0)) if affinity else os.cpu_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "git_commit": _git_commit(),
        "command": " ".join(sys.argv),
    }


def environment_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """`jax: 0.10.2 -> 0.11.0` for all that may change the numbers of a resumed run."""
    names = [name for name in {**old, **new} if name != "command"]
    return [f"{n}: {old.get(n)} -> {new.get(n)}" for n in names if old.get(n) != new.get(n)]


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
