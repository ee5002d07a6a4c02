import json
import os
import sys
import types

import jax
import pytest

from jaxgpt import machine


@pytest.mark.parametrize(
    ("kind", "teraflops"),
    [
        ("TPU v4", 275), ("TPU v5 lite", 197), ("TPU v5p", 459), ("TPU v5", 459),
        ("TPU v6 lite", 918), ("TPU v6e", 918), ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-SXM4-40GB", 312), ("NVIDIA A100 80GB PCIe", 312), ("NVIDIA A10G", 70),
        ("NVIDIA H100 80GB HBM3", 989.5), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989.5), ("NVIDIA H20", 148), ("NVIDIA B200", 2250), ("NVIDIA L4", 121),
        ("NVIDIA L40", 181), ("NVIDIA L40S", 362), ("NVIDIA GeForce RTX 4090", 165.2),
    ],
)  # fmt: skip
def test_peak_flops_are_found_by_the_whole_name(kind, teraflops):
    device = types.SimpleNamespace(platform="gpu", device_kind=kind)
    assert machine.peak_flops(device) == teraflops * 1e12


@pytest.mark.parametrize(
    "kind",
    [
        "Unknown 1", "NVIDIA RTX A1000", "NVIDIA A100X", "NVIDIA RTX 4000 Ada Generation",
        "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D", "NVIDIA H100L",
        "NVIDIA A100-SXM4-80GB MIG 1g.10gb", "NVIDIA GeForce RTX 3090 Ti", "NVIDIA A10M",
        "NVIDIA H800", "NVIDIA GH200 480GB", "Quadro L4", "TPU v4 lite", "TPU v6", "TPU7x", "cpu",
    ],
)  # fmt: skip
def test_a_chip_that_is_like_another_is_not_taken_for_it(kind):
    device = types.SimpleNamespace(platform="gpu", device_kind=kind)
    assert machine.peak_flops(device) is None and machine.chip(device) is None


def test_a_cpu_has_no_peak_to_be_measured_against():
    """A peak that was measured on a busy machine gave an MFU above 100 %."""
    assert machine.peak_flops(jax.devices()[0]) is None


def test_virtual_cpu_devices_share_what_was_measured():
    flops = sum(machine.chip(device).flops for device in jax.devices())
    assert 1e8 < flops < 1e14 and flops == pytest.approx(machine.chips._measured_cpu_flops())


def test_the_environment_is_json_and_equal_to_itself(monkeypatch):
    old = json.loads(json.dumps(machine.environment()))
    assert old["jax"] == jax.__version__ and old["devices"] == 8 and old["visible_cores"] > 0
    monkeypatch.setattr(sys, "argv", ["another", "command"])
    assert machine.environment_changes(old, machine.environment()) == []


def test_changes_of_the_environment_are_named():
    old = {"jax": "0.10.2", "visible_cores": 2, "command": "a", "gone": 1}
    new = {"jax": "0.11.0", "visible_cores": 2, "command": "b"}
    changes = machine.environment_changes(old, new)
    assert changes == ["jax: 0.10.2 -> 0.11.0", "gone: 1 -> None"]


@pytest.mark.parametrize(
    ("flags", "kept"),
    [
        ("--xla_force_host_platform_device_count=8", False),
        (f"--xla_force_host_platform_device_count=8 --{machine.SCHEDULER}=true", True),
        ("", True),
    ],
)
def test_virtual_devices_exchange_in_order(monkeypatch, flags, kept):
    monkeypatch.setenv("XLA_FLAGS", flags)
    machine.keep_collectives_in_order()
    machine.keep_collectives_in_order()
    ordered = f"{flags} --{machine.SCHEDULER}=false"
    assert os.environ["XLA_FLAGS"] == (flags if kept else ordered)
