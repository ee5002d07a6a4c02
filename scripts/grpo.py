"""Let a model practise a task against its own answers: GRPO, Dr. GRPO, DAPO, RLOO, REINFORCE++."""

from jaxgpt import config


def main() -> None:
    cfg = config.parse(config.GrpoConfig, __doc__)
    from jaxgpt import run  # here, so that --help and mistakes need no JAX

    run.launch("grpo", cfg)


if __name__ == "__main__":
    config.exit_cleanly(main)
