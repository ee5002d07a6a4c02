"""What the process keeps of its freed memory, seen from outside by the kernel's counts."""

import importlib.util
import platform
import subprocess
import sys

import jax
import pytest

from jaxgpt.machine import memory

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the calls are glibc's")
COUNTS = """
import resource
from jaxgpt.machine import memory
def new_pages(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def resident():
    line = next(line for line in open("/proc/self/status") if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024
"""


def _run(program: str) -> list[int]:
    program = COUNTS + program
    printed = subprocess.check_output([sys.executable, "-c", program], text=True)
    return [int(word) for word in printed.split()]


def test_freed_memory_is_used_again_without_new_pages() -> None:
    """32 MB written a second time: without the call all of its pages are new ones."""
    program = "{}\nbytearray(1 << 25)\nbefore = new_pages()\nbytearray(1 << 25)\n"
    program += "print(new_pages() - before)\n"
    given_back, kept = (_run(program.format(call))[0] for call in ("pass", "memory.keep_freed()"))
    assert kept < 10 < given_back  # the kernel may give huge pages by itself: 16


def test_what_is_free_between_other_pieces_is_given_back() -> None:
    """64 MB below a piece that stays, freed: resident until they are given back, and no longer;
    what comes then is kept as before."""
    program = (
        "memory.keep_freed()\n"
        "below = bytearray(1 << 26); above = bytearray(1 << 21)\n"
        "del below\n"
        "kept = resident(); memory.give_back(); print(kept - resident())\n"
        "bytearray(1 << 27); before = new_pages(); bytearray(1 << 27)\n"
        "print(new_pages() - before)\n"
    )
    given_back, new_pages = _run(program)
    assert given_back > 0.9 * (1 << 26)
    assert new_pages < 10


@pytest.fixture
def chosen():
    """Sets `jax_platforms`, which is what it was after the test."""
    before = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]
    yield lambda platforms: jax.config.update("jax_platforms", platforms)
    jax.config.update("jax_platforms", before)


@pytest.mark.parametrize(("platforms", "found"), [("cpu", False), ("tpu,cpu", True)])
def test_accelerators_are_known_by_what_jax_was_told(chosen, platforms: str, found: bool) -> None:
    chosen(platforms)
    assert memory._has_accelerator() is found


@pytest.mark.parametrize(
    ("file", "found"),
    [("null", False), ("vfio/vfio", False), ("accel0", True), ("vfio/0", True)],
)
def test_tpus_are_known_by_their_files(chosen, monkeypatch, tmp_path, file, found) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).touch()
    chosen(None)
    assert memory._has_accelerator(tmp_path) is found


def test_gpus_are_known_by_their_plugin(chosen, monkeypatch, tmp_path) -> None:
    (tmp_path / "jax_plugins").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    chosen(None)
    assert memory._has_accelerator(tmp_path)
