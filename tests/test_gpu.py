"""What a GPU computes, against the CPU, whose results the other tests hold to references.

JAX_PLATFORMS=cuda,cpu python -m pytest -m gpu
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import config, peft, scoring, sharding
from jaxgpt.model import gpt
from jaxgpt.sampling import sample

pytestmark = pytest.mark.gpu

GPT2 = dict(bias="all", activation="gelu_tanh", vocab_size=301)  # no multiple of a GPU's tile
LLAMA = dict(
    num_kv_heads=2, mlp="gated", activation="silu", norm="rmsnorm", position="rope",
    mlp_dim=96, vocab_size=256,
)  # fmt: skip
MIXTURE = LLAMA | dict(num_experts=4, experts_per_token=2)
KINDS = {"gpt2": GPT2, "llama": LLAMA, "mixture": MIXTURE, "window": LLAMA | {"sliding_window": 9}}


def model(kind: str, dtype: str) -> config.ModelConfig:
    shape = dict(context_length=64, num_layers=2, model_dim=64, num_heads=4, dtype=dtype)
    return config.ModelConfig(**(shape | KINDS[kind]))  # type: ignore[arg-type]


def on(platform: str, fn, *args):
    """fn(*args) compiled for the first device of a platform, as NumPy."""
    mesh = sharding.make_mesh(config.MeshConfig(), jax.devices(platform)[:1])
    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
        placed = jax.device_put(args, sharding.replicated(mesh))
        return jax.device_get(jax.jit(fn)(*placed))


def batch(cfg: config.ModelConfig, packed: bool) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    ids = rng.integers(0, cfg.vocab_size, (4, cfg.context_length + 1), np.int32)
    found = {"tokens": ids[:, :-1], "targets": ids[:, 1:], "mask": np.ones(ids[:, 1:].shape)}
    if packed:
        found["segments"] = np.repeat(np.array([[1, 2]], np.int32), 32, axis=1).repeat(4, axis=0)
        found["positions"] = np.tile(np.arange(32, dtype=np.int32), (4, 2))
    return found


@pytest.mark.parametrize(
    ("kind", "dtype", "packed", "tolerance"),
    [
        ("gpt2", "float32", False, 1e-4),
        ("llama", "float32", True, 1e-4),
        ("mixture", "float32", False, 1e-4),
        ("window", "bfloat16", False, 3e-2),  # cuDNN's attention from here on
        ("gpt2", "bfloat16", False, 3e-2),
        ("llama", "bfloat16", True, 3e-2),
    ],
)
def test_loss_and_gradients_are_those_of_a_cpu_in_float32(kind, dtype, packed, tolerance):
    def loss_of(dtype, params, batch):
        loss, weight, _ = scoring.next_token_loss(
            model(kind, dtype), params, batch, label_smoothing=0.1, chunk=96
        )
        return loss / weight

    cfg = model(kind, dtype)
    params = jax.device_get(gpt.init(cfg, jax.random.key(0)))
    results = [
        on(name, jax.value_and_grad(partial(loss_of, dtype)), params, batch(cfg, packed))
        for name, dtype in (("gpu", dtype), ("cpu", "float32"))
    ]
    for ours, expected in zip(*map(jax.tree.leaves, results), strict=True):
        assert np.abs(ours - expected).max() <= tolerance * max(np.abs(expected).max(), 1e-2)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_single_row_is_continued_as_the_whole_forward_pass_says(kind):
    cfg = model(kind, "float32")
    params = jax.device_get(gpt.init(cfg, jax.random.key(1)))
    mesh = sharding.make_mesh(config.MeshConfig(), jax.devices("gpu")[:1])
    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
        fast = sample.for_decoding(cfg, params, 1)
        how = sample.Sampling(max_new_tokens=40, temperature=0.0)
        written = sample.generate(cfg, fast, [[5, 6, 7]], how)[0].tokens
    row = np.array([[5, 6, 7, *written]], np.int32)
    scores = on(
        "cpu", lambda p, t: gpt.logits(cfg, p, gpt.apply(cfg, p, t).hidden_BTD), params, row
    )
    for index, token in enumerate(written):
        step = scores[0, 2 + index]
        assert step.max() - step[token] < 1e-4


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_quantised_kernels_with_adapters_are_those_of_a_cpu(quantize):
    cfg = model("llama", "float32")
    settings = config.PeftConfig(kind="qlora", quantize=quantize, rank=4)  # type: ignore[arg-type]
    params = jax.device_get(peft.add(settings, gpt.init(cfg, jax.random.key(0)), jax.random.key(2)))
    hidden = lambda params, tokens: gpt.apply(cfg, params, tokens).hidden_BTD
    tokens = batch(cfg, False)["tokens"]
    ours, expected = (on(name, hidden, params, tokens) for name in ("gpu", "cpu"))
    np.testing.assert_allclose(ours, expected, atol=1e-4)


def test_probabilities_and_entropy_leave_the_rows_of_padding_out():
    cfg = model("gpt2", "float32")
    params = jax.device_get(gpt.init(cfg, jax.random.key(0)))
    data = batch(cfg, False)

    def scores(params, batch):
        hidden_BTD = scoring.run(cfg, params, batch).hidden_BTD
        both = partial(scoring.token_scores, cfg, temperature=0.7, chunk=96)
        return both(params, hidden_BTD, batch)

    def gradient(params, batch):
        total = lambda params: sum(jnp.sum(x) for x in scores(params, batch))
        return jax.grad(total)(params)

    for fn in (scores, gradient):
        ours, expected = (on(name, fn, params, data) for name in ("gpu", "cpu"))
        for one, other in zip(*map(jax.tree.leaves, (ours, expected)), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-4 * max(np.abs(other).max(), 1))
