"""The one train step and the one training loop, for every stage."""

import contextlib
import hashlib
import math
import queue
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jaxgpt import files, machine, optim, sharding, tree
from jaxgpt.checkpoint import Checkpoints
from jaxgpt.config import RunConfig
from jaxgpt.kernels.platform import compiler_options
from jaxgpt.machine import processes
from jaxgpt.machine.stopping import Stopping
from jaxgpt.runlog import Diverged, RunLog
from jaxgpt.types import (
    Array,
    Batch,
    BatchFn,
    BatchSpec,
    Carry,
    CarryFn,
    EvalFn,
    LossFn,
    Metrics,
    Params,
    Sink,
)

PREFETCHED = 2  # batches made ahead of the step that needs them

SampleFn = Callable[[Params], list[str]]  # texts to show


class Stage(NamedTuple):
    """One way to train: its networks, its loss, its batches and how it is measured."""

    params: Params  # {"policy": ..., "reference": ...}: one entry per network
    trainable: str  # regular expression on parameter paths; what it does not match is frozen
    loss: LossFn  # (params, batch, rng_B) -> (loss sum, weight, metrics as (sum, weight))
    batch: BatchSpec = {}  # noqa: RUF012 -- never changed in place; what `loss` reads, at its largest
    next_batch: BatchFn | None = None  # (params, carry, step) -> batch; None: no data yet
    evaluate: EvalFn | None = None  # params -> held-out metrics
    carry: Carry = {}  # noqa: RUF012 -- never changed in place; small state outside the gradient, checkpointed
    after_step: CarryFn | None = None  # (carry, metrics) -> carry, traced
    # Steps that learn from one rollout of the policy; next_batch looks at the parameters where a
    # rollout begins, so no batch is made ahead. 0: it never does.
    updates_per_rollout: int = 0
    skips: bool = False  # a batch of weight zero is no mistake: it changes no parameter
    # Of held-out rows, as tokens, for samples to answer; None: the networks write nothing.
    prompts: Sequence[list[int]] | None = ()
    sample: SampleFn | None = None


class TrainState(NamedTuple):
    """Everything a step changes, and all that a checkpoint holds."""

    step: Array
    params: Params  # the trainable part; None where a parameter is frozen
    opt_state: Any
    carry: Carry
    ema: Params | None


StepFn = Callable[[TrainState, Params, Batch], tuple[TrainState, dict[str, Array]]]
_NextBatch = Callable[[TrainState, Params, int], Batch]


def spec(kinds: Mapping[str, Any], *shape: int) -> BatchSpec:
    """Shapes and types for a stage's `batch`, all of one shape: spec(examples.KINDS, B, T)."""
    return {name: jax.ShapeDtypeStruct(shape, kind) for name, kind in kinds.items()}


def make_state(
    params: Params, carry: Carry, optimizer: optax.GradientTransformation, ema: bool
) -> TrainState:
    """The state before the first step; `params` is the trainable part."""
    average = jax.tree.map(jnp.copy, params) if ema else None
    return TrainState(jnp.int32(0), params, optimizer.init(params), carry, average)


def make_step(stage: Stage, cfg: RunConfig, optimizer: optax.GradientTransformation) -> StepFn:
    """(state, frozen, batch) -> (state, metrics), to be compiled.

    The loss and its weight are summed over micro-batches and divided once, so the gradient does
    not depend on how many there are.
    """

    def step(
        state: TrainState, frozen: Params, batch: Batch
    ) -> tuple[TrainState, dict[str, Array]]:
        step_rng = jax.random.fold_in(jax.random.key(cfg.seed), state.step)
        rows_B = jnp.arange(cfg.train.batch_size)
        rng_B = jax.vmap(jax.random.fold_in, (None, 0))(step_rng, rows_B)

        def loss_of(params: Params, part: tuple[Batch, Array]) -> tuple[Array, Any]:
            batch, rng_B = part
            whole = everything(params, frozen, state.carry)
            loss, weight, sums = stage.loss(whole, batch, rng_B)
            return loss, (weight, sums)

        def accumulate(total: Any, part: tuple[Batch, Array]) -> tuple[Any, None]:
            (loss, aux), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params, part)
            return jax.tree.map(jnp.add, total, ((loss, aux), grads)), None

        if cfg.train.micro_batches == 1:
            total = jax.value_and_grad(loss_of, has_aux=True)(state.params, (batch, rng_B))
        else:
            parts = _cut((batch, rng_B), cfg.train.micro_batches)
            first = jax.tree.map(lambda leaf: leaf[0], parts)
            shapes = jax.eval_shape(jax.value_and_grad(loss_of, has_aux=True), state.params, first)
            zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
            total, _ = jax.lax.scan(accumulate, zeros, parts)
        (loss, (weight, sums)), grads = total
        divisor = jnp.where(weight > 0, weight, 1.0) if stage.skips else weight
        grads = jax.tree.map(lambda grad: grad / divisor, grads)

        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        if stage.skips:
            keep = lambda new, old: jnp.where(weight > 0, new, old)
            params = jax.tree.map(keep, params, state.params)
            opt_state = jax.tree.map(keep, opt_state, state.opt_state)
        decay = cfg.optim.ema
        ema = state.ema and jax.tree.map(
            lambda a, p: decay * a + (1 - decay) * p, state.ema, params
        )
        measures = _values(sums) | {
            "loss": loss / divisor,
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": optim.learning_rate(cfg.optim, state.step, cfg.train.steps),
        }
        carry = stage.after_step(state.carry, sums) if stage.after_step else state.carry
        return TrainState(state.step + 1, params, opt_state, carry, ema), measures

    return step


def jit_step(
    stage: Stage,
    cfg: RunConfig,
    mesh: Mesh,
    optimizer: optax.GradientTransformation,
    state: TrainState,
) -> Any:
    """`make_step` under jit. The new state reuses the memory of the old one, which is then gone.

    Args:
        state: the state, or only its shapes and shardings.
    """
    return jax.jit(
        make_step(stage, cfg, optimizer),
        donate_argnums=0,
        out_shardings=(jax.tree.map(lambda leaf: leaf.sharding, state), sharding.replicated(mesh)),
        compiler_options=compiler_options(),
    )


class _Run(NamedTuple):
    """What stays the same from the first step of `fit` to its last."""

    stage: Stage
    cfg: RunConfig
    frozen: Params
    checkpoints: Checkpoints
    stable: int  # under wsd: the step that a run with more steps goes on from
    meta: dict[str, Any]  # is kept in every checkpoint
    log: RunLog
    stopping: Stopping
    watch: Callable[[], None]


def fit(
    stage: Stage,
    cfg: RunConfig,
    mesh: Mesh,
    watch: Callable[[], None] = lambda: None,
    sinks: Sequence[Sink] = (),
    asked: threading.Event | None = None,
) -> None:
    """Restores, then steps, logs, evaluates, samples and saves up to `train.steps`.

    SIGTERM, Ctrl-C and `asked` end it early, with everything saved. A stage with rollouts first
    makes all updates of its rollout, so that a resumed run needs no rollout of old parameters. An
    evaluation, a sample or a rollout under way is left to the resumed run after a grace period.

    Args:
        watch: is called after each evaluation and save.
        sinks: functions that get every line of metrics.jsonl.
        asked: ends the run when it is set; None: only signals end it.

    Raises:
        Diverged: naming the step and the last good checkpoint.
        ValueError: the run directory was made with other frozen weights, no checkpoint fits
            train.steps, or checkpoint.every cuts a rollout in two.
    """
    updates = max(stage.updates_per_rollout, 1)
    _require_whole_rollouts(cfg, updates)
    stable = optim.open_until(cfg.optim, cfg.train.steps) if cfg.optim.schedule == "wsd" else 0
    stable = int(stable) // updates * updates
    checkpoints = Checkpoints(files.path(cfg.run) / "checkpoints", cfg.checkpoint.keep, stable)
    optimizer = optim.make_optimizer(cfg.optim, cfg.train.steps)
    state, frozen = _place(stage, cfg, mesh, optimizer)
    stage = stage._replace(params={})  # of which the state is a copy
    meta = {
        "environment": machine.environment(),
        "frozen": fingerprint(frozen),
        "schedule": [cfg.train.steps, cfg.optim.decay_steps],
    }
    state, left = _resume(checkpoints, state, meta, cfg)
    start = int(state.step)
    step_fn = jit_step(stage, cfg, mesh, optimizer, state)
    stopping = Stopping(asked or threading.Event(), cfg.checkpoint.grace)
    try:
        with (
            RunLog(cfg, start, sinks) as log,
            stopping.signals(),
            _batches(stage, mesh, cfg, start) as next_batch,
            _profiler(cfg) as trace,
        ):
            run = _Run(stage, cfg, frozen, checkpoints, stable, meta, log, stopping, watch)
            vote = processes.make_vote(mesh)
            ends = (start == 0 or bool(left)) and _between_steps(run, start, state, again=left)
            done = start
            while done < cfg.train.steps and not ends:
                trace(done)
                batch = _take(run, next_batch, state, done)
                if batch is None:
                    ends = True
                    break
                with log.clock("compile" if done == start else "step"):
                    state, measures = step_fn(state, frozen, batch)
                    done += 1
                    # All processes save the same step, at which a rollout is used up.
                    ends = vote(stopping.asked.is_set()) and done % updates == 0
                    log.step(done, measures, math.prod(batch["tokens"].shape))
                with log.throughput.paused():
                    ends = _between_steps(run, done, state, ends) or ends
            if ends:
                said = f"stopped and saved at step {done}" if done else "stopped before a step"
                log.write(f"{said}; the same command goes on")
            with log.clock("saving"):
                checkpoints.wait()
    except Diverged as error:
        checkpoints.wait()
        good = checkpoints.steps()[-1:] or ["none"]
        raise Diverged(
            f"{error}; the last good checkpoint is {good[0]}; try a lower "
            "optim.learning_rate, more optim.warmup_steps or a smaller optim.clip_norm"
        ) from None


def _take(run: _Run, next_batch: _NextBatch, state: TrainState, done: int) -> Batch | None:
    """The batch of the step after `done`; None if its rollout was left, since the run shall end."""
    updates, log = run.stage.updates_per_rollout, run.log
    if not updates or done % updates:
        with log.clock("data"):
            batch = next_batch(state, run.frozen, done)
    else:
        log.flush()  # so that the time of a rollout is its own
        make = partial(next_batch, state, run.frozen, done)
        save = partial(_save_once, run, done, state)
        with log.throughput.paused(), log.clock("rollout"):
            left, batch = run.stopping.attempt(make, partial(_out_of_time, run, save))
        if left:
            save()
            return None
    if report := batch.pop("report", None):
        log.rollout(done + 1, report)  # of the first update, lest a resume repeat it
    return batch


def _between_steps(
    run: _Run, done: int, state: TrainState, ends: bool = False, again: str = ""
) -> bool:
    """Evaluates, samples and saves what is due after `done` steps.

    Args:
        ends: the run was asked to end, so it is saved whatever is due.
        again: what was left here as the run was stopped: "evaluation", "sampling" or nothing.

    Returns:
        Whether an evaluation or a sample was left, since the run shall end.
    """
    looks, saves = _due(run, done, ends, again)
    if not looks and not saves:
        return False
    run.log.flush()  # refuses to save, or to go on from, a state that has diverged
    shows = saves or "evaluation" in looks
    save = partial(_save, run, done, state, looks)
    look = partial(_look, run, done, state, looks)
    with machine.between_steps():
        left = bool(looks) and run.stopping.attempt(look, partial(_out_of_time, run, save))[0]
        if (saves or left) and again != "sampling":
            save()
        if shows:
            with run.log.clock("report"):
                run.watch()
    return left


def _due(run: _Run, done: int, ends: bool, again: str) -> tuple[list[str], bool]:
    """What to look at after `done` steps ("evaluation", "sampling"), and whether to save."""
    stage, cfg = run.stage, run.cfg
    now = lambda every: done == cfg.train.steps or (done > 0 and every > 0 and done % every == 0)
    evaluates = stage.evaluate and again != "sampling" and (done == 0 or now(cfg.eval.every))
    samples = (stage.sample or stage.updates_per_rollout) and done > 0 and now(cfg.sample.every)
    looks = [name for name, due in (("evaluation", evaluates), ("sampling", samples)) if due]
    saves = ends or again or now(cfg.checkpoint.every) or done == run.stable
    return looks, done > 0 and bool(saves)


def _look(run: _Run, done: int, state: TrainState, looks: list[str]) -> None:
    """Evaluates and samples; what is done leaves `looks`."""
    average = state.params if state.ema is None else state.ema
    params = everything(average, run.frozen, state.carry)
    stage, log = run.stage, run.log
    while looks:
        with log.clock(looks[0]):
            if looks[0] == "evaluation":
                assert stage.evaluate is not None
                log.held_out(done, stage.evaluate(params))
            else:
                log.samples(done, stage.sample(params) if stage.sample else [])
        looks.pop(0)


def _save(run: _Run, done: int, state: TrainState, looks: list[str]) -> None:
    """Saves the state after `done` steps, and the first of what is still to be looked at."""
    if done == 0:
        return
    with run.log.clock("saving"):
        run.log.keep()
        meta = run.meta | {"left": "".join(looks[:1])}
        run.checkpoints.save(done, state, meta, run.log.held_out_loss(done))
        run.log.note(done)


def _save_once(run: _Run, done: int, state: TrainState) -> None:
    """Saves the state before a rollout, unless that was done when the steps before it were."""
    run.checkpoints.wait()
    if done > 0 and done not in run.checkpoints.steps():
        run.checkpoints.save(done, state, run.meta | {"left": ""})


def _out_of_time(run: _Run, save: Callable[[], None]) -> None:
    """Saves as the grace period is over; the process ends after it."""
    save()
    run.checkpoints.wait()
    run.log.write("stopped and saved after the grace period; the same command goes on")


def everything(params: Params, frozen: Params, carry: Carry) -> Params:
    """What losses and evaluations get: all networks whole, and the carry under the key "carry"."""
    return tree.combine(params, frozen) | {"carry": carry}


def fingerprint(frozen: Params) -> str:
    """sha256 of the frozen weights; empty if everything is trained."""
    leaves = tree.flatten(frozen)
    if not leaves:
        return ""
    digest = hashlib.sha256()
    for name, leaf in leaves.items():
        digest.update(name.encode() + np.asarray(leaf).tobytes())
    return digest.hexdigest()


def _require_whole_rollouts(cfg: RunConfig, updates: int) -> None:
    """Raises ValueError if a checkpoint would fall between the updates of one rollout."""
    if cfg.checkpoint.every % updates:
        raise ValueError(
            f"checkpoint.every={cfg.checkpoint.every}: must be a multiple of {updates}, the "
            "updates that are made of one rollout"
        )


def _values(sums: Metrics) -> dict[str, Array]:
    """sum / weight; a metric with axes is shown by its extremes."""
    values: dict[str, Array] = {}
    for name, (total, weight) in sums.items():
        value = total / weight
        values |= {name: value} if value.ndim == 0 else {
            f"{name}_min": value.min(), f"{name}_max": value.max()
        }  # fmt: skip
    return values


def _cut(batch: Any, num_parts: int) -> Any:
    """[B, ...] -> [parts, B / parts, ...]; part m gets rows m, m + parts, ... of each device.

    Contiguous parts would move rows between devices.
    """
    cut = lambda leaf: jnp.moveaxis(
        leaf.reshape(leaf.shape[0] // num_parts, num_parts, *leaf.shape[1:]), 1, 0
    )
    return jax.tree.map(cut, batch)


def _place(
    stage: Stage, cfg: RunConfig, mesh: Mesh, optimizer: optax.GradientTransformation
) -> tuple[TrainState, Params]:
    """The initial state and the frozen rest, on the mesh; the stage's own arrays stay untouched."""
    trainable, frozen = tree.partition(stage.params, stage.trainable)
    if not jax.tree.leaves(trainable):
        raise ValueError(f"trainable={stage.trainable!r}: matches no parameter")
    make = partial(make_state, optimizer=optimizer, ema=cfg.optim.ema > 0)
    placed = sharding.shardings(mesh, jax.eval_shape(make, trainable, stage.carry))
    # The state is donated step by step, so it must share no buffer with a frozen reference.
    state = jax.jit(make, out_shardings=placed)(trainable, stage.carry)
    return state, jax.device_put(frozen, sharding.shardings(mesh, frozen))


def _resume(
    checkpoints: Checkpoints, state: TrainState, meta: dict[str, Any], cfg: RunConfig
) -> tuple[TrainState, str]:
    """The newest intact checkpoint whose updates are the first ones of this run, or the state as
    it is; and what was left there to be done, as the run was stopped. A cosine that was told where
    to end goes on from wherever it is."""
    told = cfg.optim.schedule == "cosine" and cfg.optim.decay_steps is not None

    def accept(step: int, saved: dict[str, Any]) -> bool:
        before = saved.get("schedule", meta["schedule"])
        return told or optim.goes_on(cfg.optim, cfg.train.steps, tuple(before), step)

    latest = checkpoints.agreed_latest(accept)
    if latest is None:
        if checkpoints.latest_valid() is not None:
            raise ValueError(
                f"train.steps={cfg.train.steps}: no checkpoint is left from before the learning "
                f"rate began to fall; start another --run with --init {cfg.run}"
            )
        return state, ""
    if latest < max(checkpoints.steps()):
        print(f"going on from step {latest}, before the learning rate fell", file=sys.stderr)
    saved = checkpoints.meta(latest)
    if saved["frozen"] != meta["frozen"]:
        raise ValueError("init: the frozen weights are not those that this run began with")
    for change in machine.environment_changes(saved["environment"], meta["environment"]):
        print(f"warning: the resumed run may differ in the last bits: {change}", file=sys.stderr)
    with machine.between_steps():
        return checkpoints.restore(latest, state), saved.get("left", "")


@contextlib.contextmanager
def _batches(stage: Stage, mesh: Mesh, cfg: RunConfig, start: int) -> Iterator[_NextBatch]:
    """The function that gives each step its batch, made ahead by a thread where possible."""
    make = stage.next_batch
    assert make is not None, "a stage without data cannot be trained"
    if stage.updates_per_rollout:
        yield lambda state, frozen, step: make(
            everything(state.params, frozen, state.carry), state.carry, step
        )
        return
    made: queue.Queue[Batch | BaseException] = queue.Queue(PREFETCHED)
    closed = threading.Event()

    def put(item: Batch | BaseException) -> None:
        while not closed.is_set():
            with contextlib.suppress(queue.Full):
                return made.put(item, timeout=0.1)

    def work() -> None:
        try:
            with jax.set_mesh(mesh):
                for step in range(start, cfg.train.steps):
                    put(make({}, {}, step))
                    if closed.is_set():
                        return
        except BaseException as error:  # raised again where the batch is asked for
            put(error)

    def take(state: TrainState, frozen: Params, step: int) -> Batch:
        item = made.get()
        if isinstance(item, BaseException):
            raise item
        return item

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield take
    finally:
        closed.set()
        thread.join()


@contextlib.contextmanager
def _profiler(cfg: RunConfig) -> Iterator[Callable[[int], None]]:
    """What to call before each step: JAX's profiler traces those of log.profile."""
    first, last = map(int, cfg.log.profile.split(":")) if cfg.log.profile else (0, -1)
    tracing = False

    def trace(step: int) -> None:
        nonlocal tracing
        if tracing != (first <= step <= last):
            tracing = not tracing
            if tracing:
                jax.profiler.start_trace(f"{cfg.run}/profile")
            else:
                jax.profiler.stop_trace()

    try:
        yield trace
    finally:
        trace(-1)
