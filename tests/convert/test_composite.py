"""Directories that see and read: their language model, against transformers' whole model."""

import json
import re

import jax
import numpy as np
import pytest
import reference_models as reference

from jaxgpt.convert import hf, load
from jaxgpt.model import gpt

transformers = reference.transformers
TEXT = reference.SHAPE | {"head_dim": 8, "pad_token_id": None}
QWEN = {"rope_theta": 1e4, "rope_type": "default", "mrope_section": [1, 1, 2]}
TOWER = {"hidden_size": 16, "intermediate_size": 16, "image_size": 14, "patch_size": 7}
VISION = {
    "gemma3": TOWER | {"num_hidden_layers": 1, "num_attention_heads": 2},
    "mistral3": TOWER | {
        "model_type": "pixtral", "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8,
    },
    "qwen2_5_vl": {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2,
        "out_hidden_size": 24,
    },
    "qwen3_vl": {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2,
        "out_hidden_size": 24, "deepstack_visual_indexes": [0], "num_position_embeddings": 4,
    },
}  # fmt: skip
MODELS = {
    "gemma3": TEXT | {"model_type": "gemma3_text", "sliding_window": 7, "num_hidden_layers": 7},
    "mistral3": TEXT | {"model_type": "mistral", "sliding_window": None},
    "mistral3-ministral3": TEXT | {
        "model_type": "ministral3",
        "rope_parameters": reference.YARN | {"llama_4_scaling_beta": 0.2},
    },
    "qwen2_5_vl": {k: v for k, v in TEXT.items() if k != "head_dim"} | {
        "rope_parameters": QWEN | {"mrope_section": [1, 1, 1]}
    },
    "qwen3_vl": TEXT | {"rope_parameters": QWEN | {"mrope_interleaved": True}},
}  # fmt: skip
ALONE = {
    "gemma3": "gemma3_text", "mistral3": "llama", "mistral3-ministral3": "ministral3",
    "qwen2_5_vl": "qwen2", "qwen3_vl": "qwen3",
}  # fmt: skip


@pytest.fixture(params=MODELS)
def whole(request, tmp_path):
    """(name, a directory, the model in it)."""
    kind = request.param.split("-")[0]
    settings = transformers.AutoConfig.for_model(
        kind, text_config=MODELS[request.param], vision_config=VISION[kind],
        tie_word_embeddings=kind == "gemma3",
    )  # fmt: skip
    model = transformers.AutoModelForImageTextToText.from_config(
        settings, attn_implementation="eager"
    )
    reference.randomize(model).eval().save_pretrained(tmp_path / "whole")
    return request.param, tmp_path / "whole", model


def logits(cfg, params, tokens_BT):
    with jax.disable_jit():
        return np.asarray(gpt.logits(cfg, params, gpt.apply(cfg, params, tokens_BT).hidden_BTD))


def test_the_language_model_is_read_said_and_written_alone(whole, tmp_path, capsys):
    name, path, model = whole
    cfg, params = hf.load(path)
    said = capsys.readouterr().err
    assert f"is a {name.split('-')[0]}; its language model" in said
    assert said.count("\n") == 1, said
    assert load.model_config(path) == cfg
    tokens_BT = reference.tokens()
    expected_BTV = reference.logits(model, tokens_BT)
    np.testing.assert_allclose(logits(cfg, params, tokens_BT), expected_BTV, rtol=1e-4, atol=2e-4)
    hf.save(tmp_path / "alone", cfg, params)
    alone = reference.open_hf(tmp_path / "alone")
    assert alone.config.model_type == ALONE[name]
    np.testing.assert_allclose(reference.logits(alone, tokens_BT), expected_BTV, atol=2e-4)


def test_older_names_and_flat_settings_are_read(whole):
    """Before transformers 5: language_model.model.layers; Qwen's had all in one table."""
    name, path, _ = whole
    from safetensors import numpy as files

    expected = hf.load(path)
    tensors = files.load_file(path / "model.safetensors")
    inner = {  # what save_pretrained writes is old or new, by the family
        re.sub(
            r"^(model\.language_model|language_model\.model|language_model|model)\.", "", key
        ): array
        for key, array in tensors.items()
        if "vision" not in key and "visual" not in key and "projector" not in key
    }
    for begin, head in [("model.language_model.", "")] + (
        [("model.", "")]
        if name.startswith("qwen")
        else [("language_model.model.", "language_model.")]
    ):
        named = {
            (head if key.startswith("lm_head") else begin) + key: array
            for key, array in inner.items()
        }
        named["visual.extra.weight"] = np.zeros(2, np.float32)
        files.save_file(named, path / "model.safetensors")
        cfg, params = hf.load(path)
        assert cfg == expected[0]
        jax.tree.map(np.testing.assert_array_equal, params, expected[1])
    settings = json.loads((path / "config.json").read_text())
    if name == "qwen2_5_vl":
        settings = settings.pop("text_config") | settings
        settings["rope_scaling"] = {"type": "mrope", "mrope_section": [1, 1, 1]}
        settings["rope_theta"] = settings.pop("rope_parameters")["rope_theta"]
        (path / "config.json").write_text(json.dumps(settings))
        assert hf.load(path)[0] == expected[0]


def test_a_setting_of_the_language_model_is_refused_by_name(whole):
    _, path, _ = whole
    settings = json.loads((path / "config.json").read_text())
    settings["text_config"]["hidden_act"] = settings["text_config"]["hidden_activation"] = "mish"
    (path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"hidden_act.*='mish'"):
        hf.load(path)
