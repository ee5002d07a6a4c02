"""The commands that train: one for every stage of config.RUN_CONFIGS."""

import sys

from jaxgpt import commands, config


def main(stage: str) -> None:
    kind = config.RUN_CONFIGS[stage]
    args = config.with_recipe(stage, sys.argv[1:])
    cfg = config.parse(kind, commands.ABOUT.get(stage, kind.__doc__), args)
    from jaxgpt import run  # here, so that --help and mistakes need no JAX

    run.launch(stage, cfg)
