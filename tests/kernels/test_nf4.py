"""NF4 against bitsandbytes' CPU build."""

import numpy as np
import pytest

from jaxgpt.kernels import nf4


def random_kernel(*shape: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    spread = np.exp(rng.normal(size=(*shape[:-1], 1)))  # blocks of different sizes
    return (spread * rng.normal(size=shape)).astype(np.float32)


@pytest.mark.parametrize("shape", [(2, 192, 1024), (3, 24, 40), (1, 96, 2)])
def test_codes_equal_bitsandbytes(shape):
    torch = pytest.importorskip("torch", reason="the reference extra is not installed")
    functional = pytest.importorskip(
        "bitsandbytes.functional", reason="the reference extra is not installed"
    )
    kernel_LDF = random_kernel(*shape)
    ours = nf4.quantize(kernel_LDF)
    for layer, kernel_DF in enumerate(kernel_LDF):
        theirs, state = functional.quantize_4bit(
            torch.tensor(kernel_DF.T.copy()), quant_type="nf4", compress_statistics=True
        )
        packed_FC = np.asarray(ours.packed[layer])
        np.testing.assert_array_equal(packed_FC.reshape(-1), theirs.numpy().reshape(-1))
        # They search a coarser table of the edges, so a scale beside one may fall to its neighbour.
        steps_S = np.abs(np.int32(ours.scales[layer]) - np.int32(state.absmax.numpy()))
        assert steps_S.max() <= 1 and (steps_S > 0).mean() <= 0.003
        if shape[1] % nf4.BLOCK:
            continue  # bitsandbytes codes a block that spans two rows, but decodes it wrongly
        same_FD = np.repeat(steps_S == 0, nf4.BLOCK).reshape(kernel_DF.T.shape)
        decoded_FD = np.asarray(nf4.dequantize(ours)[layer]).T
        expected_FD = functional.dequantize_4bit(theirs, state).numpy()
        np.testing.assert_allclose(decoded_FD[same_FD], expected_FD[same_FD], rtol=1e-5, atol=1e-6)


def test_size_of_a_large_kernel():
    kernel = nf4.quantize(random_kernel(4, 256, 512))
    total = sum(leaf.nbytes for leaf in vars(kernel).values())
    assert total / (4 * 256 * 512) <= 0.53


def test_error_is_within_half_a_gap_of_the_levels():
    kernel_DF = random_kernel(64, 48)
    error_FD = np.abs(np.asarray(nf4.dequantize(nf4.quantize(kernel_DF))) - kernel_DF).T
    largest_S = np.abs(kernel_DF.T.reshape(-1, nf4.BLOCK)).max(1)
    half_gap = np.diff(nf4.LEVELS).max() / 2
    # One eight-bit scale in a group is off by up to 1/128 of the largest.
    slack = largest_S.max() / 64
    assert (error_FD.reshape(-1, nf4.BLOCK).max(1) <= half_gap * largest_S + slack).all()
