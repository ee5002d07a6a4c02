"""Choosing by platform, and the options that go with it."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from jaxgpt.kernels import platform as platforms


def test_default_backend_without_a_mesh():
    assert platforms.platform() == jax.default_backend()


def test_ambient_mesh_comes_before_the_default_backend():
    device = AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    mesh = AbstractMesh((4,), ("data",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        assert platforms.platform() == "tpu"
        assert platforms.accumulator_dtype(jnp.bfloat16) == jnp.bfloat16
        assert platforms.layer_unroll(12, remat=False, quantized=False) == 1
        assert "xla_cpu_prefer_vector_width" not in platforms.compiler_options()


@pytest.mark.parametrize(
    ("remat", "quantized", "unroll"), [(False, False, 12), (True, False, 1), (False, True, 1)]
)
def test_cpu_unrolls_only_what_keeps_its_memory(remat, quantized, unroll):
    assert platforms.layer_unroll(12, remat, quantized) == unroll


def test_compiler_options_are_accepted_or_left_out(monkeypatch):
    options = platforms.compiler_options()
    assert jax.jit(lambda x: x + 1, compiler_options=options)(1.0) == 2.0
    platforms._known_options.cache_clear()
    monkeypatch.setattr(jax, "jit", lambda f, **_: _Refuses())
    assert platforms.compiler_options() == {}
    platforms._known_options.cache_clear()


class _Refuses:
    def lower(self, *_):
        raise jax.errors.JaxRuntimeError("INVALID_ARGUMENT: No such compile option")


@pytest.mark.parametrize("rows", [7, 8, 24, 256])
def test_transposed_is_a_transpose_that_products_of_bfloat16_do_not_fold(rng, rows):
    x = jax.random.normal(rng, (2, rows, 5), jnp.bfloat16)
    np.testing.assert_array_equal(platforms.transposed(x), jnp.swapaxes(x, 1, 2))
    assert "lhs_contracting_dims={2}" in _product_with_transposed(x)


def test_products_of_float32_fold_a_transpose(rng):
    """Copies of it would cost GPT-2 124M a quarter of its step."""
    assert "lhs_contracting_dims={1}" in _product_with_transposed(jax.random.normal(rng, (2, 8, 5)))


def _product_with_transposed(x):
    product = lambda x, y: jnp.einsum(
        "BDN,BNF->BDF", platforms.transposed(x), y, preferred_element_type=jnp.float32
    )
    program = jax.jit(product).lower(x, x).compile().as_text()
    return re.search(r" dot\(.*", program)[0]
