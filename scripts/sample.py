"""The command `jaxgpt sample`."""

from jaxgpt import config
from jaxgpt.commands.sample import main

if __name__ == "__main__":
    config.exit_cleanly(main)
