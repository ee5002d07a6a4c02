"""Everything that is measured on a GPU, the most important first, within nine minutes.

    benchmarks/gpu.sh                          # alone on a machine with one GPU; needs no network
    benchmarks/gpu.sh --rehearse               # the same with tiny shapes, on any machine
    benchmarks/gpu.sh --only decode-gpt2-124m  # some

The file of --output is rewritten after each measure, so that what was measured stays if the time is
cut short: {"machine": …, "measures": {name: {"command", "seconds", "found" or "error"}}}. A peer
(torch, transformers) that is not installed is left out, and the file says so.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
LIMIT = 540.0  # seconds for all
SHORT = ["--eval.every=0", "--sample.every=0", "--checkpoint.every=1000", "--log.every=1"]


class Measure(NamedTuple):
    """One command, and how its figures are read."""

    name: str
    seconds: float  # after which it is ended
    command: list[str]  # without Python
    read: Callable[[str], Any]  # what it printed -> figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", default="gpu.json", help="the JSON file; default: gpu.json")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes, on any machine")
    parser.add_argument("--only", nargs="+", default=[], help="names of measures")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        every = measures(Path(folder), args.rehearse)
        unknown = sorted(set(args.only) - {each.name for each in every})
        if unknown:
            raise SystemExit(f"error: --only {unknown[0]}: one of {[m.name for m in every]}")
        report: dict[str, Any] = {"machine": machine(args.rehearse), "measures": {}}
        end = time.monotonic() + LIMIT
        for each in every:
            if not args.only or each.name in args.only:
                report["measures"][each.name] = run(each, end - time.monotonic())
                keep(Path(args.output), report)
    failed = [name for name, found in report["measures"].items() if "error" in found]
    print(f"{args.output}: {len(report['measures']) - len(failed)} measures, failed: {failed}")
    raise SystemExit(1 if failed else 0)


def measures(folder: Path, rehearse: bool) -> list[Measure]:
    """The most important first."""
    peers = all(map(importlib.util.find_spec, ("torch", "transformers")))
    no_peer = lambda flag: [] if peers else [flag]
    pairs = ["--pairs", "1" if rehearse else "3", "--json"]
    train = lambda name: Measure(
        f"train-{name}", 150, ["benchmarks/train.py", "--workload", name, *pairs]
        + (["--dtype", "float32", "--variant", *["fp32 eager"] * peers] if rehearse
           else no_peer("--variant")), last_json,
    )  # fmt: skip
    model = "gpt2-tiny" if rehearse else "gpt2-124m"
    decode = Measure(
        f"decode-{model}", 150, ["benchmarks/decode.py", "--model", model, *pairs, "--dtype",
        "float32" if rehearse else "bfloat16", "--batch", "1", *["64"] * (not rehearse),
        *no_peer("--peer")], last_json,
    )  # fmt: skip
    preset = "llama-tiny" if rehearse else "llama-135m"
    base, tuned = folder / "base", folder / "sft"
    kept = ["--train.steps=1", "--eval.batches=1", "--sample.prompts=[]"]
    small = ["--model.dtype=float32" if rehearse else "--model.dtype=bfloat16"]
    pretrain = Measure(
        "base", 120, ["scripts/pretrain.py", f"--run={base}", "--model",
        f"configs/model/{preset}.yaml", "--data.tokenizer=byte", "--train.batch_size=1",
        "--model.context_length=512", *kept, *small], lambda _: {},
    )  # fmt: skip
    sft = Measure(
        "sft", 120, ["scripts/sft.py", f"--run={tuned}", f"--init={base}",
        "--data.path=arithmetic", f"--train.steps={2 if rehearse else 40}",
        f"--train.batch_size={2 if rehearse else 64}", *SHORT], lambda _: speed(tuned),
    )  # fmt: skip
    grpo = Measure(
        "grpo", 120, ["scripts/grpo.py", f"--run={folder / 'grpo'}", f"--init={tuned}",
        "--data.path=arithmetic", f"--train.steps={2 if rehearse else 8}",
        f"--train.batch_size={8 if rehearse else 256}", "--rollout.updates=2",
        "--rollout.samples=4", f"--rollout.max_new_tokens={8 if rehearse else 128}", *SHORT[1:],
        "--eval.every=0"], lambda _: speed(folder / "grpo"),
    )  # fmt: skip
    serve = Measure(
        "serve", 150, ["benchmarks/serve.py", "--checkpoint", str(tuned), "--context", "512",
        "--seconds", "1" if rehearse else "8", "--json", "--slots", "2" if rehearse else "32",
        "--tokens", "8" if rehearse else "128", "--clients", "1", *["8", "32"] * (not rehearse)],
        last_json,
    )  # fmt: skip
    if rehearse:
        return [train("smoke"), decode, pretrain, sft, grpo, serve]
    first = [train("gpt2-32x1024"), decode, train("gpt2-1.5b"), train("llama-16x2048")]
    return [*first, pretrain, sft, grpo, serve]


def run(measure: Measure, left: float) -> dict[str, Any]:
    """The figures of one command, or why there are none."""
    command = " ".join(["python", *measure.command])
    print(f"$ {command}", file=sys.stderr, flush=True)
    if left <= 0:
        return {"command": command, "seconds": 0.0, "error": f"no time was left of {LIMIT:.0f} s"}
    began = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, *measure.command], cwd=ROOT, capture_output=True, text=True,
            timeout=min(left, measure.seconds), env=os.environ | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        if done.returncode:
            raise ValueError(f"exit status {done.returncode}: {done.stderr.strip()[-600:]}")
        found = {"found": measure.read(done.stdout)}
    except (subprocess.TimeoutExpired, ValueError, OSError) as error:
        found = {"error": str(error)}
    found = {"command": command, "seconds": round(time.monotonic() - began, 1)} | found
    print(json.dumps(found), file=sys.stderr, flush=True)
    return found


def last_json(printed: str) -> Any:
    return json.loads(printed.strip().splitlines()[-1])


def speed(run: Path) -> dict[str, float]:
    """The median of each speed that a run logged, without its first two steps."""
    import statistics

    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    names = sorted({name for line in lines for name in line if name.startswith("speed/")})
    values = {name: [line[name] for line in lines if name in line] for name in names}
    return {name: statistics.median(found[2:] or found) for name, found in values.items()}


def machine(rehearse: bool) -> dict[str, Any]:
    """What was measured, in a process of its own: a GPU's memory is for the measures."""
    ask = "import jax, json; d = jax.devices()[0]; print(json.dumps([jax.__version__, d.platform, d.device_kind]))"  # noqa: E501
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    version, platform, kind = last_json(done.stdout)
    if platform != "gpu" and not rehearse:
        raise SystemExit(
            f"error: this machine has no GPU, only {kind}; --rehearse tries the script"
        )
    peers = {name: bool(importlib.util.find_spec(name)) for name in ("torch", "transformers")}
    return {"jax": version, "device": kind, "peers": peers, "rehearsal": rehearse}


def keep(path: Path, report: dict[str, Any]) -> None:
    """Writes the file whole, or leaves the one before."""
    draft = path.with_name(path.name + ".part")
    draft.write_text(json.dumps(report, indent=1))
    draft.replace(path)


if __name__ == "__main__":
    main()
