"""A draft changes how fast a text is written, and nothing of the text."""

import dataclasses
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.config import ModelConfig
from jaxgpt.model import gpt
from jaxgpt.sampling import sample, speculate
from jaxgpt.sampling.sample import Sampling
from jaxgpt.sampling.speculate import Draft

DENSE = ModelConfig(
    vocab_size=61, context_length=64, num_layers=1, model_dim=24, num_heads=4, num_kv_heads=2,
    mlp_dim=40, bias="all",
)  # fmt: skip
MIXTURE = ModelConfig(
    vocab_size=61, context_length=64, num_layers=2, model_dim=24, num_heads=3, mlp_dim=20,
    mlp="gated", norm="rmsnorm", position="rope", num_experts=5, tie_embeddings=False,
)  # fmt: skip
TINY = ModelConfig(
    vocab_size=6, context_length=32, num_layers=1, model_dim=8, num_heads=2, mlp_dim=16
)
MODELS = {"dense": DENSE, "mixture": MIXTURE, "tiny": TINY}
PROMPTS = [[5, 60, 3, 9, 5, 60, 3], list(range(14)), [7], [1, 2, 1, 2, 1, 2]]
GREEDY = Sampling(max_new_tokens=40, temperature=0.0)
SHARP = dataclasses.replace(GREEDY, temperature=0.05)
PENALIZED = Sampling(max_new_tokens=30, temperature=0.7, top_k=20, repetition_penalty=1.2)
DRAWS = 20_000


def random_params(cfg: ModelConfig, seed: int = 0) -> dict:
    random = np.random.default_rng(seed)
    draw = lambda leaf: jnp.asarray(random.normal(0, 0.4, leaf.shape), jnp.float32)
    return jax.tree.map(draw, jax.eval_shape(partial(gpt.init, cfg), jax.random.key(0)))


PARAMS = {name: random_params(cfg) for name, cfg in MODELS.items()}


def near(name: str) -> Draft:
    """A draft that is often right: the model with a little noise."""
    mix = lambda leaf, other: leaf + 0.1 * other
    params = jax.tree.map(mix, PARAMS[name], random_params(MODELS[name], seed=1))
    return Draft(MODELS[name], params)


@partial(jax.jit, static_argnums=0)
def full_logits(cfg, params, tokens_BT):
    return gpt.logits(cfg, params, gpt.apply(cfg, params, tokens_BT).hidden_BTD)


def distribution(logits_V: np.ndarray, settings: Sampling) -> np.ndarray:
    """Sorts, cuts and renormalises, one rule after the other."""
    exp_V = np.exp((np.float64(logits_V) - logits_V.max()) / settings.temperature)
    probs_V = exp_V / exp_V.sum()
    order = np.argsort(-probs_V, kind="stable")
    if settings.top_k:
        probs_V[order[settings.top_k :]] = 0
        probs_V /= probs_V.sum()
    before_V = np.cumsum(probs_V[order]) - probs_V[order]
    probs_V[order[before_V >= settings.top_p]] = 0
    probs_V /= probs_V.sum()
    probs_V[probs_V < settings.min_p * probs_V.max()] = 0
    return probs_V / probs_V.sum()


@pytest.mark.parametrize(
    ("draft", "settings"),
    [
        ("text", Sampling(3, temperature=1.3, top_k=5, top_p=0.9, min_p=0.05)),
        pytest.param("model", Sampling(3, temperature=1.3, top_k=5, top_p=0.9, min_p=0.05),
                     marks=pytest.mark.slow),
        pytest.param("text", Sampling(3, temperature=0.7, top_p=1.0), marks=pytest.mark.slow),
        pytest.param("model", Sampling(3, temperature=0.7, top_p=1.0), marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_texts_are_as_frequent_as_their_exact_probabilities(draft, settings):
    """Chi-square over 20,000 texts of three tokens; every text is drawn through checks."""
    stats = pytest.importorskip("scipy.stats", reason="scipy is in the test extra")
    prompt, drafted = [1, 2, 3, 4, 1, 2, 3], near("tiny") if draft == "model" else None
    no_stops, end_B = jnp.zeros(0, jnp.int32), jnp.array([len(prompt) + 3])
    begin = lambda cfg, params: sample.begin(cfg, params, [prompt], 7, 12, settings, None)
    begun = begin(TINY, PARAMS["tiny"])
    cache = begin(*drafted).cache if drafted else None
    tokens_BS = jnp.zeros((1, 19), jnp.int32).at[0, :7].set(jnp.array(prompt))

    def write(key):
        given = (key[None], no_stops, end_B)
        state = speculate._begin.__wrapped__(begun, cache, tokens_BS, *given, settings)
        draft_cfg, draft_params = drafted or (None, None)
        done = speculate.decode.__wrapped__(
            TINY, PARAMS["tiny"], draft_cfg, draft_params, state, *given, 0.0, settings
        )
        return done.tokens_BS[0, 7:10], done.credit

    texts, credit = jax.jit(jax.vmap(write))(jax.random.split(jax.random.key(2), DRAWS))
    assert (np.unique(np.asarray(credit)) > 2.9).any(), "proposals stood"

    expected = {}
    texts_BT = np.array(list(itertools.product(range(6), repeat=3)))
    rows_BT = np.concatenate([np.tile(prompt, (len(texts_BT), 1)), texts_BT], axis=1)
    logits_BTV = np.asarray(full_logits(TINY, PARAMS["tiny"], jnp.asarray(rows_BT)))
    for text, logits_TV in zip(texts_BT, logits_BTV, strict=True):
        probs = [distribution(logits_TV[6 + n], settings)[token] for n, token in enumerate(text)]
        expected[tuple(text.tolist())] = float(np.prod(probs))
    counts = dict.fromkeys(expected, 0)
    for text in map(tuple, np.asarray(texts).tolist()):
        counts[text] += 1
    assert not any(counts[text] for text, p in expected.items() if p == 0)
    often = [text for text, p in expected.items() if p * DRAWS >= 5]
    seen = [counts[text] for text in often]
    awaited = [expected[text] * DRAWS for text in often]
    if (rest := DRAWS - sum(awaited)) >= 5:
        seen, awaited = [*seen, DRAWS - sum(seen)], [*awaited, rest]
    assert len(seen) > 20
    result = stats.chisquare(seen, np.array(awaited) * sum(seen) / sum(awaited))
    assert result.pvalue > 1e-4, result


@pytest.fixture(scope="module")
def every_check():
    """By how many tokens each row advanced in each pass that read proposals."""
    found, advance = [], speculate._advance

    def noted(state, proposed_BK, *given):
        new = advance(state, proposed_BK, *given)
        if proposed_BK.shape[1]:
            note = lambda new_B: found.append(np.asarray(new_B))
            jax.debug.callback(note, new.length_B - state.length_B)
        return new

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speculate, "_advance", noted)
        yield found


@pytest.fixture
def checks(every_check, monkeypatch):
    """As `every_check`, of this test; proposals always pay."""
    monkeypatch.setattr(speculate, "_cost", lambda *_: 0.0)
    every_check.clear()
    return every_check


@pytest.mark.parametrize(
    ("name", "draft", "settings"),
    [
        ("dense", "text", GREEDY),
        ("dense", "model", PENALIZED),
        pytest.param("mixture", "text", GREEDY, marks=pytest.mark.slow),
        pytest.param("mixture", "model", SHARP, marks=pytest.mark.slow),
        pytest.param("dense", "text", SHARP, marks=pytest.mark.slow),
    ],
    ids=lambda given: given if isinstance(given, str) else f"{given.temperature:g}",
)
def test_text_is_that_without_a_draft(name, draft, settings, checks):
    """Of rows of unequal length, some of which end early; also on to the context's end."""
    options = {"rng": jax.random.key(3), "stop_ids": [11], "rows": [4, 0, 2, 9]}
    prompts = [*PROMPTS[:3], PROMPTS[3] * 10]
    given = (MODELS[name], PARAMS[name], prompts, settings)
    expected = sample.generate(*given, **options)
    found = speculate.generate(*given, near(name) if draft == "model" else None, **options)
    jax.effects_barrier()
    assert [c.tokens for c in found] == [c.tokens for c in expected]
    assert [c.stopped for c in found] == [c.stopped for c in expected]
    assert len(found[3].tokens) <= 4
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, rtol=1e-3, atol=1e-4)
    new = np.concatenate(checks)
    assert new.max() == (5 if draft == "model" else 8), "all proposals stood once"
    assert (new == 1).any(), "and none did once"


def test_one_row_streams_the_same_text_and_stops_where_it_is_told(checks):
    given = (DENSE, PARAMS["dense"], [PROMPTS[0]], GREEDY)
    expected = sample.generate(*given)[0].tokens
    shown = []
    look = lambda completions: shown.append(list(completions[0].tokens)) or len(shown[-1]) > 20
    speculate.generate(*given, None, on_tokens=look)
    assert 20 < len(shown[-1]) < 40 and len(shown) > 2
    assert all(expected[: len(text)] == text for text in shown)
    assert speculate.generate(*given, None)[0].tokens == expected


def test_proposals_that_are_refused_end_them(every_check, monkeypatch):
    """Each costs more than it brings, so the credit lasts for one of them."""
    monkeypatch.setattr(speculate, "_cost", lambda *_: 20.0)
    every_check.clear()
    speculate.generate(DENSE, PARAMS["dense"], [PROMPTS[0]], GREEDY, None)
    jax.effects_barrier()
    assert len(every_check) <= 1


def test_the_text_proposes_what_followed_its_last_words():
    cases = {
        "abcdabceabc": "eabceab",  # the last of the longest
        "xabcyyabczzabc": "zzabczz",
        "uvwabcdq-bcdr-abcd": "q-bcdr-",  # four are the same, not three
        "ababab": "abababa",
        "aaaa": "aaaaaaa",
        "abcdefab": None,  # two are not enough
        "a": None,
    }
    tokens_BS = np.zeros((len(cases), 32), np.int32)
    for row, text in enumerate(cases):
        tokens_BS[row, : len(text)] = [*map(ord, text)]
    length_B = jnp.array([*map(len, cases)])
    proposed_BK, found_B = jax.jit(speculate._from_text)(tokens_BS, length_B)
    assert found_B.tolist() == [proposed is not None for proposed in cases.values()]
    for proposed, found_K in zip(cases.values(), proposed_BK, strict=True):
        assert proposed in (None, "".join(map(chr, found_K.tolist())))


def test_a_draft_whose_context_is_too_short_is_refused():
    short = Draft(dataclasses.replace(DENSE, context_length=20), PARAMS["dense"])
    with pytest.raises(ValueError, match=r"draft: its context of 20 is shorter .* 47 tokens"):
        speculate.generate(DENSE, PARAMS["dense"], [PROMPTS[0]], GREEDY, short)
