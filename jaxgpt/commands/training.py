"""The commands that train: one for every stage of config.RUN_CONFIGS."""

import sys
from collections.abc import Sequence

from jaxgpt import commands, config


def main(stage: str) -> None:
    kind = config.RUN_CONFIGS[stage]
    args = with_recipe(stage, sys.argv[1:])
    cfg = config.parse(kind, commands.ABOUT.get(stage, kind.__doc__), args)
    from jaxgpt import run  # here, so that --help and mistakes need no JAX

    run.launch(stage, cfg)


def with_recipe(stage: str, args: Sequence[str]) -> list[str]:
    """Pretraining begins with our measured recipe, configs/pretrain/default.yaml.

    Not with --config, with the preset of a --model, or with --init, which brings a model: what
    they leave out has the default of its setting.
    """
    named = {arg.partition("=")[0] for arg in args}
    if stage != "pretrain" or named & {"--config", "--init", "--model"}:
        return list(args)
    return ["--config", "pretrain/default", *args]
