"""The command `jaxgpt reward`."""

from functools import partial

from jaxgpt import config
from jaxgpt.commands import training

main = partial(training.main, "reward")

if __name__ == "__main__":
    config.exit_cleanly(main)
