"""Let a model practise a task with a value network beside it, by a rule or a reward model: PPO."""

from jaxgpt import config


def main() -> None:
    cfg = config.parse(config.PpoConfig, __doc__)
    from jaxgpt import run  # here, so that --help and mistakes need no JAX

    run.launch("ppo", cfg)


if __name__ == "__main__":
    config.exit_cleanly(main)
