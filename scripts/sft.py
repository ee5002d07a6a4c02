"""The command `jaxgpt sft`."""

from functools import partial

from jaxgpt import config
from jaxgpt.commands import training

main = partial(training.main, "sft")

if __name__ == "__main__":
    config.exit_cleanly(main)
