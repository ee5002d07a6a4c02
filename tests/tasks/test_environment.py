"""Episodes: what is asked, what the tools answer, what a turn is worth."""

import json
import sys

import pytest

from jaxgpt import tasks
from jaxgpt.tasks import tools
from jaxgpt.tasks.environment import MAX_CALLS, Question, Turn


def test_a_tool_answers_until_a_turn_calls_none() -> None:
    task = tasks.find("arithmetic-calculator")
    problem = task.problems(True)[0]
    episode = task.environment(problem)
    assert episode.reset() == [{"role": "user", "content": "What is 65 - 47?"}]
    assert episode.step("calculator(65 - 47)") == Turn("18", 0.0, False)
    assert episode.step("65 - 47 = 18") == Turn(None, 1.0, True)
    assert task.environment(problem).step("65 - 47 = 19") == Turn(None, 0.0, True)


def test_endless_calls_end_without_a_reward() -> None:
    episode = Question([], lambda answer: 1.0, ["calculator"])
    turns = [episode.step("calculator(1 + 1)") for _ in range(MAX_CALLS + 1)]
    assert turns == [Turn("2", 0.0, False)] * MAX_CALLS + [Turn(None, 0.0, True)]
    episode.reset()
    assert episode.step("calculator(1 + 1)").observation == "2"


def test_without_the_tool_a_call_is_the_answer() -> None:
    assert Question([], lambda answer: 0.5).step("calculator(1 + 1)") == Turn(None, 0.5, True)


@pytest.mark.parametrize(
    ("text", "observation"),
    [
        ("calculator(47 * 38)", "1786"),
        ("I had better ask: calculator((1 + 2) * 3)\n", "9"),
        ("calculator(1), no, calculator(2)", "2"),
        ("calculator(rm -rf /)", "error: not arithmetic"),
        ("calculator()", "error: not arithmetic"),
        ("calculator(calculator(1))", "error: not arithmetic"),
        ("calculator(" + "9" * 10_000 + ")", "error: longer than 256 characters"),
        ("calculator(1 + 1) is 2", None),
        ("calculator(1 + 1", None),
        ("mycalculator(1)", None),
        ("search(1)", None),
        (")", None),
        ("", None),
    ],
)
def test_what_counts_as_a_call(text: str, observation: str | None) -> None:
    assert tools.observe(text, ["calculator"]) == observation


def test_an_unknown_tool_is_refused() -> None:
    with pytest.raises(ValueError, match="tools=python: must be one of calculator"):
        Question([], names=["python"])


@pytest.mark.parametrize("name", tasks.TASKS)
def test_no_problem_is_in_both_splits(name: str) -> None:
    task = tasks.TASKS[name]
    asked = [{str(task.prompt(p)) for p in task.problems(side)} for side in (False, True)]
    assert all(asked) and not asked[0] & asked[1]


def test_rows_of_a_file(tmp_path) -> None:
    rows = [{"question": f"{n} * 2?", "answer": f"so {n}\n#### {2 * n:,}"} for n in range(600)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    task = tasks.find(str(path))
    train, held_out = task.problems(False), task.problems(True)
    assert len(train) + len(held_out) == 600 and 20 < len(held_out) < 120
    assert {row.question for row in train}.isdisjoint(row.question for row in held_out)
    row = next(row for row in [*train, *held_out] if row.question == "599 * 2?")
    assert row.answer == "1,198"
    assert task.environment(row).step("that is 1198") == Turn(None, 1.0, True)
    with_tool = tasks.find(str(path), tools=["calculator"]).environment(row)
    assert with_tool.step("calculator(599 * 2)") == Turn("1198", 0.0, False)
    both = tasks.find(str(path), held_out_path=str(path))
    assert both.problems(True) == both.problems(False) and len(both.problems(True)) == 600


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "a"}, "line 1: answer must be text or a number, not None"),
        ({"question": "a", "answer": [7]}, r"line 1: answer must be text or a number, not \[7\]"),
        ({"question": "a", "answer": True}, "line 1: answer must be text or a number, not True"),
        ({"question": 7, "answer": "a"}, "line 1: a conversation must be text or a list, not 7"),
        ({"question": "a", "answer": "x ####"}, "nothing stands after"),
        ([1], "must hold objects or a list of them"),
    ],
)
def test_bad_rows_are_named_with_their_place(row, message: str, tmp_path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    if isinstance(row, list):
        path.write_text('"text"\n')
    with pytest.raises(ValueError, match=message):
        tasks.find(str(path))


def test_a_task_may_be_given_other_tools() -> None:
    assert tasks.find("arithmetic", tools=["calculator"]).tools == ("calculator",)
    assert tasks.find("arithmetic").tools == ()
    with pytest.raises(ValueError, match="tools=shell"):
        tasks.find("arithmetic", tools=["shell"])


def test_an_unknown_task_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"data\.path=chess: no such file or folder, and not one of arithmetic"
    ):
        tasks.find("chess")


def test_only_a_plain_rule_calls_its_full_reward_an_exact_match():
    """What else a reward asks for, such as brevity or a form, is not part of a match."""
    plain = tasks.find("arithmetic")
    assert plain.full == "exact_match"
    assert tasks.with_format(plain, 0.25).full == "full_reward"
    assert tasks.find("arithmetic-concise").full == "full_reward"


def test_the_form_earns_its_share() -> None:
    task = tasks.with_format(tasks.find("arithmetic"), 0.25)
    problem = task.problems(True)[0]  # 65 - 47
    rewards = [
        task.reward(problem, text)
        for text in (
            "<think>65 - 40 = 25, 25 - 7 = 18</think><answer>18</answer>",
            "<think>65 - 40 = 25</think><answer>17</answer>",
            "18",
            "17",
        )
    ]
    assert rewards == [1.0, 0.25, 0.75, 0.0]


def test_tasks_need_no_jax() -> None:
    import subprocess

    code = "import jaxgpt.tasks, sys; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_answers_that_no_reply_can_equal_are_named_before_training(tmp_path, capsys) -> None:
    worked = {"question": "2 + 5?", "answer": "First there are 2.\nThen 5 more, which makes 7."}
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, [{"question": "1 + 1?", "answer": 2}, worked])))
    assert [row.answer for row in tasks.read_rows(str(path))] == ["2", worked["answer"]]
    warning = capsys.readouterr().err.splitlines()[-1]
    assert warning.startswith("warning: 1 of 2 answers, the first at ") and "line 2" in warning
    path.write_text(json.dumps(worked))
    with pytest.raises(ValueError, match=r"data.path: 1 of 1 answers.*#### 7"):
        tasks.find(str(path))


def test_questions_may_be_messages_in_columns_of_any_name(tmp_path) -> None:
    said = [{"from": "oracle", "value": "Count."}, {"from": "human", "value": "2 + 5?"}]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"dialogue": said, "result": 7.0}))
    task = tasks.find(
        str(path), str(path), columns={"answer": "result"}, roles={"oracle": "system"}
    )
    (row,) = task.problems(False)
    assert task.prompt(row) == [
        {"role": "system", "content": "Count."}, {"role": "user", "content": "2 + 5?"},
    ]  # fmt: skip
    assert (row.question, row.answer) == ("2 + 5?", "7")
    assert task.reward(row, "so 7") == 1.0
