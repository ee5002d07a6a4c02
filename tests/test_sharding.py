"""The mesh and the table of placements."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxgpt import sharding
from jaxgpt.config import MeshConfig, ModelConfig
from jaxgpt.model import gpt


def mesh_of(**sizes: int) -> jax.sharding.Mesh:
    return sharding.make_mesh(MeshConfig(**sizes))


def test_minus_one_takes_what_is_left():
    assert dict(mesh_of(fsdp=2, tensor=2).shape) == {
        "data": 2, "fsdp": 2, "tensor": 2, "context": 1, "expert": 1,
    }  # fmt: skip
    assert mesh_of(data=2, fsdp=-1).shape["fsdp"] == 4


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"data": 3}, "mesh=data 3: takes 3 devices, and here are 8; --mesh.data -1 would fit"),
        ({"data": 1}, "mesh=data 1: takes 1 devices, and here are 8; --mesh.data -1 would fit"),
        ({"fsdp": 3}, "mesh=fsdp 3: takes a multiple of 3 devices, .* --mesh.fsdp 2 would fit"),
        ({"tensor": 16}, "takes a multiple of 16 devices, .* --mesh.tensor 8 would fit"),
        ({"data": 2, "fsdp": 3}, "takes 6 devices, and here are 8; --mesh.fsdp 4 would fit"),
        ({"data": 3, "fsdp": 3}, "takes 9 devices, .* choose sizes whose product is that"),
    ],
)
def test_a_mesh_that_does_not_fit_says_which_value_would(sizes, said):
    with pytest.raises(ValueError, match=said):
        mesh_of(**sizes)
    for word in said.split("--mesh.")[1:]:
        axis, value, *_ = word.split()
        mesh_of(**{**sizes, axis: int(value)})


@pytest.mark.parametrize(
    "sizes",
    [{"data": 3}, {"data": 16}, {"data": -1, "fsdp": -1}, {"data": 4}, {"data": -1, "tensor": 3}],
)
def test_a_mesh_that_does_not_fit_is_refused(sizes):
    with pytest.raises(ValueError, match=r"mesh"):
        mesh_of(**sizes)


def test_an_axis_that_does_not_lie_along_those_of_a_slice_is_refused():
    with pytest.raises(ValueError, match=r"mesh=data 2 \* tensor 8: .* of the slice, 4x4"):
        sharding.make_mesh(MeshConfig(tensor=8), [_Chip((x, y, 0)) for x, y in np.ndindex(4, 4)])


@dataclasses.dataclass(frozen=True)
class _Chip:
    """What JAX asks of a device when it lays a mesh along a TPU's axes."""

    coords: tuple[int, int, int]
    core_on_chip: int = 0
    process_index: int = 0
    slice_index: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v6 lite"


SHAPES = {
    "gpt2": ModelConfig(vocab_size=64, model_dim=16, num_layers=3, bias="all"),
    "mixture": ModelConfig(
        vocab_size=64, model_dim=16, num_layers=3, num_experts=4, mlp="gated", position="rope",
        norm="rmsnorm", qk_norm=True, tie_embeddings=False, bias="qkv", adapter_dim=8,
    ),
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_every_parameter_has_a_place(shape):
    shapes = jax.eval_shape(lambda rng: gpt.init(SHAPES[shape], rng), jax.random.key(0))
    mesh = mesh_of(data=1, fsdp=2, tensor=2, expert=2)
    placed = sharding.shardings(mesh, {"params": {"policy": shapes}, "ema": {"policy": shapes}})
    matrices = [leaf for leaf in jax.tree.leaves(placed) if leaf.spec != P()]
    assert len(matrices) >= 14


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("policy/embed/embedding", P("tensor", "fsdp")),
        ("policy/blocks/attention/query/kernel", P(None, "fsdp", "tensor")),
        ("policy/blocks/attention/output/kernel", P(None, "tensor", "fsdp")),
        ("policy/blocks/mlp/down/kernel", P(None, "tensor", "fsdp")),
        ("opt_state/1/0/mu/policy/blocks/mlp/up/kernel", P(None, "fsdp", "tensor")),
        ("policy/blocks/moe/up/kernel", P(None, "expert", "fsdp", "tensor")),
        ("policy/blocks/moe/router/kernel", P()),
        ("policy/blocks/attention_norm/scale", P()),
        ("carry/router_bias", P()),
    ],
)
def test_the_table_by_example(name, spec):
    shape = (8,) * max(len(spec), 2)
    assert sharding.spec_of(name, shape, mesh_of(data=1, fsdp=2, tensor=2, expert=2)) == spec


def test_a_name_without_a_rule_is_an_error():
    with pytest.raises(ValueError, match="policy/blocks/surprise"):
        sharding.spec_of("policy/blocks/surprise", (8, 8), mesh_of())


def test_an_axis_that_does_not_divide_is_an_error_that_names_both():
    with pytest.raises(ValueError) as error:
        sharding.spec_of("policy/blocks/mlp/up/kernel", (2, 12, 40), mesh_of(data=1, fsdp=8))
    assert "mesh.fsdp=8" in str(error.value) and "policy/blocks/mlp/up/kernel" in str(error.value)


def read(rows: np.ndarray) -> dict[str, np.ndarray]:
    tokens_BT = rows[:, None] * 100 + np.arange(4)[None]
    return {"tokens": tokens_BT, "length": rows}


def test_rows_lie_over_data_and_fsdp_and_positions_over_context():
    batch = sharding.place_rows(mesh_of(data=2, fsdp=2, context=2), 8, read)
    np.testing.assert_array_equal(batch["tokens"], read(np.arange(8))["tokens"])
    np.testing.assert_array_equal(batch["length"], np.arange(8))
    assert {shard.data.shape for shard in batch["tokens"].addressable_shards} == {(2, 2)}
    assert {shard.data.shape for shard in batch["length"].addressable_shards} == {(2,)}


def test_only_the_asked_rows_are_read():
    asked = []
    sharding.place_rows(mesh_of(tensor=2), 8, lambda rows: asked.append(rows) or read(rows))
    np.testing.assert_array_equal(np.concatenate(asked), np.arange(8))


def test_rows_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"train\.batch_size=12"):
        sharding.place_rows(mesh_of(), 12, read)


def test_positions_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"mesh\.context=8"):
        sharding.place_rows(mesh_of(data=1, context=8), 8, read)
