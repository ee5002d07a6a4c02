"""Greedy decoding, 32 -> 128 tokens, against transformers' generate on this CPU or GPU.

python benchmarks/decode.py                                  # GPT-2 124M, batch 1 and 8
python benchmarks/decode.py --dtype float32 --batch 1
python benchmarks/decode.py --model gpt2-1.5b --batch 1 --peer    # no peer
python benchmarks/decode.py --rollout                        # drawing for rollouts, against greedy

On a GPU the share of the memory's bandwidth that reading the weights alone takes is printed too.
"""

import argparse
import json
import os
import sys
from functools import partial
from typing import Any

import paired

PROMPT, NEW = 32, 128
DTYPES = ["float32", "bfloat16"]
BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
OURS = list(BYTES)  # int8: weights, head included, and what they multiply
MODELS = ("gpt2-124m", "llama-135m", "gpt2-1.5b", "llama-8b", "gpt2-tiny")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", choices=MODELS, default=MODELS[0])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--dtype", nargs="+", choices=OURS, help="of jaxgpt")
    parser.add_argument("--peer", nargs="*", choices=DTYPES, help="of transformers")
    parser.add_argument("--rollout", action="store_true", help="ours as in reinforcement learning")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="last, one JSON list of the figures")
    parser.add_argument("--side", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        who, dtype = args.side
        sides = {
            "jaxgpt": jaxgpt_side,
            "rollout": partial(jaxgpt_side, rollout=True),
            "transformers": torch_side,
        }
        sides[who](args.model, dtype, args.batch[0])
        return
    gpu = paired.gpu()
    dtypes = args.dtype or (["bfloat16"] if gpu else DTYPES if args.rollout else OURS)
    peer_dtypes = (["bfloat16"] if gpu else ["float32"]) if args.peer is None else args.peer
    if args.rollout:
        peer_dtypes = dtypes
    found = []
    for batch in args.batch:
        start = partial(
            paired.Side, __file__, "--model", args.model, "--batch", str(batch), "--side"
        )
        own, peer = ("rollout", "jaxgpt") if args.rollout else ("jaxgpt", "transformers")
        ours = [partial(start, own, dtype) for dtype in dtypes]
        peers = [partial(start, peer, dtype) for dtype in peer_dtypes]
        title, tokens = f"{args.model}, batch {batch}", batch * NEW
        bound = limit(args.model, dtypes[0], gpu) if len(dtypes) == 1 else None
        found.append(paired.compare(title, ours, peers, tokens, "tokens", args.pairs, bound))
    if args.json:
        print(json.dumps([each._asdict() for each in found]))


def limit(name: str, dtype: str, gpu: Any) -> tuple[float, str] | None:
    """The seconds in which a GPU reads the weights once for every new token."""
    from jaxgpt import machine, metrics

    chip = machine.chip(gpu) if gpu else None
    if chip is None:
        return None
    weights = metrics.flops_per_token(settings(name, DTYPES[0]), 0) / 6
    seconds = NEW * weights * BYTES[dtype] / chip.bandwidth
    return seconds, f"the {gpu.device_kind}'s {chip.bandwidth / 1e12:.2f} TB/s"


def settings(name: str, dtype: str) -> Any:
    from dataclasses import replace

    from jaxgpt import config

    model = config.parse(config.PretrainConfig, "", [
        "--model", f"configs/model/{name}.yaml", "--model.context_length", "1024",
        "--model.dtype", "float32" if dtype == "int8" else dtype,
    ]).model  # fmt: skip
    return replace(model, vocab_size=model.vocab_size or 256)  # the tiny ones name none


def jaxgpt_side(name: str, dtype: str, batch: int, rollout: bool = False) -> None:
    import jax
    import numpy as np

    from jaxgpt import peft
    from jaxgpt.model import gpt
    from jaxgpt.sampling import sample

    cfg = settings(name, dtype)
    params = jax.jit(partial(gpt.init, cfg))(jax.random.key(0))
    if dtype == "int8":
        params = jax.jit(peft.quantize_int8)(params)
    params = sample.for_decoding(cfg, params, batch)
    prompts = np.random.default_rng(0).integers(0, cfg.vocab_size, (batch, PROMPT)).tolist()
    how = sample.Sampling(max_new_tokens=NEW, temperature=1.0 if rollout else 0.0, top_p=1.0)

    def run() -> None:
        written = sample.generate(cfg, params, prompts, how, compact=rollout)
        assert all(len(completion.tokens) == NEW for completion in written)

    side = f"rollouts {dtype}" if rollout else f"jaxgpt {dtype}"
    paired.serve(side, lambda: paired.timed(run, 1))


def torch_side(name: str, dtype: str, batch: int) -> None:
    os.environ["KMP_BLOCKTIME"] = "0"  # idle threads must not spin while the other side runs
    import torch
    import transformers

    from jaxgpt.convert.hf import config_to_hf

    cfg = settings(name, DTYPES[0])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(
                **config_to_hf(cfg), bos_token_id=None, eos_token_id=None
            ),
            dtype=getattr(torch, dtype),
        ).eval()
        ids = torch.randint(0, cfg.vocab_size, (batch, PROMPT))

    def run() -> None:
        with torch.inference_mode():
            written = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW,
                min_new_tokens=NEW, pad_token_id=0,
            ).cpu()  # fmt: skip
        assert written.shape == (batch, PROMPT + NEW)

    paired.serve(f"transformers {dtype}", lambda: paired.timed(run, 1))


if __name__ == "__main__":
    sys.exit(main())
