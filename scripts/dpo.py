"""Tune a model on preferred and rejected answers: DPO, IPO, hinge, KTO, ORPO or SimPO."""

from jaxgpt import config


def main() -> None:
    cfg = config.parse(config.DpoConfig, __doc__)
    from jaxgpt import run  # here, so that --help and mistakes need no JAX

    run.launch("dpo", cfg)


if __name__ == "__main__":
    config.exit_cleanly(main)
