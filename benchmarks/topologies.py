"""Compiles train steps and the sampler for TPU slices that are not there; one Markdown row each.

python benchmarks/topologies.py                                     # all, an hour of one core
python benchmarks/topologies.py --model llama-8b --topology v5e:2x4

Needs libtpu. All times are estimates from data sheets; nothing runs.
"""

import argparse
import os
from functools import partial
from typing import Any

TOPOLOGIES = ("v5e:2x4", "v6e:4x4", "v5p:4x4x8", "v5e:16x16")
#          context, rows of a batch for each device, and what the sampler cuts by tensor
MODELS = {
    "gpt2-124m": (1024, 16, 1),
    "llama-135m": (2048, 8, 1),
    "llama-135m-moe": (2048, 8, 1),
    "llama-8b": (2048, 2, 8),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--topology", nargs="+", default=list(TOPOLOGIES))
    parser.add_argument("--program", nargs="+", default=["train", "sample"])
    parser.add_argument("--override", nargs="*", default=[], help="--train.batch_size 8 ...")
    args = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    from jaxgpt import hardware

    hardware.use_compilation_cache()
    for topology in args.topology:
        for model in args.model:
            for program in args.program:
                print({"train": train, "sample": sample}[program](model, topology, args.override))


def train(name: str, topology: str, override: list[str]) -> str:
    """The fastest setting that fits, FSDP over the whole slice."""
    from jaxgpt import config, hardware, sharding, stages
    from jaxgpt.plan import devices, report

    chips = devices.topology(topology)
    context, rows, _ = MODELS[name]
    cfg = config.parse(config.PretrainConfig, "", [
        "--model", f"configs/model/{name}.yaml", "--model.context_length", str(context),
        "--train.batch_size", str(rows * len(chips)), "--mesh.data", "1", "--mesh.fsdp", "-1",
        "--fit", "auto", *override,
    ])  # fmt: skip
    mesh = sharding.make_mesh(cfg.mesh, chips)
    chip = hardware.chip(chips[0])
    assert chip is not None
    try:
        cfg, step = stages.plan("pretrain", cfg, mesh)
    except ValueError as error:
        return f"| {name} | {topology} | train | | {error} |"
    found = report.estimates(cfg, step, chip)
    layer = "; ".join(
        f"{kind} {both['forward']} / {both['backward']}"
        for kind, both in report.per_layer(step).items()
    )
    span = lambda values, form: " to ".join(form.format(value) for value in values)
    return (
        f"| {name} | {topology} | train {cfg.train.batch_size} x {context} | "
        f"{step.micro_batches} micro-batches, remat {step.remat} | {step.memory.total / 1e9:.2f} | "
        f"{chip.memory / 1e9:.1f} | {layer} | {span(found['seconds_per_step'], '{:.3f}')} s | "
        f"{span(found['mfu'], '{:.0%}')} |"
    )


def sample(name: str, topology: str, _: list[str]) -> str:
    """Prefill and decode for eight rows of each group of devices that has a copy of the weights."""
    import jax

    from jaxgpt import config, hardware, sharding
    from jaxgpt.model import gpt
    from jaxgpt.plan import devices, program
    from jaxgpt.sampling import sample as sampling

    chips = devices.topology(topology)
    context, _, tensor = MODELS[name]
    model = config.parse(config.PretrainConfig, "", [
        "--model", f"configs/model/{name}.yaml", "--model.context_length", str(context)
    ]).model  # fmt: skip
    mesh = sharding.make_mesh(config.MeshConfig(data=-1, tensor=tensor), chips)
    rows = 8 * len(chips) // tensor
    prompt, how = context // 2, sampling.Sampling(64)
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(lambda: {"policy": gpt.init(model, jax.random.key(0))})
        params = _placed(shapes, sharding.shardings(mesh, shapes))["policy"]
        own = lambda shape, dtype="int32": jax.ShapeDtypeStruct(
            shape, dtype, sharding=sharding.row_sharding(mesh, shape)
        )
        apart = sampling.for_decoding.lower(model, params, rows).compile()
        weights = _as_compiled(apart, partial(sampling.for_decoding, model, num_rows=rows), params)
        read = (own((rows, prompt)), own((rows,)))
        fill = lambda *arrays: sampling.prefill(model, *arrays, context, how)
        prefill = jax.jit(fill).lower(weights, *read).compile()
        state = _as_compiled(prefill, fill, weights, *read)
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))
        stops = jax.ShapeDtypeStruct((1,), "int32", sharding=sharding.replicated(mesh))
        write = lambda weights, state, rng_B, stops: sampling.decode(
            model, weights, state, rng_B, stops, how
        )
        decode = jax.jit(write, donate_argnums=1).lower(weights, state, keys, stops).compile()
    chip = hardware.chip(chips[0])
    assert chip is not None
    moved = program.read(decode.as_text())
    exchanged = sum(c.bytes * c.times for c in moved.collectives)
    parts = (moved.memory_bytes / chip.bandwidth, exchanged / chip.link)
    seconds = [each / sampling.SCAN_STEPS for each in (max(parts), sum(parts))]
    memory = [_total(each.memory_analysis()) / 1e9 for each in (prefill, decode)]
    return (
        f"| {name} | {topology} | sample {rows} x ({prompt} + {context - prompt}) | "
        f"tensor {tensor} | {memory[0]:.2f}, {memory[1]:.2f} (prefill, decode) | "
        f"{chip.memory / 1e9:.1f} | | {1e3 * seconds[0]:.2f} to {1e3 * seconds[1]:.2f} ms a token "
        "| |"
    )


def _placed(shapes: Any, placed: Any) -> Any:
    import jax

    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes,
        placed,
    )


def _as_compiled(compiled: Any, function: Any, *arrays: Any) -> Any:
    """The shapes of a program's results, where it leaves them."""
    import jax

    return _placed(jax.eval_shape(function, *arrays), compiled.output_shardings)


def _total(sizes: Any) -> float:
    return (
        sizes.argument_size_in_bytes + sizes.temp_size_in_bytes + sizes.output_size_in_bytes
        - sizes.alias_size_in_bytes + sizes.generated_code_size_in_bytes
    )  # fmt: skip


if __name__ == "__main__":
    main()
