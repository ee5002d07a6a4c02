"""The model against transformers: forward pass and gradients on the same random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("transformers", reason="the reference extra is not installed")

import reference_models
import torch

from jaxgpt import kernels, tree
from jaxgpt.convert import hf, table
from jaxgpt.model import gpt

# Each has layers of its own kind. The others are made of the same, which the forward pass checks.
DAILY = ("gpt2", "llama", "gpt_neox", "gemma3_text", "qwen3_moe", "gpt_oss", "deepseek_v3")


def slow_but(*daily):
    """Every model; those that are not named are slow."""
    return [
        pytest.param(name, marks=[] if name in daily else [pytest.mark.slow])
        for name in reference_models.CONFIGS
    ]


class Arrays:
    """Tensors that are in memory."""

    def __init__(self, arrays):
        self.arrays = arrays
        self.shapes = {name: array.shape for name, array in arrays.items()}

    def read(self, name):
        return self.arrays[name]


def imported(model, tensors):
    """Their tensors (weights or gradients) as our tree."""
    settings = model.config.to_dict()
    family = next(f for f in hf.FAMILIES if f.model_type == settings["model_type"])
    cfg = hf.config_from_hf(settings)
    arrays = {name: tensor.detach().numpy() for name, tensor in tensors}
    return cfg, table.read(family.table, cfg, Arrays(arrays))


def compiled(fn):
    return jax.jit(fn, compiler_options={"xla_backend_optimization_level": "0"})  # compiles faster


def token_losses(cfg, params, tokens_BT):
    hidden_BTD = gpt.apply(cfg, params, tokens_BT[:, :-1]).hidden_BTD
    logits_BTV = gpt.logits(cfg, params, hidden_BTD)
    logprobs_BTV = jax.nn.log_softmax(logits_BTV)
    return -jnp.take_along_axis(logprobs_BTV, tokens_BT[:, 1:, None], axis=-1)


@pytest.mark.parametrize("name", reference_models.CONFIGS)
def test_logits_equal_those_of_transformers(name):
    equal_logits(name)


@pytest.mark.parametrize("name", slow_but(*DAILY))
def test_logits_of_the_plain_equations_equal_those_of_transformers(name):
    with kernels.use("plain"):
        equal_logits(name)


def equal_logits(name):
    model, tokens_BT = reference_models.build(name), reference_models.tokens()
    cfg, params = imported(model, reference_models.tensors(model))
    expected_BTV = reference_models.logits(model, tokens_BT)
    forward = lambda params: gpt.logits(cfg, params, gpt.apply(cfg, params, tokens_BT).hidden_BTD)
    found_BTV = compiled(forward)(params)
    assert np.abs(expected_BTV).max() > 1  # far above the tolerance
    np.testing.assert_allclose(found_BTV, expected_BTV, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", slow_but(*DAILY))
def test_gradients_equal_those_of_transformers(name):
    model, tokens_BT = reference_models.build(name), reference_models.tokens(length=24)
    cfg, params = imported(model, reference_models.tensors(model))
    logits = model(torch.as_tensor(tokens_BT[:, :-1])).logits
    targets = torch.as_tensor(tokens_BT[:, 1:])
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    gradient = lambda t: torch.zeros_like(t) if t.grad is None else t.grad
    gradients = ((key, gradient(tensor)) for key, tensor in reference_models.tensors(model))
    _, expected = imported(model, gradients)

    mean_loss = lambda params: token_losses(cfg, params, jnp.asarray(tokens_BT)).mean()
    found = tree.flatten(compiled(jax.grad(mean_loss))(params))
    for path, gradient in tree.flatten(expected).items():
        # Without rotary positions a key bias adds the same to all scores of a softmax.
        still = path.endswith("choice_bias")  # which no gradient moves
        if not still and not (cfg.position == "learned" and path.endswith("key/bias")):
            assert np.abs(gradient).max() > 1e-3, path
        np.testing.assert_allclose(found[path], gradient, atol=1e-4, rtol=1e-4, err_msg=path)
