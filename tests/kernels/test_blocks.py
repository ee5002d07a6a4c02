"""Kernels of GGUF's blocks: the equations against the library `gguf`, the program against both."""

import os
import subprocess
import sys

import gguf as library
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import quants

from jaxgpt import kernels, weights
from jaxgpt.kernels import blocks, compiled
from jaxgpt.kernels.blocks import FORMATS, Blocks, tiled

# Where a block has its scales, as halves: random bits there would be infinite or not a number.
HALVES = {"Q4_0": (0,), "Q4_1": (0, 2), "Q8_0": (0,), "Q4_K": (0, 2), "Q6_K": (208,)}


def random_rows(kind: str, *shape: int, seed: int = 0) -> np.ndarray:
    """Rows of blocks whose every bit is drawn, but for the scales; shape: [..., blocks]."""
    draw, form = np.random.default_rng(seed), FORMATS[kind]
    found = draw.integers(0, 256, (*shape, form.bytes), np.uint8)
    for place in HALVES[kind]:
        scale = draw.uniform(-0.1, 0.1, shape).astype(np.float16)
        scale[..., 0] = 3e-6  # a half without its leading one: some read it as zero
        found[..., place : place + 2] = scale[..., None].view(np.uint8)
    return found.reshape(*shape[:-1], -1)


def by_the_library(rows: np.ndarray, kind: str) -> np.ndarray:
    flat = rows.reshape(-1, rows.shape[-1])
    found = quants.dequantize(flat, library.GGMLQuantizationType[kind])
    return found.reshape(*rows.shape[:-1], -1)


def needs_the_program():
    if not compiled.load():
        pytest.skip("no C++ compiler here")


@pytest.mark.parametrize("kind", FORMATS)
def test_equations_decode_as_the_library(kind):
    rows = random_rows(kind, 2, 48, 3)
    kernel = Blocks(jnp.asarray(tiled(rows)), kind)
    expected = by_the_library(rows, kind)
    near = {"rtol": 1e-6, "atol": 1e-9}
    np.testing.assert_allclose(weights.table(kernel), expected, **near)
    np.testing.assert_allclose(weights.dense(kernel), expected.swapaxes(1, 2), **near)
    one = Blocks(kernel.tiles[1], kind)
    index = np.array([[0, 47, 17], [16, 15, 31]])
    np.testing.assert_allclose(weights.take(one, index), expected[1][index], **near)
    assert not weights.take(one, np.array([-1])).any()  # nobody's token
    assert (kernel.width, kernel.count) == (expected.shape[-1], 48)


# One tile and several, one part and several; 1 to 8 rows of x together, and more.
@pytest.mark.parametrize("num_rows, num_blocks", [(16, 1), (48, 2), (304, 18)])
@pytest.mark.parametrize("kind", FORMATS)
def test_the_program_multiplies_as_numpy(kind, num_rows, num_blocks, rng):
    needs_the_program()
    rows = random_rows(
        kind, num_rows, num_blocks if FORMATS[kind].numbers == 32 else num_blocks // 4 + 1
    )
    kernel_DF = by_the_library(rows, kind).T.astype(np.float64)
    x_AD = np.asarray(jax.random.normal(rng, (70, len(kernel_DF))))
    size = np.abs(x_AD).astype(np.float64) @ np.abs(kernel_DF)  # what rounding is measured by
    for count in (1, 3, 4, 8, 70):
        found = blocks.on_cpu(jnp.asarray(x_AD[:count]), jnp.asarray(tiled(rows)), kind)
        error = np.abs(found - x_AD[:count] @ kernel_DF) / (size[:count] + 1e-9)
        assert error.max() < 3e-6, count


@pytest.mark.parametrize("kind", FORMATS)
def test_a_row_has_the_same_bits_alone_and_in_company(kind, rng):
    needs_the_program()
    tiles = jnp.asarray(tiled(random_rows(kind, 144, 5)))
    x_AD = jax.random.normal(rng, (70, Blocks(tiles, kind).width))
    together = blocks.on_cpu(x_AD, tiles, kind)
    for count in (1, 2, 4, 7, 16):
        for start in (0, 3, 66 - count):
            some = blocks.on_cpu(x_AD[start : start + count], tiles, kind)
            np.testing.assert_array_equal(some, together[start : start + count])


@pytest.mark.parametrize("used", [(), (0,), (3,), (1, 2, 6), (0, 1, 2, 3, 4, 5, 6)])
def test_rows_of_zeros_are_left_out_and_stay_zeros(used, rng):
    needs_the_program()
    tiles, there_A = jnp.asarray(tiled(random_rows("Q4_1", 48, 6))), np.isin(np.arange(7), used)
    numbers_AD = jax.random.normal(rng, (7, Blocks(tiles, "Q4_1").width))
    x_AD = jnp.where(there_A[:, None], numbers_AD, 0)
    found_AF = blocks.on_cpu(x_AD, tiles, "Q4_1")
    for row in range(7):
        alone_1F = blocks.on_cpu(x_AD[row : row + 1], tiles, "Q4_1")
        np.testing.assert_array_equal(found_AF[row], alone_1F[0])
        assert found_AF[row].any() == there_A[row]


def test_the_door_takes_blocks_under_jit_scan_vmap_and_gradients(rng, each_way):
    stack = Blocks(
        jnp.asarray(tiled(random_rows("Q4_1", 3, 64, 2))), "Q4_1"
    )  # three layers, 64 to 64
    x_BTD = jax.random.normal(rng, (2, 5, 64))

    def through(multiply):
        layer = lambda x, kernel: (jnp.tanh(multiply(x, kernel)), None)
        return lambda x: jax.lax.scan(layer, x, stack)[0]

    dense = lambda x, kernel: jnp.matmul(x, weights.dense(kernel))
    ours, plain = through(weights.matmul), through(dense)
    np.testing.assert_allclose(jax.jit(ours)(x_BTD), plain(x_BTD), atol=1e-5)
    np.testing.assert_allclose(jax.vmap(ours)(x_BTD), plain(x_BTD), atol=1e-5)
    slope = lambda fn: jax.grad(lambda x: jnp.sin(fn(x)).sum())(x_BTD)
    np.testing.assert_allclose(slope(ours), slope(plain), atol=1e-4)


def test_lora_on_blocks_adds_to_their_product(rng):
    kernel = Blocks(jnp.asarray(tiled(random_rows("Q8_0", 48, 2))), "Q8_0")
    a, b = jax.random.normal(rng, (64, 3)), jax.random.normal(rng, (3, 48))
    x_BTD = jax.random.normal(rng, (2, 5, 64))
    found = weights.matmul(x_BTD, weights.Lora(kernel, a, b, strength=0.5))
    np.testing.assert_allclose(found, x_BTD @ (weights.dense(kernel) + 0.5 * a @ b), atol=1e-3)


def test_the_setting_plain_bypasses_the_program(rng):
    tiles, x = jnp.asarray(tiled(random_rows("Q8_0", 48, 2))), jax.random.normal(rng, (3, 64))
    product = lambda x: kernels.linear_by_blocks(x, tiles, "Q8_0")
    with kernels.use("plain"):
        plain = jax.jit(product).lower(x).as_text()
    assert "custom_call" not in plain
    needs_the_program()
    assert compiled.load() in jax.jit(product).lower(x).as_text()


def test_quantising_gives_the_library_s_bytes(rng):
    kernel_LDF = np.asarray(jax.random.normal(rng, (2, 64, 16))).copy()
    kernel_LDF[0, :32, 1] = 0
    found = jax.jit(blocks.quantize)(kernel_LDF)
    expected = quants.quantize(kernel_LDF.swapaxes(1, 2), library.GGMLQuantizationType.Q8_0)
    # The library multiplies by the reciprocal: a code that lies between two may fall to the other.
    apart = found.tiles.astype(jnp.int32) - tiled(expected).astype(np.int32)
    assert (np.asarray(apart) != 0).mean() < 0.01
    step = np.abs(kernel_LDF).max() / 127
    np.testing.assert_allclose(blocks.dequantize(found), kernel_LDF, atol=0.51 * step)


SCRIPT = """
import numpy as np, jax.numpy as jnp
from jaxgpt.kernels import blocks
x, tiles = jnp.ones((2, 32)), jnp.asarray(np.full((1, 34, 16), 60, np.uint8))
for _ in range(2):
    print(float(blocks.on_cpu(x, tiles, "Q8_0")[1, 2] / blocks.linear(x, tiles, "Q8_0")[1, 2]))
"""


def test_without_a_compiler_one_line_is_said_and_the_equation_computes(tmp_path):
    told = os.environ | {"CXX": "no-such-compiler", "HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=told, capture_output=True, text=True)
    assert done.stdout.split() == ["1.0", "1.0"]
    assert done.stderr.splitlines() == [
        "note: quantised weights are read slower here: no C++ compiler is found (no-such-compiler)"
    ]


@pytest.mark.slow
def test_two_processes_may_compile_at_once(tmp_path):
    needs_the_program()
    told = os.environ | {"HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", SCRIPT]
    for process in [subprocess.Popen(command, env=told, **pipes) for _ in range(2)]:
        said, complaint = process.communicate(timeout=200)
        assert complaint == "" and all(abs(float(ratio) - 1) < 1e-6 for ratio in said.split())
    (library,) = (tmp_path / ".cache" / "jaxgpt" / "kernels").iterdir()
    assert library.suffix == ".so"
