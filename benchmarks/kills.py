"""A run under kill -9 and under signals, at random moments, beside one that was never stopped.

    python benchmarks/kills.py pretrain --kills 20
    python benchmarks/kills.py grpo --kills 20 --signals 25

One JSON line. The killed run must end with the same bits: every array (moments and the average
too), every measure but speeds, every sample. Every process that got SIGTERM or SIGINT must exit 0,
and the run that they interrupted must end with the same bits as well.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
NETWORK = (
    "--model.num_layers=2", "--model.model_dim=32", "--model.num_heads=2",
    "--model.context_length=64", "--model.mlp_dim=64",
)  # fmt: skip
OFTEN = ("--eval.every=6", "--eval.batches=1", "--sample.every=6", "--log.every=1")
STAGES = {
    "pretrain": (
        *NETWORK, *OFTEN, "--data.path=text.txt", "--data.tokenizer=byte", "--train.batch_size=8",
        "--optim.ema=0.9", "--checkpoint.every=4", "--sample.max_new_tokens=8",
        "--sample.prompts=[the]",
    ),
    "grpo": (
        *OFTEN, "--init=base", "--train.batch_size=16", "--rollout.samples=4",
        "--rollout.updates=2", "--rollout.max_new_tokens=12", "--checkpoint.every=4",
    ),
}  # fmt: skip
WORDS = ("the", "cat", "sat", "on", "a", "mat", "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--kills", type=int, default=20, help="times that kill -9 ends the run")
    parser.add_argument("--signals", type=int, default=0, help="times that a signal ends the run")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    if min(args.kills, args.signals) < 0:
        parser.error("--kills and --signals must be 0 or more")
    draw = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "text.txt").write_text(" ".join(random.Random(0).choices(WORDS, k=20_000)))
        if args.stage == "grpo":
            finish(start(folder, "sft", "base", 10, *NETWORK, "--train.batch_size=16"))
        # A life is some six steps long; the last one must have some left.
        steps = 4 * (3 + 2 * max(args.kills, args.signals))
        whole = start(folder, args.stage, "whole", steps, *STAGES[args.stage])
        finish(whole)
        found: dict[str, Any] = {"stage": args.stage, "steps": steps}
        for kind, count in (("kills", args.kills), ("signals", args.signals)):
            if count:
                codes = interrupted(folder, args.stage, kind, steps, count, draw)
                same = differing(folder / "whole", folder / kind, steps)
                found |= {kind: len(codes), f"{kind} differ": same}
                if kind == "signals":
                    found["exit codes"] = sorted(set(codes))
        print(json.dumps(found))


def interrupted(
    folder: Path, stage: str, run: str, steps: int, count: int, draw: random.Random
) -> list[int]:
    """Ends a run so many times and then lets it finish; the exit codes of those that were ended."""
    codes = []
    while len(codes) < count:
        process = start(folder, stage, run, steps, *STAGES[stage])
        # A kill may come while it starts; a signal is heard from the first step on.
        wanted = last_step(folder / run) + draw.randrange(run == "signals", 7)
        while process.poll() is None and last_step(folder / run) < wanted:
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.3))
        if process.poll() is not None:
            finish(process)
            break  # it was done
        process.send_signal(
            signal.SIGKILL if run == "kills" else draw.choice((signal.SIGTERM, signal.SIGINT))
        )
        process.communicate(timeout=300)
        codes.append(process.returncode)
        print(f"{run} {len(codes)}: step {last_step(folder / run)}", file=sys.stderr, flush=True)
    finish(start(folder, stage, run, steps, *STAGES[stage]))
    return codes


def start(folder: Path, stage: str, run: str, steps: int, *options: str) -> subprocess.Popen:
    command = [
        sys.executable, str(ROOT / "scripts" / f"{stage}.py"), "--run", run,
        f"--train.steps={steps}", *options,
    ]  # fmt: skip
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": f"{folder}/cache"}
    return subprocess.Popen(
        command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen) -> None:
    _, err = process.communicate(timeout=1200)
    if process.returncode:
        raise SystemExit(err[-2000:])


def last_step(run: Path) -> int:
    from jaxgpt import metrics

    lines = metrics.read_jsonl(run / "metrics.jsonl") if run.is_dir() else []
    return max((line["step"] for line in lines), default=0)


def differing(one: Path, other: Path, step: int) -> list[str]:
    """What two runs do not have in common to the bit."""
    from jaxgpt import checkpoint, metrics

    arrays = [checkpoint.read_arrays(run / "checkpoints" / str(step)) for run in (one, other)]
    names = arrays[0].keys() ^ arrays[1].keys()
    names |= {
        name
        for name in arrays[0].keys() & arrays[1].keys()
        if not np.array_equal(arrays[0][name], arrays[1][name], equal_nan=True)
    }
    kept = [
        [
            {name: value for name, value in line.items() if not name.startswith("speed/")}
            for line in metrics.read_jsonl(run / "metrics.jsonl")
        ]
        for run in (one, other)
    ]
    if kept[0] != kept[1]:
        names.add("metrics.jsonl")
    samples = [run / "samples.md" for run in (one, other)]
    if any(file.exists() for file in samples):
        texts = [metrics.read_samples(file) for file in samples]
        if texts[0] != texts[1]:
            names.add("samples.md")
    return sorted(names)


if __name__ == "__main__":
    main()
