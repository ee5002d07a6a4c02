"""The command `jaxgpt train_tokenizer`."""

from jaxgpt import config
from jaxgpt.commands.train_tokenizer import main

if __name__ == "__main__":
    config.exit_cleanly(main)
