"""Cross-entropy and log-probabilities a chunk at a time, against their equations."""

import inspect
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxgpt.kernels import cross_entropy, logprobs_and_entropy, use

N, D, V = 48, 16, 40


@pytest.fixture
def arrays(rng):
    """hidden, head, targets, and weights of which some are zero."""
    rngs = jax.random.split(rng, 4)
    weights_N = jax.random.uniform(rngs[3], (N,))
    return (
        jax.random.normal(rngs[0], (N, D)) / 2,
        jax.random.normal(rngs[1], (V, D)),
        jax.random.randint(rngs[2], (N,), 0, V),
        jnp.where(weights_N < 0.3, 0, weights_N),
    )


def plain_cross_entropy(hidden, head, targets, weights, z_loss=0.0, smoothing=0.0):
    equation = inspect.unwrap(cross_entropy)
    options = dict(z_loss=z_loss, label_smoothing=smoothing)
    return equation(hidden, head, targets, weights, **options).loss


def token_logprobs(*arrays, **options):
    return logprobs_and_entropy(*arrays, **options)[0]


def loss_and_gradients(hidden, head, targets, weights, **options):
    loss = lambda hidden, head: cross_entropy(hidden, head, targets, weights, **options).loss
    return jax.value_and_grad(loss, argnums=(0, 1))(hidden, head)


def assert_close(got, want, tolerance=1e-5):
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance * max(1, np.abs(y).max()))


# 48 tokens: one piece, equal chunks, chunks that have to be filled up, one token at a time
@pytest.mark.parametrize("chunk", [0, 64, 16, 11, 1])
@pytest.mark.parametrize(("z_loss", "smoothing"), [(0.0, 0.0), (0.1, 0.2)])
def test_cross_entropy_matches_plain(arrays, chunk, z_loss, smoothing):
    hidden, head, targets, weights = arrays
    got = loss_and_gradients(*arrays, z_loss=z_loss, label_smoothing=smoothing, chunk=chunk)
    plain = lambda *a: plain_cross_entropy(*a, targets, weights, z_loss, smoothing)
    assert_close(got, jax.value_and_grad(plain, argnums=(0, 1))(hidden, head))


@pytest.mark.parametrize("chunk", [0, 11])
def test_capped_logits_match_plain(arrays, chunk):
    hidden, head, targets, weights = arrays
    options = dict(z_loss=0.1, label_smoothing=0.2, softcap=1.5)
    got = loss_and_gradients(*arrays, **options, chunk=chunk)
    equation = inspect.unwrap(cross_entropy)
    plain = lambda *a: equation(*a, targets, weights, **options).loss
    assert_close(got, jax.value_and_grad(plain, argnums=(0, 1))(hidden, head))
    said = lambda function, *a: jnp.square(
        jnp.stack(function(*a, targets, temperature=0.7, softcap=1.5))
    ).sum()
    got = jax.grad(partial(said, logprobs_and_entropy), argnums=(0, 1))(hidden, head)
    plain = partial(said, inspect.unwrap(logprobs_and_entropy))
    assert_close(got, jax.grad(plain, argnums=(0, 1))(hidden, head))


def test_undifferentiated_loss_is_the_same(arrays):
    options = dict(z_loss=0.1, label_smoothing=0.2, chunk=11)
    loss = cross_entropy(*arrays, **options).loss
    np.testing.assert_allclose(loss, loss_and_gradients(*arrays, **options)[0], rtol=1e-6)


@pytest.mark.parametrize("chunk", [0, 11])
def test_reported_sums_match_plain(arrays, chunk):
    hidden, head, targets, weights = arrays
    got = cross_entropy(*arrays, z_loss=0.1, label_smoothing=0.2, chunk=chunk)
    logits_NV = hidden @ head.T
    z_N = jax.nn.logsumexp(logits_NV, axis=-1) ** 2
    correct_N = logits_NV.argmax(-1) == targets
    want = plain_cross_entropy(*arrays), (weights * z_N).sum(), (weights * correct_N).sum()
    assert_close((got.nll, got.z, got.correct), want)
    assert got.correct > 0


def test_bf16_cross_entropy_matches_plain(arrays):
    hidden, head, targets, weights = arrays
    got = loss_and_gradients(hidden.astype(jnp.bfloat16), head, targets, weights, chunk=11)
    assert got[1][0].dtype == jnp.bfloat16
    assert got[1][1].dtype == jnp.float32
    plain = lambda *a: plain_cross_entropy(*a, targets, weights)
    assert_close(got, jax.value_and_grad(plain, argnums=(0, 1))(hidden, head), 2e-2)


def compiled(function, argnums, arrays):
    return jax.jit(jax.grad(function, argnums=argnums)).lower(*arrays).compile()


@pytest.mark.parametrize("chunk", [0, 12])
def test_frozen_head_costs_no_gradient(arrays, chunk):
    """XLA counts the body of a loop over chunks once."""
    hidden, head, targets, weights = arrays
    loss = lambda hidden, head: cross_entropy(hidden, head, targets, weights, chunk=chunk).loss
    flops = lambda argnums: compiled(loss, argnums, (hidden, head)).cost_analysis()["flops"]
    saved = flops((0, 1)) - flops(0)
    assert saved >= 2 * (chunk or N) * D * V


def test_no_gradient_work_without_differentiation(arrays):
    program = jax.jit(lambda *a: cross_entropy(*a, chunk=12).loss).lower(*arrays).compile()
    assert len(re.findall(r" dot\(", program.as_text())) == 1


@pytest.mark.parametrize("function", [cross_entropy, token_logprobs])
def test_all_logits_never_exist(function):
    num_tokens, vocabulary = 4096, 512
    hidden = jax.ShapeDtypeStruct((num_tokens, 8), jnp.float32)
    head = jax.ShapeDtypeStruct((vocabulary, 8), jnp.float32)
    targets = jnp.zeros(num_tokens, int)
    args = (targets, jnp.ones(num_tokens)) if function is cross_entropy else (targets,)

    def loss(hidden, head):
        out = function(hidden, head, *args, chunk=128)
        return out.loss if function is cross_entropy else out.sum()

    memory = compiled(loss, (0, 1), (hidden, head)).memory_analysis()
    assert memory.temp_size_in_bytes < 0.25 * 4 * num_tokens * vocabulary


MESHES = {
    "data": ((8,), ("data",), P("data"), P()),
    "tensor": ((2, 4), ("data", "tensor"), P("data"), P("tensor")),
    "all": ((2, 2, 2), ("data", "fsdp", "tensor"), P(("data", "fsdp")), P("tensor", "fsdp")),
}


@pytest.mark.parametrize("name", MESHES)
@pytest.mark.parametrize("chunk", [0, 16])
def test_loss_is_the_same_on_eight_devices(arrays, name, chunk):
    shape, axes, rows, head_spec = MESHES[name]
    mesh = jax.make_mesh(shape, axes, axis_types=(AxisType.Auto,) * len(axes))
    step = jax.jit(lambda *a: loss_and_gradients(*a, z_loss=0.1, chunk=chunk))
    want = step(*arrays)
    specs = (rows, head_spec, rows, rows)
    placed = [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(arrays, specs, strict=True)]
    with jax.set_mesh(mesh):
        got = step(*placed)
    assert_close(got, want)


@pytest.mark.parametrize("chunk", [0, 64, 11])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_and_entropy_match_plain(arrays, chunk, temperature):
    hidden, head, targets, weights = arrays

    equation = inspect.unwrap(logprobs_and_entropy)
    plain = lambda *a: equation(*a, targets, temperature=temperature)
    fast = lambda *a: logprobs_and_entropy(*a, targets, chunk=chunk, temperature=temperature)
    got, pull = jax.vjp(fast, hidden, head)
    want, plain_pull = jax.vjp(plain, hidden, head)
    g = weights, jnp.sin(targets.astype(jnp.float32))
    assert_close((got, pull(g)), (want, plain_pull(g)))


def test_token_logprobs_sum_to_the_loss(arrays):
    logprob_N = token_logprobs(*arrays[:3], chunk=11)
    nll = cross_entropy(*arrays, chunk=0).nll
    np.testing.assert_allclose(-(arrays[3] * logprob_N).sum(), nll, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [0, 11])
def test_a_gpu_fills_the_head_up_and_finds_the_same(arrays, chunk):
    with use("gpu"):
        test_cross_entropy_matches_plain(arrays, chunk, 0.1, 0.2)
        test_reported_sums_match_plain(arrays, chunk)
        test_logprobs_and_entropy_match_plain(arrays, chunk, 0.7)
        text = jax.jit(partial(loss_and_gradients, chunk=chunk)).lower(*arrays).as_text()
    assert "x128xf32>" in text and "x40xf32>" not in text  # no logits of 40 columns
