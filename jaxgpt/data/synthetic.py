"""Embedded tasks: a small arithmetic assistant, generated, so that nothing is downloaded.

Most problems add or subtract two numbers from 0 to 99. Others ask for more than one step: chains of
three or four terms, and products of long numbers. Of those there are too many to list, so a fixed
sample is drawn. A hash of the operands, in no order where the order changes nothing, decides which
problems are held out, for every task alike: no stage has ever seen a held-out problem.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterator
from functools import cache
from typing import NamedTuple

from jaxgpt.data.conversations import Dialogue, Message, Preference, Rated

LARGEST = 99  # operand of a sum, and value of a chain at every step
LARGEST_TERM = 20  # of a chain
HELD_OUT = 10  # one problem in this many
DRAWN = 20_000  # chains and products each, before doubles go

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
        return draw(HELD_OUT, "split", self.sign, *operands) == 0

    def __str__(self) -> str:
        return f"{self.a} {self.sign} {self.b}"


class Chain(NamedTuple):
    """Three or four numbers, from left to right: 3 * 7 + 15 - 9. Only the first sign may be *."""

    numbers: tuple[int, ...]
    signs: tuple[str, ...]

    @property
    def steps(self) -> list[tuple[str, int]]:
        """What is computed one after another, with its result."""
        first, *rest = self.numbers
        found, value = [], first
        for sign, number in zip(self.signs, rest, strict=True):
            step = f"{value} {sign} {number}"
            value = {"+": value + number, "-": value - number, "*": value * number}[sign]
            found.append((step, value))
        return found

    @property
    def answer(self) -> int:
        return self.steps[-1][1]

    @property
    def held_out(self) -> bool:
        """The same terms in another order are the same problem."""
        terms = [*zip(("+", *self.signs), self.numbers, strict=True)]
        product = ()
        if self.signs[0] == "*":
            product, terms = tuple(sorted(self.numbers[:2])), terms[2:]
        return draw(HELD_OUT, "chain", product, *sorted(terms)) == 0

    def __str__(self) -> str:
        rest = zip(self.signs, self.numbers[1:], strict=True)
        return " ".join([str(self.numbers[0]), *(f"{sign} {number}" for sign, number in rest)])


class Product(NamedTuple):
    """a * b, both of four to six digits: more than a small network multiplies by itself."""

    a: int
    b: int

    @property
    def answer(self) -> int:
        return self.a * self.b

    @property
    def held_out(self) -> bool:
        return draw(HELD_OUT, "product", *sorted(self)) == 0

    def __str__(self) -> str:
        return f"{self.a} * {self.b}"


def problems(held_out: bool) -> Iterator[Problem]:
    """All problems of one split, in an order that looks random."""
    every = [Problem(a, s, b) for a in range(LARGEST + 1) for b in range(LARGEST + 1) for s in "+-"]
    possible = [p for p in every if p.answer >= 0 and p.held_out == held_out]
    return iter(sorted(possible, key=lambda p: draw(2**32, "order", *p)))


def chains(held_out: bool) -> Iterator[Chain]:
    """The chains of one split, none twice."""
    return (chain for chain in _chains() if chain.held_out == held_out)


def products(held_out: bool) -> Iterator[Product]:
    """The products of one split, none twice."""
    return (product for product in _products() if product.held_out == held_out)


def everyday(held_out: bool) -> Iterator[Problem | Product]:
    """What an assistant is asked: two sums for every product, as long as there are sums."""
    sums, long = problems(held_out), products(held_out)
    for first in sums:
        yield first
        yield from itertools.islice(sums, 1)
        yield from itertools.islice(long, 1)


def question(problem: Problem | Chain | Product) -> str:
    """One of several wordings."""
    return QUESTIONS[draw(len(QUESTIONS), "wording", *problem)].format(problem)


def concise(problem: Problem) -> str:
    """The steps and nothing else: 47 + 30 = 77, 77 + 8 = 85."""
    return ", ".join(f"{step} = {result}" for step, result in _steps(problem))


def rambling(problem: Problem) -> str:
    """The same steps, with everything around them that nobody asked for."""
    opening = ("Well, let me think about that.", "What a nice question!", "Sure, happy to help.")
    first = opening[draw(len(opening), "opening", *problem)]
    steps = " and then ".join(f"{step} = {result}" for step, result in _steps(problem))
    return f"{first} To find {problem}, I do {steps}. So the answer is {problem.answer}"


def hasty(problem: Problem) -> str:
    """A wrong answer: each digit is computed by itself and nothing is carried, 47 + 68 = 5."""
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
    for index, digit in enumerate(digits):
        others = [d for d in "0123456789" if d != digit]
        if index == 0 and len(digits) > 1:
            others.remove("0")  # which no right answer begins with
        changed += others[draw(len(others), "digit", index, *problem)]
    return text[: len(text) - len(digits)] + changed


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
        Rated(pair.prompt, pair.chosen if good else pair.rejected, good, pair.where)
        for pair in preferences(task, held_out)
        for good in [draw(2, "rated", pair.where) == 0]
    ]


def draw(size: int, *key: object) -> int:
    """A number below `size` that depends on the key alone."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % size


def _answers(task: str, problem: Problem) -> tuple[list[Message], list[Message]]:
    chosen, rejected = PREFERENCES[task](problem)
    return [_says("assistant", chosen)], [_says("assistant", rejected)]


def _both_styles(problem: Problem) -> list[Message]:
    style = rambling if draw(2, "style", *problem) else concise
    return [_says("assistant", style(problem))]


def _mostly_hasty(problem: Problem) -> list[Message]:
    style = hasty if draw(3, "haste", *problem) else concise
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
    "multi-step": chains,
    "multi-step-answer": chains,
    "products": products,
    "products-calculator": products,
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


@cache
def _chains() -> tuple[Chain, ...]:
    drawn = (_chain(number) for number in range(DRAWN))
    possible = (c for c in drawn if all(0 <= value <= LARGEST for _, value in c.steps))
    return tuple(dict.fromkeys(possible))


@cache
def _products() -> tuple[Product, ...]:
    digits = lambda *key: 10 ** (3 + draw(3, "digits", *key))
    number = lambda *key: digits(*key) + draw(9 * digits(*key), "number", *key)
    drawn = (Product(number(n, "a"), number(n, "b")) for n in range(DRAWN))
    return tuple(dict.fromkeys(drawn))


def _chain(number: int) -> Chain:
    count = 3 + draw(2, "terms", number)
    signs = ["+-"[draw(2, "sign", number, index)] for index in range(count - 1)]
    numbers = [1 + draw(LARGEST_TERM, "term", number, index) for index in range(count)]
    if draw(3, "product", number) == 0:
        signs[0] = "*"
        numbers[:2] = [2 + draw(8, "factor", number, index) for index in range(2)]
    return Chain(tuple(numbers), tuple(signs))
