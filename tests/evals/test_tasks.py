"""Tasks: what they read, what they ask, what they add up, and how they go on after a kill."""

import bz2
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from byte_model import byte_model, with_context

from jaxgpt import evals
from jaxgpt.config import EvaluateConfig
from jaxgpt.evals import choice, exact_match, lambada, records

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    return byte_model(tmp_path_factory.mktemp("model"))


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def config(task, data, **settings):
    return EvaluateConfig(checkpoint="tiny", task=task, data=str(data), **settings)


def logprob(lm, context, text):
    """Teacher-forced in one pass, in NumPy."""
    before, row = list(context.encode()), list((context + text).encode())
    padded = row + [0] * (lm.config.context_length - len(row))  # one shape to compile
    scores = np.asarray(lm.logits([padded]), np.float64)[0]
    logprobs = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    return sum(logprobs[i - 1, row[i]] for i in range(len(before), len(row)))


QUESTIONS = [
    {"query": "Sky is", "choices": ["blue", "a large green tree", "x"], "gold": 0},
    {"query": "Question: two?", "choices": ["yes", "no"], "gold": 1},
    {"query": "Grass is", "choices": ["red", "green"], "gold": 1},
]


def test_multiple_choice_decides_by_likelihood_and_by_likelihood_per_character(lm, tmp_path):
    cfg = config("multiple_choice", write(tmp_path / "data.jsonl", QUESTIONS))
    right, right_norm = [], []
    for row in QUESTIONS:
        scores = np.array([logprob(lm, row["query"], f" {c}") for c in row["choices"]])
        lengths = [len(c) for c in row["choices"]]
        right.append(scores.argmax() == row["gold"])
        right_norm.append((scores / lengths).argmax() == row["gold"])
    found = evals.evaluate(lm, cfg)
    assert found["acc"] == pytest.approx(np.mean(right))
    assert found["acc_norm"] == pytest.approx(np.mean(right_norm))
    assert found["acc_stderr"] == pytest.approx(np.std(right, ddof=1) / math.sqrt(3))
    assert found["count"] == 3


def test_winogrande_compares_beginnings_by_the_same_rest(lm, tmp_path):
    row = {"sentence": "Ann beat Bob, so _ was glad.", "option1": "Ann", "option2": "Bob"}
    path = write(tmp_path / "data.jsonl", [row | {"answer": "2"}])
    (item,) = choice.READERS["winogrande"](lm, config("winogrande", path), Path(path))
    assert item.pairs() == [
        ("Ann beat Bob, so Ann", " was glad."), ("Ann beat Bob, so Bob", " was glad."),
    ]  # fmt: skip
    assert item.gold == 1
    result = dict(choice.score(lm, config("winogrande", path), {0: item}))[0]
    assert result["logprobs"] == pytest.approx([logprob(lm, *p) for p in item.pairs()], abs=1e-4)


@pytest.mark.parametrize(
    ("task", "row", "context", "endings", "gold"),
    [
        (
            "hellaswag",
            {
                "ctx_a": "[header] How to sit [title] Find a chair.", "ctx_b": "the man",
                "activity_label": "Sitting", "endings": ["sits  down.", "[step] runs."],
                "label": "1",
            },
            "Sitting: How to sit. Find a chair. The man", ("sits down.", " runs."), 1,
        ),
        (
            "piqa", {"goal": "Boil?", "sol1": "heat", "sol2": "cool", "label": 0},
            "Question: Boil?\nAnswer:", ("heat", "cool"), 0,
        ),
        (
            "piqa", {"query": "Question: Boil?\n", "choices": ["heat", "cool"], "gold": 0},
            "Question: Boil?\nAnswer:", ("heat", "cool"), 0,
        ),
        (
            "arc",
            {
                "question": "Two?", "answerKey": "C",
                "choices": {"text": ["1", "2", "3"], "label": ["A", "C", "D"]},
            },
            "Question: Two?\nAnswer:", ("1", "2", "3"), 1,
        ),
    ],
)  # fmt: skip
def test_layouts(lm, tmp_path, task, row, context, endings, gold):
    path = write(tmp_path / "data.jsonl", [row])
    (item,) = choice.READERS[task](lm, config(task, path), Path(path))
    assert item == ((context,), endings, gold, " ")


def test_hellaswag_in_six_lines(lm, tmp_path):
    path = tmp_path / "hellaswag.txt.bz2"
    path.write_bytes(bz2.compress(b"A: b\n2\nw\nx\ny\nz\nC: d\n0\ne\nf\ng\nh\n"))
    items = choice.read_hellaswag(lm, config("hellaswag", path), path)
    assert items == [(("A: b",), ("w", "x", "y", "z"), 2, " "), (("C: d",), tuple("efgh"), 0, " ")]


def test_lambada_asks_for_the_last_word(lm, tmp_path):
    rows = [{"context": "one two", "continuation": "three"}, {"text": "four five six"}]
    found = evals.evaluate(lm, config("lambada", write(tmp_path / "data.jsonl", rows)))
    nll = -np.array([logprob(lm, "one two", " three"), logprob(lm, "four five", " six")])
    assert found["perplexity"] == pytest.approx(np.exp(nll.mean()), rel=1e-4)
    error = np.exp(nll.mean()) * nll.std(ddof=1) / math.sqrt(2)
    assert found["perplexity_stderr"] == pytest.approx(error, rel=1e-3)
    assert found["acc"] == 0.0


def test_lambada_counts_a_word_that_greedy_decoding_writes(lm, tmp_path):
    written = lm.generate("ab ", max_new_tokens=1)[0]
    rows = [{"context": "ab", "continuation": c} for c in (written, "xyz")]
    cfg = config("lambada", write(tmp_path / "data.jsonl", rows))
    ids = lm.encode("ab")
    blank_is_likeliest = int(lm.logits([ids])[0, -1].argmax()) == ord(" ")
    items = dict(enumerate(lambada.read(lm, cfg, Path(cfg.data))))
    greedy = {n: result["greedy"] for n, result in lambada.score(lm, cfg, items)}
    assert greedy == {0: blank_is_likeliest, 1: False}


def test_perplexity_per_token_word_and_byte(lm, tmp_path):
    text = "Größe counts. One two  three,\nfour five six seven.\n" * 4
    (tmp_path / "text.txt").write_text(text)
    found = evals.evaluate(lm, config("perplexity", tmp_path / "text.txt", window=32, stride=8))
    assert found["perplexity"] == pytest.approx(lm.perplexity(text, 32, 8), rel=1e-6)
    size = len(text.encode())
    nll = math.log(found["perplexity"]) * (size - 1)  # the first byte is not scored
    assert found["bits_per_byte"] == pytest.approx(nll / math.log(2) / (size - 1))
    words = len(text.split()) * (size - 1) / size
    assert math.log(found["word_perplexity"]) == pytest.approx(nll / words, rel=1e-6)
    assert (found["tokens"], found["bytes"]) == (size - 1, size - 1)
    assert 0 < found["perplexity_stderr"] < found["perplexity"]


GSM8K = [
    {"question": "1+1?", "answer": "1 + 1 = <<1+1=2>>2\n#### 2"},
    {"question": "1000*2?", "answer": "#### 2,000"},
]


class Scripted:
    """Writes what the test says, and remembers what it was asked."""

    def __init__(self, lm, answers):
        self._lm, self._answers, self.asked = lm, answers, []

    def __getattr__(self, name):
        return getattr(self._lm, name)

    def complete(self, prompts, settings, seed, stop, rows):
        self.asked += [self._lm.tokenizer.decode(prompt) for prompt in prompts]
        return [self._answers[row] for row in rows]


def test_gsm8k_and_its_samples(lm, tmp_path):
    answers = [
        " so #### 2", " it is 2.", " #### 3 or 2", "no idea",  # stated: 1 of 4; last number: 3 of 4
        " #### 2000.00", " #### $2,000", " 7 #### 7", " 7",
    ]  # fmt: skip
    scripted = Scripted(lm, answers)
    path = write(tmp_path / "data.jsonl", GSM8K)
    cfg = config("gsm8k", path, samples=4, temperature=1.0, max_new_tokens=16)
    found = evals.evaluate(scripted, cfg)  # type: ignore[arg-type]
    assert set(scripted.asked) == {f"Question: {row['question']}\nAnswer:" for row in GSM8K}
    assert found["exact_match"] == pytest.approx((1 / 4 + 2 / 4) / 2)
    assert found["flexible_match"] == found["pass@1"] == pytest.approx((3 / 4 + 2 / 4) / 2)
    assert found["pass@2"] == pytest.approx((1 + (1 - 1 / 6)) / 2)
    assert found["pass@4"] == found["maj@4"] == 1.0  # 2000 was first of two equals


def test_arithmetic(lm, tmp_path):
    rows = [
        {"context": "25-759=", "continuation": "-734"},
        {"context": "1+1=", "continuation": "2"},
    ]
    cfg = config("arithmetic", write(tmp_path / "data.jsonl", rows), max_new_tokens=8)
    found = evals.evaluate(Scripted(lm, ["-734", " 3"]), cfg)  # type: ignore[arg-type]
    assert found["flexible_match"] == 0.5


def test_samples_do_not_depend_on_what_else_is_asked(lm, tmp_path):
    path = write(tmp_path / "data.jsonl", GSM8K)
    cfg = config("gsm8k", path, samples=2, temperature=1.0, max_new_tokens=16, seed=5)
    items = dict(enumerate(exact_match.read_gsm8k(lm, cfg, Path(path))))
    both = dict(exact_match.score(lm, cfg, items))
    assert dict(exact_match.score(lm, cfg, {1: items[1]})) == {1: both[1]}
    assert both[1]["texts"][0] != both[1]["texts"][1]


def test_a_killed_evaluation_goes_on(lm, tmp_path, monkeypatch):
    cfg = config("multiple_choice", write(tmp_path / "data.jsonl", QUESTIONS), batch_tokens=16)
    whole = evals.evaluate(lm, cfg, tmp_path / "whole.jsonl")
    lines = (tmp_path / "whole.jsonl").read_bytes().split(b"\n")
    torn = tmp_path / "torn.jsonl"
    torn.write_bytes(b"\n".join(lines[:3]) + b'\n{"index": 2, "logp')
    scored = []
    task = evals.TASKS["multiple_choice"]

    def score(lm, cfg, items):
        scored.extend(items)
        return task.score(lm, cfg, items)

    monkeypatch.setitem(evals.TASKS, "multiple_choice", task._replace(score=score))
    assert evals.evaluate(lm, cfg, torn) == whole
    assert len(scored) == 1
    assert sorted(torn.read_bytes().split(b"\n")) == sorted(lines)


@pytest.mark.slow
def test_kill_9_loses_no_finished_item(lm, tmp_path):
    lm.save(tmp_path / "model")
    rows = [QUESTIONS[n % 3] | {"query": f"{n} is " + "x" * (n % 40)} for n in range(300)]
    args = [
        sys.executable, ROOT / "scripts/evaluate.py", "--checkpoint", tmp_path / "model",
        "--task", "multiple_choice", "--data", write(tmp_path / "data.jsonl", rows),
        "--batch_tokens", "16",
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    output = tmp_path / "results.jsonl"
    process = subprocess.Popen([*args, "--output", output], env=environment)
    while not output.exists() or output.read_bytes().count(b"\n") < 20:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    kept = output.read_bytes().rpartition(b"\n")[0].split(b"\n")
    assert 20 <= len(kept) < len(rows)
    go = lambda *more: subprocess.run(
        [*args, *more], env=environment, capture_output=True, text=True, check=True
    ).stdout.splitlines()[-1]
    assert json.loads(go("--output", output)) == json.loads(go())
    lines = output.read_bytes().rstrip(b"\n").split(b"\n")
    assert lines[: len(kept)] == kept  # nothing of it was computed again
    assert len(lines) == 1 + len(rows)


def test_results_of_another_question_are_refused(lm, tmp_path):
    path, output = write(tmp_path / "data.jsonl", QUESTIONS), tmp_path / "results.jsonl"
    evals.evaluate(lm, config("multiple_choice", path, limit=1), output)
    evals.evaluate(lm, config("multiple_choice", path), output)  # more items of the same
    with pytest.raises(ValueError, match=r"evaluation .*task: multiple_choice -> arc"):
        evals.evaluate(lm, config("arc", path), output)
    output.write_text("my notes\n")
    with pytest.raises(ValueError, match="something else"):
        evals.evaluate(lm, config("multiple_choice", path), output)
    assert output.read_text() == "my notes\n"


def test_truncated_items_are_counted(lm, tmp_path):
    rows = [QUESTIONS[0], QUESTIONS[0] | {"query": "x" * 100}]
    cfg = config("multiple_choice", write(tmp_path / "data.jsonl", rows))
    assert evals.evaluate(with_context(lm, 32), cfg)["truncated"] == 1


@pytest.mark.parametrize(
    ("task", "content", "message"),
    [
        ("perplexity", b"", "is empty"),
        ("perplexity", b"fine\n\xff\xfe", "byte 5 is not UTF-8"),
        ("multiple_choice", b'{"query": "a"}\n', "line 1: choices must be a list"),
        ("multiple_choice", b'\n{"text": "a"}\n', "line 2: must have query, choices and gold"),
        ("multiple_choice", b'{"query": "a", "choices": ["b", "c"], "gold": 2}', "gold=2 must"),
        ("multiple_choice", b"[1]", "item 1: must be an object"),
        ("arc", b'{"question": "a"', "line 1: not JSON"),
        ("hellaswag", b'{"ctx": "a"}', "line 1: endings must be"),
        ("winogrande", b'{"sentence": "a b", "option1": "x", "option2": "y"}', "must have a _"),
        ("lambada", b'{"text": "word"}', "no text before the last word"),
        ("gsm8k", b'{"question": "a", "answer": "7"}', "answer must end in"),
        ("arithmetic", b'{"context": "1+1=", "continuation": "two"}', "is no number"),
    ],
)  # fmt: skip
def test_bad_data_is_named_with_its_place(lm, tmp_path, task, content, message):
    path = tmp_path / "data.txt"
    path.write_bytes(content)
    if task == "hellaswag":
        path = path.rename(tmp_path / "data.jsonl")
    with pytest.raises(ValueError, match=f"{path}.*{message}"):
        evals.evaluate(lm, config(task, path))


def test_max_new_tokens_must_leave_room(lm, tmp_path):
    cfg = config("gsm8k", write(tmp_path / "data.jsonl", GSM8K), max_new_tokens=96)
    with pytest.raises(ValueError, match="max_new_tokens=96"):
        evals.evaluate(lm, cfg)


def run(monkeypatch, capsys, *args):
    monkeypatch.syspath_prepend(str(ROOT))
    from jaxgpt import config as settings
    from scripts import evaluate

    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, args)])
    monkeypatch.setattr("jaxgpt.machine.use_compilation_cache", lambda: None)
    code = 0
    try:
        settings.exit_cleanly(evaluate.main)
    except SystemExit as exit:
        code = exit.code
    return code, capsys.readouterr()


def test_the_command_ends_with_one_json_object(lm, tmp_path, monkeypatch, capsys):
    lm.save(tmp_path / "run", "jaxgpt")
    data = write(tmp_path / "data.jsonl", QUESTIONS)
    args = ("--checkpoint", tmp_path / "run", "--task", "multiple_choice", "--data", data)
    code, printed = run(monkeypatch, capsys, *args)
    assert code == 0
    found = json.loads(printed.out.splitlines()[-1])
    expected = evals.evaluate(lm, config("multiple_choice", data))
    assert found == {n: pytest.approx(v) if n != "task" else v for n, v in expected.items()}
    items = [file.read_text() for file in (tmp_path / "run/evals").glob("*.jsonl")]
    assert [len(text.splitlines()) for text in items] == [4]
    code, printed = run(monkeypatch, capsys, *args, "--limit", 1)
    assert json.loads(printed.out.splitlines()[-1])["acc_stderr"] is None


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--task", "chess", "--data", "x"), "chess"),
        (("--task", "arc", "--data", "/nowhere.jsonl"), "data=/nowhere.jsonl: does not exist"),
        (("--task", "arc", "--data", __file__, "--limit", "-1"), "limit=-1"),
        (("--task", "gsm8k", "--data", __file__, "--samples", "4"), "set a temperature"),
        (("--task", "arc", "--data", __file__), "checkpoint=/nowhere: does not exist"),
    ],
)
def test_a_mistake_is_one_line(args, message, monkeypatch, capsys):
    code, printed = run(monkeypatch, capsys, "--checkpoint", "/nowhere", *args)
    assert code == 2
    assert message in printed.err
    assert printed.err.count("\n") == 1


def test_rows_may_be_packed(tmp_path):
    import gzip

    path = tmp_path / "data.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"a": 1}\n'))
    assert list(records.read_rows(path)) == [(f"{path}, line 1", {"a": 1})]
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="damaged"):
        list(records.read_rows(path))
