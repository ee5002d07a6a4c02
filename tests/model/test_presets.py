"""configs/model: every preset loads, and has the published number of parameters."""

import math
from pathlib import Path

import pytest

from jaxgpt import config
from jaxgpt.convert import table

FOLDER = Path(__file__).parents[2] / "configs/model"
PUBLISHED = {
    "gpt2-124m": 124_439_808,
    "gpt2-355m": 354_823_168,
    "gpt2-774m": 774_030_080,
    "gpt2-1.5b": 1_557_611_200,
    "llama-135m": 134_515_008,
    "llama-8b": 8_030_261_248,
}


def load(name: str, *overrides: str) -> config.ModelConfig:
    args = ["--model", str(FOLDER / f"{name}.yaml"), *overrides]
    return config.parse(config.PretrainConfig, "", args).model


def count(cfg: config.ModelConfig) -> int:
    return sum(math.prod(shape) for shape in table.parameter_shapes(cfg).values())


@pytest.mark.parametrize("name", sorted(file.stem for file in FOLDER.glob("*.yaml")))
def test_preset_states_only_what_differs_from_the_defaults(name):
    lines = (FOLDER / f"{name}.yaml").read_text().splitlines()
    stated = [line.partition(":")[0] for line in lines if not line.startswith("#")]
    cfg, default = load(name), config.ModelConfig()
    # The size of a model reads better whole, even where it is the default.
    size = {"num_layers", "model_dim", "num_heads"}
    assert set(stated) >= size
    for field in set(stated) - size:
        assert getattr(cfg, field) != getattr(default, field), field


@pytest.mark.parametrize(("name", "parameters"), PUBLISHED.items())
def test_preset_has_the_published_number_of_parameters(name, parameters):
    assert count(load(name)) == parameters


@pytest.mark.parametrize("name", ["gpt2-tiny", "llama-tiny", "llama-135m"])
def test_moe_variant_multiplies_as_much_per_token(name):
    dense, mixed = load(name), load(f"{name}-moe")
    assert mixed.experts_per_token * mixed.mlp_width == dense.mlp_width
    assert mixed.num_experts > mixed.experts_per_token


def test_an_override_wins_over_the_preset():
    assert load("gpt2-124m", "--model.num_layers", "2").num_layers == 2
