"""Is an answer right, and in the form that was asked for? Plain functions of texts."""

import re
from fractions import Fraction

from jaxgpt.tasks import calculator

# Digits are ASCII, or 3 could be written in forty scripts. The minus of 3-4 is no sign.
NUMBER = r"(?:(?<![0-9.)])-)?\$?[0-9][0-9,]*(?:\.[0-9]+)?"
THOUGHT = re.compile(r"\s*<think>(.*?)</think>\s*<answer>(.*?)</answer>\s*", re.DOTALL)
LONGEST_ANSWER = 12  # words of an answer that a reply may be expected to give as it is
TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def stated(text: str) -> str | None:
    """The number after ####, where GSM8K states its answers."""
    found = re.search(rf"####\s*({NUMBER})", text)
    return plain(found[1]) if found else None


def last_number(text: str) -> str | None:
    """The last number of the text, without the calculator's <<48/2=24>>."""
    found = re.findall(NUMBER, re.sub(r"<<.*?>>", "", text))
    return plain(found[-1]) if found else None


def plain(number: str) -> str:
    """1,000 and $1000.00 are 1000."""
    digits = number.replace(",", "").replace("$", "")
    if "." in digits:
        digits = digits.rstrip("0").rstrip(".")
    return digits


def final_answer(text: str) -> str | None:
    """The answer of a text: inside <answer>, after ####, in \\boxed{}, or its last number."""
    if "<answer>" in text:
        inside = text.rpartition("<answer>")[2].partition("</answer>")[0].strip()
        return inside or None
    if "####" in text:
        line = text.rpartition("####")[2].strip().partition("\n")[0].strip()
        return line if value(line) is not None else stated(f"####{line}") or line or None
    if "\\boxed{" in text:
        return _boxed(text.rpartition("\\boxed{")[2]).strip() or None
    return last_number(text)


def expected(text: str) -> str | None:
    """The answer that a data set's text states: after ####, in <answer> or in \\boxed{}, else all.

    None if nothing stands there.
    """
    stating = any(mark in text for mark in ("####", "<answer>", "\\boxed{"))
    return final_answer(text) if stating else text.strip()


def is_worked(answer: str) -> bool:
    """Whether it has many words or lines, which no reply can be expected to repeat."""
    return value(answer) is None and ("\n" in answer or len(answer.split()) > LONGEST_ANSWER)


def value(text: str) -> Fraction | None:
    """The exact value of a number or an expression such as 3/4, $1,200 or 2 * (3 + 4)."""
    try:
        return calculator.evaluate(text.replace("$", "").strip().removesuffix("."))
    except calculator.CalculatorError:
        return None


def same(answer: str | None, expected: str) -> bool:
    """Equal in value, where both have one; else the same text but for case and blanks."""
    if answer is None:
        return False
    found, wanted = value(answer), value(expected)
    if found is None or wanted is None:
        return " ".join(answer.lower().split()) == " ".join(expected.lower().split())
    return found == wanted


def accuracy(text: str, expected: str) -> float:
    """1 if the text's answer equals what is expected, else 0.

    Where words are expected, the whole text may be them.
    """
    words = value(expected) is None
    return float(same(final_answer(text), expected) or (words and same(text, expected)))


def well_formed(text: str) -> float:
    """1 for <think>…</think><answer>…</answer> and nothing else, every tag once; else 0."""
    found = THOUGHT.fullmatch(text)
    once = all(text.count(tag) == 1 for tag in TAGS)
    return float(found is not None and once and bool(found[1].strip() and found[2].strip()))


def _boxed(text: str) -> str:
    """Up to the brace that closes: {1}{2}} of \\boxed{\\frac{1}{2}}."""
    depth = 1
    for index, character in enumerate(text):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if not depth:
            return text[:index]
    return text
