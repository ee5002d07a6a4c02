"""The engine's laws for other networks, number types and meshes of devices."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from serving import TINY
from test_serve_engine import GREEDY, LONG, PROMPTS, RANDOM, answer, ask

from jaxgpt import peft, sharding
from jaxgpt.config import MeshConfig, ServeConfig
from jaxgpt.convert.load import Loaded
from jaxgpt.data import tokenizer as tokenizers
from jaxgpt.language_model import LanguageModel
from jaxgpt.model import gpt
from jaxgpt.plan import serving
from jaxgpt.sampling import slots
from jaxgpt.sampling.sample import for_decoding, generate
from jaxgpt.serve import launch
from jaxgpt.serve.engine import CHUNK, Engine

SMALL = replace(TINY, context_length=512)
EXPERTS = replace(SMALL, num_experts=4, experts_per_token=2)
KINDS = {
    "experts": (EXPERTS, None), "window": (replace(SMALL, sliding_window=40), None),
    "bfloat16": (replace(SMALL, dtype="bfloat16"), None), "int8": (SMALL, "int8"),
    "experts in int8": (EXPERTS, "int8"), "learned places": (replace(
        SMALL, position="learned", norm="layernorm", num_kv_heads=None, mlp="plain",
        activation="gelu"), None),
}  # fmt: skip
MESHES = {"tensor": {"tensor": 2, "data": 4}, "rows": {"data": 8}}


def model(cfg, quantize=None):
    """Random, with likelihoods that differ."""
    params = jax.tree.map(lambda x: 8 * x, gpt.init(cfg, jax.random.key(1)))
    params = peft.quantize_int8(params) if quantize else params
    return LanguageModel(Loaded(cfg, params, tokenizers.load("byte")), "random")


def keeps_the_laws(lm, mesh=None, rows=3):
    """Greedy as generate; alone as in company; read afresh as kept; nothing compiled."""
    expected = generate(lm.config, for_decoding(lm.config, lm.params, rows), PROMPTS, GREEDY)
    params = launch._decoding_params(lm, rows, mesh)
    engine = Engine(lm.config, params, rows, 384, mesh=mesh)
    engine.compile(lambda _: None)
    engine.start()
    try:
        for prompt, wanted in zip(PROMPTS, expected, strict=True):
            assert [token for token, _ in answer(engine, prompt).tokens] == wanted.tokens
        engine.prefixes.clear()
        alone = [answer(engine, p, RANDOM, seed=5).tokens for p in (*PROMPTS, LONG)]
        crowd = [ask(engine, LONG[n : CHUNK + 9 * n], RANDOM, seed=n) for n in range(rows)]
        found = [ask(engine, p, RANDOM, seed=5)[1] for p in (*PROMPTS, LONG)]
        for notes, wanted in zip(found, alone, strict=True):
            assert notes.ended.wait(60) and notes.tokens == wanted
        assert found[-1].cached == 2 * CHUNK
        assert all(notes.ended.wait(60) for _, notes in crowd)
        assert engine.counts.compiled == 0
    finally:
        engine.stop()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_other_networks_and_types_keep_the_laws(kind):
    cfg, quantize = KINDS[kind]
    keeps_the_laws(model(cfg, quantize))


@pytest.mark.slow
@pytest.mark.parametrize("axes", MESHES)
def test_a_mesh_keeps_the_laws(axes):
    mesh = sharding.make_mesh(MeshConfig(**MESHES[axes]))
    keeps_the_laws(model(SMALL), mesh, rows=8)


@pytest.mark.slow
def test_experts_on_a_mesh_keep_the_laws():
    keeps_the_laws(model(EXPERTS), sharding.make_mesh(MeshConfig(tensor=2)), rows=4)


@pytest.mark.parametrize("kind", [
    kind if kind == "bfloat16" else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS
])  # fmt: skip
def test_what_is_served_is_what_is_looked_into(kind):
    lm = model(*KINDS[kind])
    before = lm.inspect("Hello there")
    launch._decoding_params(lm, 3)
    after = lm.inspect("Hello there")
    np.testing.assert_allclose(after.logprobs_TV, before.logprobs_TV, atol=1e-4)
    np.testing.assert_allclose(after.attention(1), before.attention(1), atol=1e-5)
    assert "0" in lm.params["blocks"]  # the layers stand apart, as the engine reads them


@pytest.mark.parametrize("kind", ["window", "bfloat16", "int8"])
def test_the_plan_counts_what_the_arrays_hold(kind):
    lm, count = model(*KINDS[kind]), lambda arrays: sum(x.nbytes for x in jax.tree.leaves(arrays))
    cfg = ServeConfig("x", slots=3, quantize=KINDS[kind][1], prefix_cache=1)
    plan = serving.serving(cfg, lm.config, {})
    assert plan.weights == count(launch._decoding_params(lm, 3))
    state = slots.init_state(lm.config, 3, 256)
    assert plan.total(3, 256) == plan.weights + count(state) + (1 << 20) + plan.process
    assert plan.total(plan.fitting(256), 256) <= plan.available


def test_slots_that_the_mesh_does_not_divide_are_refused():
    with pytest.raises(ValueError, match="--slots 16 would fit"):
        launch.mesh_of(ServeConfig("x", slots=9), SMALL)
    with pytest.raises(ValueError, match=r"mesh\.tensor=4: does not divide model\.num_kv_heads=2"):
        launch.mesh_of(ServeConfig("x", mesh=MeshConfig(tensor=4)), SMALL)
    with pytest.raises(ValueError, match=r"mesh\.context"):
        ServeConfig("x", mesh=MeshConfig(context=2))
