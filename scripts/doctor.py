"""The command `jaxgpt doctor`."""

from jaxgpt import config
from jaxgpt.commands.doctor import main

if __name__ == "__main__":
    config.exit_cleanly(main)
