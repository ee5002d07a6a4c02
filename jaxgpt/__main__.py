"""python -m jaxgpt: the command `jaxgpt`."""

from jaxgpt import commands

if __name__ == "__main__":
    commands.main()
