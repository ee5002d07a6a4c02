"""The laws of learning from rewards, on a tiny random network that practises two letters."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgpt import (
    checkpoint,
    metrics,
    peft,
    rollouts,
    run,
    scoring,
    sharding,
    stages,
    tasks,
    train,
    tree,
)
from jaxgpt.config import (
    CheckpointConfig,
    DistillConfig,
    EvalConfig,
    GrpoConfig,
    LogConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    PeftConfig,
    PolicyConfig,
    PpoConfig,
    RolloutConfig,
    SampleConfig,
    TrainConfig,
)
from jaxgpt.convert import chatting
from jaxgpt.convert.load import Loaded
from jaxgpt.data import synthetic
from jaxgpt.data import tokenizer as tokenizers
from jaxgpt.model import gpt
from jaxgpt.stages import distill, grpo, ppo
from jaxgpt.tasks import Task

MODEL = ModelConfig(
    vocab_size=260, context_length=96, num_layers=1, model_dim=16, num_heads=2, mlp_dim=32,
    position="rope",
)  # fmt: skip
ROLLOUT = RolloutConfig(updates=2, samples=4, max_new_tokens=16)
KINDS: dict[str, PolicyConfig] = {
    "grpo": GrpoConfig(kl=0.1, entropy=0.01, rollout=ROLLOUT),
    "ppo": PpoConfig(rollout=replace(ROLLOUT, updates=4, epochs=2, samples=1), kl_target=0.1),
}


def by_length(problem: int, text: str) -> float:
    """A reward that differs from answer to answer of a random network."""
    return len(text) % 3 / 2


@pytest.fixture(autouse=True)
def letters(monkeypatch: pytest.MonkeyPatch) -> None:
    """The task `letters`: six one-letter questions to train on and five held out."""
    ask = lambda problem: tasks.asks("abcdefghijk"[problem])
    split = lambda held_out: range(6, 11) if held_out else range(6)
    monkeypatch.setitem(tasks.TASKS, "letters", Task(split, ask, by_length))


def make(kind: str, folder: Path, **changes: Any) -> tuple[Any, Loaded]:
    tokenizer = tokenizers.load("byte")
    start = Loaded(MODEL, gpt.init(MODEL, jax.random.key(3)), tokenizer)
    start = chatting.with_format(start, chatting.chat_format(start))
    # A random network seldom draws the one token that ends a turn.
    start = start._replace(stop_ids=(*start.stop_ids, *range(200, 230)))
    cfg = replace(
        KINDS[kind], run=str(folder), model=MODEL, seed=1,
        data=replace(KINDS[kind].data, path="letters"),
        train=TrainConfig(steps=8, batch_size=8, loss_chunk=0),
        optim=OptimConfig(learning_rate=3e-3, warmup_steps=1),
        checkpoint=CheckpointConfig(every=4), eval=EvalConfig(every=4, batches=1),
        sample=SampleConfig(every=4, prompts=[]), log=LogConfig(every=1),
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    return replace(cfg, **changes), start


def build(cfg: Any, start: Loaded) -> train.Stage:
    names = {GrpoConfig: "grpo", PpoConfig: "ppo", DistillConfig: "distill"}
    return stages.STAGES[names[type(cfg)]].data(cfg, start)


def fit(cfg: Any, start: Loaded, change: Callable = lambda stage: stage) -> None:
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        train.fit(change(build(cfg, start)), cfg, mesh)


def arrays_of(run: Path, step: int) -> dict[str, np.ndarray]:
    return checkpoint.read_arrays(run / "checkpoints" / str(step))


@pytest.mark.parametrize("kind", ["grpo", pytest.param("ppo", marks=pytest.mark.slow)])
def test_a_run_killed_within_a_rollout_ends_as_if_it_had_not_been(kind: str, tmp_path: Path):
    class Killed(BaseException):
        pass

    def killed(stage: train.Stage) -> train.Stage:
        def next_batch(params, carry, step):
            if step == 5:  # a checkpoint was made at 4
                raise Killed
            return stage.next_batch(params, carry, step)

        return stage._replace(next_batch=next_batch)

    fit(*make(kind, tmp_path / "whole"))
    with pytest.raises(Killed):
        fit(*make(kind, tmp_path / "killed"), change=killed)
    fit(*make(kind, tmp_path / "killed"))
    whole, resumed = (arrays_of(tmp_path / name, 8) for name in ("whole", "killed"))
    chex.assert_trees_all_equal(whole, resumed)
    first = arrays_of(tmp_path / "whole", 4)
    assert any((first[name] != whole[name]).any() for name in whole if "policy" in name)
    lines = {
        name: [
            {k: v for k, v in line.items() if not k.startswith("speed/")}
            for line in metrics.read_jsonl(tmp_path / name / "metrics.jsonl")
        ]
        for name in ("whole", "killed")
    }
    assert [line for line in lines["killed"] if "rollout/reward" in line] == [
        line for line in lines["whole"] if "rollout/reward" in line
    ]
    assert [line["step"] for line in lines["whole"] if "val/exact_match" in line] == [0, 4, 8]
    samples = metrics.read_samples(tmp_path / "whole" / "samples.md")
    assert [step for step, _ in samples] == [4, 8] and "[reward" in samples[0][1][0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_practice_earns_more_reward(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A fifth of what a random network writes is ASCII letters; all of it could be."""
    share = lambda problem, text: sum(c.isascii() and c.isalpha() for c in text) / max(len(text), 1)
    monkeypatch.setitem(tasks.TASKS, "letters", tasks.TASKS["letters"]._replace(reward=share))
    cfg, start = make(
        kind, tmp_path, train=TrainConfig(steps=80, batch_size=16, loss_chunk=0),
        optim=OptimConfig(learning_rate=1e-2, warmup_steps=1, schedule="constant"),
        checkpoint=CheckpointConfig(every=80), eval=EvalConfig(every=0, batches=1),
    )  # fmt: skip
    fit(replace(cfg, kl=0.0, **({"kl_target": 0.0} if kind == "ppo" else {})), start)
    lines = metrics.read_jsonl(tmp_path / "metrics.jsonl")
    rewards = [line["rollout/reward"] for line in lines if "rollout/reward" in line]
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.3, rewards


# ---- what one step computes


class Recorded(NamedTuple):
    """A rollout that was made once, on one device."""

    cfg: Any
    start: Loaded
    rows: rollouts.Rows


def record(kind: str, folder: Path, **changes: Any) -> Recorded:
    cfg, start = make(kind, folder, **changes)
    with jax.set_mesh(sharding.make_mesh(MeshConfig(), jax.devices()[:1])):
        stage = build(cfg, start)
        whole = {**stage.params, "carry": stage.carry}
        rows, _ = stage.next_batch.roll(whole, stage.carry, 0)  # type: ignore[attr-defined]
    return Recorded(cfg, start, rows)


def first_update(recorded: Recorded, mesh_cfg: MeshConfig, parts: int) -> tuple[Any, Any, Any]:
    """Metrics, the gradient's step and the carry after a minibatch of the recorded rollout."""
    cfg = replace(recorded.cfg, train=replace(recorded.cfg.train, micro_batches=parts))
    mesh = sharding.make_mesh(mesh_cfg)
    with jax.set_mesh(mesh):
        stage = build(cfg, recorded.start)
        stage.next_batch._rows = (0, recorded.rows)  # type: ignore[attr-defined]
        state, frozen = train._place(stage, cfg, mesh, optax.sgd(1.0))
        before = jax.device_get(state.params)
        step = jax.jit(train.make_step(stage, cfg, optax.sgd(1.0)))
        state, measures = step(state, frozen, stage.next_batch({}, {}, 1))
        moved = jax.tree.map(np.subtract, jax.device_get(state.params), before)
        return jax.device_get(measures), moved, jax.device_get(state.carry)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_meshes_and_micro_batches_learn_the_same_from_a_recorded_rollout(kind, tmp_path):
    recorded = record(kind, tmp_path)
    expected = first_update(recorded, MeshConfig(data=8), 1)
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected[1])) > 1e-4
    found = first_update(recorded, MeshConfig(data=2, fsdp=2, tensor=2), 2)
    chex.assert_trees_all_close(found, expected, atol=1e-5, rtol=1e-4)


def curve(
    cfg: Any, start: Loaded, mesh: jax.sharding.Mesh, batches: list[Any]
) -> tuple[list[float], list[Any]]:
    """The losses of 20 steps on recorded batches, or on new ones, and those batches."""
    losses, read = [], []
    with jax.set_mesh(mesh):
        stage, optimizer = build(cfg, start), optax.adam(3e-3)
        state, frozen = train._place(stage, cfg, mesh, optimizer)
        step = jax.jit(train.make_step(stage, cfg, optimizer))
        for number in range(20):
            if batches:
                batch = sharding.place_rows(
                    mesh, cfg.train.batch_size,
                    lambda rows, n=number: {name: a[rows] for name, a in batches[n].items()},
                )  # fmt: skip
            else:
                whole = train.everything(state.params, frozen, state.carry)
                batch = {**stage.next_batch(whole, state.carry, number)}
                batch.pop("report", None)
            read.append(jax.device_get(batch))
            state, measures = step(state, frozen, batch)
            losses.append(float(measures["loss"]))
    return losses, read


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_losses_of_recorded_rollouts_agree_over_meshes(kind, tmp_path):
    cfg, start = make(kind, tmp_path)
    alone = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    expected, batches = curve(cfg, start, alone, [])
    assert np.ptp(expected) > 1e-2
    for sizes in ({"data": 8}, {"data": 1, "fsdp": 8}, {"fsdp": 2, "tensor": 2}, {"context": 4}):
        losses, _ = curve(cfg, start, sharding.make_mesh(MeshConfig(**sizes)), batches)
        np.testing.assert_allclose(losses, expected, atol=1e-4, err_msg=str(sizes))


@pytest.mark.slow
def test_eight_devices_draw_what_one_draws(tmp_path):
    cfg, start = make("grpo", tmp_path)
    found = []
    for devices in (jax.devices()[:1], jax.devices()):
        with jax.set_mesh(sharding.make_mesh(MeshConfig(), devices)):
            stage = build(cfg, start)
            params = jax.device_put(stage.params, sharding.replicated(jax.sharding.get_mesh()))
            rows, _ = stage.next_batch.roll({**params, "carry": {}}, {}, 0)  # type: ignore[attr-defined]
            found.append(rows)
    np.testing.assert_array_equal(found[0]["tokens"], found[1]["tokens"])
    np.testing.assert_allclose(found[0]["logprobs"], found[1]["logprobs"], atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_sampler_and_trainer_are_one_policy(dtype, tmp_path):
    rollout = replace(ROLLOUT, temperature=0.7)
    cfg, start = make("grpo", tmp_path, rollout=rollout, model=replace(MODEL, dtype=dtype))
    # Far from the flat distribution of initialisation.
    loud = tree.map_named(lambda n, x: x if n.endswith("scale") else 6 * x, start.params)
    with jax.set_mesh(sharding.make_mesh(MeshConfig(), jax.devices()[:1])):
        stage = build(cfg, start)
        params = {"policy": loud, "reference": loud, "carry": {}}
        _, report = stage.next_batch.roll(params, {}, 0)  # type: ignore[attr-defined]
        largest = report.measures["rollout/difference_max"]
        assert 0 < largest < rollouts.AGREEMENT[dtype]
        stage.next_batch.score = jax.jit(  # type: ignore[attr-defined]
            lambda params, batch: grpo.score(replace(cfg, rollout=ROLLOUT), params, batch)
        )
        with pytest.raises(FloatingPointError, match="differ by"):
            stage.next_batch.roll(params, {}, 0)  # type: ignore[attr-defined]


def test_one_token_in_a_thousand_may_differ_more(tmp_path):
    with jax.set_mesh(sharding.make_mesh(MeshConfig(), jax.devices()[:1])):
        require = build(*make("grpo", tmp_path)).next_batch._require_agreement  # type: ignore[attr-defined]
    measures = {"rollout/difference_max": 1e-2, "rollout/difference_p999": 9e-5}
    require(measures)
    for high in (2e-4, float("nan")):
        with pytest.raises(FloatingPointError, match="at one token in a thousand"):
            require(measures | {"rollout/difference_p999": high})


def test_a_first_rollout_without_a_stop_token_is_refused(tmp_path):
    cfg, start = make("grpo", tmp_path)
    with pytest.raises(ValueError, match=r"rollout\.max_new_tokens=16: none of 16 answers"):
        fit(cfg, start._replace(stop_ids=(260,)))


def test_checkpoints_between_rollouts_only(tmp_path):
    cfg, start = make("grpo", tmp_path, checkpoint=CheckpointConfig(every=3))
    refuse = lambda *_: pytest.fail("sampled")
    with pytest.raises(ValueError, match=r"checkpoint\.every=3: must be a multiple of 2"):
        fit(cfg, start, lambda stage: stage._replace(next_batch=refuse, evaluate=refuse))


# ---- PPO's numbers


def test_ppo_puts_the_reward_on_the_last_token_and_the_penalty_on_all():
    mask_BT = np.float32([[0, 1, 1, 0], [0, 1, 0, 1]])
    logprobs_BT = np.float32([[9, -1.0, -2.0, 9], [9, -0.5, 9, -1.5]])
    reference_BT = np.float32([[0, -1.5, -1.0, 0], [0, -0.5, 0, -2.5]])
    rows = {
        "mask": mask_BT, "logprobs": logprobs_BT, "reference": reference_BT,
        "values": np.zeros((2, 4), np.float32), "reward": np.float32([1, 0]),
        "learnt": np.float32([0.25, -0.5]),
    }  # fmt: skip
    cfg = PpoConfig(reward_model="x", rule_weight=2.0, lam=1.0)
    made, measures = ppo.advantages(cfg, rows, {"kl_weight": np.float32(0.1)})
    # Row 0: penalties -0.05 and +0.1, reward 2.25; row 1: 0 and -0.1, reward -0.5.
    expected = np.float32([[0, 2.3, 2.35, 0], [0, -0.6, 0, -0.6]])
    np.testing.assert_allclose(made["returns"], expected, atol=1e-6)
    own = expected[mask_BT > 0]
    white = (expected - own.mean()) / own.std(ddof=1) * mask_BT
    np.testing.assert_allclose(made["advantages"], white, atol=1e-5)
    np.testing.assert_allclose(measures["rollout/kl"], (0.5 - 1 + 0 + 1) / 2)


def test_an_answer_left_out_has_no_reward_in_ppo():
    zero_BT = np.zeros((1, 3), np.float32)
    rows = dict.fromkeys(("mask", "logprobs", "reference", "values"), zero_BT)
    made, _ = ppo.advantages(PpoConfig(), rows | {"reward": np.float32([1])}, {"kl_weight": 0.1})
    assert not made["returns"].any() and not made["advantages"].any()


def run_of_updates(cfg, kl_weight, kls=(3.0, 3.0, 3.0), moved=(0.0, 0.0, 0.0)):
    """The carries after a rollout's updates, of four answers and forty tokens each."""
    carry = {n: jnp.float32(0) for n in ("update", "stopped", "kl", "answers")}
    carry["kl_weight"] = jnp.float32(kl_weight)
    carries = []
    for kl, far in zip(kls, moved, strict=True):
        sums = {
            "policy/kl_of_update": (jnp.float32(far * 40), jnp.float32(40)),
            "policy/kl": (jnp.float32(kl * 4), jnp.float32(4)),
        }
        carry = ppo.after_step(cfg, carry, sums)
        carries.append({name: float(value) for name, value in carry.items()})
    return carries


def test_the_carry_stops_a_rollout_that_went_too_far():
    cfg = PpoConfig(kl_stop=0.05, rollout=RolloutConfig(updates=3, samples=1))
    carries = run_of_updates(cfg, 0.1, moved=(0.04, 0.06, 0.01))
    assert [carry["stopped"] for carry in carries] == [0, 1, 0]  # the last one ends the rollout
    assert carries[-1]["update"] == carries[-1]["kl"] == 0
    assert [carry["kl_weight"] for carry in carries] == [pytest.approx(0.1)] * 3


@pytest.mark.parametrize(
    "kls, start, end",
    [
        ((2.0, 3.0, 4.0), 0.2, 0.3),  # by the mean over its target
        ((8.0, 8.0, 8.0), 0.2, 0.4),  # at most twice as heavy
        ((0.1, 0.1, 0.1), 0.8, 0.4),  # at most half
        ((0.1, 0.1, 0.1), 0.15, 0.1),  # never below kl
    ],
)
def test_the_weight_of_kl_follows_its_budget(kls, start, end):
    cfg = PpoConfig(kl=0.1, kl_target=2.0, rollout=RolloutConfig(updates=3, samples=1))
    weights = [carry["kl_weight"] for carry in run_of_updates(cfg, start, kls)]
    assert weights == pytest.approx([start, start, end])


@pytest.mark.slow
def test_a_stopped_rollout_changes_nothing(tmp_path):
    recorded = record("ppo", tmp_path, kl_stop=1e-9)
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        stage = build(recorded.cfg, recorded.start)
        stage.next_batch._rows = (0, recorded.rows)  # type: ignore[attr-defined]
        state, frozen = train._place(stage, recorded.cfg, mesh, optax.adam(1e-2))
        step = jax.jit(train.make_step(stage, recorded.cfg, optax.adam(1e-2)))
        seen = []
        for number in (1, 2, 3):
            state, measures = step(state, frozen, stage.next_batch({}, {}, number))
            seen.append((jax.device_get((state.params, state.opt_state)), float(measures["loss"])))
    moved = lambda a, b: any(
        (x != y).any() for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True)
    )
    assert moved(seen[0][0], seen[1][0])  # the first two learn, and the second finds it went far
    chex.assert_trees_all_equal(seen[1][0], seen[2][0])
    assert seen[2][1] == 0


# ---- with adapters, and from a teacher


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_learn_and_their_base_is_the_reference(kind, tmp_path):
    cfg, start = make(kind, tmp_path, peft=PeftConfig(kind="lora", rank=2))
    adapted = peft.add(cfg.peft, start.params, jax.random.key(0))
    fit(cfg, start._replace(params=adapted), lambda stage: run.efficient(cfg.peft, stage))
    trained = checkpoint.read_arrays(tmp_path / "checkpoints" / "8")
    names = [name for name in trained if name.startswith("params/")]
    assert names and all("/kernel/" in name or "/score/" in name for name in names)
    lines = metrics.read_jsonl(tmp_path / "metrics.jsonl")
    key = "rollout/kl" if kind == "ppo" else "policy/kl"
    kls = [line[key] for line in lines if key in line]
    assert abs(kls[0]) < 1e-5 < abs(kls[-1])


@pytest.mark.slow
def test_a_student_nears_its_teacher_on_its_own_answers(tmp_path, monkeypatch):
    whole = synthetic.problems
    monkeypatch.setattr(synthetic, "problems", lambda held: list(whole(held))[:20])
    shared, start = make("grpo", tmp_path)
    teacher = start._replace(params=gpt.init(MODEL, jax.random.key(4)))
    monkeypatch.setattr(stages.distill, "_load_teacher", lambda *_: teacher)
    same = ("run", "model", "train", "checkpoint", "eval", "sample", "log")
    cfg = DistillConfig(
        **{name: getattr(shared, name) for name in same}, on_policy=True, divergence="jsd",
        optim=OptimConfig(learning_rate=1e-2, warmup_steps=0),
        rollout=RolloutConfig(samples=1, max_new_tokens=16),
    )  # fmt: skip
    fit(cfg, start)
    lines = metrics.read_jsonl(tmp_path / "metrics.jsonl")
    kls = [line["val/kl"] for line in lines if "val/kl" in line]
    assert kls[-1] < 0.9 * kls[0]
    told = next(line for line in lines if "rollout/length" in line)
    assert "rollout/reward" not in told  # nobody gave one
    assert any("train/jsd" in line for line in lines)


def minibatch(cfg: PpoConfig, network: dict) -> tuple[dict, dict]:
    """Random arrays as `ppo.loss` reads them, and its networks."""
    rng = np.random.default_rng(0)
    stage = ppo.objective(cfg, network)
    batch = {name: rng.normal(size=a.shape).astype(a.dtype) for name, a in stage.batch.items()}
    for name in ("tokens", "targets"):
        batch[name] = rng.integers(0, MODEL.vocab_size, batch[name].shape).astype(np.int32)
    batch["segments"] = np.ones_like(batch["tokens"])
    batch["mask"] = (rng.random(batch["mask"].shape) < 0.5).astype(np.float32)
    params = {**stage.params, "value": ppo._value(cfg, network), "carry": stage.carry}
    params["value"]["score"]["kernel"] += 0.1
    return params, batch


def test_the_penalty_for_leaving_the_reference_stands_where_kl_in_says():
    cfg = replace(make("ppo", Path("unused"))[0], kl=0.3)
    network = gpt.init(MODEL, jax.random.key(3))
    params, batch = minibatch(cfg, network)
    whole = lambda where: ppo.loss(replace(cfg, kl_in=where), params, batch, jnp.zeros(0))[0]
    hidden_BTD, _ = ppo.hidden_and_values(cfg, params, batch)
    logprobs_BT, _ = scoring.token_scores(
        MODEL, network, hidden_BTD, batch, cfg.rollout.temperature, 0
    )
    ratio_BT = batch["reference"] - logprobs_BT
    k3_BT = jnp.exp(ratio_BT) - 1 - ratio_BT
    expected = 0.3 * (k3_BT * batch["mask"]).sum()
    np.testing.assert_allclose(whole("loss") - whole("reward"), expected, rtol=1e-3)

    rows = {**batch, "reward": np.ones(len(batch["mask"]), np.float32)}
    carry = {"kl_weight": np.float32(0.3)}
    made = {
        where: ppo.advantages(replace(cfg, kl_in=where), rows, carry)[0]["returns"]
        for where in ("reward", "loss")
    }
    moved = {**rows, "reference": rows["reference"] + 1}
    again = ppo.advantages(replace(cfg, kl_in="loss"), moved, carry)[0]["returns"]
    np.testing.assert_array_equal(made["loss"], again)
    assert (made["loss"] != made["reward"]).any()


def test_the_value_loss_has_its_weight_and_its_clip():
    cfg, network = make("ppo", Path("unused"))[0], gpt.init(MODEL, jax.random.key(3))
    params, batch = minibatch(cfg, network)
    of = lambda **changes: ppo.loss(replace(cfg, **changes), params, batch, jnp.zeros(0))
    (one, _, sums), (three, *_) = of(value_weight=1.0), of(value_weight=3.0)
    np.testing.assert_allclose(three - one, 2 * sums["value/loss"][0], rtol=1e-4)
    (tight, _, bound), (wide, _, free) = of(value_clip=1e-6), of(value_clip=1e6)
    # A value that may not move counts as the old one, and as itself where that is worse.
    assert tight > wide
    # Rounding alone was counted as clipping: about half of all tokens, whatever the clip.
    assert bound["value/clip_fraction"][0] > 0 == free["value/clip_fraction"][0]


def test_grpo_hands_its_settings_to_the_rollouts(tmp_path: Path):
    cfg, start = make("grpo", tmp_path, resample=2)
    cfg = replace(cfg, data=replace(cfg.data, format_weight=0.5))
    with jax.set_mesh(sharding.make_mesh(MeshConfig(), jax.devices()[:1])):
        made = build(cfg, start).next_batch
    assert made.resample == 2 and made.problems.full == "full_reward"


def test_sequence_level_distillation_learns_the_teachers_answers(tmp_path, monkeypatch):
    """Written once, kept in the run's directory, and read from there when the run goes on."""
    cfg = DistillConfig(run=str(tmp_path), model=MODEL, sequence_level=True, teacher="teacher",
                        train=TrainConfig(batch_size=8, loss_chunk=0))  # fmt: skip
    _, start = make("grpo", tmp_path)
    written = []

    def write(cfg, teacher, said, form, width) -> list[str]:
        written.append(len(said))
        row = {
            "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "zz"}]
        }
        return [json.dumps(row) + "\n"] * 9

    monkeypatch.setattr(distill, "_write_answers", write)
    monkeypatch.setattr(distill, "_load_teacher", lambda *_: start)
    with jax.set_mesh(sharding.make_mesh(MeshConfig(), jax.devices()[:1])):
        for _ in range(2):
            batch = build(cfg, start).next_batch({}, {}, 0)
    assert len(written) == 1 and (tmp_path / "teacher_answers.jsonl").exists()
    learned = np.asarray(batch["targets"])[np.asarray(batch["mask"]) > 0]
    assert set(learned.tolist()) <= {ord("z"), *start.stop_ids, ord("\n")}
