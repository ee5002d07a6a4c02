"""Compiles train steps and the sampler for TPU slices that are not there; one Markdown row each.

python benchmarks/topologies.py                                     # all, an hour of one core
python benchmarks/topologies.py --model llama-8b --topology v5e:2x4

Needs libtpu. All times are estimates from data sheets; nothing runs.
"""

import argparse
import inspect
import os
from functools import partial
from typing import Any

TOPOLOGIES = ("v5e:2x4", "v6e:4x4", "v5p:4x4x8", "v5e:16x16")
#          context, rows of a batch for each device, loss_chunk, and the tensor axis at most
MODELS = {
    "gpt2-124m": (1024, 16, 4096, 1),
    "llama-135m": (2048, 8, 1024, 1),
    "llama-135m-moe": (2048, 8, 1024, 1),
    "llama-8b": (2048, 2, 1024, 8),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--topology", nargs="+", default=list(TOPOLOGIES))
    parser.add_argument("--program", nargs="+", default=["train", "sample"])
    parser.add_argument(
        "--override", nargs=argparse.REMAINDER, default=[],
        help="settings of pretrain.py, after all else: --override --train.batch_size 8 ...",
    )  # fmt: skip
    args = parser.parse_args()
    for topology in args.topology:
        for model in args.model:
            for program in args.program:
                print({"train": train, "sample": sample}[program](model, topology, args.override))


def train(name: str, topology: str, override: list[str]) -> str:
    """The fastest setting that fits, with FSDP over the longest axis of the slice.

    Over several axes at once the TPU compiler has no reduce-scatter: it turns even an explicit
    psum_scatter into an all-reduce, of which every device keeps its part. So where one axis has
    not memory enough, others hold a part of every matrix (`mesh.tensor`).
    """
    from jaxgpt import config, machine, run, sharding
    from jaxgpt.plan import devices, report

    chips = devices.topology(topology)
    context, rows, chunk, most = MODELS[name]
    chip = machine.chip(chips[0])
    assert chip is not None
    fsdp, fitting, problem = _longest(topology), [], ""
    for tensor in (n for n in (1, 2, 4, 8) if n <= most and fsdp * n <= len(chips)):
        cfg = config.parse(config.PretrainConfig, "", [
            "--model", f"configs/model/{name}.yaml", "--model.context_length", str(context),
            "--train.batch_size", str(rows * len(chips)), "--train.loss_chunk", str(chunk),
            "--mesh.data", "-1", "--mesh.fsdp", str(fsdp), "--mesh.tensor", str(tensor),
            "--fit", "auto", *override,
        ])  # fmt: skip
        try:
            fitting.append(run.plan("pretrain", cfg, sharding.make_mesh(cfg.mesh, chips)))
        except ValueError as error:
            problem = str(error)
    if not fitting:
        return f"| {name} | {topology} | train | | {problem} |"
    cfg, step = min(fitting, key=lambda each: sum(each[1].seconds(chip)))
    tensor = cfg.mesh.tensor
    found = report.estimates(cfg, step, chip)
    layer = "; ".join(
        f"{kind} {both['forward']} / {both['backward']}"
        for kind, both in report.per_layer(step).items()
    )
    span = lambda values, form: " to ".join(form.format(value) for value in values)
    mesh = f"data {len(chips) // (fsdp * tensor)} x fsdp {fsdp}"
    mesh += f" x tensor {tensor}" if tensor > 1 else ""
    return (
        f"| {name} | {topology} | train {cfg.train.batch_size} x {context} | "
        f"{mesh}, {step.micro_batches} micro-batches, "
        f"remat {step.remat} | {step.memory.total / 1e9:.2f} | "
        f"{chip.memory / 1e9:.1f} | {layer} | {span(found['seconds_per_step'], '{:.3f}')} s | "
        f"{span(found['mfu'], '{:.0%}')} |"
    )


def sample(name: str, topology: str, _: list[str]) -> str:
    """Prefill and decode for eight rows of each group of devices that has a copy of the weights."""
    from jaxgpt import config, machine, sharding
    from jaxgpt.plan import devices, program
    from jaxgpt.sampling.sample import SCAN_STEPS, Sampling

    chips = devices.topology(topology)
    context, most = MODELS[name][0], MODELS[name][-1]
    model = config.parse(config.PretrainConfig, "", [
        "--model", f"configs/model/{name}.yaml", "--model.context_length", str(context)
    ]).model  # fmt: skip
    tensor = min(most, _longest(topology))
    mesh = sharding.make_mesh(config.MeshConfig(data=-1, tensor=tensor), chips)
    rows, prompt = 8 * len(chips) // tensor, context // 2
    prefill, decode = compile_sampler(model, mesh, rows, prompt, Sampling())
    chip = machine.chip(chips[0])
    assert chip is not None
    moved = program.read(decode.as_text())
    exchanged = sum(c.bytes * c.times for c in moved.collectives)
    parts = (moved.memory_bytes / chip.bandwidth, exchanged / chip.link)
    seconds = [each / SCAN_STEPS for each in (max(parts), sum(parts))]
    memory = [
        program.total_bytes(each.memory_analysis(), "tpu") / 1e9 for each in (prefill, decode)
    ]
    return (
        f"| {name} | {topology} | sample {rows} x ({prompt} + {context - prompt}) | "
        f"tensor {tensor} | {memory[0]:.2f}, {memory[1]:.2f} (prefill, decode) | "
        f"{chip.memory / 1e9:.1f} | | {1e3 * seconds[0]:.2f} to {1e3 * seconds[1]:.2f} ms a token "
        "| |"
    )


def compile_sampler(cfg: Any, mesh: Any, rows: int, prompt: int, settings: Any) -> tuple[Any, Any]:
    """The compiled programs that read prompts and that write the tokens of one scan.

    Args:
        prompt: tokens of each prompt; the cache has room for the whole context.
    """
    import jax

    from jaxgpt import sharding
    from jaxgpt.model import gpt
    from jaxgpt.plan.step import placed
    from jaxgpt.sampling.sample import decode, for_decoding, prefill

    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(lambda: {"policy": gpt.init(cfg, jax.random.key(0))})
        params = placed(shapes, sharding.shardings(mesh, shapes))["policy"]
        arrange = partial(for_decoding, cfg, num_rows=rows)
        weights, _ = _compiled(arrange, params)
        row = lambda *shape: jax.ShapeDtypeStruct(
            shape, "int32", sharding=sharding.row_sharding(mesh, shape)
        )
        # Unwrapped: a program may not bring options of its own into another.
        read = lambda weights, tokens_BT, start_B: inspect.unwrap(prefill)(
            cfg, weights, tokens_BT, start_B, cfg.context_length, settings
        )
        state, reads = _compiled(read, weights, row(rows, prompt), row(rows))
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))
        rng_B = placed(keys, sharding.row_sharding(mesh, (rows,)))
        stops = jax.ShapeDtypeStruct((1,), "int32", sharding=sharding.replicated(mesh))
        write = lambda weights, state, rng_B, stops: inspect.unwrap(decode)(
            cfg, weights, state, rng_B, stops, settings
        )
        _, writes = _compiled(write, weights, state, rng_B, stops, donate=1)
    return reads, writes


def _compiled(function: Any, *arrays: Any, donate: tuple | int = ()) -> tuple[Any, Any]:
    """The shapes of the results where the program leaves them, and the program."""
    import jax

    from jaxgpt.plan.step import placed

    program = jax.jit(function, donate_argnums=donate).lower(*arrays).compile()
    return placed(jax.eval_shape(function, *arrays), program.output_shardings), program


def _longest(topology: str) -> int:
    """The chips along the longest axis of a slice."""
    return max(map(int, topology.split(":")[1].split("x")))


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    from jaxgpt import config

    config.exit_cleanly(main)
