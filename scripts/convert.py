"""The command `jaxgpt convert`."""

from jaxgpt import config
from jaxgpt.commands.convert import main

if __name__ == "__main__":
    config.exit_cleanly(main)
