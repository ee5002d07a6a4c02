"""int8 kernels whose inputs are rounded, too: against NumPy in float64."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import weights
from jaxgpt.kernels import int8

SIZES = [1, 7, 48, 67, 576, 768, 3072]


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("size", SIZES)
def test_the_rotation_is_orthogonal_flat_and_the_product_of_its_factors(size):
    factors = int8._factors(size)
    rotation_DD = np.kron(*(factor.astype(np.float64) for factor in factors))
    np.testing.assert_allclose(rotation_DD @ rotation_DD.T, np.eye(size), atol=1e-6)
    assert np.abs(rotation_DD).max() <= (2 / size) ** 0.5 + 1e-6  # a large entry is spread evenly
    x_ND = normal(3, size)
    found_ND = int8._rotate(jnp.asarray(x_ND), *factors)
    np.testing.assert_allclose(found_ND, x_ND @ rotation_DD, atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_what_is_decoded_lies_half_a_step_from_the_kernel_in_the_mean(size):
    kernel_LDF = normal(2, size, 5)
    codes = int8.quantize(jnp.asarray(kernel_LDF))
    error_LF = np.linalg.norm(int8.dequantize(codes) - kernel_LDF, axis=1)  # rotation keeps it
    assert (error_LF <= np.asarray(codes.scale) * size**0.5 / 2 + 1e-5).all()


@pytest.mark.parametrize("rows", [1, 3])
def test_a_row_keeps_its_small_entries_beside_a_large_one(rows):
    """Not rotated, they would be rounded to steps of 300 / 127."""
    x_BTD = normal(1, rows, 512)
    x_BTD[:, :, 7] = 300
    kernel = int8.quantize(jnp.asarray(normal(512, 16)))
    exact_BTF = x_BTD @ np.asarray(int8.dequantize(kernel))
    found_BTF = int8.product(jnp.asarray(x_BTD), kernel)
    largest = 300 / 512**0.5 + 4  # of the rotated entries: the others' part is about normal
    error = largest / 127 / 12**0.5 * 512**0.5  # of 512 entries, each rounded at random
    assert 0 < np.abs(found_BTF - exact_BTF).max() < 4 * error


@pytest.mark.parametrize("rows", [1, 3])
def test_codes_are_multiplied_as_codes(rows):
    """Without a rotation, whole numbers of largest magnitude 127 lose nothing to rounding."""
    x_BTD = np.random.default_rng(0).integers(-127, 128, (1, rows, 10)).astype(np.float32)
    kernel_DF = np.random.default_rng(1).integers(-127, 128, (10, 6)).astype(np.float32)
    x_BTD[:, :, 0], kernel_DF[0] = 127, 127
    back = [
        jnp.asarray(int8._rotate(a, *(f.T for f in int8._factors(10))))
        for a in (x_BTD, kernel_DF.T)
    ]
    kernel = int8.quantize(back[1].T)
    product = jax.jit(weights.matmul)
    np.testing.assert_allclose(product(back[0], kernel), x_BTD @ kernel_DF, rtol=1e-5)
    program = product.lower(back[0], kernel).compile().as_text()
    assert re.search(r"s32\[[^\]]*\]\S* (dot|fusion|custom-call)", program)
    assert "s8[6,10]" in program


def test_a_row_of_zeros_gives_zeros():
    kernel = int8.quantize(jnp.ones((4, 3)))
    np.testing.assert_array_equal(weights.matmul(jnp.zeros((1, 2, 4)), kernel), 0)
