"""Embedded tasks: a small arithmetic assistant, generated, so that nothing is downloaded.

Most problems add or subtract two numbers from 0 to 99; expressions.py has longer ones. Which ones
are held out follows from a hash of the operands, the same for every task: no stage has ever seen a
held-out problem.
"""

import itertools
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from jaxgpt.data import expressions
from jaxgpt.data.conversations import Dialogue, Message, Preference, Rated
from jaxgpt.data.expressions import Chain, Product
from jaxgpt.data.expressions import draw as _draw

LARGEST = 99  # operand
HELD_OUT = 10  # one problem in this many

QUESTIONS = (
    "What is {}?", "{} = ?", "Compute {}.", "How much is {}?", "Please work out {}.",
    "Can you tell me what {} is?",
)  # fmt: skip


class Problem(NamedTuple):
    """a + b or a - b; a difference is never negative."""

    a: int
    sign: str
    b: int

    @property
    def answer(self) -> int:
        return self.a + self.b if self.sign == "+" else self.a - self.b

    @property
    def held_out(self) -> bool:
        """a + b and b + a are one problem, or the one would give the other away."""
        operands = sorted((self.a, self.b)) if self.sign == "+" else (self.a, self.b)
        return _draw(HELD_OUT, "split", self.sign, *operands) == 0

    def __str__(self) -> str:
        return f"{self.a} {self.sign} {self.b}"


def problems(held_out: bool) -> Iterator[Problem]:
    """All problems of one split, in an order that looks random."""
    every = [Problem(a, s, b) for a in range(LARGEST + 1) for b in range(LARGEST + 1) for s in "+-"]
    possible = [p for p in every if p.answer >= 0 and p.held_out == held_out]
    return iter(sorted(possible, key=lambda p: _draw(2**32, "order", *p)))


def everyday(held_out: bool) -> Iterator[Problem | Product]:
    """What an assistant is asked: two sums for every product, as long as there are sums."""
    sums, products = problems(held_out), expressions.products(held_out)
    for first in sums:
        yield first
        yield from itertools.islice(sums, 1)
        yield from itertools.islice(products, 1)


def question(problem: Problem | Chain | Product) -> str:
    """One of several wordings."""
    return QUESTIONS[_draw(len(QUESTIONS), "wording", *problem)].format(problem)


def concise(problem: Problem) -> str:
    """The steps and nothing else: 47 + 30 = 77, 77 + 8 = 85."""
    return ", ".join(f"{step} = {result}" for step, result in _steps(problem))


def rambling(problem: Problem) -> str:
    """The same steps, with everything around them that nobody asked for."""
    opening = ("Well, let me think about that.", "What a nice question!", "Sure, happy to help.")
    first = opening[_draw(len(opening), "opening", *problem)]
    steps = " and then ".join(f"{step} = {result}" for step, result in _steps(problem))
    return f"{first} To find {problem}, I do {steps}. So the answer is {problem.answer}"


def hasty(problem: Problem) -> str:
    """At one stroke, each digit by itself, and all that should be carried is lost: 47 + 68 = 5."""
    sign = 1 if problem.sign == "+" else -1
    tens = (problem.a // 10 + sign * (problem.b // 10)) % 10
    return f"{problem} = {10 * tens + (problem.a + sign * problem.b) % 10}"


def lines() -> list[str]:
    """Every problem that is not held out as a line of plain text, a question and its answer."""
    return [f"{question(problem)} {concise(problem)}\n" for problem in problems(held_out=False)]


def calculator(problem: Problem) -> list[Message]:
    """The assistant calls a calculator, reads what it gave, and answers."""
    return _with_call(problem, f"{problem} = {problem.answer}")


def step_by_step(chain: Chain) -> str:
    """A chain of thought: 3 * 7 = 21, 21 + 15 = 36, 36 - 9 = 27."""
    return ", ".join(f"{step} = {result}" for step, result in chain.steps)


def wrong(problem: Problem) -> str:
    """A concise answer in which every digit of the result is another."""
    text = concise(problem)
    digits = str(problem.answer)
    changed = ""
    for place, digit in enumerate(digits):
        others = [d for d in "0123456789" if d != digit]
        if place == 0 and len(digits) > 1:
            others.remove("0")  # which no right answer begins with
        changed += others[_draw(len(others), "digit", place, *problem)]
    return text[: len(text) - len(digits)] + changed


def stated_answer(text: str) -> int | None:
    """The last number of a text, which is where every style states its answer."""
    numbers = re.findall(r"[0-9]+", text)
    # Python refuses to read numbers of thousands of digits, and no answer is that long.
    return int(numbers[-1]) if numbers and len(numbers[-1]) < 100 else None


def is_correct(problem: Problem | Chain | Product, text: str) -> bool:
    return stated_answer(text) == problem.answer


def is_concise(problem: Problem, text: str) -> bool:
    """Correct, and no longer than it has to be: the rule behind `arithmetic-concise`."""
    return is_correct(problem, text) and len(text) <= len(concise(problem))


def dialogues(task: str, held_out: bool) -> list[Dialogue]:
    """A task's conversations, one a problem."""
    return [
        Dialogue([_says("user", question(p)), *DIALOGUES[task](p)], f"{task}, {p}")
        for p in PROBLEMS.get(task, problems)(held_out)
    ]


def preferences(task: str, held_out: bool) -> list[Preference]:
    """A task's pairs, one a problem."""
    return [
        Preference([_says("user", question(p))], *_answers(task, p), 0.0, f"{task}, {p}")
        for p in problems(held_out)
    ]


def ratings(task: str, held_out: bool) -> list[Rated]:
    """A task's answers, good or bad, one of the pair's two for every problem."""
    return [
        Rated(pair.prompt, pair.chosen if good else pair.rejected, good, pair.place)
        for pair in preferences(task, held_out)
        for good in [_draw(2, "rated", pair.place) == 0]
    ]


def _answers(task: str, problem: Problem) -> tuple[list[Message], list[Message]]:
    chosen, rejected = PREFERENCES[task](problem)
    return [_says("assistant", chosen)], [_says("assistant", rejected)]


def _both_styles(problem: Problem) -> list[Message]:
    style = rambling if _draw(2, "style", *problem) else concise
    return [_says("assistant", style(problem))]


def _mostly_hasty(problem: Problem) -> list[Message]:
    style = hasty if _draw(3, "haste", *problem) else concise
    return [_says("assistant", style(problem))]


def _assisting(
    problem: Problem | Product, answer: Callable[[Problem], list[Message]]
) -> list[Message]:
    """Sums are answered at once, products by the calculator."""
    if isinstance(problem, Product):
        return _with_call(problem, str(problem.answer))
    return answer(problem)


def _with_call(problem: Problem | Product, answer: str) -> list[Message]:
    return [
        _says("assistant", f"calculator({problem})"),
        _says("tool", str(problem.answer)),
        _says("assistant", answer),
    ]


DIALOGUES: dict[str, Callable[..., list[Message]]] = {
    "arithmetic": lambda problem: [_says("assistant", concise(problem))],
    "arithmetic-styles": _both_styles,
    "arithmetic-hasty": _mostly_hasty,
    "arithmetic-calculator": calculator,
    "multi-step": lambda chain: [_says("assistant", step_by_step(chain))],
    "multi-step-answer": lambda chain: [_says("assistant", str(chain.answer))],
    "products": lambda product: [_says("assistant", str(product.answer))],
    "products-calculator": lambda product: _with_call(product, str(product.answer)),
    "assistant": lambda problem: _assisting(problem, lambda p: [_says("assistant", concise(p))]),
    "assistant-styles": lambda problem: _assisting(problem, _both_styles),
}
# Whose problems are not those of `problems`.
PROBLEMS: dict[str, Callable[[bool], Iterator]] = {
    "multi-step": expressions.chains,
    "multi-step-answer": expressions.chains,
    "products": expressions.products,
    "products-calculator": expressions.products,
    "assistant": everyday,
    "assistant-styles": everyday,
}
PREFERENCES: dict[str, Callable[[Problem], tuple[str, str]]] = {
    "arithmetic-correct": lambda problem: (concise(problem), wrong(problem)),
    "arithmetic-concise": lambda problem: (concise(problem), rambling(problem)),
}


def _steps(problem: Problem) -> list[tuple[str, int]]:
    """The tens of b, then its ones: every step is a small one."""
    a, sign, b = problem
    tens, ones = b - b % 10, b % 10
    if not (tens and ones):
        return [(str(problem), problem.answer)]
    half = Problem(a, sign, tens)
    return [(str(half), half.answer), (f"{half.answer} {sign} {ones}", problem.answer)]


def _says(role: str, content: str) -> Message:
    return {"role": role, "content": content}
