"""Greedy decoding of GPT-2 124M, 32 -> 128 tokens, against transformers' generate on the CPU.

python benchmarks/decode.py                                  # batch 1 and 8
python benchmarks/decode.py --dtype float32 --batch 1
python benchmarks/decode.py --rollout                        # drawing for rollouts, against greedy
"""

import argparse
import os
import sys
from functools import partial

import paired

PROMPT, NEW, VOCAB = 32, 128, 50257
DTYPES = ["float32", "bfloat16"]
OURS = [*DTYPES, "int8"]  # int8: weights, head included, and what they multiply


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--dtype", nargs="+", choices=OURS, default=OURS, help="of jaxgpt")
    parser.add_argument("--peer", nargs="+", choices=DTYPES, default=["float32"])
    parser.add_argument("--rollout", action="store_true", help="ours as in reinforcement learning")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--side", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        who, dtype = args.side
        sides = {
            "jaxgpt": jaxgpt_side,
            "rollout": partial(jaxgpt_side, rollout=True),
            "transformers": torch_side,
        }
        sides[who](dtype, args.batch[0])
        return
    for batch in args.batch:
        start = partial(paired.Side, __file__, "--batch", str(batch), "--side")
        own, peer = ("rollout", "jaxgpt") if args.rollout else ("jaxgpt", "transformers")
        ours = [partial(start, own, dtype) for dtype in args.dtype]
        peers = [
            partial(start, peer, dtype) for dtype in (args.dtype if args.rollout else args.peer)
        ]
        paired.compare(f"batch {batch}", ours, peers, batch * NEW, "tokens", args.pairs)


def jaxgpt_side(dtype: str, batch: int, rollout: bool = False) -> None:
    import jax
    import numpy as np

    from jaxgpt import config, peft
    from jaxgpt.model import gpt
    from jaxgpt.sampling import sample

    cfg = config.ModelConfig(
        vocab_size=VOCAB, context_length=1024, num_layers=12, model_dim=768, num_heads=12,
        bias="all", activation="gelu_tanh", dtype="float32" if dtype == "int8" else dtype,
    )  # fmt: skip
    params = gpt.init(cfg, jax.random.key(0))
    if dtype == "int8":
        params = jax.jit(peft.quantize_int8)(params)
    params = sample.for_decoding(cfg, params, batch)
    prompts = np.random.default_rng(0).integers(0, VOCAB, (batch, PROMPT)).tolist()
    how = sample.Sampling(max_new_tokens=NEW, temperature=1.0 if rollout else 0.0, top_p=1.0)

    def run() -> None:
        written = sample.generate(cfg, params, prompts, how, compact=rollout)
        assert all(len(completion.tokens) == NEW for completion in written)

    name = f"rollouts {dtype}" if rollout else f"jaxgpt {dtype}"
    paired.serve(name, lambda: paired.timed(run, 1))


def torch_side(dtype: str, batch: int) -> None:
    os.environ["KMP_BLOCKTIME"] = "0"  # idle threads must not spin while the other side runs
    import torch
    import transformers

    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval()
    model = model.to(getattr(torch, dtype))
    ids = torch.randint(0, VOCAB, (batch, PROMPT))

    def run() -> None:
        with torch.inference_mode():
            written = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW,
                min_new_tokens=NEW, pad_token_id=0,
            )  # fmt: skip
        assert written.shape == (batch, PROMPT + NEW)

    paired.serve(f"transformers {dtype}", lambda: paired.timed(run, 1))


if __name__ == "__main__":
    sys.exit(main())
