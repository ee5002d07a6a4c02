"""Run a grid of settings and seeds, what is missing of it, and compare.

    jaxgpt sweep --config sft/arithmetic \
        --grid optim.learning_rate=1e-3,3e-3 --grid train.batch_size=8,16 --seeds 0 1

The stage is the name of the folder that --config is in, or --stage. Arguments behind -- go to every
run. The first combination is what the others are compared with. --print writes one command a line
(an array job of a cluster runs line $SLURM_ARRAY_TASK_ID) and starts nothing.
"""

import argparse
import json
import sys
from pathlib import Path

from jaxgpt import config, files
from jaxgpt.config import named


def main() -> None:
    own, _, rest = _split(sys.argv[1:])
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="", help="YAML file that all runs have; empty: none")
    parser.add_argument("--stage", default="",
                        help="stage: pretrain, sft, …; empty: --config's folder")  # fmt: skip
    parser.add_argument("--grid", action="append", default=[],
                        help="a setting and its values, as KEY=A,B")  # fmt: skip
    parser.add_argument("--seeds", nargs="+", type=int, default=[0],
                        help="seeds of each combination; default: 0")  # fmt: skip
    parser.add_argument("--runs", default="runs/sweep",
                        help="folder that will hold the runs; default: runs/sweep")  # fmt: skip
    parser.add_argument("--jobs", type=int, default=1, help="runs that go on at a time; default: 1")
    parser.add_argument("--metric", default="val/loss",
                        help="metric to compare at the end; default: val/loss")  # fmt: skip
    parser.add_argument("--print", action="store_true",
                        help="print the commands, and start nothing")  # fmt: skip
    config.complete(parser)
    args = parser.parse_args(own)
    if args.config:
        named.find("config", args.config)
    files.require_local("runs", args.runs)
    if args.jobs < 1:
        raise ValueError(f"jobs={args.jobs}: must be at least 1")
    from jaxgpt.life import compare, sweep  # here, so that --help needs no JAX

    stage = args.stage or Path(args.config).parent.name or "pretrain"
    todo = sweep.jobs(stage, args.config, args.grid, args.seeds, args.runs, rest)
    if args.print:
        print("\n".join(sweep.as_lines(todo)))
        return
    failed = sweep.perform(todo, args.jobs)
    if failed:
        raise FloatingPointError(
            f"{len(failed)} of {len(todo)} runs failed; see {failed[0].run}.log"
        )
    groups: dict[str, list[Path]] = {}
    for job in todo:
        groups.setdefault(job.settings, []).append(job.run)
    made = [compare.grouped(paths, label or "all")[0] for label, paths in groups.items()]
    if len(made) < 2:
        return
    result = compare.compare(made[1:], made[0], args.metric)
    for line in [*compare.warnings(made), *compare.sentences(result)]:
        print(line)
    ordered = [*made[1:], made[0]]
    print(f"page: {files.write(Path(args.runs) / 'compare.html', compare.html(result, ordered))}")
    print(json.dumps(result))


def _split(args: list[str]) -> tuple[list[str], str, list[str]]:
    """What stands before -- and behind it."""
    place = args.index("--") if "--" in args else len(args)
    return args[:place], "--", args[place + 1 :]
