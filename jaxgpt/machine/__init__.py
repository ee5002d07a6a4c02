"""The machine under a run: its chips, its memory, its other processes, its versions."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from jaxgpt.machine.chips import Chip, chip, data_sheet, peak_flops, peak_memory
from jaxgpt.machine.versions import (
    command,
    environment,
    environment_changes,
    uncommitted,
    versions_used,
)

__all__ = [
    "Chip", "chip", "command", "data_sheet", "environment", "environment_changes", "peak_flops",
    "peak_memory", "uncommitted", "versions_used",
]  # fmt: skip

SCHEDULER = "xla_cpu_enable_concurrency_optimized_scheduler"  # of XLA, for CPUs


def prepare() -> None:
    """Everything that must be said before JAX first asks for a device, in the order it needs.

    Raises:
        ValueError: the other processes of the run do not come (machine/processes.py).
    """
    from jaxgpt.machine import memory, processes

    use_compilation_cache()
    keep_collectives_in_order()
    memory.keep_freed()
    processes.join()


@contextlib.contextmanager
def between_steps() -> Iterator[None]:
    """Around a program that is not the step, such as an evaluation: gives back the memory that
    was freed by the one before it, and that which it frees itself (machine/memory.py).
    """
    from jaxgpt.machine import memory

    memory.give_back()
    yield
    memory.give_back()


def use_compilation_cache() -> None:
    """Keeps compiled programs between runs; JAX_COMPILATION_CACHE_DIR chooses the folder.

    Each Python has a folder of its own: from 3.14 on JAX packs an entry otherwise under the same
    name, so that an older Python would warn of every program that it cannot unpack.
    """
    import jax

    if jax.config.jax_compilation_cache_dir is None:  # pyright: ignore[reportAttributeAccessIssue]
        python = f"python{sys.version_info.major}.{sys.version_info.minor}"
        folder = Path.home() / ".cache" / "jaxgpt" / "xla" / python
        jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def keep_collectives_in_order() -> None:
    """Lets virtual CPU devices exchange what they mean to; before JAX first asks for a device.

    Under XLA's scheduler for concurrency (jax 0.10.2) one program over a mesh with `context` gave
    other losses each time, by up to 1e-3, or hung: its devices took exchanges in different orders.
    As an option of a single `jax.jit` the switch has no effect.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if "host_platform_device_count" in flags and SCHEDULER not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --{SCHEDULER}=false"
