"""The laws of the four offline stages, on a tiny network and the embedded tasks."""

import re
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import chex
import jax
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

from jaxgpt import peft, rundir, sharding, stages, train, tree
from jaxgpt.config import (
    CheckpointConfig,
    DistillConfig,
    DpoConfig,
    EvalConfig,
    LogConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    PeftConfig,
    RewardConfig,
    RunConfig,
    SampleConfig,
    SftConfig,
    TrainConfig,
)
from jaxgpt.convert import chatting
from jaxgpt.convert.load import Loaded
from jaxgpt.data import examples, synthetic
from jaxgpt.data import tokenizer as tokenizers
from jaxgpt.model import gpt
from jaxgpt.run import efficient

# With remat the layers stay rolled, which compiles in half the time.
MODEL = ModelConfig(
    vocab_size=260, context_length=128, num_layers=2, model_dim=16, num_heads=2, mlp_dim=32,
    position="rope", remat="full",
)  # fmt: skip
LORA = PeftConfig(kind="lora", rank=2, alpha=4.0, dropout=0.3)
BOTTLENECK = PeftConfig(kind="adapter", adapter_dim=8)
PARALLEL = PeftConfig(kind="adapter", adapter_dim=8, adapter_parallel=True)
KINDS: dict[str, Any] = {
    "sft": SftConfig(),
    "reward": RewardConfig(),
    "dpo": DpoConfig(),
    "ipo": DpoConfig(loss="ipo"),
    "orpo": DpoConfig(loss="orpo"),
    "kto": DpoConfig(loss="kto"),
    "precomputed": DpoConfig(reference="precomputed"),
    "distill": DistillConfig(divergence="jsd", temperature=2.0, hard=0.3),
    "top_k": DistillConfig(top_k=5),
    "sft-qlora": SftConfig(peft=replace(LORA, kind="qlora", quantize="int8")),
    "reward-adapter": RewardConfig(peft=BOTTLENECK),
    "dpo-lora": DpoConfig(peft=LORA),
    "dpo-adapter": DpoConfig(peft=PARALLEL),
    "distill-lora": DistillConfig(peft=LORA),
}
# The laws are slow to compile for every variant; one, with all that can go wrong, stands for all.
QUICK = "dpo-lora"
EVERY = [kind if kind == QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
STAGE = {"ipo": "dpo", "orpo": "dpo", "kto": "dpo", "precomputed": "dpo", "top_k": "distill"}


class Run(NamedTuple):
    cfg: RunConfig
    start: Loaded


@pytest.fixture(autouse=True)
def few_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forty problems instead of fifteen thousand."""
    whole = synthetic.problems
    monkeypatch.setattr(synthetic, "problems", lambda held: list(whole(held))[:40])


def make(kind: str, tmp_path: Path, **changes: Any) -> Run:
    tokenizer = tokenizers.load("byte")
    cfg = replace(KINDS[kind], **changes)
    model = peft.model_config(cfg.peft, MODEL)
    params = gpt.init(model, jax.random.key(3))
    if cfg.peft.kind == "qlora":
        params = tree.map_named(peft.place(cfg.peft), params)
    start = Loaded(model, peft.add(cfg.peft, params, jax.random.key(5)), tokenizer)
    start = chatting.with_format(start, chatting.chat_format(start))
    cfg = replace(
        cfg, run=str(tmp_path / kind), model=model,
        train=TrainConfig(steps=4, batch_size=8, loss_chunk=100),
        optim=OptimConfig(learning_rate=1e-2, warmup_steps=1),
        checkpoint=CheckpointConfig(every=2), eval=EvalConfig(every=2, batches=1),
        log=LogConfig(every=1), sample=SampleConfig(prompts=[]),
    )  # fmt: skip
    Path(cfg.run).mkdir(parents=True, exist_ok=True)
    return Run(cfg, start)


def stage_of(kind: str, cfg: RunConfig, start: Loaded) -> train.Stage:
    name = kind.split("-")[0]
    return efficient(cfg.peft, stages.STAGES[STAGE.get(name, name)].data(cfg, start))


@pytest.fixture(autouse=True)
def another_network_as_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    """The teacher is random, and not the student."""
    params = gpt.init(MODEL, jax.random.key(4))
    teacher = Loaded(MODEL, params, tokenizers.load("byte"), stop_ids=(258,))
    monkeypatch.setattr(stages.distill, "_load_teacher", lambda *_: teacher)


def mesh_of(**sizes: int) -> Mesh:
    """On as many devices as the sizes ask for."""
    return sharding.make_mesh(
        MeshConfig(**{"data": 1} | sizes), jax.devices()[: prod(sizes.values())]
    )


def first_update(run: Run, kind: str, mesh: Mesh | None = None, parts: int = 1) -> tuple[Any, Any]:
    """The metrics and the gradient's step of the first batch; on one device if not said."""
    cfg = replace(run.cfg, train=replace(run.cfg.train, micro_batches=parts))
    mesh = mesh or mesh_of()
    with jax.set_mesh(mesh):
        stage = stage_of(kind, cfg, placed(run.start, mesh))
        state, frozen = train._place(stage, cfg, mesh, optax.sgd(1.0))
        before = jax.device_get(state.params)
        step = jax.jit(train.make_step(stage, cfg, optax.sgd(1.0)))
        state, measures = step(state, frozen, stage.next_batch({}, {}, 0))
        moved = jax.tree.map(np.subtract, jax.device_get(state.params), before)
        return jax.device_get(measures), tree.flatten(moved)  # by name: frozen networks are absent


def placed(start: Loaded, mesh: Mesh) -> Loaded:
    """As `launch` gives it to a stage."""
    at = sharding.shardings(mesh, {"policy": start.params})["policy"]
    return start._replace(params=jax.device_put(start.params, at))


MESHES = [
    ({"data": 2, "fsdp": 2, "tensor": 2}, 2),
    pytest.param({"data": 8}, 1, marks=pytest.mark.slow),
    pytest.param({"fsdp": 8}, 1, marks=pytest.mark.slow),
    pytest.param({"data": 1}, 4, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("sizes", "parts"), MESHES)
@pytest.mark.parametrize("kind", EVERY)
def test_meshes_and_micro_batches_give_the_same_gradient(
    kind: str, sizes: dict[str, int], parts: int, tmp_path: Path
) -> None:
    run = make(kind, tmp_path)
    parts = 1 if kind == "kto" else parts  # whose reference point is a mean over the micro-batch
    expected = first_update(run, kind)
    found = first_update(run, kind, mesh_of(**sizes), parts)
    chex.assert_trees_all_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_ends_like_an_uninterrupted_one(kind: str, tmp_path: Path) -> None:
    ends = []
    for folder, stops in (("whole", (4,)), ("cut", (2, 4))):
        run = make(kind, tmp_path / folder)
        mesh = mesh_of()
        for steps in stops:
            cfg = replace(run.cfg, train=replace(run.cfg.train, steps=steps))
            cfg = replace(cfg, optim=replace(cfg.optim, decay_steps=4))
            with jax.set_mesh(mesh):
                train.fit(stage_of(kind, cfg, placed(run.start, mesh)), cfg, mesh)
        ends.append(rundir.read_params(cfg.run))
    assert jax.tree.leaves(ends[0])
    jax.tree.map(np.testing.assert_array_equal, *ends)


@pytest.mark.parametrize("sizes", [{"data": 1}, {"fsdp": 8}])
def test_dpo_with_lora_keeps_its_base_once(sizes: dict[str, int], tmp_path: Path) -> None:
    """The reference is the policy's base, buffer by buffer, not a copy of it."""
    run, mesh = make("dpo-lora", tmp_path), mesh_of(**sizes)
    base = peft.without(run.start.params)
    with jax.set_mesh(mesh):
        stage = stage_of("dpo", run.cfg, placed(run.start, mesh))
        _, frozen = train._place(stage, run.cfg, mesh, optax.sgd(1.0))
    shards = [s.data for leaf in jax.tree.leaves(frozen) for s in leaf.addressable_shards]
    held = {shard.unsafe_buffer_pointer(): shard.nbytes for shard in shards}
    assert len(jax.tree.leaves(frozen)) == 2 * len(jax.tree.leaves(base))
    cut = [s.data for leaf in jax.tree.leaves(frozen["reference"]) for s in leaf.addressable_shards]
    assert sum(held.values()) == sum(shard.nbytes for shard in cut)


def test_a_fresh_policy_is_its_own_reference(tmp_path: Path) -> None:
    measures, _ = first_update(make("dpo", tmp_path), "dpo")
    assert np.isclose(measures["loss"], np.log(2), atol=1e-6)
    assert abs(measures["reward/margin"]) < 1e-6


def test_live_and_precomputed_references_agree(tmp_path: Path) -> None:
    live = first_update(make("dpo", tmp_path), "dpo")
    stored = first_update(make("precomputed", tmp_path), "precomputed")
    again = first_update(make("precomputed", tmp_path), "precomputed")  # from disk
    chex.assert_trees_all_close(stored, live, atol=1e-5)
    chex.assert_trees_all_equal(again, stored)


def test_a_reference_on_disk_of_another_network_is_refused(tmp_path: Path) -> None:
    run = make("precomputed", tmp_path)
    first_update(run, "precomputed")
    other = run.start._replace(params=gpt.init(MODEL, jax.random.key(9)))
    with pytest.raises(ValueError, match="of another network"):
        first_update(Run(run.cfg, other), "precomputed")


@pytest.mark.slow
def test_the_likeliest_tokens_on_disk_stand_for_a_live_teacher(tmp_path: Path) -> None:
    live = make("top_k", tmp_path / "live", top_k=0)
    stored = make("top_k", tmp_path / "stored", top_k=259)  # all of them but one
    found = [first_update(run, "distill") for run in (stored, live)]
    chex.assert_trees_all_close(*found, atol=1e-5)


def test_a_student_equal_to_its_teacher_has_nothing_to_learn(tmp_path: Path) -> None:
    run = make("distill", tmp_path, hard=0.0)
    same = run.start._replace(params=gpt.init(MODEL, jax.random.key(4)))
    measures, moved = first_update(Run(run.cfg, same), "distill")
    assert abs(measures["loss"]) < 1e-6
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(moved)) < 1e-5


def test_a_teacher_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    run = make("distill", tmp_path)
    other = run.start._replace(config=replace(MODEL, vocab_size=261))
    with pytest.raises(ValueError, match="another vocabulary"):
        first_update(Run(run.cfg, other), "distill")


def test_the_layers_of_a_student_are_the_teachers() -> None:
    cfg = replace(MODEL, num_layers=5)
    params = gpt.init(cfg, jax.random.key(0))
    student = stages.distill.some_layers(cfg, params, 3)
    kernel = lambda tree: tree["blocks"]["mlp"]["up"]["kernel"]
    chex.assert_trees_all_equal(kernel(student), kernel(params)[np.array([0, 2, 4])])
    chex.assert_trees_all_equal(student["embed"], params["embed"])


def test_the_reward_does_not_see_the_padding(tmp_path: Path) -> None:
    run = make("reward", tmp_path)
    with jax.set_mesh(mesh_of()):
        stage = stages.STAGES["reward"].data(run.cfg, run.start)
        batch = stage.next_batch({}, {}, 0)
        wide = {
            name: np.pad(array, [(0, 0), (0, 0), (0, 24)]) if array.ndim == 3 else array
            for name, array in batch.items()
        }
        wide["tokens"][:, :, -24:] = 7  # whatever stands there
        score = lambda batch: stages.reward.score_pairs(MODEL, stage.params, batch)
        chex.assert_trees_all_close(score(wide), score(batch), atol=1e-5)


def test_data_without_an_end_of_turn_is_refused(tmp_path: Path) -> None:
    run = make("sft", tmp_path)
    short = replace(run.cfg, data=replace(run.cfg.data, max_tokens=40))
    with pytest.raises(ValueError, match="not learn to stop"):
        first_update(Run(short, run.start), "sft")


def test_data_without_any_target_is_refused(tmp_path: Path) -> None:
    run = make("sft", tmp_path)
    short = replace(run.cfg, data=replace(run.cfg.data, max_tokens=8))
    with pytest.raises(ValueError, match="no row has a target"):
        first_update(Run(short, run.start), "sft")


@pytest.mark.parametrize(
    ("kind", "first"),
    [
        ("sft", "row 0\n"), ("distill", "row 0\n"), ("dpo", "row 0, 0  margin=0\n"),
        ("kto", "row 0, 0  desirable="), ("reward", "row 0, 0  margin=0\n"),
    ],
)  # fmt: skip
def test_the_first_batch_can_be_shown(kind: str, first: str, tmp_path: Path) -> None:
    run = make(kind, tmp_path)
    with jax.set_mesh(mesh_of()):
        text = examples.describe(
            stage_of(kind, run.cfg, run.start).next_batch({}, {}, 0), run.start.tokenizer
        )
    assert text.startswith(first)
    lines = text.split("\n")
    assert lines[2].split() == ["1", "0", "user", "257", "'<|im_start|>'"]
    ends = [line for line in lines if re.search(r"' +258 '<\|im_end\|>'$", line)]  # as a target
    assert ends and all(line.split()[2] == "assistant" for line in ends)
    assert any(line == "  padding" for line in lines)


def test_plain_text_takes_its_share_of_the_rows(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a king. " * 400)
    run = make("sft", tmp_path)
    (Path(run.cfg.run) / "tokenizer.json").unlink(missing_ok=True)
    run.start.tokenizer.save(Path(run.cfg.run) / "tokenizer.json")
    data = replace(run.cfg.data, text_share=0.25, text_path=str(text))
    with jax.set_mesh(mesh_of()):
        stage = stages.STAGES["sft"].data(replace(run.cfg, data=data), run.start)
        batches = [stage.next_batch({}, {}, step) for step in range(4)]
    plain = [row for batch in batches for row in np.asarray(batch["roles"]) if not row.any()]
    assert len(plain) == 8
