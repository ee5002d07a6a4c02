"""The command `jaxgpt chat`."""

from jaxgpt import config
from jaxgpt.commands.chat import main

if __name__ == "__main__":
    config.exit_cleanly(main)
