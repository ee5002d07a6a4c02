"""A run from its settings to its report: `launch`, and `plan`, which only looks ahead."""

import contextlib
import dataclasses
import re
import sys
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jaxgpt import (
    files,
    kernels,
    lineage,
    machine,
    metrics,
    peft,
    report,
    rundir,
    sharding,
    train,
    tree,
)
from jaxgpt.config import ModelConfig, PeftConfig, RunConfig, idle, own, sampling
from jaxgpt.convert import chatting
from jaxgpt.convert.load import Loaded, check_vocabulary, load, model_config
from jaxgpt.convert.table import Place
from jaxgpt.data import chat, examples
from jaxgpt.machine import lock, processes
from jaxgpt.model import gpt
from jaxgpt.plan import search
from jaxgpt.plan.step import Step
from jaxgpt.sampling.sample import check_prompts, for_decoding, generate
from jaxgpt.stages import STAGES
from jaxgpt.train import SampleFn, Stage
from jaxgpt.types import Array, Params


@processes.end_together()
def launch(
    name: str,
    cfg: RunConfig,
    sinks: Sequence[metrics.Sink] = (),
    asked: threading.Event | None = None,
) -> None:
    """Trains in the run directory, going on from what is there, and writes the report.

    Args:
        sinks: are given the lines of metrics.jsonl, in the first process.
        asked: ends the run early, saved, when it is set.

    Raises:
        ValueError: a setting that does not fit the others, the data or the directory.
        train.Diverged: the loss exploded.
    """
    given, cfg = cfg, lineage.pinned(cfg)
    mesh = _prepare(cfg)
    shows, cfg = cfg.show_batch, dataclasses.replace(cfg, show_batch=False)
    with processes.first_process_first("run"):
        run = rundir.enter(cfg)
    processes.require_shared(run, "run")
    alone = jax.process_index() == 0 and not shows
    with (
        lock.hold(run) if alone else contextlib.nullcontext(),
        jax.set_mesh(mesh),
        kernels.use(cfg.kernels),
    ):
        start = begin(name, cfg)  # all processes together: Orbax lets them wait for each other
        sharding.check_model(start.config, mesh)
        _warn(*idle.of_run(name, cfg), *_overruled(cfg, start))
        with processes.first_process_first("files"):
            cfg = _settle(name, cfg, start, mesh)
        start = start._replace(config=cfg.model)
        if shows:
            print(_first_batch(name, cfg, start, mesh))
            return
        watch = lambda: None
        if jax.process_index() == 0:
            lineage.begin(name, cfg, given)
            watch = report.while_it_runs(run)
        # Nothing here holds on to the stage: its parameters would stay beside the trained ones.
        train.fit(build(name, cfg, start, mesh), cfg, mesh, watch, sinks, asked)
    if jax.process_index() == 0:
        lineage.complete(cfg)
        print(summary(run, report.write_report(run)))


def plan(name: str, cfg: RunConfig, mesh: Mesh) -> tuple[RunConfig, Step]:
    """The config with all that is chosen for it, and what a step then needs; nothing is read.

    Raises:
        ValueError: it does not fit, or a setting that does not fit the others.
    """
    cfg = dataclasses.replace(cfg, model=_planned_model(name, cfg))
    shapes = partial(outline, name)
    if cfg.fit == "auto":
        step = search.search(shapes, cfg, mesh)
        return search.with_setting(cfg, step.micro_batches, step.remat), step
    return cfg, search.as_given(shapes, cfg, mesh)


def begin(name: str, cfg: RunConfig) -> Loaded:
    """The weights of `init`, computing and regularised as `cfg` says, or the stage's own start."""
    stage = STAGES[name]
    for role in ("init", "teacher"):
        path = getattr(cfg, role, "")
        if path and name != "reward":
            lineage.require_writer(role, path)
    if cfg.init:
        start = load(cfg.init, place=_place(cfg, jax.sharding.get_mesh()), merged=True)
        own = {field: getattr(cfg.model, field) for field in ("dtype", "remat", "dropout")}
        model = peft.model_config(cfg.peft, dataclasses.replace(start.config, **own))
        start = start._replace(config=model)
    elif cfg.peft.kind != "none":
        raise ValueError(f"peft.kind={cfg.peft.kind}: needs trained weights; give --init PATH")
    elif stage.begin is not None:
        start = stage.begin(cfg)
    else:
        raise ValueError("init is empty: this stage starts from trained weights; give --init PATH")
    check_vocabulary(start.config, start.tokenizer)
    if not stage.chats:
        return start
    if name in ("dpo", "grpo", "ppo"):
        none = [f"init={cfg.init}: has no chat template, so it was never tuned to chat"]
        _warn(*(none if start.chat_template is None else rundir.untuned("init", cfg.init)))
    data: Any = cfg.data  # type: ignore[attr-defined]
    form = chatting.chat_format(start, data.template, data.system)
    if data.system is None and form.default_system:
        print(f"system prompt where the data have none, by the template: {form.default_system!r} "
              "(data.system sets it)", file=sys.stderr)  # fmt: skip
    return chatting.with_format(start, form)


def build(name: str, cfg: RunConfig, start: Loaded, mesh: Mesh) -> Stage:
    """The stage with its data, and with its parameters on the mesh."""
    start = start._replace(params=on_mesh(cfg, start.params, mesh))
    stage = efficient(cfg.peft, _with_loss(cfg, STAGES[name].data(cfg, start)))
    return stage._replace(sample=sampler(name, cfg, start, stage.prompts))


def outline(name: str, cfg: RunConfig) -> Stage:
    """The stage of shapes, whose network is the one of `cfg.model`."""

    def draw() -> Params:
        rng, place = jax.random.key(0), peft.place(cfg.peft)
        params = gpt.init(cfg.model, rng)
        return peft.add(cfg.peft, tree.map_named(place, params) if place else params, rng)

    stage = STAGES[name].objective(cfg, jax.eval_shape(draw))
    return efficient(cfg.peft, _with_loss(cfg, stage))


def sampler(
    name: str, cfg: RunConfig, start: Loaded, held_out: Sequence[list[int]] | None
) -> SampleFn | None:
    """Continues or answers `sample.prompts`; the seed is the same every time.

    Args:
        held_out: the prompts as tokens where the config names none; None: nothing writes.
    """
    own = cfg.sample.prompts
    if own == [] or held_out is None:
        return None
    how = sampling(cfg.sample)
    read = _asks(start) if STAGES[name].chats else start.tokenizer.encode
    prompts = [read(text) for text in own] if own else held_out or [start.tokenizer.encode("\n")]
    check_prompts(cfg.model, prompts)  # now, not when the first sample is due
    stop = start.stop_ids or (start.tokenizer.eos_id,)

    def sample(params: Params) -> list[str]:
        policy = for_decoding(cfg.model, params["policy"], len(prompts))
        rng = jax.random.key(cfg.seed)
        written = generate(cfg.model, policy, prompts, how, stop_ids=stop, rng=rng)
        return [
            start.tokenizer.decode([*prompt, *completion.tokens])
            for prompt, completion in zip(prompts, written, strict=True)
        ]

    return sample


def summary(run: Path, page: Path) -> str:
    """The validation loss before and after, the last sample, where the report is, a warning."""
    lines = metrics.read_jsonl(run / "metrics.jsonl")
    losses = [line["val/loss"] for line in lines if "val/loss" in line]
    parts = [f"report: {page}"]
    if losses:
        parts.insert(0, f"validation loss: {losses[0]:.4f} before, {losses[-1]:.4f} after")
    for step, texts in metrics.read_samples(run / "samples.md")[-1:]:
        parts = [f"written after step {step}:", *texts, *parts]
    if said := metrics.outran(lines):
        parts.append(f"warning: {said}")
    return "\n\n".join(parts)


def fitted(name: str, cfg: RunConfig, mesh: Mesh) -> RunConfig:
    """The config with the setting that fits these devices best, chosen once for a run."""
    first = mesh.devices.flat[0]
    devices = {"kind": first.device_kind, **mesh.shape}
    chosen = rundir.read_fit(cfg.run, devices)
    if chosen is None:
        step = search.search(partial(outline, name), cfg, mesh)
        chosen = {"micro_batches": step.micro_batches, "remat": step.remat}
        rundir.write_fit(cfg.run, devices, chosen)
        print(f"fit: {chosen}, {step.memory.total / 1e9:.2f} GB a device", file=sys.stderr)
    return search.with_setting(cfg, chosen["micro_batches"], chosen["remat"])


def on_mesh(cfg: RunConfig, params: Params | None, mesh: Any) -> Params:
    """The weights where sharding.RULES puts them; what is missing is drawn at random.

    That is everything, or what peft adds.
    """
    rng = jax.random.key(cfg.seed)
    given = peft.leaves(peft.add(cfg.peft, params, rng)) if params else {}

    def draw(rng: Array) -> dict[str, Array]:
        fresh = tree.flatten(gpt.init(cfg.model, rng))
        return {name: leaf for name, leaf in fresh.items() if name not in given}

    placed = sharding.shardings(mesh, jax.eval_shape(draw, rng))
    drawn = jax.jit(draw, out_shardings=placed)(rng)
    return tree.nest({**jax.device_put(given, sharding.shardings(mesh, given)), **drawn})


def efficient(cfg: PeftConfig, stage: Stage) -> Stage:
    """The stage that trains only what peft adds to its networks; the others do without that."""
    if cfg.kind == "none":
        return stage
    pattern = peft.trainable(cfg, stage.trainable)
    trained = {
        name.split("/")[0] for name in tree.flatten(stage.params) if re.search(pattern, name)
    }
    params = {
        network: held if network in trained else peft.without(held)
        for network, held in stage.params.items()
    }
    loss = peft.with_dropout(cfg, stage.loss)
    return stage._replace(params=params, trainable=pattern, loss=loss)


def _with_loss(cfg: RunConfig, stage: Stage) -> Stage:
    """The stage with the user's own loss, if there is one."""
    if not cfg.train.loss:
        return stage
    return stage._replace(loss=partial(own.function("train.loss", cfg.train.loss), cfg))


def _prepare(cfg: RunConfig) -> Mesh:
    """The machine made ready, before JAX first asks for a device; the mesh."""
    for setting, name in own.of_run(cfg):  # before anything else takes time
        own.find(setting, name)
    machine.prepare()
    processes.agree(idle.flat(dataclasses.asdict(cfg)) | machine.versions_used())
    metrics.require_sinks(cfg.log)
    return sharding.make_mesh(cfg.mesh)


def _settle(name: str, cfg: RunConfig, start: Loaded, mesh: Mesh) -> RunConfig:
    """Writes down what the run starts from; the config with all that was open in it."""
    run = files.path(cfg.run)
    if jax.process_index() == 0:  # the others may be reading these by now
        start.tokenizer.save(run / "tokenizer.json")
        for file in start.files.keys() - {"tokenizer.json"}:
            files.write(run / file, start.files[file])
    cfg = dataclasses.replace(cfg, model=start.config)
    if cfg.fit == "auto":
        cfg = fitted(name, cfg, mesh)
    rundir.write_config(cfg)
    if cfg.peft.kind != "none":
        rundir.write_base(cfg)
    return cfg


def _first_batch(name: str, cfg: RunConfig, start: Loaded, mesh: Mesh) -> str:
    """The batch of the first step, token by token."""
    stage = build(name, cfg, start, mesh)
    assert stage.next_batch is not None
    batch = stage.next_batch({**stage.params, "carry": stage.carry}, stage.carry, 0)
    batch.pop("report", None)
    return examples.describe(batch, start.tokenizer)


def _warn(*lines: str) -> None:
    """Lines on stderr, one for all processes."""
    for line in lines if jax.process_index() == 0 else ():
        print(f"warning: {line}", file=sys.stderr)


def _overruled(cfg: RunConfig, start: Loaded) -> list[str]:
    """Settings of a network that the weights to start from overrule."""
    if not cfg.init:
        return []
    own = idle.flat(dataclasses.asdict(start.config), "model.")
    lines = [
        f"{setting}={value}: has no effect; init={cfg.init} has {own.get(setting)}"
        for setting, value in idle.given(cfg).items()
        if setting.startswith("model.") and own.get(setting) != value
    ]
    return lines


def _planned_model(name: str, cfg: RunConfig) -> ModelConfig:
    """The network that the run would have, as far as files tell it without being tokenised."""
    if cfg.init:
        own = {field: getattr(cfg.model, field) for field in ("dtype", "remat", "dropout")}
        return peft.model_config(cfg.peft, dataclasses.replace(model_config(cfg.init), **own))
    size = cfg.model.vocab_size or STAGES[name].vocab_size(cfg)
    return peft.model_config(cfg.peft, dataclasses.replace(cfg.model, vocab_size=size))


def _place(cfg: RunConfig, mesh: Any) -> Place:
    """Every parameter goes onto the mesh as it is read, quantised if it is to be: no device, and
    no host, needs room for the whole model."""
    quantized = peft.place(cfg.peft) or (lambda name, kernel: kernel)
    return lambda name, kernel: sharding.place(mesh, name, quantized(name, kernel))


def _asks(start: Loaded) -> Callable[[str], list[int]]:
    """What turns a user's message into tokens, by the chat template."""
    form = chatting.chat_format(start)

    def ask(prompt: str) -> list[int]:
        return chat.prompt(form, [{"role": "user", "content": prompt}])

    return ask
