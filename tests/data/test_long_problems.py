"""Chains of terms and long products: right steps, bounds, splits that do not leak."""

import pytest

from jaxgpt import tasks
from jaxgpt.data import synthetic


def test_every_step_of_a_chain_is_right_and_the_last_one_is_the_answer() -> None:
    for chain in synthetic.chains(held_out=True):
        text = synthetic.step_by_step(chain)
        for step in text.split(", "):
            left, right = step.split(" = ")
            assert eval(left) == int(right)
        assert eval(str(chain)) == chain.answer
        assert tasks.is_correct(chain, text)


def test_chains_have_three_or_four_terms_and_stay_small() -> None:
    seen = list(synthetic.chains(held_out=False))
    assert {len(chain.numbers) for chain in seen} == {3, 4}
    assert {sign for chain in seen for sign in chain.signs} == {"+", "-", "*"}
    assert all(0 <= value <= 99 for chain in seen for _, value in chain.steps)


def test_products_have_four_to_six_digits_each() -> None:
    lengths = {len(str(number)) for p in synthetic.products(held_out=False) for number in p}
    assert lengths == {4, 5, 6}


def terms(chain: synthetic.Chain) -> tuple:
    """A chain as what it adds up, in no order."""
    signed = [*zip(("+", *chain.signs), chain.numbers, strict=True)]
    if chain.signs[0] != "*":
        return tuple(sorted(signed))
    return (*sorted(chain.numbers[:2]), *sorted(signed[2:]))


@pytest.mark.parametrize(
    ("problems", "key"),
    [(synthetic.chains, terms), (synthetic.products, lambda product: tuple(sorted(product)))],
)
def test_a_held_out_problem_is_not_seen_in_another_order(problems, key) -> None:
    seen, held_out = list(problems(False)), list(problems(True))
    assert len(set(seen)) == len(seen) > 8 * len(held_out) > 4000
    assert not {key(p) for p in seen} & {key(p) for p in held_out}


def test_long_dialogues_say_what_their_task_asks_for() -> None:
    chain, answer = (
        [m["content"] for m in synthetic.dialogues(task, True)[0].messages]
        for task in ("multi-step", "multi-step-answer")
    )
    assert chain == ["Please work out 1 + 18 + 3 + 5.", "1 + 18 = 19, 19 + 3 = 22, 22 + 5 = 27"]
    assert answer == ["Please work out 1 + 18 + 3 + 5.", "27"]
    called = synthetic.dialogues("products-calculator", True)[0].messages
    assert [(m["role"], m["content"]) for m in called] == [
        ("user", "Compute 94932 * 81819."), ("assistant", "calculator(94932 * 81819)"),
        ("tool", "7767241308"), ("assistant", "7767241308"),
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["", "none", "\u0663", "9" * 5000, "²"])
def test_an_answer_without_the_number_is_wrong(text: str) -> None:
    assert not tasks.is_correct(synthetic.Problem(1, "+", 2), text)
