"""Every setting of every family's config.json: used as transformers uses it, or refused."""

import json
import logging

import jax
import numpy as np
import pytest
import reference_models as reference

from jaxgpt.convert import family as families
from jaxgpt.convert import hf
from jaxgpt.model import gpt

NAMES = [
    "gpt2", "llama", "mistral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "mixtral", "granite",
    "smollm3", "gemma", "olmo2", "gpt_neox", "starcoder2", "gemma2", "gemma3_text", "olmo3",
    "exaone4", "ministral", "ministral3", "phi3", "phi3-long", "glm", "glm4", "ernie4_5",
    "seed_oss", "qwen2-windows", "qwen3-windows", "gpt_oss", "deepseek_v3",
    "deepseek_v2", "glm4_moe_lite", "opt",
]  # fmt: skip
# transformers reads these too, though none of its own files states them.
UNSTATED = {
    "is_causal": True, "attention_chunk_size": None, "partial_rotary_factor": 1.0,
    "rope_theta": 10000.0, "rope_scaling": None, "original_max_position_embeddings": None,
    "layer_types": None, "sliding_window": None, "head_dim": None, "num_local_experts": None,
    "num_experts": None, "pretraining_tp": 1, "logits_scaling": 1.0, "qk_norm": False,
}  # fmt: skip
TEXTS = {
    "hidden_act": "gelu", "activation_function": "silu", "dtype": "bfloat16", "model_type": "bert",
    "rope_type": "linear",
}  # fmt: skip


def logits(cfg, params, tokens_BT):
    with jax.disable_jit():  # a program for every config would take minutes to compile
        hidden = gpt.apply(cfg, params, tokens_BT).hidden_BTD
        return np.asarray(gpt.logits(cfg, params, hidden))


def others(key, value):
    """Values that this one is not."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, 1]
    if isinstance(value, float):
        return [2 * value + 0.25, 0.5 * value]
    if isinstance(value, str):
        return [TEXTS.get(key, value + "x")]
    if isinstance(value, list):
        return [[], ["sliding_attention"] * len(value), value[:1]]
    return [2, 0.5, True, "sliding_attention", ["sliding_attention"] * 2]


def flips(settings):
    """(what is changed, the changed settings), one at a time."""
    stated = UNSTATED | settings
    for key, value in stated.items():
        if isinstance(value, dict):
            for inner, entry in value.items():
                for other in others(inner, entry):
                    yield f"{key}.{inner}={other}", settings | {key: value | {inner: other}}
            continue
        for other in others(key, value):
            yield f"{key}={other}", settings | {key: other}


def theirs(path):
    """transformers' logits, or None where it does not open the directory."""
    try:
        model, told = reference.transformers.AutoModelForCausalLM.from_pretrained(
            path, attn_implementation="eager", output_loading_info=True, dtype="float32"
        )
        found = reference.logits(model.eval(), reference.tokens(rows=1))
    except Exception:  # whatever it refuses by
        return None
    return found, bool(told["missing_keys"] or told["mismatched_keys"] or told["unexpected_keys"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_every_setting_is_used_as_transformers_does_or_refused(name, tmp_path):
    reference.build(name).save_pretrained(tmp_path)
    reference.transformers.logging.set_verbosity(logging.CRITICAL)
    settings = json.loads((tmp_path / "config.json").read_text())
    ours = families.write(hf._family(settings), hf.config_from_hf(settings))
    plain, _ = theirs(tmp_path)
    wrong, changed, refused = [], 0, 0
    known = {}  # most settings leave the ModelConfig, and so our logits, as they were
    for what, edited in flips(ours | settings):
        (tmp_path / "config.json").write_text(json.dumps(edited))
        try:
            cfg, params = hf.load(tmp_path)
        except ValueError as error:
            assert "\n" not in str(error)
            refused += 1
            continue
        expected = theirs(tmp_path)
        if expected is None:  # it may be stricter about types
            continue
        changed += not np.allclose(expected[0], plain, atol=1e-4)
        if cfg not in known:
            known[cfg] = logits(cfg, params, reference.tokens(rows=1))
        if expected[1] or not np.allclose(known[cfg], expected[0], atol=1e-4, rtol=1e-4):
            wrong.append(what)
    assert not wrong
    assert changed > 1 and refused > 10, (changed, refused)


YARN = {"rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": 32}
LONG = {
    "rope_type": "longrope", "original_max_position_embeddings": 32,
    "short_factor": [1.0, 1.1, 1.5, 2.0], "long_factor": [1.0, 2.0, 4.0, 9.0],
}  # fmt: skip
ROPES = {
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": YARN,
    "yarn-all": YARN | {
        "beta_fast": 4.0, "beta_slow": 0.5, "attention_factor": 1.3, "truncate": False,
    },
    "yarn-mscale": YARN | {"mscale": 0.7, "mscale_all_dim": 1.2, "beta_fast": None},
    "yarn-no-factor": YARN | {"factor": None},
    "longrope": LONG,
    "longrope-factor": LONG | {"factor": 5.0},
    "llama3": reference.LLAMA3,
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ROPES)
def test_rope_scaling_equals_transformers_beyond_the_original_length(name, tmp_path):
    positions = 32 if name == "dynamic" else reference.CONTEXT
    shape = reference.SHAPE | {"head_dim": 8, "max_position_embeddings": positions}
    settings = reference.transformers.LlamaConfig(
        **shape, rope_parameters={"rope_theta": 100.0} | ROPES[name]
    )
    model = reference.transformers.AutoModelForCausalLM.from_config(
        settings, attn_implementation="eager"
    ).eval()
    reference.randomize(model)
    model.save_pretrained(tmp_path / "theirs")
    cfg, params = hf.load(tmp_path / "theirs")
    for length in (30, reference.CONTEXT):
        tokens_BT = reference.tokens(rows=1, length=length)
        np.testing.assert_allclose(
            logits(cfg, params, tokens_BT), reference.logits(model, tokens_BT), atol=2e-4
        )
    hf.save(tmp_path / "ours", cfg, params)
    assert hf.load(tmp_path / "ours")[0] == cfg
    again = reference.logits(reference.open_hf(tmp_path / "ours"), tokens_BT)
    np.testing.assert_allclose(again, reference.logits(model, tokens_BT), atol=1e-5)


PLAIN = {"rope_type": "default", "rope_theta": 1e6}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rope_parameters": PLAIN, "rope_scaling": YARN}, "differs from rope_parameters"),
        ({"rope_parameters": YARN, "rope_scaling": YARN | {"factor": 2.0}}, "differs from"),
        ({"rope_parameters": PLAIN, "rope_scaling": PLAIN | {"rope_theta": 1e4}}, "differs from"),
        ({"rope_scaling": {"type": "su", "factor": 4.0}}, "rope_type='su'"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor=None"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor=0.5"),
        ({"rope_scaling": LONG | {"short_factor": [1.0]}}, "short_factors"),
        ({"rope_parameters": {"full_attention": PLAIN}}, "must be one table"),
        ({"is_causal": False}, "is_causal=False"),
    ],
)
def test_what_cannot_be_read_rightly_is_refused(settings, message):
    stated = reference.SHAPE | {"model_type": "llama", "head_dim": 8}
    with pytest.raises(ValueError, match=message):
        hf.config_from_hf(stated | settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"rope_parameters": YARN | {"rope_theta": 1e6}, "rope_scaling": YARN, "rope_theta": 1e6},
        {"rope_parameters": PLAIN, "rope_scaling": None},
        {"rope_scaling": YARN | {"type": "yarn"}, "rope_parameters": {}, "rope_theta": 1e6},
    ],
)
def test_two_tables_that_agree_are_read(settings):
    stated = reference.SHAPE | {"model_type": "llama", "head_dim": 8}
    assert hf.config_from_hf(stated | settings).rope_base == 1e6


def test_unknown_settings_are_named(tmp_path, capsys):
    reference.build("llama").save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text()) | {"odd_setting": 3}
    settings["rope_parameters"]["finetuned"] = True
    (tmp_path / "config.json").write_text(json.dumps(settings))
    hf.load(tmp_path)
    said = capsys.readouterr().err
    assert "odd_setting, rope_parameters.finetuned: no settings of a llama" in said


def test_what_transformers_writes_is_all_known(tmp_path):
    for name in NAMES:
        settings = reference.CONFIGS[name](reference.transformers).to_dict()
        assert families.unknown(hf._family(settings), settings) == [], name
