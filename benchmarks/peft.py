"""Memory and time of a training step: everything, LoRA, QLoRA, at SmolLM2's shape in float32.

python benchmarks/peft.py            # one table; alone on the machine, please
python benchmarks/peft.py --compile  # memory only, nothing runs
"""

import argparse
import time
from functools import partial

KINDS = ("full", "lora", "qlora", "qlora-int8")
BATCH, CONTEXT = 1, 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--steps", type=int, default=5, help="timed steps; their median counts")
    parser.add_argument("--compile", action="store_true", help="measure memory only")
    args = parser.parse_args()
    rows = {kind: measure(kind, args) for kind in args.kinds}
    whole = rows.get("full")
    print("             step MB     %   kernels B/param   model MB   trained   ms/step     %")
    for kind, (step, per_param, model, trained, seconds) in rows.items():
        share = [100 * step / whole[0], 100 * seconds / whole[4]] if whole else [float("nan")] * 2
        print(
            f"{kind:11} {step / 1e6:9,.0f} {share[0]:5.1f} {per_param:17.4f} {model / 1e6:10,.0f} "
            f"{trained / 1e6:8,.1f}M {1e3 * seconds:9,.0f} {share[1]:5.1f}",
            flush=True,
        )


def measure(kind: str, args: argparse.Namespace) -> tuple[float, float, float, int, float]:
    """Bytes of the compiled step, bytes per parameter of the blocks' kernels, bytes of the model,
    trained parameters, seconds per step.
    """
    import jax
    import numpy as np

    from jaxgpt import config, optim, peft, scoring, train, tree, weights
    from jaxgpt.kernels.platform import compiler_options
    from jaxgpt.model import gpt
    from jaxgpt.plan import program

    model = config.ModelConfig(
        vocab_size=49152, context_length=CONTEXT, num_layers=args.layers, model_dim=576,
        num_heads=9, num_kv_heads=3, mlp_dim=1536, mlp="gated", activation="silu",
        norm="rmsnorm", position="rope", rope_base=1e5, remat="full",
    )  # fmt: skip
    settings = config.PeftConfig(
        kind={"full": "none", "qlora-int8": "qlora"}.get(kind, kind),  # type: ignore[arg-type]
        quantize="int8" if kind == "qlora-int8" else "nf4",
        rank=args.rank,
    )
    cfg = config.PretrainConfig(
        model=model, train=config.TrainConfig(batch_size=BATCH), peft=settings
    )

    def build(rng: jax.Array) -> dict:
        params = gpt.init(model, rng)
        place = peft.place(settings)
        return peft.add(settings, tree.map_named(place, params) if place else params, rng)

    stage = train.Stage(
        params={},
        trainable=peft.trainable(settings, "^policy/"),
        loss=lambda params, batch, rng_B: scoring.next_token_loss(model, params["policy"], batch),
        next_batch=lambda params, carry, step: {},
    )
    optimizer = optim.make_optimizer(cfg.optim, 1000)
    shapes = jax.eval_shape(build, jax.random.key(0))
    part, frozen = tree.partition({"policy": shapes}, stage.trainable)
    state = jax.eval_shape(
        partial(train.make_state, carry={}, optimizer=optimizer, ema=False), part
    )
    tokens_BT = np.random.default_rng(0).integers(0, model.vocab_size, (BATCH, CONTEXT), np.int32)
    batch = {"tokens": tokens_BT, "targets": tokens_BT, "mask": np.ones_like(tokens_BT, bool)}
    step = (
        jax.jit(
            train.make_step(stage, cfg, optimizer),
            donate_argnums=0,
            compiler_options=compiler_options(),
        )
        .lower(state, frozen, batch)
        .compile()
    )
    used = program.total_bytes(step.memory_analysis(), jax.default_backend())
    num_bytes = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
    kernels = [
        kernel
        for name, kernel in peft.leaves(peft.without(shapes)).items()
        if name.startswith("blocks/") and name.endswith("kernel")
    ]
    numbers = sum(int(np.prod(peft.shape_of(kernel))) for kernel in kernels)
    seconds = float("nan")
    if not args.compile:
        params = {"policy": jax.jit(build)(jax.random.key(0))}
        part, frozen = tree.partition(params, stage.trainable)
        state = train.make_state(part, {}, optimizer, ema=False)
        times = []
        for _ in range(args.steps + 1):
            begin = time.perf_counter()
            state, measures = step(state, frozen, batch)
            jax.block_until_ready(measures)
            times.append(time.perf_counter() - begin)
        seconds = float(np.median(times[1:]))
    assert weights.is_quantized(shapes) == kind.startswith("qlora")
    return (
        used, num_bytes(kernels) / numbers, num_bytes(peft.without(shapes)), tree.count(part),
        seconds,
    )  # fmt: skip


if __name__ == "__main__":
    main()
