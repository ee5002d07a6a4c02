"""Print where a model comes from, down to the texts, and hash all of it again.

    jaxgpt lineage RUN

RUN is a run directory or an export of one. The exit status is 1, with the first difference, if
something is not what the record says.
"""

import argparse

from jaxgpt import config


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="run directory, or an export of one")
    config.complete(parser)
    path = parser.parse_args().run
    from jaxgpt import lineage  # here, so that --help needs no JAX

    print(lineage.show(path))
    looked = 0
    for name, difference in lineage.check(path):
        if difference:
            print(f"{name}: {difference}")
            raise SystemExit(1)
        looked += 1
    print(f"as recorded: {looked} files, sources and weights")
