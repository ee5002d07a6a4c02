"""Compare groups of runs, with what chance alone would explain.

    jaxgpt compare runs/a-* --against runs/b-* [--metric val/loss] [--output page.html]

Runs that differ in nothing but the seed are one group. The difference is paired by seed, with a
95 % t interval; one run each is no claim. The last line of the output is one JSON object.
"""

import argparse
import json

from jaxgpt import config, files


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", help="directories of the runs to compare")
    parser.add_argument("--against", nargs="+", required=True, help="the runs to compare them with")
    parser.add_argument("--metric", default="val/loss", help="metric to compare; default: val/loss")
    parser.add_argument("--output", default="compare.html", help="page to write; empty: none")
    config.complete(parser)
    args = parser.parse_args()
    from jaxgpt.life import compare  # here, so that --help needs no JAX

    ours, theirs = compare.grouped(args.runs, "a"), compare.grouped(args.against, "b")
    if len(theirs) > 1:
        known = "; ".join(f"{n}: {row}" for n, row in compare.differing(theirs).items())
        raise ValueError(f"against: holds {len(theirs)} configs ({known}); name runs of one")
    groups = [*ours, *theirs]
    result = compare.compare(ours, theirs[0], args.metric)
    for line in [*compare.warnings(groups), *compare.sentences(result)]:
        print(line)
    if args.output:
        print(f"page: {files.write(args.output, compare.html(result, groups))}")
    print(json.dumps(result))
