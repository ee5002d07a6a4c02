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
    # Projections side by side, of one width or of several, head by head; neighbours that rotate.
    "gpt_neox": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    "phi3-long": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    "glm4": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"],
    "gemma3_text": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "deepseek_v3": ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"],
}
SLOW = [pytest.param("deepseek_v3", marks=pytest.mark.slow)]
MORE = [name for name in TARGETS if name not in ("llama", "gpt2", "deepseek_v3")] + SLOW


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
    return gpt.logits(cfg, params, gpt.apply(cfg, params, tokens_BT).hidden_BTD)


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


@pytest.mark.parametrize("model", MORE, indirect=True)
@pytest.mark.parametrize("name", ["lora", pytest.param("dora", marks=pytest.mark.slow)])
def test_adapters_of_fused_and_patterned_families_go_both_ways(model, name, tmp_path):
    family, path, cfg, params = model
    wrapped = wrap(family, path, name)
    wrapped.save_pretrained(tmp_path / "theirs")
    tokens_BT = reference.tokens()
    expected = reference.logits(wrapped, tokens_BT)
    ours = peft_hf.load(tmp_path / "theirs", cfg, params)
    assert not np.allclose(expected, logits(cfg, params, tokens_BT), atol=1e-2)
    np.testing.assert_allclose(logits(cfg, ours, tokens_BT), expected, atol=2e-4)
    peft_hf.save(tmp_path / "ours", cfg, ours, str(path))
    opened = theirs.PeftModel.from_pretrained(reference.open_hf(path), tmp_path / "ours").eval()
    np.testing.assert_allclose(reference.logits(opened, tokens_BT), expected, atol=2e-4)


@pytest.mark.parametrize("model", ["llama", *SLOW], indirect=True)
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
    for row, (key, got_L), first in ours_by_their_names(cfg, gradient(part)):
        for layer, got in enumerate(got_L, first):
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
                first = 0 if row[0].startswith("dense_") else cfg.dense_layers
                yield row[0], (module, np.asarray(found[f"{row[0]}/{name}"])), first


@pytest.mark.parametrize("model", ["llama"], indirect=True)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type='IA3': jaxgpt has not that"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "target_parameters.*merge in PEFT"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        ({"a_new_setting": 3}, "a_new_setting=3"),
        ({"use_dora": True}, "use_dora=True, unlike the tensors"),
        ({"r": 5}, "has rank 3, where adapter_config.json states 5"),
        ({"rank_pattern": {"q_proj": 3, ".*": 4}}, "has rank 3, where .* states 4"),
        ({"target_modules": ["q_proj"]}, "which adapter_config.json does not target"),
        ({"exclude_modules": ["up_proj"]}, r"mlp.up_proj, which adapter_config.json does not"),
        ({"layers_to_transform": [0]}, r"layers.1.* does not target"),
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


# What an adapter may hold beside its low-rank changes, and how it may state their strength.
KINDS = {
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "head-dora": {"target_modules": ["q_proj", "lm_head"], "use_dora": True},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"], "use_rslora": True},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm", "down_proj"]},
    "saved-embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5, 60]},
    "tokens-by-module": {
        "target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [7, 2]},
    },
    "layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
    "regex": {"target_modules": r".*\.0\..*(q|o)_proj", "exclude_modules": ["o_proj"]},
    "patterns": {
        "target_modules": ["q_proj", "k_proj", "up_proj", "down_proj"],
        "alpha_pattern": {"q_proj": 3, "self_attn.q_proj": 50, ".*_proj": 7, "up_proj": 90},
        "rank_pattern": {r"layers\.1\.mlp\.up_proj": 2, "up_proj": 4, "1.self_attn.[qk]_proj": 1},
    },
    "patterns-rslora": {
        "target_modules": ["q_proj", "up_proj"], "use_rslora": True,
        "alpha_pattern": {"model.layers.0.self_attn.q_proj": 40, "proj": 3, "q_proj|up_proj": 5},
    },
}  # fmt: skip


def random_adapter(path: Path, folder: Path, **settings):
    """PEFT's model with every trained number changed, saved; the logits of what it reads."""
    options = {"task_type": "CAUSAL_LM", "r": 3, "lora_alpha": 10} | settings
    wrapped = theirs.get_peft_model(reference.open_hf(path), theirs.LoraConfig(**options))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.rand(parameter.shape, generator=generator))
    wrapped.save_pretrained(folder)
    # Opened again: PEFT sorts the patterns when it writes them, and the first that fits decides.
    opened = theirs.PeftModel.from_pretrained(reference.open_hf(path), folder)
    return reference.logits(opened.eval(), reference.tokens())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model", ["llama"], indirect=True)
@pytest.mark.parametrize("kind", KINDS)
def test_whatever_their_adapter_holds_gives_their_logits(model, kind, tmp_path):
    _, path, cfg, params = model
    expected = random_adapter(path, tmp_path, **KINDS[kind])
    ours = peft.merge(peft_hf.load(tmp_path, cfg, params))
    np.testing.assert_allclose(logits(cfg, ours, reference.tokens()), expected, atol=1e-4)
    assert not np.allclose(expected, logits(cfg, params, reference.tokens()), atol=1e-3)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["head", "embedding", "saved", "saved-embedding", "tokens"])
def test_an_adapter_of_a_tied_model_is_theirs_or_refused(kind, tmp_path):
    reference.build("qwen3").save_pretrained(tmp_path / "base")
    cfg, params = hf.load(tmp_path / "base")
    assert cfg.tie_embeddings
    expected = random_adapter(tmp_path / "base", tmp_path / "adapter", **KINDS[kind])
    try:
        ours = peft.merge(peft_hf.load(tmp_path / "adapter", cfg, params))
    except ValueError as error:
        assert kind != "tokens" and "merge in PEFT first" in str(error)
        return
    np.testing.assert_allclose(logits(cfg, ours, reference.tokens()), expected, atol=1e-4)


@pytest.mark.parametrize("model", ["llama"], indirect=True)
def test_rows_share_what_an_adapter_holds_whole(model):
    _, _, _, params = model
    other = {**params, "final_norm": {"scale": params["final_norm"]["scale"] + 1}}
    with pytest.raises(ValueError, match="final_norm/scale: an adapter has its own"):
        peft.for_rows([params, other], [0, 1])
