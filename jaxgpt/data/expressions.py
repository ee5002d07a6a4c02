"""Embedded problems that ask for more than one step: chains of terms, and products of long numbers.

There are too many to list. A fixed sample is drawn, and a hash of what does not change the value
(the order of what is added or multiplied) decides which of it is held out.
"""

import hashlib
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

DRAWN = 20_000  # problems of a kind, before doubles go
HELD_OUT = 10  # one problem in this many
LARGEST_TERM = 20
LARGEST_VALUE = 99  # of a chain, at every step


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


def chains(held_out: bool) -> Iterator[Chain]:
    """The chains of one split, none twice."""
    return (chain for chain in _chains() if chain.held_out == held_out)


def products(held_out: bool) -> Iterator[Product]:
    """The products of one split, none twice."""
    return (product for product in _products() if product.held_out == held_out)


def draw(size: int, *key: object) -> int:
    """A number below `size` that depends on the key alone."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % size


@cache
def _chains() -> tuple[Chain, ...]:
    drawn = (_chain(number) for number in range(DRAWN))
    possible = (c for c in drawn if all(0 <= value <= LARGEST_VALUE for _, value in c.steps))
    return tuple(dict.fromkeys(possible))


@cache
def _products() -> tuple[Product, ...]:
    digits = lambda *key: 10 ** (3 + draw(3, "digits", *key))
    number = lambda *key: digits(*key) + draw(9 * digits(*key), "number", *key)
    drawn = (Product(number(n, "a"), number(n, "b")) for n in range(DRAWN))
    return tuple(dict.fromkeys(drawn))


def _chain(number: int) -> Chain:
    count = 3 + draw(2, "terms", number)
    signs = ["+-"[draw(2, "sign", number, place)] for place in range(count - 1)]
    numbers = [1 + draw(LARGEST_TERM, "term", number, place) for place in range(count)]
    if draw(3, "product", number) == 0:
        signs[0] = "*"
        numbers[:2] = [2 + draw(8, "factor", number, place) for place in range(2)]
    return Chain(tuple(numbers), tuple(signs))
