"""The same losses over every shape of the mesh, and nothing held twice."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxgpt import optim, run, sharding, train
from jaxgpt.config import (
    DataConfig,
    DpoConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    PretrainConfig,
    RunConfig,
    SftConfig,
    TrainConfig,
)
from jaxgpt.convert import chatting
from jaxgpt.data import synthetic
from jaxgpt.stages import STAGES

STEPS = 20
MODEL = ModelConfig(
    vocab_size=264, context_length=128, num_layers=2, model_dim=16, num_heads=4, num_kv_heads=2,
    mlp_dim=32, position="rope",
)  # fmt: skip
EXPERTS = replace(MODEL, num_experts=4, mlp_dim=16)
MESHES = {
    "data 8": MeshConfig(),
    "fsdp 8": MeshConfig(data=1, fsdp=8),
    "2 x 2 x 2": MeshConfig(fsdp=2, tensor=2),
    "context 4": MeshConfig(context=4),
    "expert 4 x 2": MeshConfig(data=2, expert=4),
    "fsdp 2, tensor 2, context 2": MeshConfig(fsdp=2, tensor=2, context=2),
}


def config_of(kind: str, folder: Path) -> RunConfig:
    shape = replace(MODEL, context_length=64)
    cfg: Any = {
        "pretrain": PretrainConfig(model=shape),
        "one layer": PretrainConfig(model=replace(shape, num_layers=1, context_length=32)),
        "mixture": PretrainConfig(model=replace(EXPERTS, context_length=64)),
        "slots": PretrainConfig(model=replace(EXPERTS, context_length=64, expert_capacity=1.0)),
        "window": PretrainConfig(model=replace(shape, sliding_window=10)),
        "sft": SftConfig(model=MODEL),
        "dpo": DpoConfig(model=MODEL),
    }[kind]
    if isinstance(cfg, PretrainConfig):  # documents of unequal lengths, packed
        text = folder / "text"
        text.mkdir()
        random = np.random.default_rng(0)
        for number, length in enumerate(random.integers(20, 90, 200)):
            (text / f"{number}.txt").write_text("".join(random.choice(list("abcd "), length)))
        cfg = replace(cfg, data=DataConfig(path=str(text), tokenizer="byte", documents=True))
    return replace(
        cfg, run=str(folder / "run"), train=TrainConfig(steps=STEPS, batch_size=8, loss_chunk=100),
        optim=OptimConfig(learning_rate=1e-2, warmup_steps=5),
    )  # fmt: skip


def curve(kind: str, cfg: RunConfig, mesh: jax.sharding.Mesh) -> tuple[list[float], int]:
    """The losses of all steps, and the bytes of state and batch on each device."""
    with jax.set_mesh(mesh):
        begin = STAGES["sft" if kind in ("sft", "dpo") else "pretrain"].begin
        start = begin(cfg)._replace(config=cfg.model)
        start = start._replace(params=run.on_mesh(cfg, None, mesh))
        if kind in ("sft", "dpo"):
            start = chatting.with_format(start, chatting.chat_format(start))
        stage = STAGES[kind if kind in ("sft", "dpo") else "pretrain"].data(cfg, start)
        optimizer = optim.make_optimizer(cfg.optim, STEPS)
        state, frozen = train._place(stage, cfg, mesh, optimizer)
        step = jax.jit(
            train.make_step(stage, cfg, optimizer),
            out_shardings=(jax.tree.map(lambda leaf: leaf.sharding, state), None),
            donate_argnums=0,
        )
        batches = [stage.next_batch({}, {}, n) for n in range(STEPS)]
        program = step.lower(state, frozen, batches[0]).compile()
        losses = []
        for batch in batches:
            same = jax.tree.map(np.shape, batch) == jax.tree.map(np.shape, batches[0])
            state, measures = (program if same else step)(state, frozen, batch)
            losses.append(float(measures["loss"]))
    return losses, program.memory_analysis().argument_size_in_bytes


QUICK = [("one layer", "fsdp 2, tensor 2, context 2")]
WHOLE = [
    *((kind, mesh) for kind in ("pretrain", "sft", "dpo") for mesh in list(MESHES)[:4]),
    ("mixture", "expert 4 x 2"),
    ("slots", "expert 4 x 2"),
    ("window", "context 4"),
]


@pytest.mark.parametrize(
    ("kind", "mesh"), QUICK + [pytest.param(*case, marks=pytest.mark.slow) for case in WHOLE]
)
def test_losses_agree_over_meshes_and_state_is_held_once(kind, mesh, tmp_path, monkeypatch):
    whole = synthetic.problems
    monkeypatch.setattr(synthetic, "problems", lambda held: list(whole(held))[:40])
    cfg = config_of(kind, tmp_path)
    alone, bytes_alone = curve(kind, cfg, mesh_of_one())
    losses, bytes_each = curve(kind, cfg, sharding.make_mesh(MESHES[mesh]))
    assert alone[0] - alone[-1] > 0.05 or kind == "dpo"
    np.testing.assert_allclose(losses, alone, atol=1e-4)
    ways = MESHES[mesh].fsdp * MESHES[mesh].tensor
    assert bytes_each < bytes_alone / ways * 1.3  # norms, and dimensions that one axis cuts


@pytest.mark.slow
def test_a_ring_gives_the_same_losses_each_time(tmp_path):
    """Permutes that met each other's, or a hang, are what `keep_collectives_in_order` prevents."""
    mesh = sharding.make_mesh(MESHES["context 4"])
    curves = []
    for number in range(3):
        folder = tmp_path / str(number)
        folder.mkdir()
        curves.append(curve("sft", config_of("sft", folder), mesh)[0])
    assert curves[0] == curves[1] == curves[2]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tensor": 8}, r"mesh\.tensor=8: does not divide model\.num_heads=4"),
        ({"tensor": 4}, r"mesh\.tensor=4: does not divide model\.num_kv_heads=2"),
        ({"expert": 8}, r"mesh\.expert=8: does not divide model\.num_experts=4"),
        ({"context": 8}, r"mesh\.context=8: does not divide model\.context_length=100"),
    ],
)
def test_shapes_that_an_axis_does_not_divide_are_refused_by_name(sizes, message):
    mesh = sharding.make_mesh(MeshConfig(**sizes))
    sharding.check_model(replace(EXPERTS, context_length=128), mesh_of_one())
    with pytest.raises(ValueError, match=message):
        sharding.check_model(replace(EXPERTS, context_length=100), mesh)


def mesh_of_one() -> jax.sharding.Mesh:
    return sharding.make_mesh(MeshConfig(), jax.devices()[:1])
