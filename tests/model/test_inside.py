"""What happens inside a model, against transformers' own outputs on the same random weights."""

import jax
import numpy as np
import pytest

pytest.importorskip("transformers", reason="the reference extra is not installed")

import reference_models
import torch
from test_reference import imported

from jaxgpt.model import inside
from jaxgpt.sampling import likelihood

MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "qwen3_moe-normalized")


FAMILIES = [
    pytest.param(
        name, marks=[] if name in ("gpt2", "llama", "qwen3", "mixtral") else [pytest.mark.slow]
    )
    for name in reference_models.CONFIGS
]


@pytest.fixture(scope="module", params=FAMILIES)
def both(request):
    """(name, model, its outputs, our config, our parameters, what we see)."""
    model, tokens_BT = reference_models.build(request.param), reference_models.tokens(length=40)
    cfg, params = imported(model, model.named_parameters())
    routed = {"output_router_logits": True} if request.param in MIXTURES else {}
    with torch.no_grad():
        theirs = model(
            torch.as_tensor(tokens_BT), output_attentions=True, output_hidden_states=True, **routed
        )
    look = jax.jit(
        inside.look, static_argnums=0,
        compiler_options={"xla_backend_optimization_level": "0"},  # compiles faster
    )  # fmt: skip
    return (
        request.param,
        model,
        theirs,
        cfg,
        params,
        look(likelihood.rolled(cfg), params, tokens_BT),
    )


def test_attention_maps_equal_theirs(both):
    _, _, theirs, cfg, params, ours = both
    assert len(theirs.attentions) == cfg.num_layers
    for layer, expected_BNTS in enumerate(theirs.attentions):
        own, sinks_N = cfg.of_layer(layer), inside.sinks(cfg, params, layer)
        met = ours.q_LBTNH[layer], ours.k_LBSKH[layer]
        found_BNTS = inside.attention_weights(own, *met, sinks_N)
        assert expected_BNTS.std() > 0.01
        np.testing.assert_allclose(found_BNTS, expected_BNTS, atol=1e-5)


def test_the_residual_stream_and_what_the_head_reads_from_it_equal_theirs(both):
    _, model, theirs, cfg, params, ours = both
    *before, normed_BTD = theirs.hidden_states  # theirs holds the last one after the final norm
    norm = getattr(model.base_model, "norm", None) or model.base_model.ln_f
    assert len(ours.hidden_ABTD) == cfg.num_layers + 1
    for place, expected_BTD in enumerate(before):
        np.testing.assert_allclose(ours.hidden_ABTD[place], expected_BTD, atol=1e-4)
    with torch.no_grad():
        expected = [model.lm_head(norm(x_BTD)) for x_BTD in before] + [model.lm_head(normed_BTD)]
    for place, expected_BTV in enumerate(expected):
        found_BTV = inside.lens(cfg, params, ours.hidden_ABTD[place])
        np.testing.assert_allclose(found_BTV, expected_BTV, atol=2e-4)
    np.testing.assert_allclose(ours.logits_BTV, theirs.logits, atol=1e-4)


def test_the_experts_are_those_that_they_choose(both):
    name, _, theirs, cfg, _, ours = both
    if name not in MIXTURES:
        assert ours.expert_LBTJ is None and ours.gate_LBTJ is None
        return
    for layer, logits_NE in enumerate(theirs.router_logits):
        probs_NE = torch.softmax(logits_NE.float(), -1)
        gate_NJ, expert_NJ = probs_NE.topk(cfg.experts_per_token, dim=-1)
        if cfg.normalize_expert_weights:
            gate_NJ = gate_NJ / gate_NJ.sum(-1, keepdim=True)
        shape = (2, 40, cfg.experts_per_token)
        np.testing.assert_array_equal(ours.expert_LBTJ[layer], expert_NJ.reshape(shape))
        np.testing.assert_allclose(ours.gate_LBTJ[layer], gate_NJ.reshape(shape), atol=1e-5)


def test_looking_changes_nothing_whether_layers_are_stacked_or_apart(tiny, rng):
    from jaxgpt.model import gpt
    from jaxgpt.sampling.sample import for_decoding

    params = gpt.init(tiny, rng)
    tokens_BT = jax.random.randint(rng, (2, 9), 0, tiny.vocab_size)
    logits_BTV = gpt.logits(tiny, params, gpt.apply(tiny, params, tokens_BT).hidden_BTD)
    for cfg in (tiny, likelihood.rolled(tiny)):
        found = inside.look(cfg, params, tokens_BT)
        np.testing.assert_allclose(found.logits_BTV, logits_BTV, atol=1e-5)
    apart = inside.look(tiny, for_decoding(tiny, params), tokens_BT)
    np.testing.assert_allclose(apart.hidden_ABTD, found.hidden_ABTD, atol=1e-5)
    assert apart.q_LBTNH.shape == found.q_LBTNH.shape
