"""Norms and activations against their formulas under autodiff."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import kernels
from jaxgpt.kernels import layer_norm, rms_norm

plain_layer_norm, plain_rms_norm = map(inspect.unwrap, (layer_norm, rms_norm))

# (fast, plain), each a function of (dtype, x, scale, bias)
NORMS = {
    "layer_norm": [
        lambda dtype, x, scale, bias, norm=norm: norm(x, scale, bias, 1e-5, dtype)
        for norm in (layer_norm, plain_layer_norm)
    ],
    "layer_norm_without_bias": [
        lambda dtype, x, scale, bias, norm=norm: norm(x, scale, None, 1e-5, dtype)
        for norm in (layer_norm, plain_layer_norm)
    ],
    "rms_norm": [
        lambda dtype, x, scale, bias, norm=norm: norm(x, scale, 1e-5, dtype)
        for norm in (rms_norm, plain_rms_norm)
    ],
}


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
def test_norm_matches_its_formula(rng, name, dtype, tolerance):
    fast, plain = NORMS[name]
    rngs = jax.random.split(rng, 4)
    x = 3 * jax.random.normal(rngs[0], (4, 8, 24)) + 2
    scale, bias, g = (
        jax.random.normal(r, s) for r, s in zip(rngs[1:], [24, 24, x.shape], strict=True)
    )
    out, pull = jax.vjp(lambda *a: fast(dtype, *a), x, scale, bias)
    want, plain_pull = jax.vjp(lambda *a: plain(jnp.float32, *a), x, scale, bias)
    assert out.dtype == dtype
    g = g.astype(dtype)
    got = (out, *pull(g))
    for y, z in zip(got, (want, *plain_pull(g.astype(jnp.float32))), strict=True):
        np.testing.assert_allclose(
            y.astype(jnp.float32), z, atol=tolerance * max(1, float(jnp.abs(z).max()))
        )


def test_a_gpu_finds_mean_and_variance_in_one_pass(rng):
    with kernels.use("gpu"):
        test_norm_matches_its_formula(rng, "layer_norm", jnp.float32, 1e-5)


ACTIVATIONS = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "silu": jax.nn.silu,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_matches_jax(name):
    x = jnp.linspace(-6, 6, 201)
    fast = getattr(kernels, name)
    np.testing.assert_allclose(fast(x, jnp.float32), ACTIVATIONS[name](x), atol=1e-6)
    slope = jax.grad(lambda x: fast(x, jnp.float32).sum())(x)
    np.testing.assert_allclose(slope, jax.grad(lambda x: ACTIVATIONS[name](x).sum())(x), atol=1e-5)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_keeps_only_its_input(name):
    x = jnp.linspace(-6, 6, 201).astype(jnp.bfloat16)
    out, pull = jax.vjp(lambda x: getattr(kernels, name)(x, jnp.bfloat16), x)
    assert out.dtype == jnp.bfloat16
    kept = [y for y in jax.tree.leaves(pull) if y.size > 1]
    assert [(y.shape, y.dtype) for y in kept] == [(x.shape, x.dtype)]
