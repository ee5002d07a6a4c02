"""The train step: the same loss and gradient however the batch, mesh and program are cut."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgpt import optim, scoring, sharding, train, tree
from jaxgpt.config import MeshConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from jaxgpt.model import gpt
from jaxgpt.train import Stage

ROWS, LENGTH, VOCAB = 16, 12, 62

DENSE = ModelConfig(
    vocab_size=VOCAB, context_length=LENGTH, num_layers=2, model_dim=16, num_heads=4,
    num_kv_heads=2, mlp_dim=40, bias="all", dropout=0.25,
)  # fmt: skip
MIXTURE = ModelConfig(
    vocab_size=VOCAB, context_length=LENGTH, num_layers=2, model_dim=16, num_heads=2, mlp_dim=24,
    mlp="gated", activation="silu", norm="rmsnorm", position="rope", num_experts=5,
    balance_weight=0.5, tie_embeddings=False,
)  # fmt: skip
QUICK = {"xla_backend_optimization_level": "0"}  # compiles in two thirds of the time
MODELS = {"dense": DENSE, "mixture": MIXTURE}


def documents() -> dict[str, np.ndarray]:
    """Rows of packed documents and padding; from no target at all to one at every position."""
    random = np.random.default_rng(0)
    tokens_BT = random.integers(0, VOCAB, (ROWS, LENGTH))
    starts_BT = random.random((ROWS, LENGTH)) < 0.2
    segments_BT = 1 + np.cumsum(starts_BT, axis=1)
    index_T = np.arange(LENGTH)
    first_BT = np.maximum.accumulate(np.where(starts_BT, index_T, 0), axis=1)
    length_B = random.integers(1, LENGTH + 1, ROWS)
    real_BT = index_T < length_B[:, None]
    mask_BT = real_BT & (random.random((ROWS, LENGTH)) < np.linspace(0, 1, ROWS)[:, None])
    return {
        "tokens": tokens_BT,
        "targets": random.integers(0, VOCAB, (ROWS, LENGTH)),
        "mask": mask_BT.astype(np.float32),
        "segments": np.where(real_BT, segments_BT, 0),
        "positions": index_T - first_BT,
    }


BATCH = documents()


def mesh_of(**sizes: int) -> jax.sharding.Mesh:
    devices = jax.devices() if sizes else jax.devices()[:1]
    return sharding.make_mesh(MeshConfig(**sizes), devices)


def random_params(model: ModelConfig) -> dict:
    """Every parameter random, and large enough that every layer matters; nothing is compiled."""
    random = np.random.default_rng(0)
    draw = lambda shape: random.normal(0, 0.2, shape.shape).astype(np.float32)
    return jax.tree.map(draw, jax.eval_shape(partial(gpt.init, model), jax.random.key(0)))


def stage_of(model: ModelConfig, chunk: int = 0) -> Stage:
    def loss(params, batch, rng_B):
        return scoring.next_token_loss(model, params["policy"], batch, rng_B, chunk=chunk)

    params = {"policy": random_params(model)}
    return Stage(params, "^policy/", loss, lambda params, carry, step: BATCH)


def run_of(model: ModelConfig, micro_batches: int = 1, **optim_settings) -> RunConfig:
    return RunConfig(
        run="", model=model, optim=OptimConfig(**optim_settings),
        train=TrainConfig(steps=9, batch_size=ROWS, micro_batches=micro_batches),
    )  # fmt: skip


def loss_and_gradient(
    model: ModelConfig, mesh: jax.sharding.Mesh, micro_batches: int = 1, chunk: int = 0
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """The metrics and the gradient of one step; an optimizer that only remembers gives it away."""
    stage, cfg, remember = stage_of(model, chunk), run_of(model, micro_batches), optax.trace(0.0)
    with jax.set_mesh(mesh):
        state, frozen = train._place(stage, cfg, mesh, remember)
        batch = sharding.place_rows(mesh, ROWS, lambda rows: {n: a[rows] for n, a in BATCH.items()})
        step_fn = jax.jit(train.make_step(stage, cfg, remember), compiler_options=QUICK)
        state, measures = step_fn(state, frozen, batch)
    gradient = jax.tree.map(np.asarray, tree.flatten(state.opt_state.trace))
    return {name: float(value) for name, value in measures.items()}, gradient


@pytest.fixture(scope="module")
def plain(rolled):
    """One device, one micro-batch, nothing recomputed, all logits at once."""
    return {name: loss_and_gradient(model, mesh_of()) for name, model in MODELS.items()}


WAYS = {
    "micro_batches=2": {"micro_batches": 2},
    "micro_batches=4": {"micro_batches": 4},
    "data=8": {"mesh": {"data": 8}},
    "fsdp=8": {"mesh": {"data": 1, "fsdp": 8}},
    "data=2 fsdp=2 tensor=2": {"mesh": {"data": 2, "fsdp": 2, "tensor": 2}},
    "remat=full": {"model": {"remat": "full"}},
    "remat=dots": {"model": {"remat": "dots"}},
    "unrolled": {"unroll": 2},
    "chunked": {"chunk": 30},
    "all": {
        "mesh": {"data": 2, "fsdp": 2, "tensor": 2}, "micro_batches": 2, "chunk": 20,
        "model": {"remat": "full"},
    },
}  # fmt: skip
SLOW = {"dense": ("remat=dots",), "mixture": set(WAYS) - {"micro_batches=4", "data=8", "all"}}
CASES = [
    pytest.param(kind, way, marks=[pytest.mark.slow] if way in SLOW[kind] else [])
    for kind in MODELS
    for way in WAYS
]


@pytest.fixture(autouse=True, scope="module")
def rolled():
    """Half the program to compile; one of the WAYS is unrolled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpt, "layer_unroll", lambda *_, **__: 1)
        yield


@pytest.mark.parametrize(("kind", "way"), CASES)
def test_loss_and_gradient_stay_the_same(kind, way, plain, monkeypatch):
    how = WAYS[way]
    monkeypatch.setattr(gpt, "layer_unroll", lambda *_, **__: how.get("unroll", 1))
    model = ModelConfig(**{**vars(MODELS[kind]), **how.get("model", {})})
    measures, gradient = loss_and_gradient(
        model, mesh_of(**how.get("mesh", {})), how.get("micro_batches", 1), how.get("chunk", 0)
    )
    expected, expected_gradient = plain[kind]
    assert measures.keys() == expected.keys()
    for name, value in measures.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-5, err_msg=name)
    largest = max(np.abs(leaf).max() for leaf in expected_gradient.values())
    assert largest > 0.01
    for name, leaf in expected_gradient.items():
        # Key biases, for one, have no gradient at all: they are held to the scale of the rest.
        scale = max(np.abs(leaf).max(), 1e-2 * largest)
        np.testing.assert_allclose(gradient[name], leaf, rtol=0, atol=1e-5 * scale, err_msg=name)


@pytest.mark.usefixtures("each_way")
def test_the_loss_is_the_mean_over_all_targets(plain):
    """In float64 NumPy, from the logits of the whole batch."""
    model = ModelConfig(**{**vars(DENSE), "dropout": 0.0})
    stage = stage_of(model)
    output = gpt.apply(
        model, stage.params["policy"], BATCH["tokens"], positions_BT=BATCH["positions"],
        segments_BT=BATCH["segments"],
    )  # fmt: skip
    logits_BTV = np.float64(gpt.logits(model, stage.params["policy"], output.hidden_BTD))
    logprobs_BTV = logits_BTV - np.log(np.exp(logits_BTV).sum(-1, keepdims=True))
    gold_BT = np.take_along_axis(logprobs_BTV, BATCH["targets"][..., None], axis=-1)[..., 0]
    expected = -(gold_BT * BATCH["mask"]).sum() / BATCH["mask"].sum()
    measures, _ = loss_and_gradient(model, mesh_of(), micro_batches=4)
    np.testing.assert_allclose(measures["loss"], expected, rtol=1e-5)
    assert plain["dense"][0]["loss"] != pytest.approx(expected, rel=1e-3), "dropout was off"


def placed(mesh: jax.sharding.Mesh, cfg: RunConfig, stage: Stage) -> tuple:
    optimizer = optim.make_optimizer(cfg.optim, cfg.train.steps)
    state, frozen = train._place(stage, cfg, mesh, optimizer)
    return optimizer, state, frozen


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_parameters_and_moments_are_cut_over_fsdp(name):
    mesh = mesh_of(data=1, fsdp=8)
    _, state, _ = placed(mesh, run_of(DENSE, ema=0.9, name=name), stage_of(DENSE))
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
    small = sum(
        leaf.nbytes
        for path, leaf in tree.flatten(state).items()
        if path.endswith(("bias", "scale", "ns_coeffs")) or leaf.ndim == 0
    )
    assert held == small + (whole - small) // 8


def test_a_step_compiles_once_and_keeps_its_placement():
    mesh, cfg, stage = mesh_of(data=2, fsdp=2, tensor=2), run_of(DENSE, ema=0.9), stage_of(DENSE)
    with jax.set_mesh(mesh):
        optimizer, state, frozen = placed(mesh, cfg, stage)
        before = jax.tree.map(lambda leaf: leaf.sharding, state)
        step_fn = jax.jit(
            train.make_step(stage, cfg, optimizer), donate_argnums=0,
            out_shardings=(before, sharding.replicated(mesh)),
        )  # fmt: skip
        read = lambda rows: {n: a[rows] for n, a in BATCH.items()}
        for _ in range(3):
            state, _ = step_fn(state, frozen, sharding.place_rows(mesh, ROWS, read))
    assert step_fn._cache_size() == 1
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == before
    assert int(state.step) == 3


def frozen_stage() -> Stage:
    """A policy that starts as its own frozen reference: both share their buffers."""
    kernel = jnp.linspace(1.0, 2.0, 4)[:, None]
    network = {"score": {"kernel": kernel}}

    def loss(params, batch, rng_B):
        apart = params["policy"]["score"]["kernel"] - 2 * params["reference"]["score"]["kernel"]
        return (apart**2).sum() * 4, jnp.float32(4), {}

    return Stage({"policy": network, "reference": network}, "^policy/", loss, lambda *_: {})


def test_frozen_parameters_have_no_moments_and_survive_donation():
    stage, cfg = frozen_stage(), run_of(DENSE, warmup_steps=0, learning_rate=0.1)
    mesh = mesh_of()
    optimizer, state, frozen = placed(mesh, cfg, stage)
    assert not [name for name in tree.flatten(state) if "reference" in name]
    step_fn = jax.jit(train.make_step(stage, cfg, optimizer), donate_argnums=0)
    state, _ = step_fn(state, frozen, {})
    kernel = np.linspace(1.0, 2.0, 4)[:, None]
    np.testing.assert_allclose(frozen["reference"]["score"]["kernel"], kernel)
    np.testing.assert_allclose(stage.params["policy"]["score"]["kernel"], kernel)
    assert not np.allclose(state.params["policy"]["score"]["kernel"], kernel)


def test_nothing_to_train_is_an_error():
    stage = frozen_stage()._replace(trainable="^value/")
    with pytest.raises(ValueError, match="matches no parameter"):
        placed(mesh_of(), RunConfig(run=""), stage)


def test_the_fingerprint_changes_with_any_value_and_any_name():
    leaves = {"a": jnp.arange(3.0), "b": None}
    assert train.fingerprint({"b": None}) == ""
    prints = {
        train.fingerprint(tree_)
        for tree_ in (leaves, {"a": jnp.arange(3.0).at[1].add(1e-7)}, {"c": leaves["a"]})
    }
    assert len(prints) == 3
    assert train.fingerprint(leaves) == train.fingerprint({"a": np.arange(3, dtype=np.float32)})


def test_ema_follows_the_parameters():
    stage, cfg = frozen_stage(), RunConfig(
        run="", train=TrainConfig(batch_size=4), optim=OptimConfig(ema=0.75)
    )  # fmt: skip
    optimizer, state, frozen = placed(mesh_of(), cfg, stage)
    step_fn = jax.jit(train.make_step(stage, cfg, optimizer))
    kernel = lambda part: np.asarray(part["policy"]["score"]["kernel"])
    average = kernel(state.params)
    for _ in range(3):
        state, _ = step_fn(state, frozen, {})
        average = 0.75 * average + 0.25 * kernel(state.params)
    np.testing.assert_allclose(kernel(state.ema), average, rtol=1e-6)


def test_dropout_draws_by_row_not_by_place():
    """A row's loss is the same in the batch and alone, with its key."""
    stage = stage_of(DENSE)
    params = jax.tree.map(jnp.asarray, stage.params)
    rng_B = jax.vmap(partial(jax.random.fold_in, jax.random.key(1)))(jnp.arange(ROWS))
    nll = jax.jit(lambda batch, rng_B: stage.loss(params, batch, rng_B)[0])
    row = ROWS - 1
    whole = {name: jnp.asarray(array) for name, array in BATCH.items()}
    others = {**whole, "mask": whole["mask"].at[:row].set(0)}
    alone = {name: array[row:] for name, array in whole.items()}
    np.testing.assert_allclose(nll(others, rng_B), nll(alone, rng_B[row:]), rtol=1e-5)
    assert nll(alone, rng_B[row:]) != nll(alone, rng_B[:1])
