"""The command `jaxgpt serve`."""

from jaxgpt import config
from jaxgpt.commands.serve import main

if __name__ == "__main__":
    config.exit_cleanly(main)
