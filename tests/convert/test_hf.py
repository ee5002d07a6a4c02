"""Hugging Face directories, against transformers itself."""

import dataclasses
import json
import logging
import tracemalloc
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("transformers", reason="the reference extra is not installed")

import reference_models
import transformers
from reference_models import open_hf

from jaxgpt import scoring, sharding, tree
from jaxgpt.config import MeshConfig, ModelConfig
from jaxgpt.convert import family, hf, table
from jaxgpt.model import gpt
from jaxgpt.sampling import sample

FIRST = ("gpt2", "llama", "mistral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "mixtral")
LATER = [name for name in reference_models.CONFIGS if name.split("-")[0] not in FIRST]
# Every day those that have something of their own; the others are tables of the same parts.
DAILY = (
    "gpt2",
    "llama",
    "llama-tied-biases",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "mixtral",
    "granite-yarn",
    "smollm3",
    "olmo2",
    "gpt_neox",
    "gemma2-capped",
    "gemma3_text",
    "phi3-long",
    "glm4",
    "gpt_oss",
)
WRITTEN_AS = {  # other names for the same function
    "phi3-whole": "llama", "glm4_moe_lite": "deepseek_v3", "glm4_moe_lite-scaled": "deepseek_v3",
    "glm4_moe_lite-tied": "deepseek_v3",
}  # fmt: skip


def slow(name):
    return pytest.param(name, marks=pytest.mark.slow)


def random_params(cfg):
    random = np.random.default_rng(0)
    shapes = table.parameter_shapes(cfg).items()
    return tree.nest({n: random.normal(0, 0.3, s).astype(np.float32) for n, s in shapes})


def logits(cfg, params, tokens_BT):
    forward = lambda params: gpt.logits(cfg, params, gpt.apply(cfg, params, tokens_BT).hidden_BTD)
    # A lower level compiles faster.
    return jax.jit(forward, compiler_options={"xla_backend_optimization_level": "0"})(params)


def assert_same_bits(found, expected):
    found, expected = tree.flatten(found), tree.flatten(expected)
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name].dtype == expected[name].dtype
        assert np.array_equal(found[name], expected[name]), name


def edit(path, **settings):
    content = json.loads((path / "config.json").read_text()) | settings
    (path / "config.json").write_text(json.dumps(content))


@pytest.fixture
def llama(tmp_path):
    model = reference_models.build("llama")
    model.save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


@pytest.mark.parametrize(
    "name", [name if name in DAILY else slow(name) for name in reference_models.CONFIGS]
)
def test_export_restores_every_tensor_and_transformers_logits(name, tmp_path, caplog):
    model = reference_models.build(name)
    model.save_pretrained(tmp_path / "theirs")
    cfg, params = hf.load(tmp_path / "theirs")
    hf.save(tmp_path / "ours", cfg, params)

    transformers.logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        open_hf(tmp_path / "theirs")  # a longrope of Phi-3 is warned of in their own directory
        theirs = {record.message for record in caplog.records}
        caplog.clear()
        again = open_hf(tmp_path / "ours")
    assert {record.message for record in caplog.records} <= theirs
    assert again.config.dtype == reference_models.torch.float32
    tokens_BT = reference_models.tokens()
    if again.state_dict().keys() == model.state_dict().keys():
        for key, tensor in model.state_dict().items():
            assert reference_models.torch.equal(again.state_dict()[key], tensor), key
        assert np.array_equal(
            reference_models.logits(again, tokens_BT), reference_models.logits(model, tokens_BT)
        )
    else:  # another family computes the same
        assert name in WRITTEN_AS and again.config.model_type == WRITTEN_AS[name]
        np.testing.assert_allclose(
            reference_models.logits(again, tokens_BT), reference_models.logits(model, tokens_BT),
            atol=1e-4,
        )  # fmt: skip
    cfg_again, params_again = hf.load(tmp_path / "ours")
    assert family.resolve(cfg_again) == family.resolve(cfg)
    assert_same_bits(params_again, params)
    with jax.disable_jit():  # a program for every family would take long to compile
        hidden_BTD = gpt.apply(cfg, params, tokens_BT).hidden_BTD
        ours_BTV = gpt.logits(cfg, params, hidden_BTD)
    np.testing.assert_allclose(
        ours_BTV, reference_models.logits(model, tokens_BT), rtol=1e-4, atol=2e-4
    )


@pytest.mark.parametrize("name", ["llama", *map(slow, ["gpt2", "qwen3_moe"])])
def test_a_trained_model_is_the_same_in_transformers(name, tmp_path):
    reference_models.build(name).save_pretrained(tmp_path / "theirs")
    cfg, params = hf.load(tmp_path / "theirs")
    tokens_BT = reference_models.tokens(length=16)
    loss = lambda params: jnp.square(gpt.apply(cfg, params, tokens_BT).hidden_BTD).mean()
    options = {"xla_backend_optimization_level": "0"}
    gradients = jax.jit(jax.grad(loss), compiler_options=options)(params)
    params = jax.tree.map(lambda p, g: p - 0.3 * g, params, gradients)
    hf.save(tmp_path / "ours", cfg, params)
    expected_BTV = reference_models.logits(open_hf(tmp_path / "ours"), tokens_BT)
    before_BTV = reference_models.logits(open_hf(tmp_path / "theirs"), tokens_BT)
    assert np.abs(expected_BTV - before_BTV).max() > 1e-2
    np.testing.assert_allclose(logits(cfg, params, tokens_BT), expected_BTV, atol=1e-4)


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text"])
def test_a_gemma_without_windows_runs_in_transformers(name, tmp_path):
    """As the one that scripts/pretrain.py makes."""
    cfg = ModelConfig(
        vocab_size=reference_models.VOCAB, context_length=reference_models.CONTEXT, num_layers=2,
        model_dim=32, num_heads=4, mlp="gated", activation="gelu_tanh", norm="rmsnorm",
        norm_offset=1.0, norm_place="both", qk_norm=name == "gemma3_text", position="rope",
        embedding_scale=None,
    )  # fmt: skip
    params = random_params(cfg)
    hf.save(tmp_path / "ours", cfg, params)
    theirs, tokens_BT = open_hf(tmp_path / "ours"), reference_models.tokens()
    assert theirs.config.model_type == name
    expected = reference_models.logits(theirs, tokens_BT)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(logits(cfg, params, tokens_BT), expected, atol=1e-4 * scale)
    assert hf.load(tmp_path / "ours")[0].sliding_window is None


@pytest.mark.parametrize(
    "name", ["gemma3_text", "gemma2-capped", *map(slow, ["llama", "gpt2", *LATER])]
)
def test_gradients_of_one_step_equal_transformers(name, tmp_path):
    model = reference_models.build(name)
    model.save_pretrained(tmp_path)
    cfg, params = hf.load(tmp_path)
    theirs = hf._family(json.loads((tmp_path / "config.json").read_text()))
    torch = reference_models.torch
    tokens_BT = reference_models.tokens(length=24)
    ids = torch.as_tensor(tokens_BT)
    scores = model(ids).logits[:, :-1].flatten(0, 1)
    torch.nn.functional.cross_entropy(scores, ids[:, 1:].flatten(), reduction="sum").backward()
    batch = {
        "tokens": tokens_BT, "mask": (np.arange(24) < 23)[None].repeat(2, 0).astype(np.float32),
        "targets": np.roll(tokens_BT, -1, axis=1),
    }  # fmt: skip
    plain = dataclasses.replace(cfg, balance="none")  # theirs adds no loss about its router
    loss = lambda params: scoring.next_token_loss(plain, params, batch)[0]
    options = {"xla_backend_optimization_level": "0"}
    found = jax.jit(jax.grad(loss), compiler_options=options)(params)
    expected = dict(model.named_parameters())
    largest = max(float(parameter.grad.abs().max()) for parameter in expected.values())
    last = {"layer": cfg.num_layers - 1, "expert": 0}
    held = lambda row: row[1].format(**last) in expected  # in memory experts are one tensor
    rows = tuple(sorted(theirs.table, key=held, reverse=True))
    names = [key for key, _ in table.write(rows, cfg, found)]
    buffers = {key for key, _ in model.named_buffers()}  # the correction of a router's choice
    assert len(set(names) - buffers) == len(expected)
    for key, gradient in table.write(rows, cfg, found):
        if key in buffers:
            assert not np.any(gradient)
            continue
        np.testing.assert_allclose(gradient, expected[key].grad, rtol=1e-3, atol=1e-4 * largest)


@pytest.mark.parametrize(
    "name",
    [
        "gpt2",
        "llama",
        *map(slow, ["mistral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "mixtral"]),
        *map(slow, [*LATER, "qwen2-windows", "qwen3-windows"]),
    ],
)
def test_greedy_text_equals_that_of_transformers(name, tmp_path):
    model = reference_models.build(name)
    model.save_pretrained(tmp_path)
    cfg, params = hf.load(tmp_path)
    prompt = reference_models.tokens(rows=1, length=20)
    expected = model.generate(
        reference_models.torch.as_tensor(prompt), max_new_tokens=64, do_sample=False
    )[0, 20:].tolist()
    settings = sample.Sampling(max_new_tokens=64, temperature=0)
    (found,) = sample.generate(cfg, params, [prompt[0].tolist()], settings)
    assert len(set(expected)) > 3  # no single repeated token
    if found.tokens != expected:  # allowed only where the two leading logits are as good as equal
        first = next(i for i in range(64) if found.tokens[i] != expected[i])
        row = np.concatenate([prompt[0], expected[:first]])[None]
        leading = np.sort(reference_models.logits(model, row)[0, -1])[-2:]
        assert leading[1] - leading[0] < 1e-4


def test_shards_of_transformers_are_read(tmp_path):
    model = reference_models.build("llama")
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    assert_same_bits(hf.load(tmp_path / "many")[1], hf.load(tmp_path / "one")[1])


def test_shards_are_written_below_their_limit(llama, tmp_path):
    cfg, params = hf.load(llama)
    hf.save(tmp_path / "ours", cfg, params, shard_bytes=20_000)
    files = sorted((tmp_path / "ours").glob("*.safetensors"))
    assert len(files) > 2
    assert all(file.stat().st_size < 20_000 + 4_000 for file in files)  # and a header
    assert_same_bits(hf.load(tmp_path / "ours")[1], params)
    tokens_BT = reference_models.tokens()
    assert np.array_equal(
        reference_models.logits(open_hf(tmp_path / "ours"), tokens_BT),
        reference_models.logits(open_hf(llama), tokens_BT),
    )


def test_weights_go_straight_onto_a_mesh(llama):
    mesh = sharding.make_mesh(MeshConfig(fsdp=4), jax.devices()[:4])
    _, params = hf.load(llama, place=partial(sharding.place, mesh))
    kernel = params["blocks"]["mlp"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (2, 24 // 4, 40)
    assert_same_bits(params, hf.load(llama)[1])


@pytest.mark.parametrize(
    "place", [None, lambda name, array: array.shape], ids=["here", "elsewhere"]
)
def test_loading_holds_the_model_and_one_tensor(place, tmp_path):
    cfg = ModelConfig(
        vocab_size=64, num_layers=4, model_dim=256, norm="rmsnorm", mlp="gated",
        activation="silu", position="rope",
    )  # fmt: skip
    shapes = table.parameter_shapes(cfg)
    hf.save(tmp_path / "model", cfg, random_params(cfg))
    sizes = [4 * np.prod(shape) for shape in shapes.values()]
    hf.load(tmp_path / "model", place=place)  # what Python and JAX keep for the next time
    tracemalloc.start()
    hf.load(tmp_path / "model", place=place)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    tensor = 4 * 256 * 1024
    held = sum(sizes) if place is None else max(sizes)  # elsewhere: one stack of layers at a time
    assert held < peak < held + tensor + 300_000


def test_bfloat16_is_kept_or_widened(llama, tmp_path):
    cfg, params = hf.load(llama)
    hf.save(tmp_path / "half", cfg, params, dtype="bfloat16")
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    assert_same_bits(hf.load(tmp_path / "half", dtype="bfloat16")[1], rounded)
    widened = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), rounded)
    assert_same_bits(hf.load(tmp_path / "half")[1], widened)
    assert open_hf(tmp_path / "half").config.dtype == reference_models.torch.bfloat16


def test_gpt2_without_biases_is_written_with_zeros(tmp_path):
    cfg = ModelConfig(vocab_size=61, num_layers=2, model_dim=24, num_heads=4, context_length=32)
    params = random_params(cfg)
    hf.save(tmp_path / "model", cfg, params)
    tokens_BT = reference_models.tokens(length=32)
    expected_BTV = reference_models.logits(open_hf(tmp_path / "model"), tokens_BT)
    np.testing.assert_allclose(logits(cfg, params, tokens_BT), expected_BTV, atol=1e-4)


def test_old_gpt2_files_without_prefix_and_with_masks_are_read(tmp_path):
    model = reference_models.build("gpt2")
    model.save_pretrained(tmp_path / "new")
    model.transformer.save_pretrained(tmp_path / "old")
    from safetensors import numpy as files

    tensors = files.load_file(tmp_path / "old/model.safetensors")
    assert "wte.weight" in tensors
    tensors |= {f"h.{i}.attn.bias": np.ones((1, 1, 8, 8), np.float32) for i in range(2)}
    files.save_file(tensors, tmp_path / "old/model.safetensors")
    assert_same_bits(hf.load(tmp_path / "old")[1], hf.load(tmp_path / "new")[1])


def test_fused_experts_are_read(tmp_path):
    model = reference_models.build("qwen3_moe")
    model.save_pretrained(tmp_path / "each")
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    from safetensors import safe_open

    with safe_open(tmp_path / "fused/model.safetensors", "np") as file:
        assert any("gate_up_proj" in name for name in file.keys())  # noqa: SIM118
    assert_same_bits(hf.load(tmp_path / "fused")[1], hf.load(tmp_path / "each")[1])


def test_mxfp4_kernels_are_read_as_transformers_reads_them(tmp_path):
    from safetensors import numpy as files
    from transformers.integrations import mxfp4 as theirs

    model = reference_models.transformers.AutoModelForCausalLM.from_config(
        reference_models.transformers.GptOssConfig(
            **reference_models.SHAPE | {"hidden_size": 64, "intermediate_size": 32}, head_dim=8,
            num_local_experts=3, num_experts_per_tok=2, sliding_window=7, pad_token_id=None,
        ),
        attn_implementation="eager",
    )  # fmt: skip
    reference_models.randomize(model).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors, random = files.load_file(file), np.random.default_rng(0)
    torch, wide = reference_models.torch, {}
    for name in [n for n in tensors if n.endswith("_proj") and "experts" in n]:
        experts, inward, outward = tensors.pop(name).shape
        blocks = random.integers(0, 256, (experts, outward, inward // 32, 16), np.uint8)
        scales = random.integers(118, 124, blocks.shape[:3], np.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        wide[name] = theirs.convert_moe_packed_tensors(*map(torch.as_tensor, (blocks, scales)))
    files.save_file(tensors, file, {"format": "pt"})
    edit(tmp_path, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": []})
    cfg, params = hf.load(tmp_path)
    with torch.no_grad():
        for name, value in wide.items():
            model.get_parameter(name).copy_(value)
    for name, tensor in table.write(hf.GPT_OSS.table, cfg, params):
        assert np.array_equal(tensor, model.get_parameter(name).detach().numpy()), name
    hf.save(tmp_path / "ours", cfg, params, dtype="bfloat16")
    again = open_hf(tmp_path / "ours")
    assert torch.equal(again.get_parameter(name), model.get_parameter(name).bfloat16())

    del tensors[next(key for key in tensors if key.endswith("_scales"))]
    files.save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match="blocks and scales are missing"):
        hf.load(tmp_path)


def test_a_copy_of_the_tied_head_is_accepted_and_another_head_is_not(tmp_path):
    reference_models.build("llama-tied-biases").save_pretrained(tmp_path)
    from safetensors import numpy as files

    file = tmp_path / "model.safetensors"
    tensors, expected = files.load_file(file), hf.load(tmp_path)[1]
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    files.save_file(tensors, file, {"format": "pt"})
    assert_same_bits(hf.load(tmp_path)[1], expected)
    tensors["lm_head.weight"][0, 0] += 1
    files.save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"tie_word_embeddings=True, but lm_head\.weight"):
        hf.load(tmp_path)


def test_settings_of_transformers_4_are_read(llama):
    new = hf.load(llama)[0]
    content = json.loads((llama / "config.json").read_text())
    rope = content.pop("rope_parameters")
    content["rope_theta"] = rope.pop("rope_theta")
    content["rope_scaling"] = rope | {"type": rope.pop("rope_type")}
    (llama / "config.json").write_text(json.dumps(content))
    assert hf.load(llama)[0] == new
    assert new.rope_scaling is not None
    assert new.rope_base == 1000


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("llama", {"model_type": "bert"}, "model_type='bert'"),
        ("llama", {"hidden_act": "mish"}, "hidden_act='mish'"),
        ("llama", {"attention_bias": True}, "weights lack tensors .*q_proj.bias"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ("llama", {"rope_parameters": {"rope_type": "axial", "rope_theta": 1e4}}, "_type='axial"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "rope_parameters.partial_rotary_factor=0.5",
        ),
        ("llama", {"rope_parameters": {"rope_type": "llama3"}}, "rope_parameters.factor=None"),
        ("llama", {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
        ("llama", {"hidden_size": "24"}, "hidden_size='24'"),
        ("llama", {"hidden_size": True}, "hidden_size=True"),
        ("llama", {"num_hidden_layers": 10**30}, "num_hidden_layers=1000"),
        ("llama", {"num_hidden_layers": 10**9}, "lack tensors .*layers.2.input_layernorm"),
        ("llama", {"vocab_size": 2**31 - 1}, "shapes"),
        ("llama", {"rms_norm_eps": float("nan")}, "rms_norm_eps=nan"),
        ("llama", {"num_key_value_heads": 3}, "num_kv_heads=3"),
        ("llama", {"head_dim": 7}, "head_dim=7"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
        ("qwen2_moe", {"use_sliding_window": True}, "use_sliding_window=True"),
        (
            "qwen2",
            {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 4},
            "layer_types.*use_sliding_window is not true",
        ),
        ("llama", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ("gemma3_text", {"layer_types": ["full_attention"]}, "for 7 layers"),
        ("gemma3_text", {"sliding_window": None}, "sliding_window=None"),
        ("gemma3_text", {"num_hidden_layers": 10**9}, "num_hidden_layers=1000"),
        ("exaone4", {"layer_types": ["full_attention"] * 2 + ["sliding_attention"] * 3}, "n-th"),
        ("phi3", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_type='linear'"),
        ("qwen3", {"attention_bias": True}, "attention_bias=True"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, "mlp_only_layers"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step=2"),
        ("mistral", {"sliding_window": 0}, "sliding_window=0"),
    ],
)
def test_what_the_model_does_not_have_is_refused_by_name(name, settings, message, tmp_path):
    reference_models.build(name).save_pretrained(tmp_path)
    edit(tmp_path, **settings)
    with pytest.raises(ValueError, match=message) as caught:
        hf.load(tmp_path)
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.norm.weight": None}, "lack tensors that the config asks for: model.norm.weight$"),
        ({"model.layers.0.extra": np.ones(3, np.float32)}, "no place for: model.layers.0.extra$"),
        (
            {"model.norm.weight": np.ones((24, 1), np.float32)},
            r"model.norm.weight is \[24, 1\] instead of \[24\]",
        ),
        ({"model.norm.weight": np.ones(24, np.int8)}, "model.norm.weight is I8"),
    ],
)
def test_tensors_that_do_not_fit_are_named(llama, change, message):
    from safetensors import numpy as files

    tensors = files.load_file(llama / "model.safetensors") | change
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    files.save_file(kept, llama / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        hf.load(llama)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adapter_dim": 4}, "model.adapter_dim=4: no Hugging Face family"),
        ({"num_experts": 4}, "model.num_experts=4"),
        ({"num_kv_heads": 1}, "model.num_kv_heads=1"),
        ({"qk_norm": True}, "model.qk_norm=True"),
    ],
)
def test_a_model_that_no_family_has_is_refused_by_name(settings, message):
    cfg = ModelConfig(vocab_size=61, model_dim=24, num_heads=4, **settings)
    with pytest.raises(ValueError, match=message):
        hf.config_to_hf(cfg)


def test_parameters_of_another_config_are_refused(tmp_path, tiny):
    cfg = dataclasses.replace(tiny, num_kv_heads=None)
    params = random_params(dataclasses.replace(cfg, num_layers=3))
    with pytest.raises(ValueError, match="not the config's: blocks/attention/key/kernel"):
        hf.save(tmp_path / "model", cfg, params)


def test_only_our_own_export_is_replaced_and_a_failed_one_leaves_nothing(llama, tmp_path):
    cfg, params = hf.load(llama)
    with pytest.raises(ValueError, match="holds something else than an export"):
        hf.save(llama, cfg, params)
    out = tmp_path / "out"
    hf.save(out, cfg, params)
    doubled = jax.tree.map(lambda leaf: 2 * leaf, params)
    hf.save(out, cfg, doubled)
    assert_same_bits(hf.load(out)[1], doubled)
    with pytest.raises(OSError, match="missing-folder"):
        hf.save(out, cfg, params, tokenizer_files={"missing-folder/x": b""})
    assert_same_bits(hf.load(out)[1], doubled)
    assert {file.name for file in tmp_path.iterdir()} == {"llama", "out"}
