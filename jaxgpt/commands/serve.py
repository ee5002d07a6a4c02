"""Serve a model by OpenAI's API, with a page to talk to it."""

import sys

from jaxgpt import config


def main() -> None:
    lists = ("--adapter", "--api_key", "--cors")
    args = config.join_lists(sys.argv[1:], *lists)
    cfg = config.parse(config.ServeConfig, __doc__, args)
    from jaxgpt.serve import launch

    raise SystemExit(launch.serve(cfg, lambda line: print(line, flush=True)))
