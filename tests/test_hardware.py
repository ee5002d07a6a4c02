import json
import os
import sys
import types

import jax
import pytest

from jaxgpt import hardware


@pytest.mark.parametrize(
    ("kind", "teraflops"),
    [
        ("TPU v4", 275), ("TPU v5 lite", 197), ("TPU v5p", 459), ("TPU v5", 459),
        ("TPU v6 lite", 918), ("TPU v6e", 918), ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10G", 70), ("NVIDIA H100 80GB HBM3", 989.5), ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989.5), ("NVIDIA B200", 2250), ("NVIDIA L4", 121), ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165.2), ("Unknown 1", None),
    ],
)  # fmt: skip
def test_peak_flops_are_found_by_device_kind(kind, teraflops):
    device = types.SimpleNamespace(platform="gpu", device_kind=kind)
    assert hardware.peak_flops(device) == (teraflops and teraflops * 1e12)


def test_virtual_cpu_devices_share_one_measured_peak():
    peaks = [hardware.peak_flops(device) for device in jax.devices()]
    assert 1e8 < sum(peaks) < 1e14
    assert sum(peaks) == pytest.approx(hardware._measured_cpu_flops())


def test_the_environment_is_json_and_equal_to_itself(monkeypatch):
    old = json.loads(json.dumps(hardware.environment()))
    assert old["jax"] == jax.__version__ and old["devices"] == 8 and old["visible_cores"] > 0
    monkeypatch.setattr(sys, "argv", ["another", "command"])
    assert hardware.environment_changes(old, hardware.environment()) == []


def test_changes_of_the_environment_are_named():
    old = {"jax": "0.10.2", "visible_cores": 2, "command": "a", "gone": 1}
    new = {"jax": "0.11.0", "visible_cores": 2, "command": "b"}
    changes = hardware.environment_changes(old, new)
    assert changes == ["jax: 0.10.2 -> 0.11.0", "gone: 1 -> None"]


@pytest.mark.parametrize(
    ("flags", "kept"),
    [
        ("--xla_force_host_platform_device_count=8", False),
        (f"--xla_force_host_platform_device_count=8 --{hardware.SCHEDULER}=true", True),
        ("", True),
    ],
)
def test_virtual_devices_exchange_in_order(monkeypatch, flags, kept):
    monkeypatch.setenv("XLA_FLAGS", flags)
    hardware.keep_collectives_in_order()
    hardware.keep_collectives_in_order()
    ordered = f"{flags} --{hardware.SCHEDULER}=false"
    assert os.environ["XLA_FLAGS"] == (flags if kept else ordered)
