"""Adapters against Hugging Face's PEFT: logits both ways, and the gradients of one step."""

import dataclasses
import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_models as reference

from jaxgpt import peft, tree, weights
from jaxgpt.config import PeftConfig
from jaxgpt.convert import hf, peft_hf
from jaxgpt.model import gpt

theirs = pytest.importorskip("peft", reason="the reference extra is not installed")
torch = reference.torch
# PEFT reads a property that transformers is about to rename.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

CONFIGS = {
    "lora": PeftConfig(kind="lora", rank=3, alpha=12.0),
    "rslora": PeftConfig(kind="lora", rank=4, alpha=6.0, rslora=True),
    "dora": PeftConfig(kind="lora", rank=3, alpha=6.0, dora=True),
}
TARGETS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_fc", "c_proj"],
}


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request, tmp_path_factory):
    """(family, a fresh transformers model, our config and parameters of the same weights)."""
    path = tmp_path_factory.mktemp(request.param)
    reference.build(request.param).save_pretrained(path)
    return request.param, path, *hf.load(path)


def wrap(family: str, path: Path, name: str):
    """PEFT's model with random numbers in place of its zeros."""
    cfg = CONFIGS[name]
    settings = theirs.LoraConfig(
        task_type="CAUSAL_LM", r=cfg.rank, lora_alpha=cfg.alpha, use_rslora=cfg.rslora,
        use_dora=cfg.dora, target_modules=TARGETS[family], fan_in_fan_out=family == "gpt2",
    )  # fmt: skip
    wrapped = theirs.get_peft_model(reference.open_hf(path), settings)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in wrapped.named_parameters():
            if "lora_B" in key or "magnitude" in key:
                parameter.add_(0.1 * torch.rand(parameter.shape, generator=generator))
    return wrapped


@partial(jax.jit, static_argnums=0)
def logits(cfg, params, tokens_BT):
    return gpt.logits(params, gpt.apply(cfg, params, tokens_BT).hidden_BTD)


# Another factor on the same sum: the one that CI leaves out.
NAMES = [pytest.param(n, marks=pytest.mark.slow) if n == "rslora" else n for n in CONFIGS]


@pytest.mark.parametrize("name", NAMES)
def test_their_adapter_gives_their_logits(model, name, tmp_path):
    family, path, cfg, params = model
    wrapped = wrap(family, path, name)
    wrapped.save_pretrained(tmp_path)
    ours = peft_hf.load(tmp_path, cfg, params)
    tokens_BT = reference.tokens()
    expected = reference.logits(wrapped, tokens_BT)
    assert not np.allclose(expected, logits(cfg, params, tokens_BT), atol=1e-2)
    np.testing.assert_allclose(logits(cfg, ours, tokens_BT), expected, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_our_adapter_gives_our_logits(model, name, tmp_path):
    _, path, cfg, params = model
    ours = peft.add(CONFIGS[name], params, jax.random.key(0))
    part, rest = tree.partition(ours, peft.trainable(CONFIGS[name], ""))
    key = iter(jax.random.split(jax.random.key(1), 99))
    part = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(next(key), leaf.shape), part)
    ours = tree.combine(part, rest)
    peft_hf.save(tmp_path, cfg, ours, str(path))
    opened = theirs.PeftModel.from_pretrained(reference.open_hf(path), tmp_path).eval()
    tokens_BT = reference.tokens()
    expected = logits(cfg, ours, tokens_BT)
    np.testing.assert_allclose(reference.logits(opened, tokens_BT), expected, atol=1e-4)
    assert peft_hf.base_of(tmp_path) == path
    again = peft_hf.load(tmp_path, cfg, params)
    np.testing.assert_allclose(logits(cfg, again, tokens_BT), expected, atol=1e-4)


@pytest.mark.parametrize("model", ["llama"], indirect=True)
@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_of_one_step_equal_theirs(model, name, tmp_path):
    family, path, cfg, params = model
    wrapped = wrap(family, path, name)
    tokens_BT = reference.tokens()
    wrapped(torch.as_tensor(tokens_BT), labels=torch.as_tensor(tokens_BT)).loss.backward()
    expected = {
        key.replace(".default", "").removesuffix(".weight"): parameter.grad.numpy()
        for key, parameter in wrapped.named_parameters()
        if parameter.grad is not None
    }
    wrapped.save_pretrained(tmp_path)
    ours = with_strength(peft_hf.load(tmp_path, cfg, params), peft.strength(CONFIGS[name]))
    part, frozen = tree.partition(ours, peft.trainable(CONFIGS[name], ""))

    @jax.jit
    @jax.grad
    def gradient(part):
        scores_BTV = logits(cfg, tree.combine(part, frozen), tokens_BT)[:, :-1]
        logprobs_BTV = jax.nn.log_softmax(scores_BTV)
        return -jnp.take_along_axis(logprobs_BTV, tokens_BT[:, 1:, None], -1).mean()

    compared = 0
    for row, (key, got_L) in ours_by_their_names(cfg, gradient(part)):
        for layer, got in enumerate(got_L):
            want = expected[key.format(layer=layer)]
            np.testing.assert_allclose(got.T, want, atol=1e-4 * np.abs(want).max(), err_msg=row)
            compared += 1
    assert compared == len(expected)


def with_strength(params, strength: float):
    """Importing folds the strength into b; take it out again, as it is while training."""

    def change(_, kernel):
        if not isinstance(kernel, weights.Lora):
            return kernel
        return dataclasses.replace(kernel, b=kernel.b / strength, strength=strength)

    return weights.map_kernels(change, params)


def ours_by_their_names(cfg, gradients):
    field = {"a": "lora_A", "b": "lora_B", "magnitude": "lora_magnitude_vector"}
    found = tree.flatten(gradients)
    for row in peft_hf._rows(cfg):
        for name, suffix in field.items():
            if f"{row[0]}/{name}" in found:
                module = f"base_model.model.{row[1].removesuffix('.weight')}.{suffix}"
                yield row[0], (module, np.asarray(found[f"{row[0]}/{name}"]))


@pytest.mark.parametrize("model", ["llama"], indirect=True)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type='IA3': jaxgpt has not that"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ],
)
def test_what_means_something_else_is_refused(model, change, message, tmp_path):
    _, path, cfg, params = model
    peft_hf.save(tmp_path, cfg, peft.add(CONFIGS["lora"], params, jax.random.key(0)), str(path))
    file = tmp_path / peft_hf.CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        peft_hf.load(tmp_path, cfg, params)


@pytest.mark.parametrize("model", ["llama"], indirect=True)
def test_a_tensor_without_a_place_is_refused(model, tmp_path):
    _, _, cfg, params = model
    peft_hf.save(tmp_path, cfg, peft.add(CONFIGS["lora"], params, jax.random.key(0)))
    smaller = dataclasses.replace(cfg, num_layers=1)
    first = jax.tree.map(lambda leaf: leaf[:1], params["blocks"])
    with pytest.raises(ValueError, match=r"fit nowhere: .*layers\.1"):
        peft_hf.load(tmp_path, smaller, {**params, "blocks": first})
    with pytest.raises(ValueError, match="base_model_name_or_path='': is not here"):
        peft_hf.base_of(tmp_path)
