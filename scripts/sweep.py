"""The command `jaxgpt sweep`."""

from jaxgpt import config
from jaxgpt.commands.sweep import main

if __name__ == "__main__":
    config.exit_cleanly(main)
