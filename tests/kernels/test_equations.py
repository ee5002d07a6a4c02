"""The equations of kernels/__init__.py against JAX's, flax's and optax's own, and their switch."""

import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgpt import kernels
from jaxgpt.kernels import grouped

B, T, N, K, H, D, V = 2, 9, 4, 2, 8, 6, 11


def close(got, want, tolerance=1e-5):
    np.testing.assert_allclose(np.asarray(got, np.float32), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize("packed", [False, True])
def test_attention_is_that_of_jax(rng, window, packed):
    q, k, v = (
        jax.random.normal(r, (B, T, heads, H))
        for r, heads in zip(jax.random.split(rng, 3), (N, K, K), strict=True)
    )
    segments = jnp.array([[1, 1, 1, 2, 2, 2, 2, 3, 3], [1, 1, 2, 2, 2, 2, 2, 2, 2]])
    mask = (segments[:, None, :, None] == segments[:, None, None]) if packed else None
    want = jax.nn.dot_product_attention(
        q, k, v, mask=mask, is_causal=True, local_window_size=(window - 1, 0) if window else None
    )
    with kernels.use("plain"):
        close(kernels.attention(q, k, v, segments if packed else None, window), want)


def test_cross_entropy_is_that_of_optax(rng):
    rngs = jax.random.split(rng, 4)
    hidden, head = jax.random.normal(rngs[0], (B, T, D)), jax.random.normal(rngs[1], (V, D))
    targets, weights = (
        jax.random.randint(rngs[2], (B, T), 0, V),
        jax.random.uniform(rngs[3], (B, T)),
    )
    goal = optax.smooth_labels(jax.nn.one_hot(targets, V), 0.1)
    logits = hidden @ head.T
    with kernels.use("plain"):
        found = kernels.cross_entropy(hidden, head, targets, weights, label_smoothing=0.1)
        logprobs, entropy = kernels.logprobs_and_entropy(hidden, head, targets, temperature=0.7)
    close(found.loss, (weights * optax.softmax_cross_entropy(logits, goal)).sum())
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    close(found.nll, (weights * nll).sum())
    close(found.correct, (weights * (logits.argmax(-1) == targets)).sum())
    close(logprobs, -optax.softmax_cross_entropy_with_integer_labels(logits / 0.7, targets))
    probs = jax.nn.softmax(logits / 0.7)
    close(entropy, optax.softmax_cross_entropy(logits / 0.7, probs))


def test_norms_are_those_of_flax(rng):
    x, scale, bias = 3 * jax.random.normal(rng, (B, T, D)) + 1, jnp.arange(1.0, 7), jnp.arange(6.0)
    layer = nn.LayerNorm(epsilon=1e-5).apply({"params": {"scale": scale, "bias": bias}}, x)
    rms = nn.RMSNorm(epsilon=1e-5).apply({"params": {"scale": scale}}, x)
    with kernels.use("plain"):
        close(kernels.layer_norm(x, scale, bias, 1e-5, "float32"), layer)
        close(kernels.rms_norm(x, scale, 1e-5, "float32"), rms)


def test_products_are_those_of_numpy(rng):
    x, kernel = jax.random.normal(rng, (B, T, D)), jax.random.normal(rng, (3, D, V))
    expert_R = jnp.array([0, 0, 1, 1, 1, 2, 2, 2, 2])
    layout = grouped.Layout(jnp.arange(9)[:, None], jnp.arange(9), expert_R, jnp.array([2, 3, 4]))
    with kernels.use("plain"):
        close(kernels.linear(x, kernel[0]), np.asarray(x) @ np.asarray(kernel[0]))
        close(kernels.scores(x, kernel[0]), np.asarray(x) @ np.asarray(kernel[0]))
        close(kernels.add_bias(x, jnp.arange(6.0)), np.asarray(x) + np.arange(6.0))
        rows = kernels.grouped_matmul(x[0], kernel, layout)
    close(rows, np.stack([np.asarray(x[0, r] @ kernel[e]) for r, e in enumerate(expert_R)]))


def test_every_operation_has_a_line_in_the_table():
    wrapped = {name for name, found in vars(kernels).items() if hasattr(found, "__wrapped__")}
    assert wrapped == kernels.FAST.keys()


def test_a_program_is_compiled_for_each_choice():
    """The choice is part of what jit goes by: a cached program of the other one is never run."""
    x = jnp.ones((2, 3), jnp.bfloat16)
    product = jax.jit(lambda x: kernels.linear(x, jnp.ones((3, 4))))
    assert product(x).dtype == jnp.float32  # a CPU's own
    with kernels.use("plain"):
        assert product(x).dtype == jnp.bfloat16
        assert kernels.linear is not inspect.unwrap(kernels.linear)
    assert product(x).dtype == jnp.float32


@pytest.mark.parametrize("where", ["cpu", "gpu", "tpu"])
def test_kept_products_are_not_computed_again(where):
    """What model.remat=dots is for, on the branch of every platform, by traced FLOPs.

    A forward rule that calls its own custom-vjp function hides the product from the policy.
    """
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    layers = {"none": lambda f: f, "dots": lambda f: jax.checkpoint(f, policy=policy),
              "full": jax.checkpoint}  # fmt: skip

    def count(wrap) -> int:
        def block(x, up, down):
            return kernels.linear(jnp.tanh(kernels.linear(x, up)), down)

        loss = lambda *a: wrap(block)(*a).astype(jnp.float32).sum()
        shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((8, 16), (16, 32), (32, 16))]
        with kernels.use(where):
            return str(jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(*shapes)).count("dot_general")

    none, dots, full = (count(layers[name]) for name in ("none", "dots", "full"))
    assert none == dots < full
