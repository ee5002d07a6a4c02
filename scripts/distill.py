"""The command `jaxgpt distill`."""

from functools import partial

from jaxgpt import config
from jaxgpt.commands import training

main = partial(training.main, "distill")

if __name__ == "__main__":
    config.exit_cleanly(main)
