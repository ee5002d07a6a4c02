"""Every kind of kernel through the one door."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import kernels, weights
from jaxgpt.kernels import grouped
from jaxgpt.weights import Int8, Lora

D, F, R = 64, 48, 3


def make(kind: str, rng: jax.Array, *lead: int) -> weights.Kernel:
    """A random kernel [*lead, D, F] of a kind such as "lora-nf4"; adapters are not fresh."""
    keys = jax.random.split(rng, 4)
    w = 0.1 * jax.random.normal(keys[0], (*lead, D, F))
    base = weights.quantize(w, kind.split("-")[-1]) if kind.endswith(("int8", "nf4")) else w
    if kind.split("-")[0] not in ("lora", "dora"):
        return base
    a = jax.random.normal(keys[1], (*lead, D, R))
    b = jax.random.normal(keys[2], (*lead, R, F))
    if kind.startswith("lora"):
        return Lora(base, a, b, strength=0.5)
    norm = jnp.linalg.norm(weights.dense(base), axis=-2)
    magnitude = jax.random.uniform(keys[3], (*lead, F), minval=0.5)
    return Lora(base, a, b, magnitude, norm, strength=0.5)


KINDS = ("plain", "int8", "nf4", "lora", "lora-int8", "lora-nf4", "dora", "dora-nf4")


@pytest.mark.parametrize("kind", KINDS)
def test_product_equals_that_with_the_dense_kernel(kind, rng):
    kernel = make(kind, rng)
    x_BTD = jax.random.normal(rng, (2, 5, D))
    expected = x_BTD @ weights.dense(kernel)
    np.testing.assert_allclose(weights.matmul(x_BTD, kernel), expected, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_dense_takes_stacked_layers(kind, rng):
    kernel = make(kind, rng, 2)
    for layer, stacked in enumerate(weights.dense(kernel)):
        one = jax.tree.map(lambda leaf, layer=layer: leaf[layer], kernel)
        np.testing.assert_allclose(stacked, weights.dense(one), atol=1e-6)


@pytest.mark.parametrize("kind", ("int8", "nf4", "lora", "lora-nf4"))
def test_experts_take_every_kind(kind, rng):
    kernel = make(kind, rng, 4)
    plain = weights.dense(kernel)
    layout = grouped.group_rows(jax.random.randint(rng, (7, 2), 0, 4), 4)
    rows_RD = grouped.gather(jax.random.normal(rng, (7, D)), layout)
    np.testing.assert_allclose(
        weights.grouped_matmul(rows_RD, kernel, layout),
        weights.grouped_matmul(rows_RD, plain, layout),
        atol=2e-5,
    )
    slots_BECD = jax.random.normal(rng, (2, 4, 3, D))
    np.testing.assert_allclose(
        weights.batched_matmul(slots_BECD, kernel),
        weights.batched_matmul(slots_BECD, plain),
        atol=2e-5,
    )


@pytest.mark.parametrize("kind", ("lora", "dora"))
def test_fresh_adapter_changes_no_bit(kind, rng):
    kernel = make(kind, rng)
    kernel = dataclasses.replace(
        kernel, b=jnp.zeros_like(kernel.b), magnitude=kernel.norm if kind == "dora" else None
    )
    x_BTD = jax.random.normal(rng, (2, 5, D))
    got = jax.jit(weights.matmul)(x_BTD, kernel)
    np.testing.assert_array_equal(got, jax.jit(weights.matmul)(x_BTD, kernel.w))


def test_gradient_of_a_quantised_kernel_keeps_codes_and_not_numbers(rng):
    kernel = make("nf4", rng)
    x_ND = jax.random.normal(rng, (5, D))
    _, backward = jax.vjp(lambda x: weights.matmul(x, kernel), x_ND)
    kept = [leaf.size for leaf in jax.tree.leaves(backward) if leaf.dtype == jnp.float32]
    assert D * F not in kept
    (gradient,) = backward(jnp.ones((5, F)))
    np.testing.assert_allclose(gradient, jnp.ones((5, F)) @ weights.dense(kernel).T, atol=1e-5)


def test_int8_rounds_to_half_a_step(rng):
    w_DF = jax.random.normal(rng, (D, F)) * jnp.arange(F)[None]
    kernel = weights.quantize(w_DF, "int8")
    assert isinstance(kernel, Int8) and kernel.codes.dtype == jnp.int8
    half_F = jnp.abs(w_DF).max(0) / 127 / 2
    assert (jnp.abs(weights.dense(kernel) - w_DF) <= half_F[None] + 1e-6).all()


def test_dropout_draws_by_row(rng):
    kernel = make("lora", rng)
    keys_B = jax.random.split(rng, 4)
    x_BTD = jax.random.normal(rng, (4, 5, D))
    through = lambda x, rng: weights.matmul(x, dataclasses.replace(kernel, rng=rng, dropout=0.5))
    whole = through(x_BTD, keys_B)
    assert not np.allclose(whole, weights.matmul(x_BTD, kernel))
    np.testing.assert_allclose(whole[2:], through(x_BTD[2:], keys_B[2:]), atol=1e-5)


def test_dropout_differs_between_the_sequences_of_a_row(rng):
    kernel = make("lora", rng)
    keys_B = jax.random.split(rng, 2)
    x_1TD = jax.random.normal(rng, (1, 5, D))
    through = lambda x, rng: weights.matmul(x, dataclasses.replace(kernel, rng=rng, dropout=0.5))
    both = through(jnp.tile(x_1TD, (4, 1, 1)), keys_B)  # two rows of two sequences
    assert len({row.tobytes() for row in np.asarray(both)}) == 4
    second = through(jnp.tile(x_1TD, (2, 1, 1)), keys_B[1:])  # as another micro-batch has it
    np.testing.assert_allclose(both[2:], second, atol=1e-5)


def test_dropout_keeps_the_mean(rng):
    kernel = Lora(jnp.zeros((D, D)), jnp.eye(D), jnp.eye(D), dropout=0.25)
    kernel = dataclasses.replace(kernel, rng=jax.random.split(rng, 100))
    y_BTD = weights.matmul(jnp.ones((100, 10, D)), kernel)
    np.testing.assert_allclose(np.unique(y_BTD), [0, 4 / 3], atol=1e-6)
    assert abs(y_BTD.mean() - 1) < 0.02


def test_rows_may_have_their_own_adapters(rng):
    kernels = [make("lora", key) for key in jax.random.split(rng, 2)]
    kernels[1] = dataclasses.replace(kernels[1], w=kernels[0].w)
    x_BTD = jax.random.normal(rng, (2, 5, D))
    a, b = (jnp.stack([getattr(k, name) for k in kernels]) for name in "ab")
    both = weights.matmul(x_BTD, dataclasses.replace(kernels[0], a=a, b=b))
    for row, kernel in enumerate(kernels):
        np.testing.assert_allclose(both[row], weights.matmul(x_BTD[row], kernel), atol=1e-5)


def test_casting_leaves_codes_and_norms_alone(rng):
    params = {"x": {"kernel": make("dora-nf4", rng)}, "norm": {"scale": jnp.ones(3)}}
    cast = weights.cast_kernels(params, "bfloat16")
    assert cast["x"]["kernel"].a.dtype == jnp.bfloat16
    assert cast["x"]["kernel"].w.offset.dtype == jnp.float32
    assert cast["norm"]["scale"].dtype == jnp.float32
    assert weights.is_quantized(params) and not weights.is_quantized(params["norm"])


@pytest.mark.parametrize("kind", ["plain", "fast"])
def test_scores_are_not_rounded_to_bfloat16(kind, rng):
    x_BTD = (10 * jax.random.normal(rng, (2, 5, D))).astype(jnp.bfloat16)
    kernel = jax.random.normal(rng, (D, F)).astype(jnp.bfloat16)
    exact = np.einsum("btd,df->btf", *(np.asarray(a, np.float64) for a in (x_BTD, kernel)))
    with kernels.use(kind):
        found = weights.scores(x_BTD, kernel)
    assert found.dtype == jnp.float32
    assert np.abs(exact).max() > 64  # where bfloat16 has steps of a half
    np.testing.assert_allclose(found, exact, atol=1e-3)
