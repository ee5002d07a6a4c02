"""The command `jaxgpt evaluate`."""

from jaxgpt import config
from jaxgpt.commands.evaluate import main

if __name__ == "__main__":
    config.exit_cleanly(main)
