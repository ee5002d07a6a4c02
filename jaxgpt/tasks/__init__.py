"""Problems whose answers a rule can judge, by name: what reinforcement learning trains on."""

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from jaxgpt.data import conversations, synthetic
from jaxgpt.data.chat import Message
from jaxgpt.tasks import verify
from jaxgpt.tasks.environment import Environment, Question
from jaxgpt.tasks.tools import check

HELD_OUT = 10  # one row of a file in this many


class Task(NamedTuple):
    """Problems of two splits, how they are asked, and what an answer to them is worth."""

    problems: Callable[[bool], Sequence[Any]]  # held out -> problems, in an order that is fixed
    prompt: Callable[[Any], list[Message]]
    reward: Callable[[Any, str], float]  # (problem, answer); 1 is right
    tools: tuple[str, ...] = ()

    def environment(self, problem: Any) -> Environment:
        """A new episode on the problem."""
        return Question(self.prompt(problem), partial(self.reward, problem), self.tools)


class Row(NamedTuple):
    """A question of a file and its right answer."""

    question: str
    answer: str


def find(
    name: str, held_out_path: str = "", split: str = "train", tools: Sequence[str] = ()
) -> Task:
    """A task of TASKS, or the {question, answer} rows of a file or a Hub data set.

    Args:
        held_out_path: the rows that are held out; without it, one in HELD_OUT of the file's.
        tools: what may be called; empty: what the task itself offers.

    Raises:
        ValueError: no such task, file or tool, or rows of another form.
    """
    at_hand = check(tools)
    if name in TASKS:
        return TASKS[name]._replace(tools=at_hand or TASKS[name].tools)
    if not Path(name).exists() and "/" not in name:
        raise ValueError(f"data.path={name}: no such file, and not one of {', '.join(TASKS)}")
    rows = read_rows(name, split)
    if held_out_path:
        splits = {False: rows, True: read_rows(held_out_path, split)}
    else:
        splits = {side: [row for row in rows if _held_out(row) == side] for side in (False, True)}
    return Task(splits.__getitem__, lambda row: asks(row.question), _right, at_hand)


def with_format(task: Task, weight: float) -> Task:
    """The same task, where <think>…</think><answer>…</answer> earns `weight` of the reward."""
    return task._replace(
        reward=lambda problem, text: (
            (1 - weight) * task.reward(problem, text) + weight * verify.well_formed(text)
        )
    )


def read_rows(path: str, split: str = "train") -> list[Row]:
    """Questions and answers; an answer that states a number after #### is that number."""
    found = []
    for row, place in conversations.rows(path, split):
        question, answer = conversations.question_and_answer(row, place)
        final = verify.final_answer(answer) if "####" in answer else answer.strip()
        if final is None:
            raise ValueError(f"{place}: nothing stands after the answer's ####")
        found.append(Row(question, final))
    return found


def asks(question: str) -> list[Message]:
    """The user's question as a prompt."""
    return [{"role": "user", "content": question}]


def _held_out(row: Row) -> bool:
    digest = hashlib.blake2b(row.question.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % HELD_OUT == 0


def _right(row: Row, text: str) -> float:
    return verify.accuracy(text, row.answer)


def _embedded(rule: Callable[[Any, str], bool], *tools: str, name: str = "") -> Task:
    """Problems of data/synthetic.py, judged by one of its rules."""
    return Task(
        lambda held_out: list(synthetic.PROBLEMS.get(name, synthetic.problems)(held_out)),
        lambda problem: asks(synthetic.question(problem)),
        lambda problem, text: float(rule(problem, text)),
        tools,
    )


TASKS: dict[str, Task] = {
    "arithmetic": _embedded(synthetic.is_correct),
    "arithmetic-concise": _embedded(synthetic.is_concise),
    "arithmetic-calculator": _embedded(synthetic.is_correct, "calculator"),
    "multi-step": _embedded(synthetic.is_correct, name="multi-step"),
    "products": _embedded(synthetic.is_correct, name="products"),
    "products-calculator": _embedded(synthetic.is_correct, "calculator", name="products"),
    "assistant": _embedded(synthetic.is_correct, "calculator", name="assistant"),
}
