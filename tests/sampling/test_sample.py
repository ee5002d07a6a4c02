"""Decoding with a cache equals the full forward pass, whoever shares the batch."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.config import ModelConfig
from jaxgpt.model import gpt
from jaxgpt.sampling import sample
from jaxgpt.sampling.sample import Sampling, decode, for_decoding, generate

DENSE = ModelConfig(
    vocab_size=61, context_length=64, num_layers=2, model_dim=24, num_heads=4, num_kv_heads=2,
    mlp_dim=40, bias="all",
)  # fmt: skip
MIXTURE = ModelConfig(
    vocab_size=61, context_length=64, num_layers=2, model_dim=24, num_heads=3, mlp_dim=20,
    mlp="gated", norm="rmsnorm", position="rope", num_experts=5, tie_embeddings=False,
)  # fmt: skip
MODELS = {"dense": DENSE, "mixture": MIXTURE}
PROMPTS = [[5, 60, 3], list(range(14)), [7], [1, 2, 3, 4, 5, 6]]
GREEDY = Sampling(max_new_tokens=20, temperature=0.0)
RANDOM = Sampling(max_new_tokens=20, temperature=1.2, top_k=20, top_p=0.9)


def random_params(cfg: ModelConfig) -> dict:
    random = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(random.normal(0, 0.4, leaf.shape), jnp.float32)
    return jax.tree.map(draw, jax.eval_shape(partial(gpt.init, cfg), jax.random.key(0)))


PARAMS = {name: random_params(cfg) for name, cfg in MODELS.items()}


@partial(jax.jit, static_argnums=0)
def full_logits(cfg, params, tokens_BT):
    return gpt.logits(cfg, params, gpt.apply(cfg, params, tokens_BT).hidden_BTD)


def score(cfg: ModelConfig, params: dict, sequence: list[int]) -> np.ndarray:
    """Logits [T, V] of one sequence alone; filled up on the right, which causality ignores."""
    padded = [*sequence, *[0] * (cfg.context_length - len(sequence))]
    return np.asarray(full_logits(cfg, params, np.array([padded])))[0, : len(sequence)]


@pytest.fixture(scope="module")
def greedy():
    return {name: generate(cfg, PARAMS[name], PROMPTS, GREEDY) for name, cfg in MODELS.items()}


@pytest.mark.parametrize("name", MODELS)
def test_greedy_decoding_equals_the_argmax_of_full_passes(name, greedy):
    for prompt, completion in zip(PROMPTS, greedy[name], strict=True):
        assert len(completion.tokens) == 20 and not completion.stopped
        logits_TV = score(MODELS[name], PARAMS[name], prompt + completion.tokens)
        written_TV = logits_TV[len(prompt) - 1 : -1]
        np.testing.assert_array_equal(completion.tokens, written_TV.argmax(-1))
        logprobs_TV = jax.nn.log_softmax(written_TV, axis=-1)
        np.testing.assert_allclose(completion.logprobs, logprobs_TV.max(-1), rtol=1e-4, atol=1e-5)
    assert len({tuple(completion.tokens) for completion in greedy[name]}) > 1


@pytest.mark.parametrize("name", MODELS)
def test_a_row_does_not_depend_on_its_batch_or_padding(name, greedy):
    rng = jax.random.key(3)
    cfg, params = MODELS[name], PARAMS[name]
    drawn = generate(cfg, params, PROMPTS, RANDOM, rng=rng)
    # 33 tokens of company move the short prompts into a wider bucket.
    company = [PROMPTS[2], list(range(33)), PROMPTS[0], PROMPTS[3]]
    same = generate(cfg, params, company, RANDOM, rng=rng, rows=[2, 9, 0, 3])
    for row, other in ((2, 0), (0, 2), (3, 3)):
        assert drawn[row].tokens == same[other].tokens
        np.testing.assert_allclose(drawn[row].logprobs, same[other].logprobs, rtol=1e-3, atol=1e-4)
    again = generate(cfg, params, PROMPTS, RANDOM, rng=jax.random.key(4))
    assert [c.tokens for c in again] != [c.tokens for c in drawn]


@pytest.mark.usefixtures("each_way")
def test_rows_with_one_prompt_draw_differently():
    drawn = generate(DENSE, PARAMS["dense"], [[7]] * 4, RANDOM, rng=jax.random.key(0))
    assert len({tuple(completion.tokens) for completion in drawn}) == 4


def test_a_stop_token_ends_a_row_and_is_left_out(greedy):
    stop = greedy["dense"][0].tokens[6]
    stopped = generate(DENSE, PARAMS["dense"], PROMPTS, GREEDY, stop_ids=[stop, 60_000])
    for before, after in zip(greedy["dense"], stopped, strict=True):
        length = before.tokens.index(stop) if stop in before.tokens else 20
        assert after.tokens == before.tokens[:length]
        assert len(after.logprobs) == length
        assert after.stopped == (length < 20)


def test_an_accelerator_begins_the_next_scan_early_and_writes_the_same(greedy, monkeypatch):
    monkeypatch.setattr("jaxgpt.sampling.sample.platform", lambda: "gpu")
    begun, shown = [], []
    monkeypatch.setattr("jaxgpt.sampling.sample.decode", lambda *a: begun.append(1) or decode(*a))
    longer = dataclasses.replace(GREEDY, max_new_tokens=40)
    done = generate(
        DENSE, PARAMS["dense"], PROMPTS[:1], longer, stop_ids=[greedy["dense"][0].tokens[0]],
        on_tokens=lambda completions: shown.append(completions) or False,
    )  # fmt: skip
    assert done[0].stopped and done[0].tokens == []
    assert len(shown) == 1 and len(begun) == 2  # the second scan is in vain
    written = generate(DENSE, PARAMS["dense"], PROMPTS, GREEDY)
    assert [c.tokens for c in written] == [c.tokens for c in greedy["dense"]]


def test_generation_ends_when_every_row_has_stopped(greedy):
    calls = []
    stops = {completion.tokens[0] for completion in greedy["dense"]}
    settings = dataclasses.replace(GREEDY, max_new_tokens=40)
    done = generate(
        DENSE, PARAMS["dense"], PROMPTS, settings, stop_ids=list(stops),
        on_tokens=lambda completions: calls.append(completions) or False,
    )  # fmt: skip
    assert all(c.tokens == [] and c.stopped for c in done)
    assert calls == [done]  # one scan


def test_max_new_tokens_counts(greedy):
    for count in (0, 1, 17):
        settings = dataclasses.replace(GREEDY, max_new_tokens=count)
        cut = generate(DENSE, PARAMS["dense"], PROMPTS, settings)
        assert [c.tokens for c in cut] == [c.tokens[:count] for c in greedy["dense"]]


@pytest.mark.usefixtures("each_way")
def test_text_ends_with_the_context():
    settings = dataclasses.replace(GREEDY, max_new_tokens=40)
    prompts = [list(range(50)), list(range(63)), [7]]
    written = generate(DENSE, PARAMS["dense"], prompts, settings)
    assert [len(c.tokens) for c in written] == [14, 1, 40]
    assert not any(c.stopped for c in written)
    whole = prompts[0] + written[0].tokens
    logits_TV = score(DENSE, PARAMS["dense"], whole)
    np.testing.assert_array_equal(written[0].tokens, logits_TV[49:-1].argmax(-1))


@pytest.mark.parametrize(("prompt", "named"), [([], "empty"), (list(range(60)) + [1] * 4, "64")])
def test_a_prompt_that_cannot_be_continued_is_refused(prompt, named):
    with pytest.raises(ValueError, match=f"prompt 1 .*{named}"):
        generate(DENSE, PARAMS["dense"], [[1], prompt], GREEDY)


def test_streaming_sees_growing_prefixes_and_may_end_it(greedy):
    seen = []
    settings = dataclasses.replace(GREEDY, max_new_tokens=40)

    def look(completions):
        seen.append([list(completion.tokens) for completion in completions])
        return len(seen) == 2

    generate(DENSE, PARAMS["dense"], PROMPTS, settings, on_tokens=look)
    assert [len(rows[0]) for rows in seen] == [16, 32]
    assert seen[1][0][:16] == seen[0][0] == greedy["dense"][0].tokens[:16]


def test_the_repetition_penalty_sees_the_prompt_and_what_was_written():
    """Against a loop that scores whole sequences and penalises in NumPy."""
    settings = dataclasses.replace(GREEDY, repetition_penalty=1.8)
    prompts = [PROMPTS[0], PROMPTS[1]]
    written = generate(DENSE, PARAMS["dense"], prompts, settings)
    for prompt, completion in zip(prompts, written, strict=True):
        sequence = list(prompt)
        for token in completion.tokens:
            logits_V = score(DENSE, PARAMS["dense"], sequence)[-1].copy()
            seen = sorted(set(sequence))
            logits_V[seen] = np.where(
                logits_V[seen] > 0, logits_V[seen] / 1.8, logits_V[seen] * 1.8
            )
            assert token == logits_V.argmax()
            sequence.append(token)


@pytest.mark.parametrize("name", ["dense", pytest.param("mixture", marks=pytest.mark.slow)])
def test_kernels_cast_for_decoding_write_the_same(name):
    cfg, params = dataclasses.replace(MODELS[name], dtype="bfloat16"), PARAMS[name]
    plain = generate(cfg, params, PROMPTS, GREEDY)
    fast = generate(cfg, for_decoding(cfg, params), PROMPTS, GREEDY)
    assert [c.tokens for c in fast] == [c.tokens for c in plain]
    kinds = {leaf.dtype for leaf in jax.tree.leaves(for_decoding(cfg, params))}
    assert kinds == {jnp.dtype("bfloat16"), jnp.dtype("float32")}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_of_its_own_is_laid_out_to_write_the_same(dtype):
    cfg, params = dataclasses.replace(DENSE, dtype=dtype), PARAMS["dense"]
    fast = for_decoding(cfg, params, 1)
    for prompt in PROMPTS:
        plain = generate(cfg, params, [prompt], GREEDY)[0]
        assert generate(cfg, fast, [prompt], GREEDY)[0].tokens == plain.tokens


@pytest.mark.usefixtures("each_way")
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_greedy_text_equals_transformers_generate(family, tmp_path):
    """A token may differ only where the two leading logits lie within 1e-4."""
    reason = "the reference extra is not installed"
    torch = pytest.importorskip("torch", reason=reason)
    pytest.importorskip("transformers", reason=reason)
    import reference_models

    from jaxgpt.convert import hf

    model = reference_models.build(family)
    model.save_pretrained(tmp_path)
    cfg, params = hf.load(tmp_path)
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        theirs = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False,
            pad_token_id=0,
        )[0].tolist()  # fmt: skip
        mine = prompt + generate(cfg, params, [prompt], GREEDY)[0].tokens
        if mine != theirs:
            place = next(i for i, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b)
            logits_V = score(cfg, params, mine[:place])[-1]
            second, first = np.sort(logits_V)[-2:]
            assert first - second < 1e-4


def test_the_first_of_the_largest_scores_is_drawn():
    scores_BV = jnp.asarray([[1, 3, 2, 3], [-np.inf, -np.inf, -5, -6], [np.nan, 1, 2, 0]])
    assert sample.largest(scores_BV).tolist() == [1, 2, 3]  # the last one is not a number


def test_draws_are_those_of_jax(rng):
    logits_BV = jax.random.normal(rng, (64, 50))
    rng_B, index_B = jax.random.split(jax.random.key(5), 64), jnp.arange(64)
    settings = Sampling(temperature=1.0, top_p=1.0)
    found_B, _ = sample.draw(logits_BV, None, rng_B, index_B, settings)
    keys_B = jax.vmap(jax.random.fold_in)(rng_B, index_B)
    expected_B = jax.vmap(jax.random.categorical)(keys_B, jax.nn.log_softmax(logits_BV))
    assert found_B.tolist() == expected_B.tolist()


@pytest.mark.parametrize("kinds", [([1, 2, 3], [4], [5, 6]), ([1, 2, 3],)])
def test_copies_of_a_prompt_are_read_once(tiny, rng, monkeypatch, kinds):
    params = for_decoding(tiny, gpt.init(tiny, rng))
    prompts = [prompt for prompt in kinds for _ in range(4)]
    settings = Sampling(max_new_tokens=20, temperature=1.0, repetition_penalty=1.2)
    read, prefill = [], sample.prefill

    def noted(cfg, params, tokens_BT, *rest):
        read.append(len(tokens_BT))
        return prefill(cfg, params, tokens_BT, *rest)

    monkeypatch.setattr(sample, "prefill", noted)
    found = generate(tiny, params, prompts, settings, rng=jax.random.key(5))
    monkeypatch.setattr(sample, "_copies", lambda prompts: 1)
    expected = generate(tiny, params, prompts, settings, rng=jax.random.key(5))
    assert read == [len(kinds), len(prompts)]
    assert [c.tokens for c in found] == [c.tokens for c in expected]
    assert len({tuple(c.tokens) for c in found}) == len(prompts)


def test_only_whole_groups_are_copies():
    assert sample._copies([[1], [1], [2], [2]]) == 2
    assert sample._copies([[1], [1], [2]]) == sample._copies([[1], [2], [2], [2]]) == 1
    assert sample._copies([[1], [1], [1], [2]]) == sample._copies([[1], [1], [2], [1]]) == 1


def test_rows_that_leave_the_batch_change_nothing(tiny, rng, monkeypatch):
    params = for_decoding(tiny, gpt.init(tiny, rng))
    prompts = [[n % 50 + 1, 2, 3][: n % 3 + 1] for n in range(32)]
    settings = Sampling(max_new_tokens=28, temperature=1.0, top_p=1.0)
    # A third of the vocabulary ends a row, so that few are left after the first scan.
    options = {"stop_ids": range(4), "rng": jax.random.key(5)}
    expected = generate(tiny, params, prompts, settings, **options)
    kept, take = [], sample._take

    def noted(state, rows_R):
        kept.append(len(rows_R))
        return take(state, rows_R)

    monkeypatch.setattr(sample, "_take", noted)
    found = generate(tiny, params, prompts, settings, compact=True, **options)
    assert kept and kept[0] < 32
    for one, other in zip(expected, found, strict=True):
        assert (one.tokens, one.stopped) == (other.tokens, other.stopped)
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)
        assert (one.end is None) == (not one.stopped)
        if one.end is not None:
            assert one.end[0] in range(4) and one.end[0] == other.end[0]
