"""What plan.py says of memory against what a run takes: the rise of its peak resident memory.

python benchmarks/memory.py                       # GPT-2 124M, 2 x 512, on this CPU
python benchmarks/memory.py --batch 32 --context 1024 --dtype bfloat16     # on a GPU

The run is a fresh process whose programs are in the compilation cache, since compiling takes
memory too. On a GPU the device's own peak is compared.
"""

import argparse
import json
import subprocess
import sys
import tempfile

SETTINGS = (
    "--model", "configs/model/gpt2-124m.yaml", "--data.tokenizer", "byte", "--train.steps", "3",
    "--eval.batches", "1", "--sample.prompts", "[]", "--checkpoint.every", "1000",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--batch", default="2")
    parser.add_argument("--context", default="512")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    args = parser.parse_args()
    settings = [
        *SETTINGS, "--train.batch_size", args.batch, "--model.context_length", args.context,
        "--model.dtype", args.dtype,
    ]  # fmt: skip
    if args.side:
        return run([*settings, "--run", args.side])
    own = [sys.executable, "scripts/plan.py", "--fit", "off", *settings]
    planned = json.loads(_last_line(own))["memory_total"]
    for warm in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            shape = ["--batch", args.batch, "--context", args.context, "--dtype", args.dtype]
            taken = float(_last_line([sys.executable, __file__, *shape, "--side", folder]))
        state = "programs in the cache" if warm else "programs to compile"
        print(
            f"{state}: the run takes {taken / 1e9:.3f} GB, the plan says {planned / 1e9:.3f} GB, "
            f"{planned / taken:.3f} of it",
            flush=True,
        )


def run(settings: list[str]) -> None:
    """Trains a little and prints by how many bytes the peak rose."""
    import jax
    import psutil

    from jaxgpt import config, run
    from jaxgpt.checkpoint import Checkpoints

    # On a CPU a checkpoint's copy of the state lies in the same memory; the plan is of the step.
    Checkpoints.save = lambda *_: None  # type: ignore[method-assign]
    start = psutil.Process().memory_info().rss
    run.launch("pretrain", config.parse(config.PretrainConfig, "", settings))
    stats = jax.devices()[0].memory_stats()
    print(stats["peak_bytes_in_use"] if stats else _peak() - start)


def _peak() -> int:
    """The process's largest resident memory so far, in bytes."""
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def _last_line(command: list[str]) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.splitlines()[-1]


if __name__ == "__main__":
    main()
