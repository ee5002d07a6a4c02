"""Activations, whose slopes are written out, against jax.nn under autodiff."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import kernels

PLAIN = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
}


@pytest.mark.parametrize("name", PLAIN)
def test_values_and_slopes_are_those_of_jax(name):
    x = jnp.linspace(-12, 12, 4001)
    ours = lambda x: getattr(kernels, name)(x, jnp.float32)
    for fn in (lambda f: f(x), lambda f: jax.grad(lambda x: f(x).sum())(x)):
        np.testing.assert_allclose(fn(ours), fn(PLAIN[name]), rtol=1e-5, atol=5e-6)


def test_the_backward_pass_computes_tanh_anew(rng):
    """Merged with the forward pass it would be kept in memory, in float32."""
    x, kernel = jax.random.normal(rng, (2, 64, 64))
    loss = lambda x: (kernels.gelu_tanh(x @ kernel, jnp.float32) @ kernel).sum()
    assert jax.jit(jax.grad(loss)).lower(x).compile().as_text().count(" tanh(") == 1
    both = jax.jit(jax.value_and_grad(loss)).lower(x).compile().as_text()
    assert both.count(" tanh(") == 2
