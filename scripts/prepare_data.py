"""The command `jaxgpt prepare_data`."""

from jaxgpt import config
from jaxgpt.commands.prepare_data import main

if __name__ == "__main__":
    config.exit_cleanly(main)
