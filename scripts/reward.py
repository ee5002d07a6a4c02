"""Train a reward model on preferred and rejected answers."""

from jaxgpt import config


def main() -> None:
    cfg = config.parse(config.RewardConfig, __doc__)
    from jaxgpt import run  # here, so that --help and mistakes need no JAX

    run.launch("reward", cfg)


if __name__ == "__main__":
    config.exit_cleanly(main)
