"""Problems whose answers a rule can judge, by name: what reinforcement learning trains on."""

import hashlib
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from jaxgpt.config import TaskConfig, own
from jaxgpt.data import conversations, synthetic
from jaxgpt.data import rows as data
from jaxgpt.data.chat import Message
from jaxgpt.data.columns import Columns
from jaxgpt.data.rows import Paths
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
    # What the share of answers with a reward of 1 is called: a reward that asks for more than the
    # right answer is no exact match.
    full: str = "exact_match"
    # problem -> a new episode on it; None: a question, answered by the policy and its tools.
    begins: Callable[[Any], Environment] | None = None

    def environment(self, problem: Any) -> Environment:
        """A new episode on the problem."""
        if self.begins is not None:
            return self.begins(problem)
        return Question(self.prompt(problem), partial(self.reward, problem), self.tools)


class Row(NamedTuple):
    """A question of a file and its right answer."""

    prompt: Sequence[Message]
    answer: str

    @property
    def question(self) -> str:
        """What the user asks, in one text."""
        return "\n\n".join(str(m["content"]) for m in self.prompt if m["role"] == "user")


def find(
    name: Paths,
    held_out_path: Paths = "",
    split: str = "train",
    tools: Sequence[str] = (),
    columns: Mapping[str, str | None] | None = None,
    roles: Mapping[str, str] | None = None,
) -> Task:
    """A task of TASKS, or questions and answers of files or a Hub data set.

    Args:
        held_out_path: the rows that are held out; without it, one in HELD_OUT of the files'.
        tools: what may be called; empty: what the task itself offers.
        columns: which column of the files holds what, where its name does not say it.
        roles: who speaks, where a role's name does not say it.

    Raises:
        ValueError: no such task, file or tool, or rows of another form.
    """
    at_hand = check(tools)
    if isinstance(name, str) and name in TASKS:
        return TASKS[name]._replace(tools=at_hand or TASKS[name].tools)
    data.require("data.path", name, TASKS)
    rows = read_rows(name, split, Columns(columns, roles))
    if held_out_path:
        data.require("data.val_path", held_out_path)
        splits = {False: rows, True: read_rows(held_out_path, split, Columns(columns, roles))}
    else:
        splits = {side: [row for row in rows if _held_out(row) == side] for side in (False, True)}
    return Task(splits.__getitem__, lambda row: list(row.prompt), _right, at_hand)


def configured(cfg: TaskConfig) -> Task:
    """The task of a run's settings, with the user's own rewards, tools and environments.

    Raises:
        ValueError: no such task, file, tool or function, or rows of another form.
    """
    if cfg.task:
        task = own.find("data.task", cfg.task)
        task = task if isinstance(task, Task) or not callable(task) else task()
        if not isinstance(task, Task):
            raise ValueError(
                f"data.task={cfg.task}: is {type(task).__name__}; give a jaxgpt.tasks.Task, or a "
                "function that makes one"
            )
        task = task._replace(tools=check(cfg.tools or task.tools))
    else:
        task = find(cfg.path, cfg.val_path, cfg.split, cfg.tools, cfg.columns, cfg.roles)
    if cfg.reward:
        task = task._replace(reward=own.function("data.reward", cfg.reward), full="full_reward")
    if cfg.environment:
        begins = own.function("data.environment", cfg.environment)
        task = task._replace(begins=begins, full="full_reward")
    return with_format(task, cfg.format_weight) if cfg.format_weight else task


def with_format(task: Task, weight: float) -> Task:
    """The same task, where <think>…</think><answer>…</answer> earns `weight` of the reward."""
    return task._replace(
        full="full_reward",
        reward=lambda problem, text: (
            (1 - weight) * task.reward(problem, text) + weight * verify.well_formed(text)
        ),
    )


def read_rows(paths: Paths, split: str = "train", columns: Columns | None = None) -> list[Row]:
    """Questions and answers; of a worked answer, what it states: 7 of `#### 7` or `\\boxed{7}`.

    A warning names the share of answers that state nothing and that no reply can equal.

    Raises:
        ValueError: a row of another form, or no answer that a reply can equal.
    """
    found, worked = [], []
    for prompt, answer, where in conversations.questions(paths, split, columns):
        final = verify.expected(answer)
        if not final:
            raise ValueError(f"{where}: nothing stands after the answer's ####")
        if verify.is_worked(final):
            worked.append(where)
        found.append(Row(prompt, final))
    if worked:
        said = (
            f"{len(worked):,} of {len(found):,} answers, the first at {worked[0]}, are worked out "
            "and state no result after ####, so no reply can equal them and earn a reward; end "
            "them in a line such as #### 7"
        )
        if len(worked) == len(found):
            raise ValueError(f"data.path: {said}")
        print(f"warning: {said}", file=sys.stderr)
    return found


def asks(question: str) -> list[Message]:
    """The user's question as a prompt."""
    return [{"role": "user", "content": question}]


def is_correct(problem: Any, text: str) -> bool:
    """Whether a text ends on the answer to an embedded problem."""
    return verify.last_number(text) == str(problem.answer)


def is_concise(problem: synthetic.Problem, text: str) -> bool:
    """Correct, and no longer than it has to be: the rule behind `arithmetic-concise`."""
    return is_correct(problem, text) and len(text) <= len(synthetic.concise(problem))


def _held_out(row: Row) -> bool:
    digest = hashlib.blake2b(row.question.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % HELD_OUT == 0


def _right(row: Row, text: str) -> float:
    return verify.accuracy(text, row.answer)


def _embedded(rule: Callable[[Any, str], bool], *tools: str, name: str = "") -> Task:
    """Problems of data/synthetic.py, judged by a rule."""
    return Task(
        lambda held_out: list(synthetic.PROBLEMS.get(name, synthetic.problems)(held_out)),
        lambda problem: asks(synthetic.question(problem)),
        lambda problem, text: float(rule(problem, text)),
        tools,
    )


TASKS: dict[str, Task] = {
    "arithmetic": _embedded(is_correct),
    "arithmetic-concise": _embedded(is_concise)._replace(full="full_reward"),
    "arithmetic-calculator": _embedded(is_correct, "calculator"),
    "multi-step": _embedded(is_correct, name="multi-step"),
    "products": _embedded(is_correct, name="products"),
    "products-calculator": _embedded(is_correct, "calculator", name="products"),
    "assistant": _embedded(is_correct, "calculator", name="assistant"),
}
