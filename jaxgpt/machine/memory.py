"""What a CPU run does with memory that XLA has freed: keeps it, in huge pages, for the next step.

XLA allocates a step's temporary memory with malloc and frees it again. glibc hands pieces that
large back to the kernel, which clears them page by page at the next step: 1.3 GB in pages of 4 KB
for GPT-2 124M at 2 x 512, a fifth of the step. Without glibc nothing here does anything.
"""

import ctypes
import functools
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import jax

# glibc's <malloc.h>, and Linux' <sys/mman.h>
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
MADV_HUGEPAGE, HUGE_PAGE = 14, 1 << 21


def keep_freed() -> None:
    """Keeps what is freed from now on, where JAX will compute on the CPU.

    To be called before JAX first asks for a device: a thread that is there already keeps its own
    heap, whose large pieces are the kernel's again.
    """
    libc = _libc()
    if libc is None or _has_accelerator():
        return
    # All from one heap, no mapping of its own for a large piece, nothing given back.
    for option, value in ((M_ARENA_MAX, 1), (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1)):
        libc.mallopt(option, value)
    # A step called while another runs would take memory of its own beside the other's.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    _set_addresses_aside(libc)


def share_heaps() -> None:
    """Lets all threads take their memory from two heaps, for a server that runs for weeks.

    glibc gives every thread a heap of its own, and each keeps the most that it ever held.
    """
    if libc := _libc():
        libc.mallopt(M_ARENA_MAX, 2)


def give_back() -> None:
    """Gives the kernel all that is free now.

    For the moments between two programs that need memory in pieces of other sizes, such as the
    step and an evaluation: small pieces that stay would keep what one of them frees from the other.
    """
    if libc := _libc():
        libc.malloc_trim(0)
        _set_addresses_aside(libc)


def _set_addresses_aside(libc: Any) -> None:
    """Makes half the machine's memory part of the heap, in huge pages.

    It is addresses only: a page is taken when it is first written. Unless `keep_freed` was called
    they are given up at once.
    """
    size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    if start := libc.malloc(size):  # None where the process's addresses are limited
        aligned = -(-start // HUGE_PAGE) * HUGE_PAGE
        libc.madvise(aligned, (start + size - aligned) // HUGE_PAGE * HUGE_PAGE, MADV_HUGEPAGE)
        libc.free(start)


@functools.cache
def _libc() -> Any:
    """glibc, or None if the process has another C library."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is None or not hasattr(libc, "mallopt"):
        return None
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.malloc_trim.argtypes = [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc


def _has_accelerator(devices: Path = Path("/dev")) -> bool:
    """Whether JAX would find a GPU or TPU, without asking it: its threads would start.

    There the heap is for Python and the compiler, whose many threads should not share one.
    """
    if chosen := jax.config.jax_platforms:  # pyright: ignore[reportAttributeAccessIssue]
        return chosen != "cpu"
    tpus = [*devices.glob("accel*"), *devices.glob("vfio/[0-9]*")]
    return bool(tpus) or importlib.util.find_spec("jax_plugins") is not None
