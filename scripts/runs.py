"""The command `jaxgpt runs`."""

from jaxgpt import config
from jaxgpt.commands.runs import main

if __name__ == "__main__":
    config.exit_cleanly(main)
