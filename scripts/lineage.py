"""The command `jaxgpt lineage`."""

from jaxgpt import config
from jaxgpt.commands.lineage import main

if __name__ == "__main__":
    config.exit_cleanly(main)
