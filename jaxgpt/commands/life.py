"""Live a whole life: a YAML list of commands, from a tokenizer to an assistant, with a card.

    jaxgpt life [--config life/tiny] [--run runs/life]
    jaxgpt life --plan             # memory, time and cost of every stage; starts nothing
    jaxgpt life --check            # hashes all of it and computes one number per stage

The same command goes on after a kill. A stage that misses a target ends the life with one line, and
exit status 1; with --keep_going the card shows it in red. --check exits with 1 at the first thing
that is not what the card says, and names it.
"""

import argparse
import json
from pathlib import Path

from jaxgpt import config, files


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="life/tiny", help="YAML file of the life, or its name")
    parser.add_argument("--run", default="", help="folder of the life; empty: the config's own")
    parser.add_argument("--set", action="append", default=[],
                        help="NAME=VALUE, for one of the YAML's `places`")  # fmt: skip
    parser.add_argument("--seeds", nargs="+", type=int, default=[0],
                        help="seeds; each has a life of its own")  # fmt: skip
    parser.add_argument("--keep_going", action="store_true", help="go on after a missed target")
    parser.add_argument("--plan", action="store_true",
                        help="print what the life will need, and start nothing")  # fmt: skip
    parser.add_argument("--check", action="store_true",
                        help="check that all is as the life's card says")  # fmt: skip
    config.complete(parser)
    args = parser.parse_args()
    from jaxgpt.life import life as lives  # here, so that --help needs no JAX

    life = lives.read(args.config, args.set)
    files.require_local("run", args.run or life.run)
    run = Path(args.run or life.run)
    if args.plan:
        from jaxgpt.life import forecast

        table, plans = forecast.forecast(life)
        print(table)
        print(json.dumps(plans))
    elif args.check:
        _check(life, run)
    else:
        _live(life, run, args.seeds, args.keep_going)


def _live(life, run: Path, seeds: list[int], keep_going: bool) -> None:
    from jaxgpt.life import card as cards
    from jaxgpt.life import life as lives

    made, pages, ended = [], [], None
    for seed in seeds:
        folder = run / f"seed{seed}" if len(seeds) > 1 else run
        try:
            lives.live(life, folder, seed, keep_going)
        except lives.Missed as error:
            ended = error
        cards.answer(life, folder)
        made.append(cards.collect(life, folder))
        pages = cards.write(made[-1], folder)
        if ended:
            raise ended
    if len(seeds) > 1:
        pages = cards.write(cards.spread(made), run)
    print(f"card: {pages[-1]}")


def _check(life, run: Path) -> None:
    from jaxgpt.life import check

    looked = 0
    for name, difference in check.check(life, run):
        if difference:
            print(f"{name}: {difference}")
            raise SystemExit(1)
        looked += 1
    print(f"as the card says: {looked} files, sources, weights and numbers")
