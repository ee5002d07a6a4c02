"""Eight virtual CPU devices, strict shapes, warnings as errors."""

import os

os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import jax
import pytest

from jaxgpt import hardware
from jaxgpt.config import ModelConfig

hardware.keep_collectives_in_order()

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def tiny() -> ModelConfig:
    """Two layers with grouped queries: small, but no axis has the length of another."""
    return ModelConfig(
        vocab_size=61, context_length=32, num_layers=2, model_dim=24, num_heads=4, num_kv_heads=2,
        mlp_dim=40,
    )  # fmt: skip


@pytest.fixture
def rng() -> jax.Array:
    return jax.random.key(0)
