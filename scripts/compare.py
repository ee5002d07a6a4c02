"""The command `jaxgpt compare`."""

from jaxgpt import config
from jaxgpt.commands.compare import main

if __name__ == "__main__":
    config.exit_cleanly(main)
