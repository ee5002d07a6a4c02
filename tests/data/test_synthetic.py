"""The embedded arithmetic: right answers, a split that does not leak, rules that judge."""

import pytest

from jaxgpt import tasks
from jaxgpt.data import synthetic


def text_of(messages: list) -> str:
    return messages[-1]["content"]


@pytest.mark.parametrize("style", [synthetic.concise, synthetic.rambling])
def test_every_style_ends_with_the_answer(style) -> None:
    for problem in synthetic.problems(held_out=True):
        assert eval(str(problem)) == problem.answer
        assert tasks.is_correct(problem, style(problem))


def test_every_step_of_a_solution_is_right() -> None:
    for problem in synthetic.problems(held_out=True):
        for step in synthetic.concise(problem).split(", "):
            left, right = step.split(" = ")
            assert eval(left) == int(right)


def test_held_out_problems_are_not_seen_in_either_order() -> None:
    seen = {(p.sign, *sorted((p.a, p.b))) for p in synthetic.problems(held_out=False)}
    held_out = {p for p in synthetic.problems(held_out=True) if p.sign == "+"}
    assert 400 < len(held_out) < 1600
    assert not {(p.sign, *sorted((p.a, p.b))) for p in held_out} & seen


def test_the_intermediate_step_of_a_solution_may_be_a_seen_problem_but_not_the_question() -> None:
    questions = {text_of(d.messages[:1]) for d in synthetic.dialogues("arithmetic", False)}
    held_out = {text_of(d.messages[:1]) for d in synthetic.dialogues("arithmetic", True)}
    assert not questions & held_out


def test_the_rules_tell_the_answers_of_a_pair_apart() -> None:
    for problem in list(synthetic.problems(held_out=True))[:200]:
        right, wrong = synthetic.PREFERENCES["arithmetic-correct"](problem)
        assert tasks.is_correct(problem, right) and not tasks.is_correct(problem, wrong)
        assert len(right) == len(wrong)
        result, changed = (text.rsplit(" ", 1)[1] for text in (right, wrong))
        assert all(a != b for a, b in zip(result, changed, strict=True))
        assert changed == str(int(changed))
        short, long = synthetic.PREFERENCES["arithmetic-concise"](problem)
        assert tasks.is_concise(problem, short) and not tasks.is_concise(problem, long)
        assert tasks.is_correct(problem, long)


def test_a_task_is_the_same_on_every_machine() -> None:
    first = synthetic.dialogues("arithmetic-styles", True)[0]
    assert [m["content"] for m in first.messages] == [
        "What is 65 - 47?",
        "What a nice question! To find 65 - 47, I do 65 - 40 = 25 and then 25 - 7 = 18. "
        "So the answer is 18",
    ]


def test_haste_loses_what_should_be_carried() -> None:
    problems = [synthetic.Problem(*p) for p in ((47, "+", 68), (65, "-", 47), (21, "+", 34))]
    assert [synthetic.hasty(p) for p in problems] == ["47 + 68 = 5", "65 - 47 = 28", "21 + 34 = 55"]
    said = [d.messages[1]["content"] for d in synthetic.dialogues("arithmetic-hasty", False)]
    pairs = list(zip(said, synthetic.problems(held_out=False), strict=True))
    assert all(text in (synthetic.hasty(p), synthetic.concise(p)) for text, p in pairs)
    assert 0.6 < sum(text == synthetic.hasty(p) for text, p in pairs) / len(pairs) < 0.75


def test_the_calculator_is_called_before_it_answers() -> None:
    roles = [m["role"] for m in synthetic.dialogues("arithmetic-calculator", True)[0].messages]
    assert roles == ["user", "assistant", "tool", "assistant"]
