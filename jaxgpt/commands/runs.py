"""List the runs in a folder: stage, state, seed, last measures, costs.

    jaxgpt runs runs/ --where stage=sft --where "val/loss<2" --sort val/loss

Columns are run, stage, state, step, begun, tokens, seconds, every setting (optim.learning_rate) and
the last value of every metric (val/loss). Conditions compare by = != < > <= >= or ~ (a regular
expression).
"""

import argparse
import json
import re

from jaxgpt import config


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", help="folder that holds runs")
    parser.add_argument("--where", action="append", default=[],
                        help="a condition on runs, such as stage=sft")  # fmt: skip
    parser.add_argument("--sort", default="",
                        help="column to sort by; --sort=-step: largest step first")  # fmt: skip
    parser.add_argument("--json", action="store_true",
                        help="print all columns, as one JSON object a line")  # fmt: skip
    config.complete(parser)
    args = parser.parse_args()
    from jaxgpt.life import runs  # here, so that --help needs no JAX

    rows = runs.select([run.row() for run in runs.find(args.folder)], args.where, args.sort)
    if args.json:
        for row in rows:
            print(json.dumps(row))
        return
    named = [re.split("[<>=!~]", condition)[0] for condition in args.where]
    print(runs.table(rows, [*named, args.sort.removeprefix("-")]) if rows else "no runs")
