"""The command `jaxgpt plan`."""

from jaxgpt import config
from jaxgpt.commands.plan import main

if __name__ == "__main__":
    config.exit_cleanly(main)
