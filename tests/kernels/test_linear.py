"""The linear product against x @ kernel under autodiff."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxgpt.kernels import add_bias, linear, linear_by_rows, use


def inputs(rng, dtype=jnp.float32, width=40):
    x_rng, kernel_rng, g_rng = jax.random.split(rng, 3)
    x_BTD = jax.random.normal(x_rng, (4, 24, 16)).astype(dtype)
    kernel_DF = jax.random.normal(kernel_rng, (16, width))
    return x_BTD, kernel_DF, jax.random.normal(g_rng, (4, 24, width))


@partial(jax.jit, static_argnums=0)
def value_and_gradients(function, x, kernel, g):
    out, pull = jax.vjp(function, x, kernel)
    return out, *pull(g.astype(out.dtype))


@pytest.mark.parametrize("width", [40, 4])
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
def test_linear_matches_plain(rng, dtype, tolerance, width):
    x, kernel, g = inputs(rng, dtype, width)
    got = value_and_gradients(linear, x, kernel, g)
    want = value_and_gradients(jnp.matmul, x.astype(jnp.float32), kernel, g)
    assert [y.dtype for y in got] == [jnp.float32, dtype, jnp.float32]
    for y, z in zip(got, want, strict=True):
        np.testing.assert_allclose(y.astype(jnp.float32), z, rtol=tolerance, atol=10 * tolerance)


def test_one_row_matches_many(rng):
    x, kernel, _ = inputs(rng, jnp.bfloat16)
    kernel = kernel.astype(jnp.bfloat16)  # as held for decoding
    np.testing.assert_allclose(
        linear(x[:1, :1], kernel), linear(x, kernel)[:1, :1], rtol=1e-5, atol=1e-5
    )
    gradient = jax.grad(lambda x: linear(x, kernel).sum())
    np.testing.assert_allclose(
        gradient(x[0, 0]).astype(jnp.float32), gradient(x)[0, 0].astype(jnp.float32), rtol=1e-2
    )


def layers(x_BTD, kernels_LDD, unroll, remat):
    layer = lambda x, kernel: (x + jnp.tanh(linear(x, kernel)).astype(x.dtype), None)
    return jax.lax.scan(
        jax.checkpoint(layer) if remat else layer, x_BTD, kernels_LDD, unroll=unroll
    )[0].sum()


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("unroll", [1, 3])
def test_frozen_kernel_costs_no_gradient(rng, unroll, remat):
    """Rolled, XLA counts a loop's body once, so each side is compared with its own full step."""
    x = jax.random.normal(rng, (64, 64))
    kernels = jax.random.normal(rng, (3, 64, 64))

    def flops(argnums):
        step = jax.jit(jax.grad(layers, argnums=argnums), static_argnums=(2, 3))
        return step.lower(x, kernels, unroll, remat).compile().cost_analysis()["flops"]

    one_gradient = 2 * 64**3 * (1 if unroll == 1 else 3)
    saved = flops((0, 1)) - flops(0)
    assert 0.99 * one_gradient < saved < 1.2 * one_gradient


@pytest.mark.parametrize("kernel_spec", [P("fsdp", "tensor"), P("tensor", "fsdp")])
def test_linear_is_the_same_on_eight_devices(rng, kernel_spec):
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    x, kernel, g = inputs(rng)
    step = jax.jit(lambda *a: value_and_gradients(linear, *a))
    want = step(x, kernel, g)
    place = lambda y, spec: jax.device_put(y, NamedSharding(mesh, spec))
    rows = P(("data", "fsdp"))
    with jax.set_mesh(mesh):
        got = step(place(x, rows), place(kernel, kernel_spec), place(g, rows))
    for y, z in zip(got, want, strict=True):
        np.testing.assert_allclose(y, z, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("where", ["cpu", "gpu", "tpu", "plain"])
@pytest.mark.parametrize("rows", [1, 5])
def test_kernels_with_outputs_first_multiply_alike(rng, where, rows):
    x_BTD, kernel_DF, _ = inputs(rng)
    x_BTD = x_BTD[:1, :rows]
    with use(where):
        got = linear_by_rows(x_BTD, kernel_DF.T, jnp.float32)
    np.testing.assert_allclose(got, x_BTD @ kernel_DF, rtol=1e-5, atol=1e-5)


def test_a_long_sum_of_bias_gradients_keeps_its_digits(rng):
    g_ND = jax.random.uniform(rng, (20_000, 4)).astype(jnp.bfloat16)
    _, pull = jax.vjp(add_bias, jnp.zeros_like(g_ND), jnp.zeros(4))
    np.testing.assert_allclose(pull(g_ND)[1], np.asarray(g_ND, np.float64).sum(0), rtol=1e-5)
