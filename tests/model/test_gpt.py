"""Laws of the network: causality, caches, documents, dropout, recomputation; NumPy's opinion."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import kernels, tree
from jaxgpt.config import ModelConfig, RopeScaling
from jaxgpt.model import gpt, layers
from jaxgpt.model.attention import init_cache
from jaxgpt.plan import flops

TINY = ModelConfig(
    vocab_size=37, context_length=24, num_layers=2, model_dim=24, num_heads=4, num_kv_heads=2,
    mlp_dim=40,
)  # fmt: skip
ROPE = dataclasses.replace(
    TINY, position="rope", norm="rmsnorm", mlp="gated", activation="silu", qk_norm=True,
    tie_embeddings=False, head_dim=10, bias="qkv", num_layers=3,
)  # fmt: skip
GPT2 = dataclasses.replace(TINY, bias="all", activation="gelu_tanh")
SLIDING = dataclasses.replace(TINY, position="rope", sliding_window=6)
FAMILIES = {"gpt2": GPT2, "rope": ROPE}


def random_params(cfg: ModelConfig, scale: float = 0.3) -> dict:
    """Every parameter random, norms and biases too; nothing is compiled."""
    random = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(random.normal(0, scale, leaf.shape), jnp.float32)
    params = jax.tree.map(draw, jax.eval_shape(partial(gpt.init, cfg), jax.random.key(0)))
    return tree.map_named(lambda name, leaf: leaf + name.endswith("scale"), params)


@partial(jax.jit, static_argnums=0)
def run(cfg, params, tokens_BT, **inputs):
    output = gpt.apply(cfg, params, tokens_BT, **inputs)
    return gpt.logits(cfg, params, output.hidden_BTD), output.cache


def tokens(rows: int = 3, length: int = 24, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, TINY.vocab_size, (rows, length))


@pytest.mark.usefixtures("each_way")
@pytest.mark.parametrize("family", FAMILIES)
def test_future_tokens_do_not_change_past_logits(family):
    cfg, tokens_BT = FAMILIES[family], tokens()
    params = random_params(cfg)
    before_BTV, _ = run(cfg, params, tokens_BT)
    for position in (1, 11, 23):
        changed_BT = tokens_BT.copy()
        changed_BT[:, position:] = (changed_BT[:, position:] + 1) % cfg.vocab_size
        after_BTV, _ = run(cfg, params, changed_BT)
        np.testing.assert_array_equal(after_BTV[:, :position], before_BTV[:, :position])
        assert not np.allclose(after_BTV[:, position], before_BTV[:, position])


@pytest.mark.usefixtures("each_way")
@pytest.mark.parametrize("family", [*FAMILIES, "sliding window"])
def test_cached_chunks_equal_one_pass_up_to_the_last_slot(family):
    """Ragged rows, right-aligned; the chunks end with the context's last slot."""
    cfg, tokens_BT = FAMILIES.get(family, SLIDING), tokens()
    params, length = random_params(cfg), cfg.context_length
    start_B = np.array([0, 5, 2])
    cache, parts = init_cache(cfg, 3, length, jnp.asarray(start_B)), []
    for begin, end in [(0, 9), (9, 22), (22, 23), (23, 24)]:
        part_BTV, cache = run(cfg, params, tokens_BT[:, begin:end], cache=cache)
        parts.append(part_BTV)
    cached_BTV = np.concatenate(parts, axis=1)
    assert int(cache.length) == length
    for row, start in enumerate(start_B):
        alone_BTV, _ = run(cfg, params, tokens_BT[row : row + 1, start:])
        np.testing.assert_allclose(cached_BTV[row, start:], alone_BTV[0], rtol=1e-4, atol=2e-5)


def test_a_sliding_window_ends_where_it_says():
    """One layer, so that nothing passes on what is further away."""
    cfg, tokens_BT = dataclasses.replace(SLIDING, num_layers=1), tokens()
    params = random_params(cfg)
    before_BTV, _ = run(cfg, params, tokens_BT)
    changed_BT = tokens_BT.copy()
    changed_BT[:, 10] = (changed_BT[:, 10] + 1) % cfg.vocab_size
    after_BTV, _ = run(cfg, params, changed_BT)
    differs_T = np.any(np.asarray(before_BTV) != np.asarray(after_BTV), axis=(0, 2))
    np.testing.assert_array_equal(differs_T.nonzero()[0], np.arange(10, 16))


PACKED = {"positions_BT": np.array([[*range(7), *range(5), *range(12)]]),
          "segments_BT": np.array([[1] * 7 + [2] * 5 + [3] * 12])}  # fmt: skip


@pytest.mark.usefixtures("each_way")
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents_are_computed_as_if_alone(family):
    cfg, tokens_BT = FAMILIES[family], tokens(rows=1)
    params = random_params(cfg)
    packed_BTV, _ = run(cfg, params, tokens_BT, **PACKED)
    for start, stop in ((0, 7), (7, 12), (12, 24)):
        alone_BTV, _ = run(cfg, params, tokens_BT[:, start:stop])
        np.testing.assert_allclose(packed_BTV[:, start:stop], alone_BTV, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_gradient_crosses_from_one_document_to_another(family):
    cfg, tokens_BT = FAMILIES[family], np.arange(24)[None]  # every token once
    params = random_params(cfg)

    def second_document(embedding_VD):
        changed = {**params, "embed": {"embedding": embedding_VD}, "head": HEAD}
        output = gpt.apply(cfg, changed, tokens_BT, **PACKED)
        return (gpt.logits(cfg, changed, output.hidden_BTD)[:, 7:12] ** 2).sum()

    HEAD = params.get("head", {"kernel": params["embed"]["embedding"].T})
    gradient_VD = np.asarray(jax.jit(jax.grad(second_document))(params["embed"]["embedding"]))
    reached = np.abs(gradient_VD).max(axis=1) > 0
    assert reached[7:12].all() and reached.sum() == 5


def test_padding_rows_change_nothing_and_stay_finite():
    cfg, tokens_BT = GPT2, tokens()
    params = random_params(cfg)
    segments_BT = np.array([[1] * 24, [1] * 9 + [0] * 15, [0] * 24])
    padded_BTV, _ = run(cfg, params, tokens_BT, segments_BT=segments_BT)
    whole_BTV, _ = run(cfg, params, tokens_BT)
    np.testing.assert_allclose(padded_BTV[0], whole_BTV[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(padded_BTV[1, :9], whole_BTV[1, :9], rtol=1e-4, atol=1e-5)
    assert np.isfinite(padded_BTV).all()


def test_dropout_depends_on_the_rows_own_key():
    cfg, tokens_BT = dataclasses.replace(GPT2, dropout=0.3), tokens(rows=4)
    params = random_params(cfg)
    rng_B = jax.random.split(jax.random.key(5), 4)
    all_BTV, _ = run(cfg, params, tokens_BT, rng_B=rng_B)
    two_BTV, _ = run(cfg, params, tokens_BT[2:], rng_B=rng_B[2:])
    np.testing.assert_allclose(two_BTV, all_BTV[2:], rtol=1e-5, atol=1e-5)
    other_BTV, _ = run(cfg, params, tokens_BT[2:], rng_B=rng_B[:2])
    assert not np.allclose(other_BTV, two_BTV)
    off_BTV, _ = run(cfg, params, tokens_BT[2:])
    assert not np.allclose(off_BTV, two_BTV)


def test_dropout_keeps_the_mean_and_drops_the_rate():
    rng_B = jax.random.split(jax.random.key(0), 8)
    ones_BTD = jnp.ones((8, 64, 64))
    dropped_BTD = np.asarray(layers.dropout(ones_BTD, rng_B, 3, 0.25))
    assert set(np.unique(dropped_BTD)) == {0.0, np.float32(4 / 3)}
    # 32,768 draws: the standard deviation of the rate is 0.0024.
    assert abs((dropped_BTD == 0).mean() - 0.25) < 0.01
    other_BTD = np.asarray(layers.dropout(ones_BTD, rng_B, 4, 0.25))
    assert 0.3 < (other_BTD != dropped_BTD).mean() < 0.45  # independent: 0.375


@pytest.fixture(scope="module")
def big():
    """Large enough that activations outweigh everything else."""
    cfg = dataclasses.replace(ROPE, num_layers=6, model_dim=64, context_length=128)
    tokens_BT = np.random.default_rng(2).integers(0, cfg.vocab_size, (16, 128))
    return random_params(cfg, 0.1), {name: compile_grad(cfg, name, tokens_BT) for name in REMAT}


REMAT = {
    "none": {"remat": "none", "num_layers": 6},
    **{name: {"remat": name} for name in ("dots", "qkv", "attention", "full")},
}


def compile_grad(cfg: ModelConfig, remat: str, tokens_BT: np.ndarray):
    cfg = dataclasses.replace(cfg, **REMAT[remat])
    params = random_params(cfg, 0.1)

    def loss(params):
        output = gpt.apply(cfg, params, tokens_BT)
        return (output.hidden_BTD**2).mean()

    return jax.jit(jax.value_and_grad(loss)).lower(params).compile()


def test_remat_changes_no_gradient_and_saves_memory(big):
    params, compiled = big
    loss, gradient = compiled["none"](params)
    for name in ("dots", "qkv", "attention", "full"):
        other_loss, other = compiled[name](params)
        np.testing.assert_allclose(other_loss, loss, rtol=1e-5)
        for path, leaf in tree.flatten(gradient).items():
            scale = np.abs(leaf).max() + 1e-6
            np.testing.assert_allclose(
                tree.flatten(other)[path], leaf, atol=1e-5 * scale, err_msg=path
            )
    bytes_of = lambda name: compiled[name].memory_analysis().temp_size_in_bytes
    assert bytes_of("full") < 0.5 * bytes_of("none")
    assert sorted(map(bytes_of, REMAT), reverse=True) == [*map(bytes_of, REMAT)]


@pytest.mark.parametrize("where", ["cpu", "gpu", "tpu", "plain"])
def test_each_choice_of_remat_computes_more_again_than_the_one_before(where):
    """In traced FLOPs, on every platform's branch; nothing is run."""
    params = jax.eval_shape(lambda: gpt.init(ROPE, jax.random.key(0)))

    def count(remat: str) -> float:
        cfg = dataclasses.replace(ROPE, remat=remat)
        loss = lambda params: jnp.square(gpt.apply(cfg, params, tokens()).hidden_BTD).mean()
        with kernels.use(where):
            return flops.count(jax.make_jaxpr(jax.grad(loss))(params).jaxpr)

    none, dots, qkv, attention, full = map(count, REMAT)
    assert none < dots < qkv < attention <= full
    products = full - dots  # those of kernels, which are what `dots` keeps
    assert products > 0.5 * (full - none)


def softmax(scores: np.ndarray) -> np.ndarray:
    exp = np.exp(scores - scores.max(-1, keepdims=True))
    return exp / exp.sum(-1, keepdims=True)


def layer_norm(x: np.ndarray, scale: np.ndarray, bias: np.ndarray, eps: float) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * scale + bias


def numpy_gpt2(cfg: ModelConfig, params: dict, tokens_T: np.ndarray) -> np.ndarray:
    """GPT-2 in float64, one head and one layer at a time."""
    params = {name: np.float64(leaf) for name, leaf in tree.flatten(params).items()}
    length, width = len(tokens_T), cfg.head_width
    x_TD = params["embed/embedding"][tokens_T] + params["positions/embedding"][:length]
    group = cfg.num_heads // cfg.kv_heads
    for layer in range(cfg.num_layers):
        get = lambda name, layer=layer: params[f"blocks/{name}"][layer]
        linear = lambda x, name, get=get: x @ get(f"{name}/kernel") + get(f"{name}/bias")
        norm = lambda x, name, get=get: layer_norm(
            x, get(f"{name}/scale"), get(f"{name}/bias"), cfg.norm_eps
        )
        y_TD = norm(x_TD, "attention_norm")
        q, k, v = (linear(y_TD, f"attention/{name}") for name in ("query", "key", "value"))
        heads = []
        for head in range(cfg.num_heads):
            mine = slice(head * width, (head + 1) * width)
            shared = slice(head // group * width, (head // group + 1) * width)
            scores_TS = q[:, mine] @ k[:, shared].T / np.sqrt(width)
            scores_TS[np.triu_indices(length, 1)] = -np.inf
            heads.append(softmax(scores_TS) @ v[:, shared])
        x_TD = x_TD + linear(np.concatenate(heads, axis=1), "attention/output")
        hidden = linear(norm(x_TD, "mlp_norm"), "mlp/up")
        hidden = 0.5 * hidden * (1 + np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)))
        x_TD = x_TD + linear(hidden, "mlp/down")
    x_TD = layer_norm(x_TD, params["final_norm/scale"], params["final_norm/bias"], cfg.norm_eps)
    return x_TD @ params["embed/embedding"].T


@pytest.mark.usefixtures("each_way")
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (4, 2), (4, 1)])
def test_every_kind_of_attention_equals_numpy(heads, kv_heads):
    """Single-head, multi-head, grouped-query and multi-query attention in a whole GPT-2."""
    cfg = dataclasses.replace(GPT2, num_heads=heads, num_kv_heads=kv_heads)
    params, tokens_BT = random_params(cfg), tokens(rows=2, length=13)
    logits_BTV, _ = run(cfg, params, tokens_BT)
    for row in range(2):
        expected = numpy_gpt2(cfg, params, tokens_BT[row])
        np.testing.assert_allclose(logits_BTV[row], expected, rtol=1e-4, atol=1e-4)


def test_rope_equals_complex_rotation():
    cfg = dataclasses.replace(ROPE, head_dim=8, rope_base=100.0)
    positions_BT = np.array([[0, 1, 5, 300], [7, 7, 2, 9]])
    x_BTNH = np.random.default_rng(0).normal(size=(2, 4, 3, 8)).astype(np.float32)
    rotated_BTNH = layers.rotate(jnp.asarray(x_BTNH), layers.rope_tables(cfg, positions_BT))
    pairs = np.complex128(x_BTNH[..., :4] + 1j * x_BTNH[..., 4:])
    turns = np.exp(1j * positions_BT[..., None] * 100.0 ** (-np.arange(4) / 4))
    expected = pairs * turns[:, :, None]
    expected = np.concatenate([expected.real, expected.imag], axis=-1)
    np.testing.assert_allclose(rotated_BTNH, expected, rtol=1e-4, atol=1e-4)


def test_rope_sees_only_distances():
    cfg = dataclasses.replace(ROPE, head_dim=8)
    q, k = np.random.default_rng(0).normal(size=(2, 1, 1, 1, 8)).astype(np.float32)
    score = lambda a, b: float((
        layers.rotate(jnp.asarray(q), layers.rope_tables(cfg, np.array([[a]])))
        * layers.rotate(jnp.asarray(k), layers.rope_tables(cfg, np.array([[b]])))
    ).sum())  # fmt: skip
    assert score(3, 1) == pytest.approx(score(12, 10), abs=1e-5)
    assert score(3, 1) != pytest.approx(score(3, 2), abs=1e-2)


def test_rope_scaling_equals_transformers():
    reason = "the reference extra is not installed"
    pytest.importorskip("torch", reason=reason)
    rope = pytest.importorskip("transformers.modeling_rope_utils", reason=reason)
    transformers = pytest.importorskip("transformers", reason=reason)
    scaling = RopeScaling(factor=6.0, original_context=64)
    cfg = dataclasses.replace(ROPE, head_dim=32, rope_base=500.0, rope_scaling=scaling)
    theirs = transformers.LlamaConfig(
        head_dim=32, max_position_embeddings=384, rope_parameters=dict(
            rope_type="llama3", rope_theta=500.0, factor=6.0, low_freq_factor=1.0,
            high_freq_factor=4.0, original_max_position_embeddings=64,
        ),
    )  # fmt: skip
    frequency, _ = rope.ROPE_INIT_FUNCTIONS["llama3"](theirs, "cpu")
    cos, sin = layers.rope_tables(cfg, np.array([[1]]))
    plain, _ = layers.rope_tables(dataclasses.replace(cfg, rope_scaling=None), np.array([[1]]))
    np.testing.assert_allclose(np.arctan2(sin, cos)[0, 0], frequency.numpy(), rtol=1e-5)
    assert (cos != plain).any() and (cos == plain).any()  # some stretched, some kept


def test_a_tied_head_is_the_embedding_and_a_free_one_is_not():
    params = random_params(GPT2)
    assert "head" not in params
    np.testing.assert_array_equal(gpt.head(params), params["embed"]["embedding"])
    free = random_params(dataclasses.replace(GPT2, tie_embeddings=False))
    np.testing.assert_array_equal(gpt.head(free), free["head"]["kernel"].T)
    untied = {**params, "head": {"kernel": params["embed"]["embedding"].T}}
    tied_BTV, _ = run(GPT2, params, tokens())
    free_BTV, _ = run(dataclasses.replace(GPT2, tie_embeddings=False), untied, tokens())
    np.testing.assert_allclose(free_BTV, tied_BTV, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("parallel", [False, True])
def test_a_fresh_adapter_changes_nothing_and_a_used_one_does(parallel):
    cfg = dataclasses.replace(GPT2, adapter_dim=6, adapter_parallel=parallel)
    adapted = jax.jit(partial(gpt.init, cfg))(jax.random.key(0))
    plain = {**adapted, "blocks": {n: p for n, p in adapted["blocks"].items() if "ad" not in n}}
    expected_BTV, _ = run(GPT2, plain, tokens())
    fresh_BTV, _ = run(cfg, adapted, tokens())
    # Two programs, whose sums may be ordered differently.
    np.testing.assert_allclose(fresh_BTV, expected_BTV, atol=1e-6)
    used = tree.map_named(lambda name, leaf: leaf + 0.1 * ("adapter/up" in name), adapted)
    used_BTV, _ = run(cfg, used, tokens())
    assert not np.allclose(used_BTV, expected_BTV)


def test_parameters_are_counted_by_hand():
    count = lambda cfg: sum(
        int(np.prod(leaf.shape))
        for leaf in jax.tree.leaves(jax.eval_shape(partial(gpt.init, cfg), jax.random.key(0)))
    )
    # GPT-2: tables, then per layer two norms, attention with grouped keys and values, and MLP.
    attention = 24 * 24 + 24 + 2 * (24 * 12 + 12) + 24 * 24 + 24
    mlp = 24 * 40 + 40 + 40 * 24 + 24
    assert count(GPT2) == 37 * 24 + 24 * 24 + 2 * (4 * 24 + attention + mlp) + 2 * 24
    attention = 24 * 40 + 40 + 2 * (24 * 20 + 20) + 40 * 24 + 2 * 10
    assert count(ROPE) == 2 * 37 * 24 + 3 * (2 * 24 + attention + 3 * 24 * 40) + 24


def test_bfloat16_computes_close_to_float32_and_keeps_float32_logits():
    cfg = dataclasses.replace(ROPE, dtype="bfloat16")
    params = random_params(cfg, 0.1)
    half_BTV, _ = run(cfg, params, tokens())
    full_BTV, _ = run(ROPE, params, tokens())
    assert half_BTV.dtype == jnp.float32
    np.testing.assert_allclose(half_BTV, full_BTV, atol=2e-2 * np.abs(full_BTV).max())


def test_initial_weights_have_gpt2s_sizes():
    cfg = dataclasses.replace(GPT2, model_dim=64, num_layers=8, vocab_size=500, mlp_dim=None)
    params = tree.flatten(jax.jit(partial(gpt.init, cfg))(jax.random.key(0)))
    std = lambda name: float(params[name].std())
    assert std("embed/embedding") == pytest.approx(0.02, rel=0.05)
    assert std("blocks/mlp/up/kernel") == pytest.approx(0.02, rel=0.05)
    assert std("blocks/mlp/down/kernel") == pytest.approx(0.02 / 4, rel=0.05)
    assert std("blocks/attention/output/kernel") == pytest.approx(0.02 / 4, rel=0.05)
    layers_LX = params["blocks/mlp/up/kernel"].reshape(8, -1)
    assert len(np.unique(np.asarray(layers_LX[:, 0]))) == 8, "layers were drawn alike"
