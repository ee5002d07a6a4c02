"""The ways to train. A stage's `build` says what is trained; `launch` turns a config into a run."""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax

from jaxgpt import metrics, report, rundir, sharding, train
from jaxgpt.config import PretrainConfig, RunConfig
from jaxgpt.convert.load import Loaded, load
from jaxgpt.model import gpt
from jaxgpt.sampling.sample import Sampling, for_decoding, generate
from jaxgpt.stages import pretrain
from jaxgpt.train import SampleFn, Stage
from jaxgpt.types import Params

BUILD: dict[str, Callable[[Any, Loaded], Stage]] = {
    "pretrain": pretrain.build,
}


def launch(name: str, cfg: RunConfig) -> None:
    """Trains in the run directory, going on from what is there, and writes the report.

    Raises:
        ValueError: a setting that does not fit the others, the data or the directory.
        train.Diverged: the loss exploded.
    """
    use_compilation_cache()
    sharding.initialize()
    mesh = sharding.make_mesh(cfg.mesh)
    with sharding.first_process_first("run"), jax.set_mesh(mesh):
        run = rundir.enter(cfg)
        start = _begin(cfg)
        start.tokenizer.save(run / "tokenizer.json")
        cfg = dataclasses.replace(cfg, model=start.config)
        rundir.write_config(cfg)
    with jax.set_mesh(mesh):
        start = start._replace(params=_on_mesh(cfg, start.params, mesh))
        stage = BUILD[name](cfg, start)
        train.fit(stage, cfg, mesh, sampler(cfg, start))
    if jax.process_index() == 0:
        print(summary(run, report.write_report(run)))


def use_compilation_cache() -> None:
    """Keeps compiled programs between runs; JAX_COMPILATION_CACHE_DIR chooses the folder."""
    if jax.config.jax_compilation_cache_dir is None:  # pyright: ignore[reportAttributeAccessIssue]
        folder = Path.home() / ".cache" / "jaxgpt" / "xla"
        jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def sampler(cfg: RunConfig, start: Loaded) -> SampleFn:
    """Continues the prompts of `sample.prompts`; the seed is the same every time."""
    how = Sampling(
        cfg.sample.max_new_tokens, cfg.sample.temperature, cfg.sample.top_p, cfg.sample.top_k
    )
    prompts = [start.tokenizer.encode(prompt) for prompt in cfg.sample.prompts]

    def sample(params: Params) -> list[str]:
        policy = for_decoding(cfg.model, params["policy"])
        stop = [start.tokenizer.eos_id]
        rng = jax.random.key(cfg.seed)
        written = generate(cfg.model, policy, prompts, how, stop_ids=stop, rng=rng)
        return [
            prompt + start.tokenizer.decode(completion.tokens)
            for prompt, completion in zip(cfg.sample.prompts, written, strict=True)
        ]

    return sample


def summary(run: Path, page: Path) -> str:
    """The validation loss before and after, the last sample, and where the report is."""
    lines = metrics.read_jsonl(run / "metrics.jsonl")
    losses = [line["val/loss"] for line in lines if "val/loss" in line]
    parts = [f"report: {page}"]
    if losses:
        parts.insert(0, f"validation loss: {losses[0]:.4f} before, {losses[-1]:.4f} after")
    for step, texts in metrics.read_samples(run / "samples.md")[-1:]:
        parts = [f"written after step {step}:", *texts, *parts]
    return "\n\n".join(parts)


def _begin(cfg: RunConfig) -> Loaded:
    """The weights of `init`, computing and regularised as `cfg` says, or a fresh network."""
    if cfg.init:
        loaded = load(cfg.init)
        own = {name: getattr(cfg.model, name) for name in ("dtype", "remat", "dropout")}
        return loaded._replace(config=dataclasses.replace(loaded.config, **own))
    if isinstance(cfg, PretrainConfig):
        return pretrain.begin(cfg)
    raise ValueError("init is empty: this stage starts from trained weights; give --init PATH")


def _on_mesh(cfg: RunConfig, params: Params | None, mesh: Any) -> Params:
    """The weights where sharding.RULES puts them; drawn at random if there are none."""
    draw = partial(gpt.init, cfg.model)
    shapes = jax.eval_shape(draw, jax.random.key(0))
    placed = sharding.shardings(mesh, shapes)
    if params is not None:
        return jax.device_put(params, placed)
    return jax.jit(draw, out_shardings=placed)(jax.random.key(cfg.seed))
