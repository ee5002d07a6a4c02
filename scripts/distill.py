"""Distil a teacher into a smaller student."""

from jaxgpt import config


def main() -> None:
    cfg = config.parse(config.DistillConfig, __doc__)
    from jaxgpt import run  # here, so that --help and mistakes need no JAX

    run.launch("distill", cfg)


if __name__ == "__main__":
    config.exit_cleanly(main)
