"""What a training run will need of its devices, before it runs and without them.

Compiles the train step from shapes: for the devices that are here, for virtual ones (--devices 8),
or for a TPU slice (--topology v5e:4x4). With fit=auto, the default here, it looks for the fewest
micro-batches and the least recomputation that fit. All times are estimates from data sheets. The
last line of the output is one JSON object.

The stage is the name of the folder that --config is in, or --stage.

With --serve it says what a server will need, and how many slots fit; it then takes the options of
`jaxgpt serve`.
"""

import argparse
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxgpt import config


def main() -> None:
    if "--serve" in sys.argv[1:]:
        plan_server([arg for arg in sys.argv[1:] if arg != "--serve"])
        return
    stage, args = stage_of(sys.argv[1:])
    args = config.with_recipe(stage, args)
    cfg: Any = config.parse(config.planned(config.RUN_CONFIGS[stage]), __doc__, args)
    if cfg.devices:
        flags = f"--xla_force_host_platform_device_count={cfg.devices}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
    if cfg.devices or cfg.topology:
        os.environ["JAX_PLATFORMS"] = "cpu"

    from jaxgpt import machine, run, sharding
    from jaxgpt.plan import devices, report, search

    if not cfg.topology:  # JAX can write such a program, but not read it without a TPU
        machine.use_compilation_cache()
    machine.keep_collectives_in_order()
    mesh = sharding.make_mesh(cfg.mesh, devices.topology(cfg.topology) if cfg.topology else None)
    cfg, step = run.plan(stage, cfg, mesh)
    chip = search.planned_chip(cfg, mesh)
    if chip and cfg.price:
        chip = chip._replace(price=cfg.price)
    print(report.describe(cfg, mesh, step, chip))
    print(json.dumps(report.as_json(cfg, mesh, step, chip)))


def plan_server(args: list[str]) -> None:
    """The plan of a server, from the shape of its model."""
    args = config.join_lists(args, "--adapter", "--api_key", "--cors")
    cfg = config.parse(config.ServeConfig, __doc__, args)
    from jaxgpt.convert import load
    from jaxgpt.plan import serving
    from jaxgpt.serve import launch

    model = load.model_config(cfg.checkpoint)
    model = replace(model, dtype=cfg.dtype or model.dtype)
    mesh, context = launch.mesh_of(cfg, model), launch.capacity_of(cfg, model)
    plan = serving.serving(cfg, model, dict(mesh.shape) if mesh else {})
    if cfg.adapter:
        print("warning: adapter: is not counted; it adds its own low-rank weights", file=sys.stderr)
    print(serving.describe(cfg, plan, model, context))
    print(json.dumps(serving.as_json(cfg, plan, model, context)))


def stage_of(args: list[str]) -> tuple[str, list[str]]:
    """The stage, and the arguments without it."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--stage", default="")
    named, rest = parser.parse_known_args(args)
    parser.add_argument("--config", default="")
    folder = Path(parser.parse_known_args(args)[0].config).parent.name
    stage = named.stage or (folder if folder in config.RUN_CONFIGS else "pretrain")
    if stage not in config.RUN_CONFIGS:
        raise ValueError(f"stage={stage}: must be one of {', '.join(config.RUN_CONFIGS)}")
    return stage, rest
