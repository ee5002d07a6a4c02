"""What each chip can do, by its data sheet; what this CPU can do, as measured; memory held."""

import functools
import sys
import time
from typing import Any, NamedTuple


class Chip(NamedTuple):
    """One jax.Device by its data sheet, in bytes and seconds."""

    flops: float  # dense bfloat16, a second
    memory: float
    bandwidth: float  # of that memory
    link: float  # what reaches a device while a ring of them exchanges
    price: float | None = None  # dollars an hour, on demand


# By the whole of device_kind, of NVIDIA's without that word: an L40 is no L4, an RTX A1000 no A100,
# and a part of a GPU (MIG), which has more words, none of them. In jax a TPU v2 or v3 device is
# half a chip. Read in 2026:
# TPUs: cloud.google.com/tpu/docs/v5e and its like; a link is one axis of the torus, both
#   ways: the sheet's bidirectional bandwidth of a chip over its ports (4, or 6 of a 3D torus).
# GPUs: NVIDIA data sheets (half of the "with sparsity" FLOP/s; GeForce: Ada and Blackwell white
#   papers, float32 accumulation); a link is NVLink one way, or PCI Express.
# Prices are list prices of 2025 in the United States, cloud.google.com/tpu/pricing and
#   lambda.ai/pricing; they change, and plan.py takes --price.
_V5E = Chip(197e12, 16 * 2**30, 819e9, 100e9, 1.20)
_V5P = Chip(459e12, 95 * 2**30, 2765e9, 200e9, 4.20)
_V6E = Chip(918e12, 32 * 2**30, 1638e9, 200e9, 2.70)
_CHIPS = {
    "TPU v2": Chip(22.5e12, 8 * 2**30, 350e9, 62e9),
    "TPU v3": Chip(61.5e12, 16 * 2**30, 450e9, 82e9),
    "TPU v4": Chip(275e12, 32 * 2**30, 1228e9, 100e9, 3.22),
    "TPU v5 lite": _V5E, "TPU v5e": _V5E,
    "TPU v5": _V5P, "TPU v5p": _V5P,
    "TPU v6 lite": _V6E, "TPU v6e": _V6E,
    "GB200": Chip(2500e12, 186e9, 8000e9, 900e9),
    "B200": Chip(2250e12, 180e9, 8000e9, 900e9),
    "H200": Chip(989.5e12, 141e9, 4800e9, 450e9),
    "H200 NVL": Chip(835e12, 141e9, 4800e9, 450e9),
    "H100 80GB HBM3": Chip(989.5e12, 80e9, 3350e9, 450e9, 2.99),
    "H100 NVL": Chip(835e12, 94e9, 3900e9, 300e9),
    "H100 PCIe": Chip(756e12, 80e9, 2000e9, 64e9),
    "H20": Chip(148e12, 96e9, 4000e9, 450e9),
    "A100-SXM4-80GB": Chip(312e12, 80e9, 2039e9, 300e9, 1.79),
    "A100-SXM4-40GB": Chip(312e12, 40e9, 1555e9, 300e9),
    "A100 80GB PCIe": Chip(312e12, 80e9, 1935e9, 32e9),
    "A100-PCIE-40GB": Chip(312e12, 40e9, 1555e9, 32e9),
    "L40S": Chip(362e12, 48e9, 864e9, 32e9),
    "L40": Chip(181e12, 48e9, 864e9, 32e9),
    "L4": Chip(121e12, 24e9, 300e9, 32e9),
    "A10": Chip(125e12, 24e9, 600e9, 32e9),
    "A10G": Chip(70e12, 24e9, 600e9, 32e9),
    "GeForce RTX 5090": Chip(209.5e12, 32e9, 1792e9, 64e9),
    "GeForce RTX 4090": Chip(165.2e12, 24e9, 1008e9, 32e9),
    "GeForce RTX 3090": Chip(71e12, 24e9, 936e9, 32e9),
}  # fmt: skip


def peak_flops(device: Any) -> float | None:
    """Dense bfloat16 FLOP/s of a jax.Device by its data sheet; None if none is known of it.

    A CPU has no such sheet, and a peak that was measured while something else ran would be too
    low: the share of it that a run uses could read over 100 %.
    """
    sheet = _data_sheet(device)
    return sheet and sheet.flops


def chip(device: Any) -> Chip | None:
    """What a jax.Device can do and hold; None if it is not listed.

    A device that is here says itself how much memory it has. On a CPU all is measured, and shared
    over the virtual devices.
    """
    import jax

    if device.platform == "cpu":
        import psutil

        share = 1 / jax.local_device_count()
        bandwidth = _measured_cpu_bandwidth()
        memory = psutil.virtual_memory().total
        return Chip(_measured_cpu_flops() * share, memory * share, bandwidth * share, bandwidth)
    sheet = _data_sheet(device)
    if sheet is None or device not in jax.local_devices():
        return sheet
    limit = (device.memory_stats() or {}).get("bytes_limit", sheet.memory)
    return sheet._replace(memory=limit)


def data_sheet(name: str) -> Chip:
    """A chip by its name.

    Raises:
        ValueError: none is known of it.
    """
    if name not in _CHIPS:
        raise ValueError(f"chip={name}: must be one of {', '.join(_CHIPS)}")
    return _CHIPS[name]


def _data_sheet(device: Any) -> Chip | None:
    return _CHIPS.get(device.device_kind.removeprefix("NVIDIA "))


@functools.cache
def _measured_cpu_bandwidth() -> float:
    """Bytes read and written in a second by the fastest of a few copies of 64 MB."""
    import numpy as np

    source = np.ones(1 << 24, np.float32)
    target, best = np.empty_like(source), 0.0
    for _ in range(4):
        start = time.perf_counter()
        np.copyto(target, source)
        best = max(best, 2 * source.nbytes / (time.perf_counter() - start))
    return best


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


def peak_memory() -> int | None:
    """Bytes that this process has held at most: of its device, or on a CPU of the host."""
    import jax

    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
