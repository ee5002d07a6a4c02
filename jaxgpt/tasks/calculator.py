"""A calculator for text that a model wrote: + - * / % ** and parentheses, exact, bounded.

It parses by itself. Whatever the text is, it ends within microseconds and gives a number or one of
ERRORS.
"""

import re
from fractions import Fraction

MAX_CHARACTERS = 256
MAX_DEPTH = 32  # of parentheses, signs and powers inside each other
MAX_BITS = 1024  # of a numerator or a denominator
DECIMALS = 10  # to which a result that is not a whole number is rounded

ERRORS = NOT_ARITHMETIC, TOO_LONG, TOO_DEEP, TOO_LARGE, BY_ZERO, NOT_WHOLE = (
    "error: not arithmetic",
    f"error: longer than {MAX_CHARACTERS} characters",
    f"error: nested deeper than {MAX_DEPTH}",
    "error: number too large",
    "error: division by zero",
    "error: exponent is no whole number",
)

# Digits are ASCII; \d would take those of every script. 1,234 is a number, 1,2 is not.
TOKEN = re.compile(
    r"\s*((?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+|\*\*|[-+*/%()])", re.ASCII
)
SIGNS = str.maketrans("\N{MULTIPLICATION SIGN}·÷\N{MINUS SIGN}", "**/-")


class CalculatorError(ValueError):
    """What the text asks for has no value; the message is one of ERRORS."""


def calculate(text: str) -> str:
    """The value of an expression as a decimal number, or one of ERRORS; never an exception."""
    try:
        return decimal(evaluate(text))
    except CalculatorError as error:
        return str(error)


def evaluate(text: str) -> Fraction:
    """The exact value of an expression; signs bind and powers associate as in Python.

    Raises:
        CalculatorError: it has none within the bounds.
    """
    if len(text) > MAX_CHARACTERS:
        raise CalculatorError(TOO_LONG)
    parser = _Parser(_tokens(text.translate(SIGNS)))
    value = parser.sum(0)
    if parser.next is not None:
        raise CalculatorError(NOT_ARITHMETIC)
    return value


def decimal(value: Fraction) -> str:
    """12, -0.5, or to DECIMALS places where there is no end: 0.3333333333."""
    scaled = round(abs(value) * 10**DECIMALS)
    whole, rest = divmod(scaled, 10**DECIMALS)
    places = f"{rest:0{DECIMALS}}".rstrip("0")
    sign = "-" if value < 0 and scaled else ""
    return f"{sign}{whole}.{places}" if places else f"{sign}{whole}"


class _Parser:
    """Recursive descent, one method for each level of binding."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens = tokens[::-1]

    @property
    def next(self) -> str | None:
        return self.tokens[-1] if self.tokens else None

    def sum(self, depth: int) -> Fraction:
        value = self.product(depth)
        while self.next in ("+", "-"):
            sign = self.tokens.pop()
            other = self.product(depth)
            value = _bounded(value + other if sign == "+" else value - other)
        return value

    def product(self, depth: int) -> Fraction:
        value = self.signed(depth)
        while self.next in ("*", "/", "%"):
            sign = self.tokens.pop()
            other = self.signed(depth)
            if sign != "*" and other == 0:
                raise CalculatorError(BY_ZERO)
            value = _bounded(
                value * other if sign == "*" else value / other if sign == "/" else value % other
            )
        return value

    def signed(self, depth: int) -> Fraction:
        if depth > MAX_DEPTH:
            raise CalculatorError(TOO_DEEP)
        if self.next in ("+", "-"):
            sign = self.tokens.pop()
            value = self.signed(depth + 1)
            return -value if sign == "-" else value
        return self.power(depth)

    def power(self, depth: int) -> Fraction:
        value = self.atom(depth)
        if self.next != "**":
            return value
        self.tokens.pop()
        return _power(value, self.signed(depth + 1))

    def atom(self, depth: int) -> Fraction:
        token = self.tokens.pop() if self.tokens else ""
        if token == "(":
            value = self.sum(depth + 1)
            if not self.tokens or self.tokens.pop() != ")":
                raise CalculatorError(NOT_ARITHMETIC)
            return value
        if not token or token in "+-**/%)":
            raise CalculatorError(NOT_ARITHMETIC)
        return _bounded(Fraction(token.replace(",", "").removesuffix(".")))


def _tokens(text: str) -> list[str]:
    found, place = [], 0
    text = text.rstrip()
    while place < len(text):
        match = TOKEN.match(text, place)
        if match is None:
            raise CalculatorError(NOT_ARITHMETIC)
        found.append(match[1])
        place = match.end()
    return found


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    """The size is known before anything is computed."""
    if exponent.denominator != 1:
        raise CalculatorError(NOT_WHOLE)
    if base == 0 and exponent < 0:
        raise CalculatorError(BY_ZERO)
    if abs(base) not in (0, 1) and _bits(base) * abs(exponent.numerator) > MAX_BITS:
        raise CalculatorError(TOO_LARGE)
    if abs(base) == 1:
        return base if exponent.numerator % 2 else Fraction(1)
    return Fraction(0 if exponent else 1) if base == 0 else base**exponent.numerator


def _bounded(value: Fraction) -> Fraction:
    if _bits(value) > MAX_BITS:
        raise CalculatorError(TOO_LARGE)
    return value


def _bits(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())
