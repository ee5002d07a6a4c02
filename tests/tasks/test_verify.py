"""What counts as the right number, and as the asked-for form."""

from fractions import Fraction

import pytest

from jaxgpt.tasks import verify


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("costs $1,234.50", "1234.5"), ("25-30=-5", "-5"), ("3-4", "4"), ("<<6*7=42>>", None),
        ("x = 10.", "10"), ("none", None), ("", None),
        ("\u0663 and ²", None), ("7 apples, not \u0663", "7"),
    ],
)  # fmt: skip
def test_last_number(text, number):
    assert verify.last_number(text) == number


@pytest.mark.parametrize(
    ("text", "expected", "right"),
    [
        ("so 6 * 7 = 42\n#### 42", "42", True),
        ("#### 1,042", "1042", True),
        ("#### -7.50", "-7.5", True),
        ("#### $18", "18", True),
        ("#### 42 apples, or 43", "42", True),
        ("#### 3/4", "0.75", True),
        ("#### forty", "40", False),
        ("#### 1/0", "0", False),
        ("42, then #### 43", "42", False),
        ("the last of 1, 2 and 3", "3", True),
        ("<think>7</think><answer>3/4</answer>", "0.75", True),
        ("<answer>2 * (3 + 4)</answer>", "14", True),
        ("<answer>1/3</answer>", "0.3333333333", False),
        ("<answer>Paris </answer>", "paris", True),
        (r"so \\boxed{42}.", "42", True),
        (r"so \\boxed{\\frac{1}{2}} of 3", r"\\frac{1}{2}", True),
        (r"\\boxed{", "5", False),
        ("Paris", "paris", True),
        ("The capital is Paris", "Paris", False),
        ("<answer></answer> 5", "5", False),
        ("<answer>" + "9" * 5000 + "</answer>", "5", False),
        ("9" * 5000, "5", False),
        ("no number here", "5", False),
        ("", "5", False),
        ("####", "5", False),
        ("\u0665", "5", False),
    ],
)
def test_accuracy(text, expected, right):
    assert verify.accuracy(text, expected) == float(right)


def test_values_are_exact():
    assert verify.value("1/3") == Fraction(1, 3)
    assert verify.value("$1,200") == 1200
    assert verify.value("one") is None
    assert verify.value("1/0") is None


@pytest.mark.parametrize(
    ("text", "formed"),
    [
        ("<think>2 + 2</think><answer>4</answer>", True),
        ("\n<think>a\nb</think>\n<answer>4</answer>\n", True),
        ("<think></think><answer>4</answer>", False),
        ("<think>x</think><answer> </answer>", False),
        ("<think>x</think><answer>4</answer> and more", False),
        ("<think>x</think><answer>4</answer><answer>5</answer>", False),
        ("<think><think>x</think><answer>4</answer>", False),
        ("<answer>4</answer><think>x</think>", False),
        ("4", False),
    ],
)
def test_well_formed(text, formed):
    assert verify.well_formed(text) == float(formed)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("7", "7"), (" Paris ", "Paris"), ("2 + 5 = 7\n#### 7", "7"), ("#### 1,200 boats", "1200"),
        (r"so it is \boxed{\frac{1}{2}}", r"\frac{1}{2}"), ("x\n<answer>7</answer>", "7"),
        ("x\n####", None), ("It leaves at nine.", "It leaves at nine."),
    ],
)  # fmt: skip
def test_what_a_data_sets_answer_states(text, answer):
    assert verify.expected(text) == answer
    assert not verify.is_worked(answer or "")


@pytest.mark.parametrize(
    "text",
    ["2 + 5 = 7\nso 7", "There are two and then five more boats, which makes seven in all."],
)
def test_a_worked_answer_states_nothing(text):
    assert verify.is_worked(verify.expected(text))
