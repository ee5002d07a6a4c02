"""Optimizers against torch and against values worked out by hand."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgpt import optim, tree
from jaxgpt.config import OptimConfig


def rates(cfg: OptimConfig, steps: list[int], num_steps: int) -> np.ndarray:
    return np.array([float(optim.learning_rate(cfg, jnp.int32(s), num_steps)) for s in steps])


def test_cosine_by_hand():
    cfg = OptimConfig(learning_rate=2.0, warmup_steps=3, min_ratio=0.1)
    # Warm-up in fourths; half-way from step 3 to 13 the mean of 1 and 0.1; at the end the floor.
    got = rates(cfg, [0, 1, 2, 3, 8, 13, 50], 13)
    np.testing.assert_allclose(got, [0.5, 1.0, 1.5, 2.0, 1.1, 0.2, 0.2], rtol=1e-6)


def test_wsd_by_hand():
    cfg = OptimConfig(
        learning_rate=1.0, schedule="wsd", warmup_steps=1, min_ratio=0.2, decay_fraction=0.5
    )
    got = rates(cfg, [0, 1, 5, 10, 15, 20], 20)
    np.testing.assert_allclose(got, [0.5, 1.0, 1.0, 1.0, 0.6, 0.2], rtol=1e-6)


def test_constant_by_hand_and_without_warm_up():
    cfg = OptimConfig(learning_rate=3.0, schedule="constant", warmup_steps=0)
    np.testing.assert_allclose(rates(cfg, [0, 7, 100], 10), 3.0)


def test_decay_may_end_before_the_run_does():
    cfg = OptimConfig(learning_rate=1.0, warmup_steps=0, decay_steps=4, min_ratio=0.5)
    np.testing.assert_allclose(rates(cfg, [0, 2, 4, 9], 100), [1.0, 0.75, 0.5, 0.5], rtol=1e-6)


PARAMS = {
    "embed": {"embedding": (7, 4)},
    "blocks": {
        "attention": {"query": {"kernel": (2, 4, 6), "bias": (2, 6)}},
        "moe": {"router": {"kernel": (2, 4, 3)}, "up": {"kernel": (2, 3, 4, 5)}},
        "mlp_norm": {"scale": (2, 4)},
    },
    "head": {"kernel": (4, 7)},
}


def arrays(seed: int, scale: float = 1.0) -> dict:
    random = np.random.default_rng(seed)
    draw = lambda shape: jnp.asarray(random.normal(0, scale, shape), jnp.float32)
    return jax.tree.map(draw, PARAMS, is_leaf=lambda node: isinstance(node, tuple))


def test_decay_goes_by_path():
    """A stacked bias has two axes, as a matrix has: only its name tells."""
    decayed = optim.decayed(OptimConfig(), arrays(0))
    expected = jax.tree.map(lambda _: True, arrays(0))
    expected["embed"]["embedding"] = False
    expected["blocks"]["attention"]["query"]["bias"] = False
    expected["blocks"]["mlp_norm"]["scale"] = False
    assert decayed == expected
    everything = optim.decayed(OptimConfig(no_decay="^$"), arrays(0))
    assert all(jax.tree.leaves(everything))


def test_adamw_steps_equal_torch():
    torch = pytest.importorskip("torch", reason="the reference extra is not installed")
    cfg = OptimConfig(
        learning_rate=0.05, warmup_steps=5, weight_decay=0.3, beta1=0.8, beta2=0.9, clip_norm=0.5
    )
    num_steps, params = 20, arrays(0)
    optimizer = optim.make_optimizer(cfg, num_steps)
    update = jax.jit(optimizer.update)
    state = optimizer.init(params)

    leaves = [torch.nn.Parameter(torch.tensor(np.array(x))) for x in jax.tree.leaves(params)]
    mask = jax.tree.leaves(optim.decayed(cfg, params))
    groups = [
        {"params": [x for x, m in zip(leaves, mask, strict=True) if m], "weight_decay": 0.3},
        {"params": [x for x, m in zip(leaves, mask, strict=True) if not m], "weight_decay": 0.0},
    ]
    other = torch.optim.AdamW(groups, lr=1.0, betas=(0.8, 0.9), eps=cfg.eps)
    clipped = 0
    for step in range(num_steps):
        grads = arrays(100 + step, scale=0.02 if step % 2 else 0.2)
        for leaf, grad in zip(leaves, jax.tree.leaves(grads), strict=True):
            leaf.grad = torch.tensor(np.array(grad))
        clipped += bool(torch.nn.utils.clip_grad_norm_(leaves, cfg.clip_norm) > cfg.clip_norm)
        for group in other.param_groups:
            group["lr"] = float(optim.learning_rate(cfg, jnp.int32(step), num_steps))
        other.step()
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    assert 0 < clipped < num_steps
    for mine, theirs in zip(jax.tree.leaves(params), leaves, strict=True):
        np.testing.assert_allclose(mine, theirs.detach().numpy(), rtol=1e-5, atol=1e-6)


def test_moments_in_bfloat16_equal_a_numpy_loop():
    """Every update is of the whole moments; only what waits for the next step is rounded."""
    cfg = OptimConfig(
        learning_rate=0.05, schedule="constant", warmup_steps=0, weight_decay=0.0, clip_norm=0,
        beta1=0.9, beta2=0.95, moments="bfloat16",
    )  # fmt: skip
    optimizer = optim.make_optimizer(cfg, 30)
    one, beta1, beta2 = np.float32([1, 0.9, 0.95])
    params = {"kernel": jnp.zeros((40, 5))}
    state = optimizer.init(params)
    expected = np.zeros((40, 5), np.float32)
    mu = nu = np.zeros((40, 5), jnp.bfloat16)
    whole_mu = np.zeros((40, 5), np.float32)
    for step in range(30):
        grad = np.random.default_rng(step).normal(0, 0.1, (40, 5)).astype(np.float32)
        m = beta1 * mu.astype(np.float32) + (one - beta1) * grad
        v = beta2 * nu.astype(np.float32) + (one - beta2) * grad**2
        mu, nu = m.astype(jnp.bfloat16), v.astype(jnp.bfloat16)
        m, v = m / (1 - 0.9 ** (step + 1)), v / (1 - 0.95 ** (step + 1))
        expected -= 0.05 * m / (np.sqrt(v) + cfg.eps)
        whole_mu = beta1 * whole_mu + (one - beta1) * grad
        updates, state = optimizer.update({"kernel": jnp.asarray(grad)}, state, params)
        params = optax.apply_updates(params, updates)
    kept = tree.flatten(state)
    np.testing.assert_array_equal(kept["0/mu/kernel"], mu)
    np.testing.assert_array_equal(kept["0/nu/kernel"], nu)
    np.testing.assert_allclose(params["kernel"], expected, rtol=1e-4, atol=1e-6)
    assert 1e-5 < np.abs(mu.astype(np.float32) - whole_mu).max() < 2e-3, "rounded, and not far off"


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_only_moments_are_kept_in_bfloat16(name):
    optimizer = optim.make_optimizer(OptimConfig(name=name, moments="bfloat16"), 10)
    params = arrays(0)
    state = optimizer.init(params)
    updates, after = jax.jit(optimizer.update)(arrays(1), state, params)
    for leaves in (tree.flatten(state), tree.flatten(after)):
        moments = {key: leaf for key, leaf in leaves.items() if re.search("/(mu|nu)/", key)}
        assert {leaf.dtype for leaf in moments.values()} == {jnp.dtype(jnp.bfloat16)}
        assert len(moments) == (14 if name == "adamw" else 12)
        others = {leaf.dtype.name for key, leaf in leaves.items() if key not in moments}
        assert others == ({"int32"} if name == "adamw" else {"int32", "float32"})
    assert {leaf.dtype.name for leaf in jax.tree.leaves(updates)} == {"float32"}


def test_muon_orthogonalises_the_matrices_of_the_blocks():
    cfg = OptimConfig(name="muon", learning_rate=1.0, warmup_steps=0, weight_decay=0.0, clip_norm=0)
    params, grads = arrays(0), arrays(1)
    optimizer = optim.make_optimizer(cfg, 10)
    updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
    query_LDF = np.asarray(updates["blocks"]["attention"]["query"]["kernel"])
    up_LEDF = np.asarray(updates["blocks"]["moe"]["up"]["kernel"])
    for matrix in [*query_LDF, *up_LEDF.reshape(-1, 4, 5)]:
        values = np.linalg.svd(matrix, compute_uv=False)
        # Newton-Schulz brings every singular value near one and the same number, not onto it.
        assert values.max() / values.min() < 2.5
    raw = np.linalg.svd(np.asarray(grads["blocks"]["moe"]["up"]["kernel"])[0, 0], compute_uv=False)
    assert raw.max() / raw.min() > 2.5
    # The rest goes to Adam, whose first update is the sign of the gradient.
    for path in (("embed", "embedding"), ("head", "kernel"), ("blocks", "moe", "router", "kernel")):
        update, grad = updates, grads
        for key in path:
            update, grad = update[key], grad[key]
        np.testing.assert_allclose(update, -np.sign(grad), rtol=1e-3, err_msg="/".join(path))


def test_muon_decays_the_weights_by_path():
    cfg = OptimConfig(name="muon", learning_rate=0.1, warmup_steps=0, weight_decay=0.5, clip_norm=0)
    params = arrays(0)
    optimizer = optim.make_optimizer(cfg, 10)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(optimizer.update)(zeros, optimizer.init(params), params)
    for update, leaf, decayed in zip(
        *map(jax.tree.leaves, (updates, params, optim.decayed(cfg, params))), strict=True
    ):
        expected = -0.05 * leaf if decayed else np.zeros(leaf.shape)
        np.testing.assert_allclose(update, expected, rtol=1e-5, atol=1e-7)
