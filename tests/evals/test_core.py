"""CORE: prompts with their examples, centred accuracies, and no CORE of fewer than all tasks."""

import json

import numpy as np
import pytest
from byte_model import byte_model, with_context

from jaxgpt.config import EvaluateConfig
from jaxgpt.evals import core, evaluate


def rows_of(kind: str, count: int) -> list[dict]:
    if kind == "schema":
        return [
            {
                "context_options": [f"the {n} cat", f"the {n} dog"],
                "continuation": "ran",
                "gold": n % 2,
            }
            for n in range(count)
        ]
    if kind == "choice":
        return [
            {"query": f"q{n}", "choices": ["yes", "no no"], "gold": n % 2} for n in range(count)
        ]
    return [{"context": f" c{n} ", "continuation": f"{n}"} for n in range(count)]


SCHEMA = {"winograd_wsc", "winogrande"}
WRITTEN = {"jeopardy_all", "bigbench_qa_wikidata", "lambada_openai", "bigbench_dyck_languages",
           "bigbench_cs_algorithms", "bigbench_operators", "bigbench_repeat_copy_logic", "squad",
           "coqa"}  # fmt: skip


def bundle(folder, without=()):
    for name in {kind.file for kind in core.TASKS.values()} - set(without):
        kind = "schema" if name in SCHEMA else "written" if name in WRITTEN else "choice"
        (folder / kind).mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(row) + "\n" for row in rows_of(kind, 12)]
        (folder / kind / f"{name}.jsonl").write_text("".join(lines))
    return folder


def settings(data, **more) -> EvaluateConfig:
    return EvaluateConfig(checkpoint="", task="core", data=str(data), **more)


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    return with_context(byte_model(tmp_path_factory.mktemp("model")), 256)


def test_examples_stand_before_the_question_and_never_are_it(lm, tmp_path):
    items = core.read(lm, settings(tmp_path), bundle(tmp_path))
    arc = [item for item in items if item.task == "arc_easy"]
    assert len(arc) == 12
    for item in arc:
        context, answer = item.pairs[0]
        *examples, question = context.split("\n\n")
        assert len(examples) == 10 and len(set(examples)) == 10
        assert question.startswith("q") and not any(e.split("\n")[0] == question for e in examples)
        assert all(e.split("\n")[1] in ("Answer: yes", "Answer: no no") for e in examples)
        assert answer == "\nAnswer: yes"
    (wino, *_) = [item for item in items if item.task == "winogrande"]
    assert {ending for _, ending in wino.pairs} == {" ran"} and len(wino.pairs) == 2
    (squad, *_) = [item for item in items if item.task == "squad"]
    assert squad.gold is None and squad.pairs[0][0].count("\n\n") == 10


def test_choices_are_compared_by_their_mean_logprob_per_token(lm, tmp_path):
    items = core.read(lm, settings(tmp_path), bundle(tmp_path))
    number, item = next((n, i) for n, i in enumerate(items) if i.task == "copa")
    ((_, found),) = core.score(lm, settings(tmp_path), {number: item})
    expected = []
    for context, ending in item.pairs:
        before, whole = lm.encode(context), lm.encode(context + ending)
        logits = np.asarray(lm.logits([whole]), np.float64)[0]
        logprobs = (
            logits
            - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
            - logits.max(-1, keepdims=True)
        )
        expected.append(
            np.mean([logprobs[p - 1, whole[p]] for p in range(len(before), len(whole))])
        )
    np.testing.assert_allclose(found["scores"], expected, rtol=1e-4)
    assert found["right"] == (int(np.argmax(expected)) == item.gold)


def test_core_is_the_mean_of_centred_accuracies_of_all_tasks(lm, tmp_path):
    found = evaluate(lm, settings(bundle(tmp_path), batch_tokens=16384))
    assert not found["missing"] and not found["partial"]
    centred = []
    for name, kind in core.TASKS.items():
        accuracy = found[f"{name}_acc"]
        centred.append((accuracy - kind.chance) / (1 - kind.chance))
        low, high = found[f"{name}_interval"]
        assert found[name] == pytest.approx(centred[-1]) and low <= accuracy <= high
    assert len(centred) == 22 and found["core"] == pytest.approx(np.mean(centred))


def results(without=(), of=2):
    return [{"task": name, "of": of, "right": n == 0, "truncated": False}
            for name in core.TASKS if name not in without for n in range(2)]  # fmt: skip


def test_missing_and_partial_tasks_are_named_and_there_is_no_core():
    assert "core" in core.summarize(results())
    found = core.summarize(results(without=("coqa", "squad")))
    assert "core" not in found and found["missing"] == ["squad", "coqa"]
    found = core.summarize(results(of=3))
    assert "core" not in found and len(found["partial"]) == 22


def test_perfect_is_one_and_guessing_is_zero():
    boolq = [{"task": "boolq", "of": 50, "right": n < 31, "truncated": False} for n in range(50)]
    assert core.summarize(boolq)["boolq"] == pytest.approx(0.0)
    assert core.summarize([{**r, "right": True} for r in boolq])["boolq"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ('{"query": "q", "choices": ["a", "b"], "gold": 2}\n', "gold=2"),
        ('{"query": "q", "choices": ["a"], "gold": 0}\n', "choices"),
        ('{"context": "c"}\n', "continuation"),
    ],
)
def test_a_bad_row_is_named(lm, tmp_path, content, named):
    (tmp_path / "copa.jsonl").write_text(content)
    with pytest.raises(ValueError, match=r"copa.jsonl, line 1") as error:
        core.read(lm, settings(tmp_path), tmp_path)
    assert named in str(error.value)


def test_a_folder_without_tasks_and_a_task_without_examples_are_refused(lm, tmp_path):
    with pytest.raises(ValueError, match="holds none of CORE's files"):
        core.read(lm, settings(tmp_path), tmp_path)
    (tmp_path / "piqa.jsonl").write_text('{"query": "q", "choices": ["a", "b"], "gold": 0}\n')
    with pytest.raises(ValueError, match="piqa needs 10 examples"):
        core.read(lm, settings(tmp_path), tmp_path)
