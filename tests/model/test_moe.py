"""Mixture of experts: both paths against a loop over experts, balance, and the selection bias."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxgpt import scoring, sharding
from jaxgpt.config import MeshConfig, ModelConfig
from jaxgpt.model import gpt
from jaxgpt.model.moe import MoE, assign_slots, router_stats
from jaxgpt.stages import pretrain

CFG = ModelConfig(
    vocab_size=29, context_length=10, num_layers=1, model_dim=12, num_heads=2, mlp_dim=20,
    mlp="gated", activation="silu", num_experts=5, experts_per_token=2,
)  # fmt: skip
PLAIN = dataclasses.replace(CFG, mlp="plain", activation="gelu", normalize_expert_weights=False)


def random_params(cfg: ModelConfig, seed: int = 0) -> dict:
    random = np.random.default_rng(seed)
    x_BTD = jax.ShapeDtypeStruct((1, 2, cfg.model_dim), jnp.float32)
    shapes = jax.eval_shape(
        lambda rng, x: MoE(cfg).init(rng, x, None, None)["params"], jax.random.key(0), x_BTD
    )
    draw = lambda leaf: jnp.asarray(random.normal(0, 0.5, leaf.shape), jnp.float32)
    return jax.tree.map(draw, shapes)


def inputs(rows: int = 3, length: int = 10) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(rows, length, 12)).astype(np.float32)


@partial(jax.jit, static_argnums=0)
def run(cfg, params, x_BTD, bias_E=None, segments_BT=None):
    return MoE(cfg).apply({"params": params}, x_BTD, bias_E, segments_BT)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def gelu(x: np.ndarray) -> np.ndarray:
    from math import erf

    return x * (1 + np.vectorize(erf)(x / np.sqrt(2))) / 2


def scores_of(params: dict, x_BTD: np.ndarray) -> np.ndarray:
    logits_BTE = np.float64(x_BTD) @ np.float64(params["router"]["kernel"])
    exp_BTE = np.exp(logits_BTE - logits_BTE.max(-1, keepdims=True))
    return exp_BTE / exp_BTE.sum(-1, keepdims=True)


def every_expert(cfg: ModelConfig, params: dict, x_BTD: np.ndarray) -> np.ndarray:
    """What each expert makes of each token, [B, T, E, D], in float64."""
    kernel = lambda name: np.float64(params[name]["kernel"])
    outs = []
    for expert in range(cfg.num_experts):
        up = x_BTD @ kernel("up")[expert]
        if cfg.mlp == "gated":
            gate = x_BTD @ kernel("gate")[expert]
            hidden = gate * sigmoid(gate) * up
        else:
            hidden = gelu(up)
        outs.append(hidden @ kernel("down")[expert])
    return np.stack(outs, axis=2)


def expected_output(cfg, params, x_BTD, bias_E=0.0, kept_BTJ=None) -> np.ndarray:
    """The plain loop: every token's chosen experts, weighted by their scores without the bias."""
    scores_BTE, outs_BTED = scores_of(params, x_BTD), every_expert(cfg, params, x_BTD)
    out_BTD = np.zeros_like(outs_BTED[:, :, 0])
    for b, t in np.ndindex(*x_BTD.shape[:2]):
        chosen = np.argsort(-(scores_BTE[b, t] + bias_E))[: cfg.experts_per_token]
        gates = scores_BTE[b, t, chosen]
        if cfg.normalize_expert_weights:
            gates = gates / gates.sum()
        for j, expert in enumerate(chosen):
            if kept_BTJ is None or kept_BTJ[b, t, j]:
                out_BTD[b, t] += gates[j] * outs_BTED[b, t, expert]
    return out_BTD


@pytest.mark.usefixtures("each_way")
@pytest.mark.parametrize("cfg", [CFG, PLAIN], ids=["gated-normalized", "plain"])
def test_dropless_equals_a_loop_over_experts(cfg):
    params, x_BTD = random_params(cfg), inputs()
    out_BTD, _ = run(cfg, params, x_BTD)
    np.testing.assert_allclose(out_BTD, expected_output(cfg, params, x_BTD), rtol=1e-4, atol=1e-5)


def test_ample_capacity_equals_dropless_with_its_gradient():
    ample, params, x_BTD = (
        dataclasses.replace(CFG, expert_capacity=5.0),
        random_params(CFG),
        inputs(),
    )

    def loss(cfg, params, x_BTD):
        out_BTD, stats = MoE(cfg).apply({"params": params}, x_BTD, None, None)
        return (out_BTD**2).sum() + stats.balance, stats.dropped

    both = [
        jax.jit(jax.value_and_grad(partial(loss, cfg), (0, 1), has_aux=True))(params, x_BTD)
        for cfg in (CFG, ample)
    ]
    ((value, _), grads), ((other, dropped), other_grads) = both
    assert int(dropped) == 0
    np.testing.assert_allclose(other, value, rtol=1e-5)
    for mine, theirs in zip(*map(jax.tree.leaves, (grads, other_grads)), strict=True):
        np.testing.assert_allclose(theirs, mine, rtol=1e-4, atol=1e-5 * np.abs(mine).max())


MESHES = {
    "dropless": (0.0, {"data": 4, "expert": 2}),
    "only tokens": (0.0, {"data": 2, "fsdp": 2, "tensor": 2}),
    "capacity": (0.5, {"data": 2, "expert": 4}),
    "every axis": (0.0, {"data": 1, "fsdp": 2, "tensor": 2, "expert": 2}),
    "capacity, positions cut": (0.5, {"data": 2, "expert": 2, "context": 2}),
}


@pytest.mark.parametrize(
    "name",
    [
        n if n in ("dropless", "only tokens") else pytest.param(n, marks=pytest.mark.slow)
        for n in MESHES
    ],
)
def test_experts_cut_over_devices_change_no_value_and_no_gradient(name):
    capacity, sizes = MESHES[name]
    cfg = dataclasses.replace(CFG, num_experts=4, expert_capacity=capacity)
    params, x_BTD, bias_E = random_params(cfg), inputs(8), jnp.array([0.5, 0, 0, 0])

    def loss(params, x_BTD):
        out_BTD, stats = MoE(cfg).apply({"params": params}, x_BTD, bias_E, None)
        return jnp.sin(out_BTD).sum() + stats.balance, (out_BTD, stats)

    step = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    want = step(params, x_BTD)
    assert want[0][1][1].load_E.std() > 10  # devices send each other different numbers of rows
    mesh = sharding.make_mesh(MeshConfig(**sizes))
    stacked = jax.tree.map(lambda leaf: leaf[None], {"moe": params})
    specs = jax.tree.map(lambda place: P(*place.spec[1:]), sharding.shardings(mesh, stacked)["moe"])
    with jax.set_mesh(mesh):
        put = lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec))
        placed = jax.tree.map(put, params, specs)
        program = step.lower(placed, put(x_BTD, P(sharding.ROWS, "context"))).compile()
        got = program(placed, put(x_BTD, P(sharding.ROWS, "context")))
    assert ("all-to-all" in program.as_text()) == (sizes.get("expert", 1) > 1)
    for mine, theirs in zip(*map(jax.tree.leaves, (want, got)), strict=True):
        scale = max(1, np.abs(mine).max())
        np.testing.assert_allclose(theirs, mine, rtol=1e-5, atol=1e-5 * scale)


def test_experts_that_do_not_divide_are_refused_by_name():
    name = "policy/blocks/moe/up/kernel"
    mesh = sharding.make_mesh(MeshConfig(expert=8))
    with pytest.raises(ValueError, match=rf"mesh\.expert=8: does not divide {name}"):
        sharding.spec_of(name, (1, 5, 12, 20), mesh)


def test_capacity_serves_the_first_positions_and_drops_the_rest():
    tight = dataclasses.replace(CFG, expert_capacity=0.5)
    params, x_BTD = random_params(CFG), inputs()
    order_BTE = np.argsort(-scores_of(params, x_BTD), axis=-1)
    capacity = 2  # ceil(0.5 * 10 * 2 / 5)
    kept_BTJ = np.zeros((3, 10, 2), bool)
    for b in range(3):
        used = np.zeros(5, int)
        for t, j in np.ndindex(10, 2):
            expert = order_BTE[b, t, j]
            kept_BTJ[b, t, j] = used[expert] < capacity
            used[expert] += 1
    out_BTD, stats = run(tight, params, x_BTD)
    expected_BTD = expected_output(CFG, params, x_BTD, kept_BTJ=kept_BTJ)
    np.testing.assert_allclose(out_BTD, expected_BTD, rtol=1e-4, atol=1e-5)
    assert float(stats.dropped) == (~kept_BTJ).sum() > 0
    # A token that every expert turned away keeps its residual stream, and nothing else.
    alone_BT = ~kept_BTJ.any(-1)
    assert alone_BT.any()
    np.testing.assert_array_equal(np.asarray(out_BTD)[alone_BT], 0)


def test_padding_takes_no_slot():
    tight = dataclasses.replace(CFG, expert_capacity=0.5)
    expert_BTJ = jnp.zeros((1, 10, 2), jnp.int32).at[..., 1].set(1)  # all want experts 0 and 1
    real_BT = jnp.arange(10)[None] >= 4
    kept_BTJ, _, capacity = assign_slots(tight, expert_BTJ, real_BT)
    assert capacity == 2
    np.testing.assert_array_equal(np.asarray(kept_BTJ).any(-1)[0].nonzero()[0], [4, 5])


def test_the_router_works_in_float32_under_bfloat16():
    """Scores that differ only beyond bfloat16's eight bits still decide."""
    cfg = dataclasses.replace(CFG, dtype="bfloat16", num_experts=2, experts_per_token=1)
    params = random_params(cfg)
    router_DE = jnp.zeros((12, 2)).at[0].set(jnp.array([1.0, 1.0 + 2**-12]))
    params = {**params, "router": {"kernel": router_DE}}
    x_BTD = np.zeros((1, 2, 12), np.float32)
    x_BTD[0, :, 0] = [1.0, -1.0]
    _, stats = run(cfg, params, x_BTD)
    np.testing.assert_array_equal(stats.load_E, [1, 1])
    assert stats.entropy.dtype == jnp.float32


def balance_of(scores_TE: np.ndarray, expert_TJ: np.ndarray) -> float:
    """E * sum_e f_e P_e of one sequence (arXiv:2412.19437, equation 17), times its tokens."""
    length, num_experts = scores_TE.shape
    share_E = np.bincount(expert_TJ.reshape(-1), minlength=num_experts) / expert_TJ.size
    return float(length * num_experts * (share_E * scores_TE.mean(0)).sum())


def test_statistics_equal_numpy_and_leave_padding_out():
    params, x_BTD = random_params(CFG), inputs()
    length_B = np.array([10, 6, 1])
    segments_BT = (np.arange(10) < length_B[:, None]).astype(np.int32)
    _, stats = run(CFG, params, x_BTD, None, segments_BT)
    scores_BTE = scores_of(params, x_BTD)
    expert_BTJ = np.argsort(-scores_BTE, axis=-1)[..., :2]
    rows = [(scores_BTE[b, :n], expert_BTJ[b, :n]) for b, n in enumerate(length_B)]
    entropy = sum(-(scores * np.log(scores)).sum() for scores, _ in rows)
    chosen = np.concatenate([expert.reshape(-1) for _, expert in rows])
    np.testing.assert_allclose(stats.balance, sum(balance_of(*row) for row in rows), rtol=1e-5)
    np.testing.assert_array_equal(stats.load_E, np.bincount(chosen, minlength=5))
    np.testing.assert_allclose(stats.entropy, entropy, rtol=1e-5)
    assert float(stats.tokens) == 17 and float(stats.dropped) == 0


def test_the_balance_loss_pushes_down_the_busiest_expert():
    scores_BTE = jnp.full((1, 6, 3), 1 / 3)
    expert_BTJ = jnp.array([[[0], [0], [0], [0], [1], [1]]])
    kept_BTJ, real_BT = jnp.ones((1, 6, 1), bool), jnp.ones((1, 6), bool)
    balance = lambda scores: router_stats(scores, expert_BTJ, kept_BTJ, real_BT).balance
    gradient_E = np.asarray(jax.grad(balance)(scores_BTE)).sum((0, 1))
    assert gradient_E[0] > gradient_E[1] > gradient_E[2] >= 0


def test_a_selection_bias_changes_choices_but_never_gates():
    params, x_BTD = random_params(CFG), inputs()
    bias_E = np.array([0.0, 1.0, 0.0, 0.0, -1.0], np.float32)
    out_BTD, stats = run(CFG, params, x_BTD, bias_E)
    _, without = run(CFG, params, x_BTD)
    assert float(stats.load_E[1]) == 30 and float(stats.load_E[4]) == 0
    assert float(without.load_E[1]) < 30 and float(without.load_E[4]) > 0
    expected_BTD = expected_output(CFG, params, x_BTD, bias_E)
    np.testing.assert_allclose(out_BTD, expected_BTD, rtol=1e-4, atol=1e-5)


def test_no_gradient_reaches_the_selection_bias():
    params, x_BTD = random_params(CFG), inputs()
    loss = lambda bias_E: (MoE(CFG).apply({"params": params}, x_BTD, bias_E, None)[0] ** 2).sum()
    np.testing.assert_array_equal(jax.jit(jax.grad(loss))(jnp.zeros(5)), 0)


def test_after_a_step_the_bias_moves_toward_the_idle_experts():
    load_LE = jnp.array([[9.0, 3.0, 6.0]])
    metrics = {"router/load": (load_LE, jnp.full((1, 3), 6.0))}
    carry = {"router_bias": jnp.array([[0.5, 0.0, 0.25]])}
    moved = pretrain._move_bias(0.01)(carry, metrics)
    np.testing.assert_allclose(moved["router_bias"], [[0.49, 0.01, 0.25]], rtol=1e-6)


def test_moving_the_bias_evens_out_a_skewed_router():
    params, x_BTD = random_params(CFG), inputs(8)
    skew_E = np.array([0.3, 0.0, -0.1, 0.0, 0.0], np.float32)
    carry, loads = {"router_bias": jnp.asarray(skew_E)[None]}, []
    for _ in range(40):
        _, stats = run(CFG, params, x_BTD, carry["router_bias"][0])
        loads.append(np.asarray(stats.load_E))
        even_LE = jnp.full((1, 5), 8 * 10 * 2 / 5)
        carry = pretrain._move_bias(0.02)(carry, {"router/load": (stats.load_E[None], even_LE)})
    assert loads[-1].std() < 0.5 * loads[0].std()


def test_metrics_are_shares_of_tokens_and_of_an_even_load():
    cfg = dataclasses.replace(CFG, num_layers=2)
    random = np.random.default_rng(0)
    shapes = jax.eval_shape(partial(gpt.init, cfg), jax.random.key(0))
    params = jax.tree.map(lambda s: random.normal(0, 0.3, s.shape).astype(np.float32), shapes)
    batch = {
        "tokens": random.integers(0, 29, (4, 10)), "targets": random.integers(0, 29, (4, 10)),
        "mask": np.ones((4, 10), np.float32), "segments": np.ones((4, 10), np.int32),
    }  # fmt: skip
    batch["segments"][2:, 5:] = 0
    loss, weight, metrics = jax.jit(partial(scoring.next_token_loss, cfg))(params, batch)
    value = {name: np.asarray(total / weight) for name, (total, weight) in metrics.items()}
    assert value["router/load"].shape == (2, 5)
    np.testing.assert_allclose(value["router/load"].mean(1), 1, rtol=1e-6)
    assert value["router/balance"] >= 0.99 and value["router/dropped"] == 0
    assert 0 < value["router/entropy"] < np.log(5)
    balance, tokens = metrics["router/balance"]
    assert float(tokens) == 2 * 30
    expected = metrics["nll"][0] + cfg.balance_weight * balance / 2
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert float(weight) == 40
