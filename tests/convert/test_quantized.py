"""Checkpoints of fewer bits, against the libraries that write them."""

import json
import logging

import numpy as np
import pytest

pytest.importorskip("transformers", reason="the reference extra is not installed")

import safetensors.torch
import torch
import transformers

from jaxgpt.convert import hf, load, quantized, tensors

CONFIG = transformers.LlamaConfig(
    vocab_size=61, hidden_size=64, intermediate_size=192, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=96,
    bos_token_id=None, eos_token_id=None, pad_token_id=None,
)  # fmt: skip
FLOAT8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
GROUP = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", "symmetric": True}}
COMPRESSED = {"quant_method": "compressed-tensors", "format": "float-quantized",
              "config_groups": {"group_0": GROUP}, "kv_cache_scheme": None}  # fmt: skip


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """The directory of a random model, and its tensors."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("llama")
    transformers.LlamaForCausalLM(CONFIG).save_pretrained(path)
    return path, safetensors.torch.load_file(path / "model.safetensors")


def write(path, llama, told, store):
    """The model with its blocks' matrices as `store` gives them: {ending: tensor} of a weight."""
    source, held = llama
    path.mkdir(exist_ok=True)
    settings = json.loads((source / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(settings | {"quantization_config": told}))
    out = {}
    for name, weight in held.items():
        if "_proj." in name:
            out |= {name.removesuffix("weight") + end: t for end, t in store(weight).items()}
        else:
            out[name] = weight
    safetensors.torch.save_file(
        {name: tensor.contiguous() for name, tensor in out.items()}, path / "model.safetensors"
    )
    return out


def decoded(path):
    told = json.loads((path / "config.json").read_text())["quantization_config"]
    with tensors.Tensors(path, quantized.STORED) as files:
        source = quantized.Decoded(files, told)
        return {name: source.read(name) for name in source.shapes}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_allclose(
            found[name].astype(np.float32), tensor.float().numpy(), rtol=1e-6, err_msg=name
        )


def blocks(tall, wide, scale_dtype=torch.float32):
    """float8 with a scale for each block, the last of which may be short."""

    def store(weight):
        rows, columns = weight.shape
        down, across = -(-rows // tall), -(-columns // wide)
        padded = torch.zeros(down * tall, across * wide)
        padded[:rows, :columns] = weight
        cut = padded.reshape(down, tall, across, wide)
        scale = (cut.abs().amax((1, 3)) / 448).to(scale_dtype)
        codes = (cut / scale.float()[:, None, :, None]).reshape(padded.shape)[:rows, :columns]
        return {"weight": codes.to(torch.float8_e4m3fn), "weight_scale_inv": scale}

    return store


def test_float8_by_blocks_is_as_transformers_reads_it(llama, tmp_path):
    size = (16, 64)
    told = FLOAT8 | {"weight_block_size": size}
    write(tmp_path / "q", llama, told, blocks(*size))
    logging.disable(logging.WARNING)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "q", dtype=torch.float32)
    logging.disable(logging.NOTSET)
    found, (plain, _) = decoded(tmp_path / "q"), llama
    assert_same(found, theirs.state_dict())
    # The whole way, into our parameters.
    cfg, params = hf.load(tmp_path / "q")
    assert cfg == hf.load(plain)[0] == load.model_config(tmp_path / "q")
    query = found["model.layers.1.self_attn.q_proj.weight"]
    ours = np.asarray(params["blocks"]["attention"]["query"]["kernel"])[1]
    np.testing.assert_array_equal(ours.reshape(64, -1), query.T)


def test_a_last_block_may_be_short(llama, tmp_path):
    told = FLOAT8 | {"weight_block_size": [24, 80]}
    held = write(tmp_path / "q", llama, told, blocks(24, 80))
    found = decoded(tmp_path / "q")
    name = "model.layers.0.mlp.down_proj.weight"  # [64, 192]
    scale = held[name + "_scale_inv"].numpy()
    codes = held[name].float().numpy()
    by_hand = [[codes[i, j] * scale[i // 24, j // 80] for j in range(192)] for i in range(64)]
    np.testing.assert_array_equal(found[name], np.array(by_hand, np.float32))


def test_scales_may_be_powers_of_two(llama, tmp_path):
    told = FLOAT8 | {"weight_block_size": [32, 32], "scale_fmt": "ue8m0"}
    held = write(tmp_path / "q", llama, told, blocks(32, 32, torch.float8_e8m0fnu))
    from transformers.integrations import finegrained_fp8

    reference = finegrained_fp8.Fp8Dequantize(None)._dequantize_one
    found = decoded(tmp_path / "q")
    for name in (name for name in found if name + "_scale_inv" in held):
        expected = reference(held[name], held[name + "_scale_inv"], torch.float32)
        np.testing.assert_array_equal(found[name], expected.numpy())


def test_one_scale_for_all(llama, tmp_path):
    store = lambda w: {
        "weight": (w / (w.abs().max() / 448)).to(torch.float8_e4m3fn),
        "weight_scale_inv": w.abs().max() / 448, "activation_scale": torch.tensor(0.1),
    }  # fmt: skip
    told = FLOAT8 | {"activation_scheme": "static", "weight_block_size": None}
    held = write(tmp_path / "q", llama, told, store)
    found = decoded(tmp_path / "q")
    assert found.keys() == llama[1].keys()
    name = "model.layers.0.self_attn.k_proj.weight"
    expected = held[name].float() * held[name + "_scale_inv"]
    np.testing.assert_array_equal(found[name], expected.numpy())


@pytest.mark.parametrize("kind", ["float", "int"])
@pytest.mark.parametrize("strategy", ["tensor", "channel", "block"])
def test_compressed_tensors(llama, tmp_path, kind, strategy):
    theirs = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.quantization.lifecycle import forward

    args = theirs.QuantizationArgs(
        num_bits=8, type=kind, symmetric=True, strategy=strategy,
        block_structure=[32, 32] if strategy == "block" else None,
    )  # fmt: skip
    stored, largest = (torch.float8_e4m3fn, 448) if kind == "float" else (torch.int8, 127)
    expected = {}

    def store(weight):
        size = {"tensor": (*weight.shape,), "channel": (1, weight.shape[1]), "block": (32, 32)}
        tall, wide = size[strategy]
        cut = weight.reshape(weight.shape[0] // tall, tall, weight.shape[1] // wide, wide)
        scale = cut.abs().amax((1, 3)) / largest
        if strategy == "tensor":
            scale = scale.reshape(1)
        codes = forward.quantize(weight, scale, torch.zeros_like(scale), args, dtype=stored)
        expected[codes.float().sum()] = forward.dequantize(codes, scale, None, args)
        return {"weight": codes, "weight_scale": scale, "input_scale": torch.ones(1)}

    weights = GROUP["weights"] | {"type": kind, "strategy": strategy}
    told = COMPRESSED | {"config_groups": {"group_0": GROUP | {"weights": weights}}}
    write(tmp_path / "q", llama, told, store)
    found = decoded(tmp_path / "q")
    assert found.keys() == llama[1].keys()
    projections = [found[name] for name in llama[1] if "_proj." in name]
    for ours, reference in zip(projections, expected.values(), strict=True):
        np.testing.assert_allclose(ours, reference.numpy(), rtol=1e-6)


@pytest.mark.parametrize("how", ["nf4", "nf4-twice", "fp4-twice", "int8"])
def test_bitsandbytes(llama, tmp_path, how):
    functional = pytest.importorskip("bitsandbytes.functional")
    kind, _, twice = how.partition("-")
    expected = {}

    def store(weight):
        if kind == "int8":
            codes, largest, _ = functional.int8_vectorwise_quant(weight.half())
            expected[len(expected)] = functional.int8_vectorwise_dequant(codes, largest)
            # The library's own 1 / 127 is rounded.
            marks = {"weight_format": torch.tensor(0, dtype=torch.uint8)}
            return {"weight": codes, "SCB": largest, **marks}
        codes, state = functional.quantize_4bit(
            weight, quant_type=kind, compress_statistics=bool(twice)
        )
        expected[len(expected)] = functional.dequantize_4bit(codes, state)
        beside = {f"weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
        return {"weight": codes, **beside}

    told = {"quant_method": "bitsandbytes", "load_in_8bit": kind == "int8",
            "load_in_4bit": kind != "int8", "bnb_4bit_quant_type": kind}  # fmt: skip
    write(tmp_path / "q", llama, told, store)
    found = decoded(tmp_path / "q")
    assert found.keys() == llama[1].keys()
    projections = [found[name] for name in llama[1] if "_proj." in name]
    for ours, reference in zip(projections, expected.values(), strict=True):
        np.testing.assert_allclose(ours, reference.float().numpy(), rtol=1e-6, atol=1e-9)
    assert hf.load(tmp_path / "q")[0] == hf.load(llama[0])[0]


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quant_method='gptq': must be bitsandbytes or fp8"),
        ({"quant_method": "awq"}, "quant_method='awq'"),
        ([1], r"quantization_config=\[1\]: must be a table"),
        (FLOAT8 | {"fmt": "e5m2"}, "quantization_config.fmt='e5m2': must be e4m3"),
        (FLOAT8 | {"expert_dtype": "fp4"}, "expert_dtype='fp4'"),
        (FLOAT8 | {"news": 1}, "quantization_config.news=1: must be absent"),
        (COMPRESSED | {"format": "pack-quantized"}, "format='pack-quantized'"),
        (COMPRESSED | {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        (COMPRESSED | {"transform_config": {"a": 1}}, "transform_config"),
        (
            COMPRESSED | {"config_groups": {"g": {"weights": {"num_bits": 4}}}},
            "config_groups.g.weights.num_bits=4: must be 8",
        ),
        ({"quant_method": "bitsandbytes", "bits": 4}, "quantization_config.bits=4"),
    ],
)
def test_others_are_refused_by_name(llama, told, message):
    settings = json.loads((llama[0] / "config.json").read_text())
    with pytest.raises(ValueError, match=message):
        hf.config_from_hf(settings | {"quantization_config": told})


def test_damaged_scales_are_named(llama, tmp_path):
    whole = blocks(32, 32)
    told = FLOAT8 | {"weight_block_size": [32, 32]}
    write(tmp_path / "a", llama, told, lambda w: {"weight": whole(w)["weight"]})
    with pytest.raises(ValueError, match=r"q_proj\.weight: is F8_E4M3 without a scale|is F8_E4M3"):
        hf.load(tmp_path / "a")
    write(tmp_path / "b", llama, told, lambda w: whole(w) | {"weight_scale_inv": torch.ones(3, 5)})
    with pytest.raises(ValueError, match=r"\(3, 5\) scales do not fit a matrix of"):
        hf.load(tmp_path / "b")
    settings = json.loads((tmp_path / "a/config.json").read_text())
    del settings["quantization_config"]  # without it no such type is read
    (tmp_path / "a/config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="is F8_E4M3; only F64, F32, F16, BF16 are read"):
        hf.load(tmp_path / "a")
