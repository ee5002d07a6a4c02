"""Pretrain a GPT on text. Without arguments: on the source code of Python's standard library."""

from jaxgpt import config


def main() -> None:
    cfg = config.parse(config.PretrainConfig, __doc__)
    from jaxgpt import run  # here, so that --help and mistakes need no JAX

    run.launch("pretrain", cfg)


if __name__ == "__main__":
    config.exit_cleanly(main)
