"""This checkout against another commit, in turn: start, speed and memory of training and writing.

python benchmarks/guard.py                        # against the last tag
python benchmarks/guard.py --against HEAD~20 --json guard.json
python benchmarks/guard.py --checkpoint SmolLM2.gguf   # writes with this model
python benchmarks/guard.py --quick --at_least 0.75     # at most two minutes; what CI runs

Each side runs the public commands pretrain.py and sample.py, each command in a process of its own,
with a warm compilation cache. A ratio above 1 means that this checkout is better.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PROMPT = "def "


class Side(NamedTuple):
    """One of the two checkouts, and the folder in which its runs lie."""

    root: Path
    folder: Path


class Figure(NamedTuple):
    """Medians of both sides, and how much better ours is in each pair."""

    name: str
    unit: str
    ours: float
    theirs: float
    ratio: float
    ratios: tuple[float, float]  # the least and the largest pair


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--against", help="commit; default: the last tag")
    parser.add_argument("--config", type=Path, default=ROOT / "configs/pretrain/default.yaml",
                        help="of the training, one that both commits know")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="at most two minutes")
    parser.add_argument("--checkpoint", help="model that writes; default: the one just trained")
    parser.add_argument("--steps", type=int, default=60, help="of training")
    parser.add_argument("--new", type=int, default=200, help="tokens that are written")
    parser.add_argument("--pairs", type=int, default=5, help="at most")
    parser.add_argument("--seconds", type=float, default=900, help="no pair begins after these")
    parser.add_argument(
        "--at_least", type=float, default=0, help="it is an error if no pair reaches it"
    )
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    args = parser.parse_args()
    if not args.config.is_file():
        parser.error(f"--config={args.config}: there is no such file")
    if args.quick:
        args.steps, args.seconds = min(args.steps, 30), min(args.seconds, 70)
    against = args.against or last_tag()
    if not against:
        print("guard: there is no tag to compare with; name a commit: --against COMMIT")
        return
    with checkout(against) as (ours, theirs):
        figures = compare(ours, theirs, args)
    print(f"this checkout against {against}, {os.cpu_count()} CPUs; above 1: this one is better")
    for figure in figures:
        least, most = figure.ratios
        print(
            f"{figure.name:26}{figure.ours:12,.2f}{figure.theirs:12,.2f} {figure.unit:10}"
            f"ratio {figure.ratio:.2f} ({least:.2f}-{most:.2f})"
        )
    if args.json:
        found = {"against": against, "figures": [figure._asdict() for figure in figures]}
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    worse = [figure.name for figure in figures if max(figure.ratios) < args.at_least]
    if worse:
        raise SystemExit(f"guard: below {args.at_least} of {against}: {', '.join(worse)}")


def last_tag() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--tags", "--abbrev=0"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


@contextmanager
def checkout(commit: str) -> Iterator[tuple[Side, Side]]:
    """Our side, and that of a commit, whose files stand in a git worktree as long as this lasts."""
    git = ["git", "-C", str(ROOT), "worktree"]
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        sides = Side(ROOT, place / "ours"), Side(place / "commit", place / "theirs")
        command = [*git, "add", "--quiet", "--detach", str(sides[1].root), commit]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"error: against={commit}: {done.stderr.strip().splitlines()[-1]}")
        try:
            for side in sides:
                side.folder.mkdir()
                write_text(side.folder / "text.txt")
            yield sides
        finally:
            subprocess.run([*git, "remove", "--force", str(sides[1].root)], check=True)


def write_text(file: Path) -> None:
    """Half a megabyte of Python's standard library."""
    library = Path(os.__file__).parent
    names = sorted(library.glob("*.py"))
    texts = [name.read_text(encoding="utf-8", errors="replace") for name in names]
    file.write_text("".join(texts)[:500_000], encoding="utf-8")


def compare(ours: Side, theirs: Side, args: argparse.Namespace) -> list[Figure]:
    begin = time.monotonic()
    pairs: list[tuple[dict[str, float], dict[str, float]]] = []
    for number in range(args.pairs + 1):
        if number > 1 and time.monotonic() - begin > args.seconds:
            break
        order = (ours, theirs) if number % 2 else (theirs, ours)
        found = {side: measure(side, args) for side in order}
        if number:  # the first one fills the caches
            pairs.append((found[ours], found[theirs]))
    return [figure(name, pairs) for name in pairs[0][0]]


def figure(name: str, pairs: list[tuple[dict[str, float], dict[str, float]]]) -> Figure:
    """Of seconds and bytes fewer are better."""
    values = [(one[name], other[name]) for one, other in pairs]
    more = name.endswith("speed")
    ratios = [one / other if more else other / one for one, other in values]
    unit = "tokens/s" if more else "s" if "first" in name else "MB"
    ours, theirs = (statistics.median(column) for column in zip(*values, strict=True))
    spread = min(ratios), max(ratios)
    return Figure(name, unit, ours, theirs, statistics.median(ratios), spread)


def measure(side: Side, args: argparse.Namespace) -> dict[str, float]:
    """What training and then writing take."""
    run = side.folder / "run"
    subprocess.run(["rm", "-rf", str(run)], check=True)
    train = [
        "pretrain.py", "--config", str(args.config.absolute()), "--run", str(run),
        "--data.path", str(side.folder / "text.txt"), "--data.tokenizer", "byte", "--train.steps",
        str(args.steps), "--optim.warmup_steps", "1", "--log.every", "1", "--eval.batches", "1",
        "--sample.prompts", "[]",
    ]  # fmt: skip
    metrics = run / "metrics.jsonl"
    stepped = lambda _: metrics.is_file() and "train/loss" in metrics.read_text()
    first, _, _, megabytes = command(side, train, stepped)
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    speeds = [line["speed/tokens_per_second"] for line in lines if line.get("step", 0) > 2
              and "speed/tokens_per_second" in line]  # fmt: skip
    found = {
        "training: first step": first, "training: speed": statistics.median(speeds),
        "training: memory": megabytes,
    }  # fmt: skip
    model = args.checkpoint or str(run)
    write = [
        "sample.py", "--checkpoint", model, "--prompt", PROMPT, "--temperature", "0",
        "--max_new_tokens", str(args.new),
    ]  # fmt: skip
    first, rest, text, megabytes = command(side, write, lambda text: len(text) > len(PROMPT))
    # In UTF-8 bytes, which are the tokens of the model just trained.
    return found | {
        "writing: first word": first, "writing: speed": len(text) / max(rest, 1e-3),
        "writing: memory": megabytes,
    }  # fmt: skip


def command(
    side: Side, args: list[str], begun: Callable[[bytes], bool]
) -> tuple[float, float, bytes, float]:
    """Seconds until `begun` says so of what was printed, and from then to the last word; what was
    printed in them; and the largest memory in megabytes.
    """
    environment = os.environ | {"PYTHONPATH": str(side.root)}
    script, *rest = args
    start, first, last, text, before = time.perf_counter(), 0.0, 0.0, b"", 0
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            [sys.executable, str(side.root / "scripts" / script), *rest],
            stdout=subprocess.PIPE, stderr=said, cwd=side.folder, env=environment,
        )  # fmt: skip
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        while True:
            if new := process.stdout.read():
                text, last = text + new, time.perf_counter() - start
            if not first and begun(text):
                first, before = time.perf_counter() - start, len(text)
            ended, status, usage = os.wait4(process.pid, os.WNOHANG)
            if ended:
                break
            time.sleep(0.005)
        if new := process.stdout.read():
            text, last = text + new, time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        process.stdout.close()
        said.seek(0)
        if process.returncode or not first:
            raise SystemExit(f"error: {side.root}: {script}: {said.read().decode()[-500:]}")
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    return first, last - first, text[before:], usage.ru_maxrss * unit / 1e6


if __name__ == "__main__":
    sys.exit(main())
