"""The commands that train: one for every stage of config.RUN_CONFIGS."""

from jaxgpt import commands, config


def main(stage: str) -> None:
    kind = config.RUN_CONFIGS[stage]
    cfg = config.parse(kind, commands.ABOUT.get(stage, kind.__doc__))
    from jaxgpt import run  # here, so that --help and mistakes need no JAX

    run.launch(stage, cfg)
