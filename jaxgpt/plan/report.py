"""A plan in words, and as one JSON object."""

import dataclasses
from collections import defaultdict
from typing import Any

from jax.sharding import Mesh

from jaxgpt.config import RunConfig
from jaxgpt.machine import Chip
from jaxgpt.metrics import short
from jaxgpt.plan.step import Step


def as_json(cfg: RunConfig, mesh: Mesh, step: Step, chip: Chip | None) -> dict[str, Any]:
    """Everything by name; times, rates and costs as [if all overlaps, if nothing does]."""
    measures = {
        "device": mesh.devices.flat[0].device_kind,
        "devices": step.devices,
        "mesh": dict(mesh.shape),
        "model": dataclasses.asdict(cfg.model),
        "parameters": step.parameters,
        "trained_parameters": step.trained,
        "flops_per_token": step.flops_per_token,
        "flops_per_step": step.flops,
        "tokens_per_step": step.tokens,
        "micro_batches": step.micro_batches,
        "micro_batch_rows_per_step": cfg.train.batch_size // step.micro_batches,
        "remat": step.remat,
        "memory": vars(step.memory),
        "memory_total": step.memory.total,
        "memory_available": chip and chip.memory,
        "memory_traffic": step.memory_traffic,
        "collectives": exchanges(step),
        "collective_bytes": step.exchanged,
        "per_layer": per_layer(step),
    }
    return measures | (estimates(cfg, step, chip) if chip else {})


def estimates(cfg: RunConfig, step: Step, chip: Chip) -> dict[str, Any]:
    """By the roofline of the data sheet."""
    seconds = step.seconds(chip)
    hours = [each * cfg.train.steps / 3600 for each in seconds]
    peak = chip.flops * step.devices
    rates = [step.tokens / each for each in seconds]
    cost = chip.price and [each * step.devices * chip.price for each in hours]
    return {
        "seconds_per_step": list(seconds),
        "tokens_per_second": rates,
        "mfu": [rate * step.flops_per_token / peak for rate in rates],
        "steps": cfg.train.steps,
        "hours": hours,
        "dollars_per_device_hour": chip.price,
        "dollars": cost,
    }


def exchanges(step: Step) -> dict[str, dict[str, float]]:
    """Per step and device: how often each kind of collective runs, and its bytes."""
    found: dict[str, dict[str, float]] = defaultdict(lambda: {"times": 0, "bytes": 0.0})
    for collective in step.collectives:
        found[collective.kind]["times"] += collective.times
        found[collective.kind]["bytes"] += collective.bytes * collective.times
    return dict(found)


def per_layer(step: Step) -> dict[str, dict[str, int]]:
    """Arrays that each layer exchanges forward and backward, by kind."""
    kinds = sorted({collective.kind for collective in step.collectives})
    counted = {
        kind: {"forward": step.in_layers(kind, False), "backward": step.in_layers(kind, True)}
        for kind in kinds
    }
    return {kind: both for kind, both in counted.items() if any(both.values())}


def describe(cfg: RunConfig, mesh: Mesh, step: Step, chip: Chip | None) -> str:
    """The plan for a person."""
    memory, device = step.memory, mesh.devices.flat[0].device_kind
    axes = [f"{axis} {size}" for axis, size in mesh.shape.items() if size != 1]
    lines = [
        f"devices           {step.devices} x {device}" + (f": {', '.join(axes)}" if axes else ""),
        f"parameters        {short(step.parameters)}, trained {short(step.trained)}",
        f"FLOPs             {short(step.flops_per_token)} a token; "
        f"{short(step.flops)} a step with recomputation",
        f"chosen            {step.micro_batches} micro-batches of "
        f"{cfg.train.batch_size // step.micro_batches} rows, remat {step.remat}",
        f"memory            {_gb(memory.total)} a device"
        + (f" of {_gb(chip.memory)}" if chip else ""),
        *(f"  {name.replace('_', ' '):15} {_gb(size)}" for name, size in vars(memory).items()),
        f"collectives       {_gb(step.exchanged)} a step and device",
        *(
            f"  {kind:19}{found['times']:,.0f} times, {_gb(found['bytes'])}"
            for kind, found in exchanges(step).items()
        ),
    ]
    for kind, both in per_layer(step).items():
        lines.append(
            f"  in a layer        {kind} of {both['forward']} arrays forward, "
            f"{both['backward']} backward"
        )
    if chip is None:
        return "\n".join([*lines, f"no data sheet of {device}: no estimate of time"])
    found = estimates(cfg, step, chip)
    span = lambda values, form: " to ".join(form(value) for value in values)
    lines += [
        f"memory traffic    {_gb(step.memory_traffic)} a step and device",
        f"step, estimated   {span(found['seconds_per_step'], '{:.4g} s'.format)} "
        "(all overlaps, nothing does)",
        f"tokens            {span(found['tokens_per_second'], short)} a second, "
        f"MFU {span(found['mfu'], '{:.0%}'.format)}",
        f"{cfg.train.steps:,} steps: {span(found['hours'], '{:.3g} h'.format)}"
        + (f", {span(found['dollars'], '${:,.2f}'.format)}" if found["dollars"] else ""),
    ]
    return "\n".join(lines)


def _gb(size: float) -> str:
    return f"{size / 1e9:.3f} GB"
