"""The command `jaxgpt life`."""

from jaxgpt import config
from jaxgpt.commands.life import main

if __name__ == "__main__":
    config.exit_cleanly(main)
