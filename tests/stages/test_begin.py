"""Where a run that starts from given weights puts them."""

import jax
import numpy as np
import pytest

from jaxgpt import run, sharding, tree
from jaxgpt.config import MeshConfig, ModelConfig, PeftConfig, SftConfig
from jaxgpt.convert import hf
from jaxgpt.convert.load import own_files
from jaxgpt.data import tokenizer as tokenizers
from jaxgpt.model import gpt

MODEL = ModelConfig(
    vocab_size=264, context_length=32, num_layers=2, model_dim=64, num_heads=4, mlp_dim=128,
    mlp="gated", activation="silu", norm="rmsnorm", position="rope",
)  # fmt: skip


@pytest.mark.parametrize("kind", ["none", "qlora"])
def test_initial_weights_go_straight_onto_the_mesh(kind, tmp_path):
    tokenizers.load("byte").save(tmp_path / "tokenizer.json")
    files = own_files({"tokenizer.json": (tmp_path / "tokenizer.json").read_bytes()})
    params = gpt.init(MODEL, jax.random.key(0))
    hf.save(tmp_path / "model", MODEL, params, tokenizer_files=files)
    cfg = SftConfig(init=str(tmp_path / "model"), peft=PeftConfig(kind=kind))
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=2, tensor=4))
    with jax.set_mesh(mesh):
        start = run.begin("sft", cfg)
    for name, leaf in tree.flatten(start.params).items():
        assert leaf.sharding.spec == sharding.spec_of(name, leaf.shape, mesh), name
    placed, expected = tree.flatten(start.params), tree.flatten(params)
    if kind == "none":
        for name, leaf in placed.items():
            np.testing.assert_array_equal(leaf, expected[name], err_msg=name)
    cut = placed["blocks/mlp/up/kernel" + "/packed" * (kind == "qlora")]
    assert cut.addressable_shards[0].data.size == cut.size // 8
