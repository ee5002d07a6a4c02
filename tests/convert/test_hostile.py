"""Damaged and hostile files: one ValueError, no crash, no memory blow-up."""

import contextlib
import json
import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxgpt import tree
from jaxgpt.config import ModelConfig
from jaxgpt.convert import gguf, hf, llama2c, table, tensors, tokenizer_files
from jaxgpt.convert.load import load

LLAMA = ModelConfig(
    vocab_size=32, context_length=16, num_layers=2, model_dim=32, num_heads=2, num_kv_heads=1,
    mlp_dim=64, mlp="gated", activation="silu", norm="rmsnorm", position="rope",
)  # fmt: skip
MEGABYTE = 2**20


@pytest.fixture(scope="module")
def params():
    shapes = table.parameter_shapes(LLAMA).items()
    return tree.nest({name: np.ones(shape, np.float32) for name, shape in shapes})


@pytest.fixture
def model(tmp_path, params):
    hf.save(tmp_path / "model", LLAMA, params)
    return tmp_path / "model"


@pytest.fixture
def sharded(tmp_path, params):
    hf.save(tmp_path / "sharded", LLAMA, params, shard_bytes=20_000)
    return tmp_path / "sharded"


@contextlib.contextmanager
def little_memory(limit=30 * MEGABYTE):
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < limit


@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.999])
def test_truncated_safetensors(model, share):
    file = model / tensors.SINGLE
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    with little_memory(), pytest.raises(ValueError, match="not a whole safetensors file"):
        hf.load(model)


@pytest.mark.parametrize("size", [2**63, 2**40, 90_000_000])
def test_a_header_that_claims_a_terabyte(model, size):
    file = model / tensors.SINGLE
    file.write_bytes(struct.pack("<Q", size) + file.read_bytes()[8:])
    with little_memory(), pytest.raises(ValueError, match="not a whole safetensors file"):
        hf.load(model)


@pytest.mark.parametrize("shape", [[2**40], [2**62, 4], [32, 2**31]])
def test_a_tensor_that_claims_a_terabyte(model, shape):
    size = 4 * int(np.prod(shape, dtype=object))
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}
    header = json.dumps({"model.embed_tokens.weight": entry}).encode()
    (model / tensors.SINGLE).write_bytes(struct.pack("<Q", len(header)) + header + bytes(64))
    with little_memory(), pytest.raises(ValueError, match="not a whole safetensors file"):
        hf.load(model)


def test_missing_shards_are_named(sharded):
    shards = sorted(sharded.glob("*.safetensors"))
    shards[1].unlink()
    with pytest.raises(ValueError, match=f"shards are missing: {shards[1].name}"):
        hf.load(sharded)


@pytest.mark.parametrize(
    "name",
    ["../secret.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..\\x.safetensors",
     "", ".", "x.bin", "x\0.safetensors", 7, None, ["x.safetensors"]],
)  # fmt: skip
def test_an_index_cannot_lead_out_of_its_directory(sharded, name):
    index = json.loads((sharded / tensors.INDEX).read_text())
    (sharded.parent / "secret.safetensors").write_bytes(b"secret")
    index["weight_map"]["model.norm.weight"] = name
    (sharded / tensors.INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match="is not the name of a shard beside it"):
        hf.load(sharded)


def test_an_index_that_names_the_wrong_shard(sharded):
    index = json.loads((sharded / tensors.INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = sorted(sharded.glob("*.safetensors"))[-1].name
    (sharded / tensors.INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"disagree about model\.norm\.weight"):
        hf.load(sharded)


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"null", b"{", b"\xff\xfe{}", b"[" * 200_000, b'{"a":' * 200_000,
     b'{"vocab_size": ' + b"9" * 100_000 + b"}"],
    ids=["empty", "list", "null", "open", "not UTF-8", "deep list", "deep object", "long number"],
)  # fmt: skip
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", tensors.INDEX])
def test_bad_json(model, name, content):
    (model / name).write_bytes(content)
    read = tokenizer_files.read if name == "tokenizer.json" else hf.load
    with little_memory(), pytest.raises(ValueError, match=name):
        read(model)


def test_pickles_are_never_opened(tmp_path, model):
    (model / tensors.SINGLE).unlink()
    (model / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    with pytest.raises(ValueError, match="convert to safetensors"):
        hf.load(model)


def test_a_directory_without_a_model(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json: no such file"):
        hf.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("notes.txt", b"", "holds neither a run .* nor a Hugging Face model .config.json.$"),
        ("a.gguf", b"", ".*; name a file in it, such as .*a.gguf$"),
    ],
)
def test_a_directory_that_is_no_model(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"checkpoint={tmp_path}: {message}"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("pytorch_model.bin", b"PK\x03\x04" + bytes(80), "pickled weights can run code"),
        ("model.pt", b"\x80\x02\x8a\n" + bytes(80), "pickled weights can run code"),
        ("old.bin", b"\x80\x02\x8a\n" + bytes(80), "not a llama2.c model"),
        ("model.safetensors", bytes(80), "give its directory"),
        ("notes.txt", b"Dear diary, today I trained a model.", "not a llama2.c model"),
        ("model.gguf", b"PK\x03\x04" + bytes(80), "pickled weights"),
        ("empty", b"", "too short"),
    ],
)
def test_a_file_that_is_no_model(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}: .*{message}"):
        load(tmp_path / name)


@pytest.mark.parametrize("name", ["merges.txt", "chat_template.jinja"])
def test_tokenizer_text_that_is_not_utf8(model, name):
    (model / name).write_bytes(b"#version: 0.2\n\xff\xfe\n")
    with pytest.raises(ValueError, match=f"{name}: not UTF-8 text"):
        tokenizer_files.read(model)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", {"added_tokens": 5}),
        ("tokenizer.json", {"added_tokens": [{"id": 1}]}),
        ("tokenizer.json", {"added_tokens": [["a", "b"]]}),
        ("generation_config.json", {"eos_token_id": {"a": 1}}),
        ("generation_config.json", {"eos_token_id": ["a"]}),
    ],
)
def test_special_tokens_of_the_wrong_type(name, content):
    with pytest.raises(ValueError, match=name):
        tokenizer_files.special_ids({name: json.dumps(content).encode()})


@pytest.mark.parametrize("template", [5, {"a": "b"}, [{"name": "default", "template": 3}]])
def test_a_chat_template_that_is_no_text(template):
    content = json.dumps({"chat_template": template}).encode()
    with pytest.raises(ValueError, match=r"chat_template=.*must be text"):
        tokenizer_files.chat_template({"tokenizer_config.json": content})


# Fuzzing: whatever bytes a file holds, it is read, or refused with a ValueError.

fuzz = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
EDITS = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255), st.integers(0, 3)),
    min_size=1, max_size=6,
)  # fmt: skip


def mutate(content, edits):
    """Bytes set, cut out or put in, mostly near the beginning where the headers are."""
    content = bytearray(content)
    for where, byte, kind in edits:
        place = int(where**3 * len(content))
        if kind == 0:
            content[place : place + 1] = b""
        elif kind == 1:
            content[place:place] = bytes([byte])
        elif kind == 2:
            content[place : place + 8] = struct.pack("<Q", byte * 2**56 + byte)
        else:
            content[place : place + 1] = bytes([byte])
    return bytes(content)


@fuzz
@given(EDITS)
def test_fuzzed_safetensors(model, edits):
    whole = model.parent / "whole"
    if not whole.exists():
        (model / tensors.SINGLE).rename(whole)
    (model / tensors.SINGLE).write_bytes(mutate(whole.read_bytes(), edits))
    with contextlib.suppress(ValueError), tensors.Tensors(model) as files:
        for name in files.shapes:
            assert files.read(name).shape == files.shapes[name]


@fuzz
@given(EDITS, st.sampled_from(["config.json", "generation_config.json", tensors.INDEX]))
def test_fuzzed_json(sharded, edits, name):
    content = (sharded / name).read_bytes()
    (sharded / name).write_bytes(mutate(content, edits))
    try:
        with contextlib.suppress(ValueError):
            hf.config_from_hf(tensors.read_json(sharded / "config.json"))
            tokenizer_files.read(sharded)
            tensors.Tensors(sharded).__exit__(None, None, None)
    finally:
        (sharded / name).write_bytes(content)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)


@fuzz
@given(st.data())
def test_settings_of_any_type(data):
    family = data.draw(st.sampled_from(hf.FAMILIES))
    cfg = hf.config_from_hf(GOOD[family.model_type])
    settings = hf.config_to_hf(cfg)
    key = data.draw(st.sampled_from(sorted(settings.keys() | hf.families.NEUTRAL)))
    value = data.draw(JSON)
    with contextlib.suppress(ValueError):
        hf.config_from_hf(settings | {key: value})


SIZES = dict(
    vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=16,
    sliding_window=16,
)  # fmt: skip
GOOD = {
    **{f.model_type: SIZES | {"model_type": f.model_type} for f in hf.FAMILIES},
    "gpt2": {
        "model_type": "gpt2", "vocab_size": 32, "n_positions": 16, "n_layer": 2, "n_embd": 32,
        "n_head": 2,
    },
}  # fmt: skip
LATENT = dict(
    num_key_value_heads=2, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4,
    v_head_dim=8, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, n_group=1,
    topk_group=1, first_k_dense_replace=1,
)  # fmt: skip
for name in ("deepseek_v2", "deepseek_v3", "glm4_moe_lite"):
    GOOD[name] |= LATENT


@pytest.fixture(scope="module")
def small_gguf(tmp_path_factory, params):
    from test_gguf import CFG, write

    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    shapes = table.parameter_shapes(CFG).items()
    write(path, tree.nest({name: np.ones(shape, np.float32) for name, shape in shapes}))
    return path.read_bytes()


@fuzz
@given(EDITS)
def test_fuzzed_gguf(small_gguf, tmp_path, edits):
    path = tmp_path / "fuzzed.gguf"
    # Most of the file is weights: the header is its first hundredth.
    head = len(small_gguf) // 80
    path.write_bytes(mutate(small_gguf[:head], edits) + small_gguf[head:])
    with little_memory(), contextlib.suppress(ValueError):
        gguf.load(path, place=lambda name, array: array)


@pytest.mark.parametrize(("offset", "count"), [(8, 2**60), (16, 2**60), (8, 2**64 - 1)])
def test_gguf_counts_that_lie(small_gguf, tmp_path, offset, count):
    content = small_gguf[:offset] + struct.pack("<Q", count) + small_gguf[offset + 8 :]
    (tmp_path / "model.gguf").write_bytes(content)
    with little_memory(), pytest.raises(ValueError, match=r"model\.gguf"):
        gguf.load(tmp_path / "model.gguf")


@fuzz
@given(EDITS)
def test_fuzzed_llama2c(tmp_path, edits):
    from test_llama2c import write_model, write_vocabulary

    write_model(tmp_path / "model.bin", tied=True)
    write_vocabulary(tmp_path / "tok.bin", 20)
    vocabulary = (tmp_path / "tok.bin").read_bytes()
    header = (tmp_path / "model.bin").read_bytes()
    (tmp_path / "model.bin").write_bytes(mutate(header[:28], edits) + header[28:])
    with little_memory(), contextlib.suppress(ValueError):
        llama2c.load(tmp_path / "model.bin", place=lambda name, array: array)
    (tmp_path / "tok.bin").write_bytes(mutate(vocabulary, edits))
    with contextlib.suppress(ValueError):
        llama2c.read_tokenizer(tmp_path / "tok.bin", 20)
