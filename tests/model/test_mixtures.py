"""Mixtures with more to them, by every way of running them: whole rows, caches, meshes."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import kernels, peft, scoring, sharding, tree, weights
from jaxgpt.config import Latent, MeshConfig, ModelConfig, PeftConfig, ServeConfig
from jaxgpt.model import gpt
from jaxgpt.model.attention import init_cache
from jaxgpt.model.moe import route
from jaxgpt.model.slots import init_slots
from jaxgpt.plan import serving
from jaxgpt.sampling.sample import for_decoding

OSS = ModelConfig(
    vocab_size=38, context_length=12, num_layers=2, model_dim=24, num_heads=4, num_kv_heads=2,
    mlp_dim=40, mlp="gated", activation="silu", norm="rmsnorm", position="rope", bias="attention",
    sliding_window=4, layer_pattern="LG", attention_sinks=True, gate_limit=0.5, expert_bias=True,
    num_experts=4, balance="none", tie_embeddings=False,
)  # fmt: skip
DEEPSEEK = ModelConfig(
    vocab_size=38, context_length=12, num_layers=2, model_dim=24, num_heads=4, head_dim=14,
    mlp_dim=20, mlp="gated", activation="silu", norm="rmsnorm", position="rope",
    rope_pairs="neighbours", latent=Latent(dim=12, query_dim=16, rope_dim=6, value_dim=10),
    num_experts=8, balance="none", router="sigmoid", expert_groups=4, groups_per_token=2,
    expert_scale=1.5, shared_mlp_dim=28, shared_gate=False, dense_layers=1, dense_mlp_dim=40,
    tie_embeddings=False,
)  # fmt: skip
KINDS = {"gpt-oss": OSS, "deepseek": DEEPSEEK}
TOKENS = np.random.default_rng(1).integers(0, OSS.vocab_size, (3, 12))
QUICK = {"xla_backend_optimization_level": "0"}  # compiles faster


@pytest.fixture(params=KINDS)
def cfg(request):
    return KINDS[request.param]


def random_params(cfg: ModelConfig) -> dict:
    random = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(random.normal(0, 0.3, leaf.shape), jnp.float32)
    params = jax.tree.map(draw, jax.eval_shape(partial(gpt.init, cfg), jax.random.key(0)))
    return tree.map_named(lambda name, leaf: leaf + name.endswith("scale"), params)


def run(cfg, params, tokens_BT, **inputs):
    with jax.disable_jit():  # programs for so many shapes would take a minute to compile
        output = gpt.apply(cfg, params, tokens_BT, **inputs)
        return gpt.logits(cfg, params, output.hidden_BTD), output.cache


def loss_of(cfg, params):
    batch = {
        "tokens": np.resize(TOKENS, (4, 12)), "targets": np.roll(np.resize(TOKENS, (4, 12)), -1, 1),
        "mask": np.ones((4, 12), np.float32),
    }  # fmt: skip
    return scoring.next_token_loss(cfg, params, batch)[0]


@pytest.mark.slow
def test_fast_programs_equal_the_equations(cfg):
    params = random_params(cfg)
    with kernels.use("plain"):
        expected_BTV, _ = run(cfg, params, TOKENS)
    np.testing.assert_allclose(run(cfg, params, TOKENS)[0], expected_BTV, atol=1e-4)


@pytest.mark.slow
def test_cached_chunks_equal_one_pass(cfg):
    """Ragged rows, in layers apart and in a stack."""
    params = random_params(cfg)
    start_B = np.array([0, 3, 1])
    alone = [
        run(cfg, params, TOKENS[row : row + 1, start:])[0] for row, start in enumerate(start_B)
    ]
    for held in (params, for_decoding(cfg, params, 3)):
        cache, parts = init_cache(cfg, 3, 12, jnp.asarray(start_B)), []
        for begin, end in [(0, 5), (5, 11), (11, 12)]:
            part_BTV, cache = run(cfg, held, TOKENS[:, begin:end], cache=cache)
            parts.append(part_BTV)
        cached_BTV = np.concatenate(parts, axis=1)
        for row, start in enumerate(start_B):
            np.testing.assert_allclose(cached_BTV[row, start:], alone[row][0], atol=1e-4)


@pytest.mark.slow
def test_rows_of_their_own_lengths_equal_one_pass(cfg):
    params = random_params(cfg)
    apart = for_decoding(cfg, params, 3)
    cache, parts = init_slots(cfg, 3, 12), []
    for begin, end in [(0, 5), (5, 11), (11, 12)]:
        part_BTV, cache = run(cfg, apart, TOKENS[:, begin:end], cache=cache)
        parts.append(part_BTV)
    whole_BTV, _ = run(cfg, params, TOKENS)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole_BTV, atol=1e-4)


@pytest.mark.parametrize(
    "mesh",
    [pytest.param(dict(data=2, fsdp=2, tensor=2), marks=pytest.mark.slow),
     pytest.param(dict(fsdp=2, expert=2), marks=pytest.mark.slow),
     pytest.param(dict(context=2, expert=2), marks=pytest.mark.slow)],
    ids=lambda mesh: "-".join(mesh),
)  # fmt: skip
def test_a_mesh_gives_the_gradients_of_one_device(cfg, mesh):
    params = random_params(cfg)
    step = partial(
        jax.jit, jax.value_and_grad(partial(loss_of, cfg)), compiler_options=QUICK
    )  # fmt: skip
    expected = step()(params)
    devices = sharding.make_mesh(MeshConfig(**mesh), jax.devices()[: np.prod(list(mesh.values()))])
    with jax.set_mesh(devices):
        placed = jax.device_put(params, sharding.shardings(devices, params))
        found = step()(placed)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4 * np.abs(y).max() + 1e-5)


@pytest.mark.slow
def test_capacity_large_enough_changes_nothing(cfg):
    params = random_params(cfg)
    room = dataclasses.replace(cfg, expert_capacity=float(cfg.num_experts))
    found_BTV, expected_BTV = run(room, params, TOKENS)[0], run(cfg, params, TOKENS)[0]
    np.testing.assert_allclose(found_BTV, expected_BTV, atol=1e-4)


@pytest.mark.slow
def test_adapters_on_all_kernels_begin_as_nothing_and_have_gradients(cfg):
    params = random_params(cfg)
    settings = PeftConfig(kind="lora", rank=2)
    adapted = peft.add(settings, params, jax.random.key(0))
    part, rest = tree.partition(adapted, peft.trainable(settings, ""))
    loss = lambda part: loss_of(cfg, tree.combine(part, rest))
    with jax.disable_jit():
        value, gradient = jax.value_and_grad(loss)(part)
        np.testing.assert_allclose(value, loss_of(cfg, params), rtol=1e-5)
    moved = {name: leaf for name, leaf in tree.flatten(gradient).items() if name.endswith("/b")}
    own = {"query_up", "latent"} if cfg.latent else {"query", "value"}
    assert {name.split("/")[-3] for name in moved} >= own | {"gate", "down", "output"}
    assert all(np.abs(leaf).max() > 0 for leaf in moved.values())


@pytest.mark.slow
def test_kernels_in_fewer_bits_compute_what_their_codes_say(cfg):
    """As whole rows, and against a cache."""
    chosen = re.compile(peft.PRESETS["all-linear"]).search

    def quantize(name, kernel):
        if not chosen(name):
            return kernel
        return weights.quantize(kernel, "int8" if kernel[0].size % 64 else "nf4")

    stored = weights.map_kernels(quantize, random_params(cfg))
    plain = weights.map_kernels(lambda _, kernel: weights.dense(kernel), stored)
    expected_BTV, _ = run(cfg, plain, TOKENS)
    np.testing.assert_allclose(run(cfg, stored, TOKENS)[0], expected_BTV, atol=1e-4)
    held, cache, parts = for_decoding(cfg, stored, 3), init_cache(cfg, 3, 12), []
    for begin, end in [(0, 9), (9, 12)]:
        part_BTV, cache = run(cfg, held, TOKENS[:, begin:end], cache=cache)
        parts.append(part_BTV)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), expected_BTV, atol=1e-4)


def test_the_cache_of_latent_attention_is_one_vector_a_token():
    cache = init_cache(DEEPSEEK, 2, 10)
    assert {x.shape for x in cache.keys} == {(2, 1, 10, 12 + 6)}
    assert sum(x.size for x in cache.values) == 0
    a_token = sum(x.nbytes for x in cache.keys) // (2 * 10)
    for devices in ({}, {"tensor": 2}):  # which cuts heads, and so not this vector
        assert serving.serving(ServeConfig("x"), DEEPSEEK, devices).token == a_token


def test_rows_may_not_have_changes_of_what_a_cache_takes_whole():
    settings = PeftConfig(kind="lora", rank=2, targets="attention")
    params = random_params(DEEPSEEK)
    networks = [params, peft.add(settings, params, jax.random.key(0))]
    with pytest.raises(ValueError, match="key_value/kernel: adapters by row"):
        peft.for_rows(networks, [0, 1])


def test_a_token_visits_experts_of_its_best_groups_and_the_correction_is_no_gate():
    logits_BTE = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 8)))
    correction_E = jnp.asarray(np.random.default_rng(1).normal(size=8))
    _, expert_BTJ, gate_BTJ = route(DEEPSEEK, logits_BTE, correction_E)
    scores_BTE = 1 / (1 + np.exp(-np.asarray(logits_BTE)))
    for b, t in np.ndindex(2, 5):
        choose_E = scores_BTE[b, t] + np.asarray(correction_E)
        best_two = [np.sort(choose_E[2 * g : 2 * g + 2]).sum() for g in range(4)]
        groups = np.argsort(best_two)[-2:]
        allowed = [e for e in range(8) if e // 2 in groups]
        chosen = sorted(allowed, key=lambda e: -choose_E[e])[:2]
        assert expert_BTJ[b, t].tolist() == chosen
        gates = scores_BTE[b, t, chosen]
        np.testing.assert_allclose(gate_BTJ[b, t], 1.5 * gates / gates.sum(), rtol=1e-5)
