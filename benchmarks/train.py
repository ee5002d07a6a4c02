"""Training steps of jaxgpt against torch: Hugging Face's GPT-2, fp32 or bf16, eager or compiled.

python benchmarks/train.py                       # all workloads
python benchmarks/train.py --workload char baby  # some
"""

import argparse
import os
import sys
from functools import partial
from typing import Any

import paired

#            layers, heads, width, vocabulary, batch, context, steps per measurement
WORKLOADS = {
    "char": (4, 4, 128, 65, 12, 64, 100),
    "baby": (6, 6, 384, 65, 16, 256, 4),
    "gpt2-2x512": (12, 12, 768, 50257, 2, 512, 1),
    "gpt2-1x1024": (12, 12, 768, 50257, 1, 1024, 1),
}
DTYPES = ["bfloat16", "float32"]
VARIANTS = ["fp32 eager", "fp32 compile", "bf16 eager", "bf16 compile"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=DTYPES, help="of jaxgpt")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--variant", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--side", choices=[*DTYPES, *VARIANTS], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        side = jaxgpt_side if args.side in DTYPES else torch_side
        side(args.side, args.workload[0])
        return
    for name in args.workload:
        *_, batch, context, steps = WORKLOADS[name]
        start = partial(paired.Side, __file__, "--workload", name, "--side")
        ours, peers = ([partial(start, v) for v in side] for side in (args.dtype, args.variant))
        paired.compare(name, ours, peers, batch * context * steps, "tokens", args.pairs)


def jaxgpt_side(dtype: str, name: str) -> None:
    import jax
    import numpy as np

    from jaxgpt import config, optim, scoring, train
    from jaxgpt.kernels.platform import compiler_options
    from jaxgpt.model import gpt

    layers, heads, width, vocab, batch_size, context, steps = WORKLOADS[name]
    model = config.ModelConfig(
        vocab_size=vocab, context_length=context, num_layers=layers, model_dim=width,
        num_heads=heads, bias="all", activation="gelu_tanh", dtype=dtype,
    )  # fmt: skip
    cfg = config.PretrainConfig(model=model, train=config.TrainConfig(batch_size=batch_size))
    stage = train.Stage(
        params={"policy": gpt.init(model, jax.random.key(0))},
        trainable="",
        loss=lambda params, batch, rng: scoring.next_token_loss(
            model, params["policy"], batch, rng
        ),
        next_batch=lambda params, carry, step: {},
    )
    optimizer = optim.make_optimizer(cfg.optim, 1000)
    step = jax.jit(
        train.make_step(stage, cfg, optimizer),
        donate_argnums=0,
        compiler_options=compiler_options(),
    )
    state = train.make_state(stage.params, {}, optimizer, ema=False)
    frozen = jax.tree.map(lambda _: None, stage.params)
    ids = np.random.default_rng(0).integers(0, vocab, (batch_size, context + 1), np.int32)
    ones = np.ones((batch_size, context), np.float32)
    batch = jax.device_put({"tokens": ids[:, :-1], "targets": ids[:, 1:], "mask": ones})

    def run() -> None:
        nonlocal state
        state, measures = step(state, frozen, batch)
        float(measures["loss"])

    paired.serve(f"jaxgpt {dtype}", lambda: paired.timed(run, steps) * steps)


def torch_side(variant: str, name: str) -> None:
    os.environ["KMP_BLOCKTIME"] = "0"  # idle threads must not spin while the other side runs
    import torch
    import transformers

    layers, heads, width, vocab, batch_size, context, steps = WORKLOADS[name]
    torch.manual_seed(0)
    settings = transformers.GPT2Config(
        vocab_size=vocab, n_positions=context, n_embd=width, n_layer=layers, n_head=heads,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model: Any = transformers.GPT2LMHeadModel(settings)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    forward = torch.compile(model) if variant.endswith("compile") else model
    ids = torch.randint(0, vocab, (batch_size, context))
    bf16 = variant.startswith("bf16")

    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = forward(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()

    paired.serve(f"torch {variant}", lambda: paired.timed(run, steps) * steps)


if __name__ == "__main__":
    sys.exit(main())
