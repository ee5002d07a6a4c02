"""Let a model practise a task against its own answers: GRPO, Dr. GRPO, DAPO, RLOO, REINFORCE++."""

from jaxgpt import config


def main() -> None:
    cfg = config.parse(config.GrpoConfig, __doc__)
    from jaxgpt import stages  # here, so that --help and mistakes need no JAX

    stages.launch("grpo", cfg)


if __name__ == "__main__":
    config.exit_cleanly(main)
