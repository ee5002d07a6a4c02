"""The calculator: Python's exact arithmetic, and no text that it does not survive."""

import re
import time
from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jaxgpt.tasks import calculator

NUMBERS = st.one_of(
    st.integers(0, 10**6).map(str),
    st.tuples(st.integers(0, 999), st.integers(0, 999)).map(lambda pair: f"{pair[0]}.{pair[1]}"),
)
EXPRESSIONS = st.recursive(
    NUMBERS,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from([" + ", "-", "*", " / ", "%"]), inner).map("".join),
        inner.map(lambda text: f"({text})"),
        inner.map(lambda text: f"-{text}"),
        st.tuples(inner, st.integers(-3, 3)).map(lambda pair: f"({pair[0]})**{pair[1]}"),
    ),
    max_leaves=8,
)
PIECES = st.lists(
    st.sampled_from(
        [*"0123456789.,+-*/%()\u00d7÷\u2212^ eE_x\n\0\u0663²½", "**", "<|im_end|>", "inf"]
    )
)


def python(text: str) -> Fraction:
    """Python's own parser, every number of which becomes a Fraction."""
    exact = re.sub(r"\d+(\.\d+)?", lambda number: f"Fraction('{number[0]}')", text)
    # Exponents stay plain whole numbers.
    exact = re.sub(r"\*\*(-?)Fraction\('(\d)'\)", r"**\1\2", exact)
    return eval(exact, {"Fraction": Fraction})


@given(EXPRESSIONS)
def test_values_are_pythons_own(text: str) -> None:
    try:
        found = calculator.evaluate(text)
    except calculator.CalculatorError as error:
        if str(error) == calculator.BY_ZERO:
            with pytest.raises(ZeroDivisionError):
                python(text)
        else:
            assert str(error) in (calculator.TOO_LARGE, calculator.TOO_LONG)
        return
    assert found == python(text)


@given(st.one_of(st.text(), PIECES.map("".join)))
@example("(" * 200)
@example("-" * 250 + "1")
@example("9**9**9**9")
@example("(9**99)**(9**99)")
@example("9" * 256)
@example("1" * 100_000)
@example("*".join(["99999999999999999999"] * 12))
@example("1/3**99 + " * 20 + "1")
def test_any_text_ends_at_once_in_a_number_or_a_known_error(text: str) -> None:
    start = time.process_time()
    found = calculator.calculate(text)
    assert time.process_time() - start < 0.1
    assert found in calculator.ERRORS or Fraction(found) is not None
    assert len(found) < 400


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("47 * 38", "1786"), ("1/3", "0.3333333333"), ("-2**2", "-4"), ("2**3**2", "512"),
        ("1,234 * 2", "2468"), ("6 ÷ 4", "1.5"), ("7 % 3", "1"), ("-7 % 3", "2"),
        (".5+.25", "0.75"), ("6 \u00d7 2 \u2212 1", "11"),
        ("0 - 0", "0"), ("-1/30000000000000", "0"), ("--3", "3"), ("5.", "5"), ("2(3)", "!"),
        ("1 2", "!"), ("1,2", "!"), ("", "!"), ("()", "!"), ("(1", "!"), ("1)", "!"), ("1e5", "!"),
        ("\u0663 + 1", "!"), ("__import__('os')", "!"), ("2 **", "!"), ("* 2", "!"),
    ],
)  # fmt: skip
def test_known_answers(text: str, shown: str) -> None:
    assert calculator.calculate(text) == (calculator.NOT_ARITHMETIC if shown == "!" else shown)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("1" + "+1" * 200, calculator.TOO_LONG), ("(" * 40 + "1" + ")" * 40, calculator.TOO_DEEP),
        ("10**400", calculator.TOO_LARGE), ("99**99*99**99", calculator.TOO_LARGE),
        ("1/(2-2)", calculator.BY_ZERO), ("5 % 0", calculator.BY_ZERO),
        ("0**-1", calculator.BY_ZERO), ("2**0.5", calculator.NOT_WHOLE),
    ],
)  # fmt: skip
def test_known_errors(text: str, error: str) -> None:
    assert calculator.calculate(text) == error


def test_parentheses_as_deep_as_allowed() -> None:
    assert calculator.calculate("(" * 32 + "1" + ")" * 32) == "1"
