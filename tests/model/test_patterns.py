"""Layers that differ: windows, bases of RoPE and positions by layer, scanned by their period."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import kernels, peft, tree
from jaxgpt.config import ModelConfig, PeftConfig
from jaxgpt.model import gpt, inside
from jaxgpt.model.attention import init_cache
from jaxgpt.sampling.sample import for_decoding

# Five layers of a period of three: one whole period, and two layers of the next.
CFG = ModelConfig(
    vocab_size=37, context_length=24, num_layers=5, model_dim=24, num_heads=4, num_kv_heads=2,
    mlp_dim=40, mlp="gated", activation="silu", norm="rmsnorm", position="rope", qk_norm=True,
    norm_place="both", sliding_window=6, layer_pattern="LLG", rope_local_base=100.0,
    attention_softcap=3.0, logit_softcap=4.0,
)  # fmt: skip
FOUR = dataclasses.replace(CFG, num_layers=4, layer_pattern="LG", rope_skip=2)  # two whole periods
KINDS = {"left over": CFG, "whole": FOUR}
TOKENS = np.random.default_rng(1).integers(0, CFG.vocab_size, (3, 24))


def random_params(cfg: ModelConfig) -> dict:
    random = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(random.normal(0, 0.3, leaf.shape), jnp.float32)
    params = jax.tree.map(draw, jax.eval_shape(partial(gpt.init, cfg), jax.random.key(0)))
    return tree.map_named(lambda name, leaf: leaf + name.endswith("scale"), params)


@partial(jax.jit, static_argnums=0)
def run(cfg, params, tokens_BT, **inputs):
    output = gpt.apply(cfg, params, tokens_BT, **inputs)
    return gpt.logits(cfg, params, output.hidden_BTD), output.cache


def one_by_one(cfg, params):
    """Every layer a model of its own kind, on what the one before it leaves."""
    params = dict(params)
    blocks = params.pop("blocks")
    x_BTD = params["embed"]["embedding"][TOKENS]
    seen = []
    for layer in range(cfg.num_layers):
        # A model of one layer, whose embedding is what comes in and whose final norm is left out.
        own = dataclasses.replace(cfg.of_layer(layer), num_layers=1)
        block = gpt.Block(own)
        inputs = gpt.BlockInputs(
            gpt.rope_tables(own, jnp.arange(24)[None].repeat(3, 0))
            if own.position == "rope" else None,
            None, None, None, None,
        )  # fmt: skip
        one = jax.tree.map(lambda leaf: leaf[layer], blocks)  # noqa: B023
        x_BTD, _ = block.apply({"params": one}, x_BTD, (layer, None, None), inputs)
        seen.append(x_BTD)
    return seen


def test_a_uniform_model_is_its_own_period():
    uniform = dataclasses.replace(
        CFG, layer_pattern="", rope_local_base=None, sliding_window=None, rope_skip=0
    )
    assert uniform.period == (uniform,)
    assert uniform.of_layer(3) is uniform
    all_local = dataclasses.replace(uniform, sliding_window=5, layer_pattern="L")
    assert all_local.period == (dataclasses.replace(uniform, sliding_window=5),)


def test_layers_are_what_their_letters_say():
    local, _, whole = CFG.period
    assert (local.sliding_window, local.rope_base) == (6, 100.0)
    assert (whole.sliding_window, whole.rope_base) == (None, 10000.0)
    assert [kind.position for kind in FOUR.period] == ["rope", "none"]
    assert FOUR.of_layer(3) == FOUR.period[1]


@pytest.mark.parametrize("name", KINDS)
def test_the_scan_by_period_is_the_layers_one_by_one(name):
    cfg = KINDS[name]
    params = random_params(cfg)
    with kernels.use("plain"):
        seen = inside.look(cfg, params, TOKENS).hidden_ABTD[1:]
        for found_BTD, expected_BTD in zip(seen, one_by_one(cfg, params), strict=True):
            np.testing.assert_allclose(found_BTD, expected_BTD, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", KINDS)
def test_cached_chunks_and_layers_apart_equal_one_pass(name):
    """Ragged rows; the window is shorter than the texts."""
    cfg, params = KINDS[name], random_params(KINDS[name])
    apart = for_decoding(cfg, params, 3)
    start_B = np.array([0, 5, 2])
    for held in (params, apart):
        cache, parts = init_cache(cfg, 3, 24, jnp.asarray(start_B)), []
        for begin, end in [(0, 9), (9, 22), (22, 23), (23, 24)]:
            part_BTV, cache = run(cfg, held, TOKENS[:, begin:end], cache=cache)
            parts.append(part_BTV)
        cached_BTV = np.concatenate(parts, axis=1)
        for row, start in enumerate(start_B):
            alone_BTV, _ = run(cfg, params, TOKENS[row : row + 1, start:])
            np.testing.assert_allclose(cached_BTV[row, start:], alone_BTV[0], atol=1e-4)


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_recomputing_changes_no_gradient(remat):
    params = random_params(CFG)

    def gradients(cfg):
        loss = lambda params: jnp.square(gpt.apply(cfg, params, TOKENS).hidden_BTD).sum()
        return jax.jit(jax.grad(loss))(params)

    found = gradients(dataclasses.replace(CFG, remat=remat))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-3),
        found, gradients(CFG),
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["lora", "qlora"])
def test_adapters_stand_in_every_layer(kind):
    cfg = dataclasses.replace(CFG, dtype="float32")
    params = random_params(cfg)
    settings = PeftConfig(kind=kind, rank=2, quantize="int8")
    place = peft.place(settings)
    params = tree.map_named(place, params) if place else params
    adapted = peft.add(settings, params, jax.random.key(0))
    part, rest = tree.partition(adapted, peft.trainable(settings, ""))
    loss = lambda part: jnp.square(
        gpt.apply(cfg, tree.combine(part, rest), TOKENS).hidden_BTD
    ).sum()
    gradient = jax.jit(jax.grad(loss))(part)
    moved = [leaf for name, leaf in tree.flatten(gradient).items() if name.endswith("/b")]
    assert moved
    for leaf_L in moved:
        assert np.all(np.abs(leaf_L).reshape(cfg.num_layers, -1).max(1) > 0)


def test_wrong_patterns_are_refused():
    for settings, message in [
        ({"layer_pattern": "LXG"}, "must be letters L and G"),
        ({"sliding_window": None}, "has local layers"),
        ({"layer_pattern": ""}, "rope_local_base"),
    ]:
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(CFG, **settings)
