"""Every fast attention against the equation: a softmax over all scores."""

import inspect
import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxgpt import kernels, scoring, sharding
from jaxgpt.config import MeshConfig, ModelConfig
from jaxgpt.kernels import attention, blocked_attention, cached_attention, chunked_attention
from jaxgpt.kernels.fast_attention import _all_scores
from jaxgpt.kernels.platform import accumulator_dtype
from jaxgpt.kernels.splash_attention import splash_attention
from jaxgpt.model import gpt

plain_attention = inspect.unwrap(kernels.attention)


def inputs(rng, B, T, N, K, H, dtype=jnp.float32):
    rngs = jax.random.split(rng, 4)
    shapes = [(B, T, N, H), (B, T, K, H), (B, T, K, H), (B, T, N, H)]
    return [
        jax.random.normal(r, shape).astype(dtype) for r, shape in zip(rngs, shapes, strict=True)
    ]


def segments(rng, T):
    return jnp.sort(jax.random.randint(rng, (2, T), 0, 4))


def value_and_gradients(function, q, k, v, g):
    out, pull = jax.vjp(function, q, k, v)
    return out, *pull(g.astype(out.dtype))


def assert_matches_plain(arrays, segments_BT=None, window=0, tolerance=1e-5, kernel=attention):
    q, k, v, g = arrays
    fast = lambda q, k, v: kernel(q, k, v, segments_BT, window)
    float32 = lambda *arrays: (x.astype(jnp.float32) for x in arrays)
    plain = lambda q, k, v: plain_attention(*float32(q, k, v), segments_BT, window)
    got = jax.jit(lambda *a: value_and_gradients(fast, *a))(q, k, v, g)
    want = jax.jit(lambda *a: value_and_gradients(plain, *a))(q, k, v, g)
    assert got[0].dtype == q.dtype
    for x, y in zip(got, want, strict=True):
        x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
        # bf16 rounds the largest entries by 2**-9 of their size: the tolerance is relative to them.
        np.testing.assert_allclose(x, y, atol=tolerance * max(1, np.abs(y).max()))


@pytest.mark.parametrize("T", [1, 5, 63, 64, 65, 150, 300])
def test_blocks_of_any_length_match_plain(rng, T):
    assert_matches_plain(inputs(rng, 2, T, 2, 2, 16))


@pytest.mark.parametrize("with_segments", [True, False])
def test_grouped_queries_and_masks_match_plain(rng, with_segments):
    segments_BT = jnp.sort(jax.random.randint(rng, (2, 150), 0, 4)) if with_segments else None
    assert_matches_plain(inputs(rng, 2, 150, 6, 2, 16), segments_BT)


def test_recomputed_probabilities_match_plain(rng, monkeypatch):
    monkeypatch.setattr(blocked_attention, "LONGEST_KEPT", 0)
    segments_BT = jnp.sort(jax.random.randint(rng, (2, 150), 0, 4))
    assert_matches_plain(inputs(rng, 2, 150, 4, 2, 16), segments_BT)


# Some bf16 products compile and then have no kernel at run time: every shape must also run.
@pytest.mark.parametrize("H", [16, 32, 64, 80, 128])
@pytest.mark.parametrize(("B", "T", "N", "K"), [(1, 1, 1, 1), (2, 7, 1, 1), (3, 64, 4, 4)])
def test_bf16_in_one_block_matches_plain(rng, B, T, N, K, H):
    assert_matches_plain(inputs(rng, B, T, N, K, H, jnp.bfloat16), tolerance=2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("H", [16, 32, 64, 80, 128])
@pytest.mark.parametrize("T", [1, 2, 16, 64, 100, 128, 256, 333, 512])
@pytest.mark.parametrize(("B", "N", "K"), [(1, 1, 1), (1, 3, 3), (2, 4, 2), (3, 6, 1)])
def test_bf16_matches_plain_at_every_shape(rng, B, T, N, K, H):
    assert_matches_plain(inputs(rng, B, T, N, K, H, jnp.bfloat16), tolerance=2e-2)


@pytest.mark.parametrize("T", [65, 600])
def test_capped_scores_match_plain(rng, T):
    segments_BT = jnp.sort(jax.random.randint(rng, (2, T), 0, 4))
    arrays = inputs(rng, 2, T, 4, 2, 16)
    capped = partial(attention, segments_BT=segments_BT, window=40, softcap=1.5)
    plain = partial(plain_attention, segments_BT=segments_BT, window=40, softcap=1.5)
    got = jax.jit(lambda *a: value_and_gradients(capped, *a))(*arrays)
    want = jax.jit(lambda *a: value_and_gradients(plain, *a))(*arrays)
    uncapped = jax.jit(lambda q, k, v: plain_attention(q, k, v, segments_BT, 40))(*arrays[:3])
    assert not np.allclose(got[0], uncapped, atol=1e-2)
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5 * max(1, np.abs(y).max()))


@pytest.mark.parametrize("T", [65, 600])
def test_sinks_match_plain(rng, T):
    segments_BT = jnp.sort(jax.random.randint(rng, (2, T), 0, 4))
    *arrays, g_BTNH = inputs(rng, 2, T, 4, 2, 16)
    arrays.append(jax.random.normal(rng, (4,)))

    def both(function):
        run = lambda q, k, v, s: function(q, k, v, segments_BT, window=40, sinks_N=s)
        out, pull = jax.vjp(run, *arrays)
        return out, *pull(g_BTNH)

    got, want = both(attention), both(plain_attention)
    # By hand: one key more, whose value is zero, is a smaller share for all others.
    bare_BTNH = plain_attention(*arrays[:3], segments_BT, 40)
    assert np.all(np.abs(want[0]) <= np.abs(bare_BTNH) + 1e-6)
    low = plain_attention(*arrays[:3], segments_BT, 40, sinks_N=jnp.full(4, -50.0))
    np.testing.assert_allclose(low, bare_BTNH, atol=1e-6)
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5 * max(1, np.abs(y).max()))


def test_future_tokens_change_nothing(rng):
    q, k, v, _ = inputs(rng, 1, 100, 2, 2, 16)
    out = attention(q, k, v)
    changed = attention(q, k.at[:, 70:].add(1), v.at[:, 70:].add(1))
    np.testing.assert_array_equal(out[:, :70], changed[:, :70])
    assert not np.allclose(out[:, 70:], changed[:, 70:])


def test_attention_is_the_same_on_eight_devices(rng):
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    arrays = inputs(rng, 4, 70, 4, 2, 16)
    segments_BT = jnp.sort(jax.random.randint(rng, (4, 70), 0, 3))
    fast = lambda q, k, v, s: attention(q, k, v, s)
    step = jax.jit(lambda q, k, v, g, s: value_and_gradients(
        lambda *a: fast(*a, s), q, k, v, g
    ))  # fmt: skip
    want = step(*arrays, segments_BT)
    with jax.set_mesh(mesh):
        place = NamedSharding(mesh, P("data", None, "tensor", None))
        placed = [jax.device_put(x, place) for x in arrays]
        got = step(*placed, jax.device_put(segments_BT, NamedSharding(mesh, P("data", None))))
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
@pytest.mark.parametrize("T", [1, 3])
def test_cached_attention_matches_plain(rng, dtype, tolerance, T):
    _, k, v, _ = inputs(rng, 2, 20, 6, 2, 16, dtype)
    q = jax.random.normal(rng, (2, T, 6, 16)).astype(dtype)
    lengths_BT = jnp.array([[7], [20]]) - T + 1 + jnp.arange(T)[None]
    mask_BTS = jnp.arange(20)[None, None] < lengths_BT[:, :, None]
    cache = (x.swapaxes(1, 2).astype(accumulator_dtype(dtype)) for x in (k, v))  # as init_cache
    got = cached_attention(q, *cache, mask_BTS)
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    want = inspect.unwrap(cached_attention)(q, k.swapaxes(1, 2), v.swapaxes(1, 2), mask_BTS)
    np.testing.assert_allclose(got.astype(jnp.float32), want, atol=tolerance)


@pytest.mark.parametrize(
    ("T", "window", "with_segments"),
    [
        (300, 150, True),
        (150, 70, True),
        pytest.param(70, 1, False, marks=pytest.mark.slow),
    ],
)
def test_blocks_with_windows_and_masks_match_plain(rng, T, window, with_segments):
    segments_BT = segments(rng, T) if with_segments else None
    assert_matches_plain(inputs(rng, 2, T, 4, 2, 8), segments_BT, window)


@pytest.mark.parametrize(
    ("T", "window", "with_segments"),
    [
        (101, 40, True),
        (67, 0, False),
        pytest.param(96, 0, True, marks=pytest.mark.slow),
    ],
)
def test_chunks_match_plain(rng, monkeypatch, T, window, with_segments):
    monkeypatch.setattr(chunked_attention, "CHUNK", 32)
    segments_BT = segments(rng, T) if with_segments else None
    kernel = chunked_attention.chunked_attention
    assert_matches_plain(inputs(rng, 2, T, 4, 2, 8), segments_BT, window, kernel=kernel)


@pytest.mark.parametrize(
    ("T", "window", "with_segments"),
    [
        (64, 0, True),
        pytest.param(64, 20, True, marks=pytest.mark.slow),
        pytest.param(36, 0, False, marks=pytest.mark.slow),  # nine to a device: no halves
    ],
)
def test_positions_cut_over_devices_match_plain(rng, T, window, with_segments):
    mesh = sharding.make_mesh(MeshConfig(data=1, tensor=2, context=4))
    segments_BT = segments(rng, T) if with_segments else None
    with jax.set_mesh(mesh):
        assert_matches_plain(inputs(rng, 2, T, 4, 2, 8), segments_BT, window)


def test_devices_that_hold_a_long_odd_number_of_positions_are_refused(rng):
    mesh = sharding.make_mesh(MeshConfig(data=1, tensor=2, context=4))
    q, k, v, _ = inputs(rng, 1, 4 * 521, 2, 2, 4)
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=r"mesh\.context=4"):
        jax.eval_shape(attention, q, k, v)


@pytest.mark.parametrize(
    ("T", "window", "with_segments"),
    [(200, 70, True), pytest.param(130, 0, False, marks=pytest.mark.slow)],
)
def test_splash_attention_as_interpreted_matches_plain(rng, T, window, with_segments):
    segments_BT = segments(rng, T) if with_segments else None
    kernel = partial(splash_attention, interpret=True)
    assert_matches_plain(inputs(rng, 2, T, 4, 2, 8), segments_BT, window, kernel=kernel)


@pytest.mark.parametrize("window", [0, 9])
def test_what_xla_and_cudnn_are_asked_for_matches_plain(rng, window):
    arrays = inputs(rng, 2, 40, 4, 2, 8)
    assert_matches_plain(arrays, segments(rng, 40), window, kernel=_all_scores("xla"))


def test_32k_tokens_train_without_an_array_of_their_square(rng):
    """The longest arrays of the compiled program have the length once, never twice."""
    T = 32768
    cfg = ModelConfig(
        vocab_size=61, context_length=T, num_layers=2, model_dim=8, num_heads=2, mlp_dim=16,
        position="rope",
    )  # fmt: skip
    batch = {
        name: jax.ShapeDtypeStruct((1, T), dtype)
        for name, dtype in {"tokens": int, "targets": int, "mask": float, "segments": int}.items()
    }
    loss = lambda params, batch: scoring.next_token_loss(cfg, params, batch, chunk=512)[0]
    params = jax.eval_shape(partial(gpt.init, cfg), rng)
    program = jax.jit(jax.grad(loss)).lower(params, batch).compile()
    shapes = re.findall(r"\w\[([\d,]+)\]", program.as_text())
    sizes = {math.prod(int(length) for length in shape.split(",")) for shape in shapes}
    assert max(sizes) < 64 * T
    assert T in sizes  # the pattern finds shapes at all
    assert program.memory_analysis().temp_size_in_bytes < 200e6
