"""Training steps of jaxgpt against torch: Hugging Face's model, fp32 or bf16, eager or compiled.

python benchmarks/train.py                       # all workloads of this machine, GPU or CPU
python benchmarks/train.py --workload char baby  # some
python benchmarks/train.py --workload gpt2-1.5b --variant   # no peers

On a GPU the share of its peak, MFU, is printed too. `--workload smoke --at_least 0.4` is the guard
in the test suite.
"""

import argparse
import json
import os
import sys
from functools import partial
from typing import Any, NamedTuple

import paired


class Workload(NamedTuple):
    model: list[str]  # settings of the model
    batch: int
    context: int
    steps: int  # of a measurement
    loss_chunk: int = 1024


def gpt2(layers: int, heads: int, width: int) -> list[str]:
    """nanoGPT's two models of characters."""
    return [
        "--model.num_layers", str(layers), "--model.num_heads", str(heads), "--model.model_dim",
        str(width), "--model.vocab_size", "65", "--model.bias", "all", "--model.activation",
        "gelu_tanh",
    ]  # fmt: skip


def preset(name: str) -> list[str]:
    return ["--model", f"configs/model/{name}.yaml"]


SMOKE = {"smoke": Workload(gpt2(4, 4, 128), 12, 64, 4)}  # the first of these, in short
CPU = {
    "char": Workload(gpt2(4, 4, 128), 12, 64, 100),
    "baby": Workload(gpt2(6, 6, 384), 16, 256, 4),
    "gpt2-2x512": Workload(preset("gpt2-124m"), 2, 512, 1),
    "gpt2-1x1024": Workload(preset("gpt2-124m"), 1, 1024, 1),
}
GPU = {
    "gpt2-32x1024": Workload(preset("gpt2-124m"), 32, 1024, 10, 8192),
    "llama-16x2048": Workload(preset("llama-135m"), 16, 2048, 10, 8192),
    "gpt2-1.5b": Workload(preset("gpt2-1.5b"), 4, 1024, 3, 8192),
}
WORKLOADS = CPU | GPU | SMOKE
DTYPES = ["bfloat16", "float32"]
# "kept": with malloc set as a run of ours sets it; torch's users have glibc's defaults.
VARIANTS = ["fp32 eager", "fp32 compile", "bf16 eager", "bf16 compile", "bf16 compile kept"]
GPU_VARIANTS = ["bf16 compile"]  # alone: several would not fit the memory beside each other


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="of jaxgpt")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--variant", nargs="*", choices=VARIANTS, help="of torch; none: no peers")
    parser.add_argument("--at_least", type=float, default=0, help="a lower ratio is an error")
    parser.add_argument("--json", action="store_true", help="last, one JSON list of the figures")
    parser.add_argument("--side", choices=[*DTYPES, *VARIANTS], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        side = jaxgpt_side if args.side in DTYPES else torch_side
        side(args.side, args.workload[0])
        return
    gpu = paired.gpu()
    dtypes = args.dtype or (DTYPES[:1] if gpu else DTYPES)
    variants = (GPU_VARIANTS if gpu else VARIANTS) if args.variant is None else args.variant
    found = []
    for name in args.workload or (GPU if gpu else CPU):
        start = partial(paired.Side, __file__, "--workload", name, "--side")
        ours, peers = ([partial(start, v) for v in side] for side in (dtypes, variants))
        work = WORKLOADS[name]
        tokens = work.batch * work.context * work.steps
        bound = limit(name, tokens, gpu)
        found.append(paired.compare(name, ours, peers, tokens, "tokens", args.pairs, bound))
        ratio = found[-1].ratio
        if ratio is not None and ratio < args.at_least:
            raise SystemExit(f"{name}: the ratio {ratio:.2f} is below {args.at_least}")
    if args.json:
        print(json.dumps([each._asdict() for each in found]))


def limit(name: str, tokens: int, gpu: Any) -> tuple[float, str] | None:
    """The seconds that a GPU at its peak would take."""
    from jaxgpt import machine, metrics

    peak = machine.peak_flops(gpu) if gpu else None
    if not peak:
        return None
    flops = metrics.flops_per_token(settings(name, DTYPES[0]).model, WORKLOADS[name].context)
    return tokens * flops / peak, f"the {gpu.device_kind}'s {peak / 1e12:,.0f} TFLOP/s (MFU)"


def settings(name: str, dtype: str) -> Any:
    from jaxgpt import config

    work = WORKLOADS[name]
    return config.parse(config.PretrainConfig, "", [
        *work.model, "--model.context_length", str(work.context), "--model.dtype", dtype,
        "--train.batch_size", str(work.batch),
    ])  # fmt: skip


def jaxgpt_side(dtype: str, name: str) -> None:
    import jax
    import numpy as np

    from jaxgpt import optim, scoring, train
    from jaxgpt.kernels.platform import compiler_options
    from jaxgpt.machine import memory
    from jaxgpt.model import gpt

    memory.keep_freed()  # as a run does
    work, cfg = WORKLOADS[name], settings(name, dtype)
    model = cfg.model
    stage = train.Stage(
        params={"policy": jax.jit(partial(gpt.init, model))(jax.random.key(0))},
        trainable="",
        loss=lambda params, batch, rng: scoring.next_token_loss(
            model, params["policy"], batch, rng, chunk=work.loss_chunk
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
    ids = np.random.default_rng(0).integers(
        0, model.vocab_size, (work.batch, work.context + 1), np.int32
    )
    ones = np.ones((work.batch, work.context), np.float32)
    batch = jax.device_put({"tokens": ids[:, :-1], "targets": ids[:, 1:], "mask": ones})

    def run() -> None:
        nonlocal state
        measures: Any = None
        for _ in range(work.steps):  # as in a run, an accelerator is waited for at the last only
            state, measures = step(state, frozen, batch)
        float(measures["loss"])

    paired.serve(f"jaxgpt {dtype}", lambda: paired.timed(run, 1))


def torch_side(variant: str, name: str) -> None:
    os.environ["KMP_BLOCKTIME"] = "0"  # idle threads must not spin while the other side runs
    import torch
    import transformers

    from jaxgpt.convert.hf import config_to_hf
    from jaxgpt.machine import memory

    if variant.endswith("kept"):
        memory.keep_freed()
    work, model_settings = WORKLOADS[name], settings(name, "float32").model
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high" if device == "cuda" else "highest")
    torch.manual_seed(0)
    model: Any = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(
            **config_to_hf(model_settings), resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
            use_cache=False, bos_token_id=None, eos_token_id=None,
        )
    ).to(device)  # fmt: skip
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    forward = torch.compile(model) if "compile" in variant else model
    ids = torch.randint(0, model_settings.vocab_size, (work.batch, work.context), device=device)
    bf16 = variant.startswith("bf16")

    def run() -> None:
        loss: Any = None
        for _ in range(work.steps):
            with torch.autocast(device, torch.bfloat16, enabled=bf16):
                loss = forward(input_ids=ids, labels=ids).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        loss.item()

    paired.serve(f"torch {variant}", lambda: paired.timed(run, 1))


if __name__ == "__main__":
    sys.exit(main())
