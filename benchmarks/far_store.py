"""Training wholly in a store some milliseconds away, beside the same training on this disk.

    pip install "jaxgpt[s3]" "moto[server]"
    python benchmarks/far_store.py --delay 0.05 --pairs 3

The tokens, the checkpoints and the logs of one run are in moto's s3, behind a proxy that waits
before it passes a request on; those of the other are files. One JSON line: tokens/s, in pairs that
alternate. The store and the proxy use this machine's cores, too.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--delay", type=float, default=0.05, help="seconds before every answer")
    parser.add_argument("--pairs", type=int, default=3, help="pairs of runs")
    parser.add_argument("--steps", type=int, default=150, help="steps of a run")
    parser.add_argument(
        "--cache", type=float, default=20.0, help="data.cache of the run in the store, GB"
    )
    args = parser.parse_args()
    if min(args.delay, args.cache) < 0 or args.pairs < 1 or args.steps < 10:
        parser.error("--delay and --cache must be 0 or more, --pairs 1 or more, --steps 10 or more")
    sys.path.insert(0, str(ROOT / "tests"))
    import test_buckets as buckets

    from jaxgpt import files

    found: dict[str, list[float]] = {"store": [], "disk": []}
    with tempfile.TemporaryDirectory() as name, buckets.serving("s3", Path(name)) as server:
        folder = Path(name)
        prepare(folder)
        for file in (folder / "tokens").iterdir():
            files.write(server.path(f"tokens/{file.name}"), file.read_bytes())
        server.delay = args.delay
        for pair in range(args.pairs):
            for place in ("store", "disk"):
                root = server.path("")[:-1] if place == "store" else str(folder)
                run = f"{root}/run{pair}"
                cache = [f"--data.cache={args.cache}"] if place == "store" else []
                train(folder, server.env, f"--run={run}", f"--data.path={root}/tokens", *cache,
                      f"--train.steps={args.steps}", "--checkpoint.every=200", "--log.every=10",
                      "--eval.every=200", "--sample.every=0")  # fmt: skip
                found[place].append(speed(run))
    ratios = [store / disk for store, disk in zip(found["store"], found["disk"], strict=True)]
    print(json.dumps({
        "delay": args.delay, "tokens/s": {k: [round(v) for v in vs] for k, vs in found.items()},
        "ratio": round(statistics.median(ratios), 3), "least": round(min(ratios), 3),
        "largest": round(max(ratios), 3),
    }))  # fmt: skip


def prepare(folder: Path) -> None:
    """The demo's text as tokens."""
    text = "".join(
        file.read_text(errors="ignore") for file in sorted(Path(os.__file__).parent.glob("*.py"))
    )
    (folder / "text.txt").write_text(text)
    subprocess.run(
        [
            sys.executable, str(ROOT / "scripts" / "prepare_data.py"), "--input=text.txt",
            "--tokenizer=byte", "--output=tokens",
        ],
        cwd=folder, check=True, stdout=sys.stderr, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def train(folder: Path, env: dict[str, str], *options: str) -> None:
    subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "pretrain.py"), *options],
        cwd=folder, check=True, stdout=sys.stderr, env=os.environ | env | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def speed(run: str) -> float:
    """The median of what a run logged."""
    from jaxgpt import files, metrics

    lines = metrics.read_jsonl(files.path(run) / "metrics.jsonl")
    return statistics.median(
        line["speed/tokens_per_second"] for line in lines if "speed/tokens_per_second" in line
    )


if __name__ == "__main__":
    main()
