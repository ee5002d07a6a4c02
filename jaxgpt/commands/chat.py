"""Talk to a model in the terminal."""

import sys
from functools import partial

from jaxgpt import config


def main() -> None:
    cfg = config.parse(config.ChatConfig, __doc__, config.join_lists(sys.argv[1:], "--tools"))
    from jaxgpt.serve import terminal

    if sys.stdin.isatty():
        import readline  # noqa: F401  # lets lines be edited and called back
    ask = partial(input, "> " if sys.stdin.isatty() else "")
    show = partial(print, end="", flush=True)
    terminal.talk(cfg, ask, show, partial(print, file=sys.stderr, flush=True))
