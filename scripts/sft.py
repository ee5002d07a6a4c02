"""Fine-tune a model on conversations. Without data: on an embedded arithmetic assistant."""

from jaxgpt import config


def main() -> None:
    cfg = config.parse(config.SftConfig, __doc__)
    from jaxgpt import run  # here, so that --help and mistakes need no JAX

    run.launch("sft", cfg)


if __name__ == "__main__":
    config.exit_cleanly(main)
