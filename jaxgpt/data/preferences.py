"""Pairs of answers, and single good or bad ones, as batches.

The arrays of a batch are [B, 2, T]: for pairs, the chosen answer before the rejected one.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from jaxgpt.config import ConversationConfig
from jaxgpt.data import chat, conversations, examples, synthetic
from jaxgpt.data.chat import Encoded, Format
from jaxgpt.data.conversations import Message, Preference, Rated
from jaxgpt.data.examples import Examples, Item, Tally

Splits = tuple[Examples, Examples]  # training, held out
T = TypeVar("T")


def pairs(cfg: ConversationConfig, form: Format, width: int, batch_size: int, seed: int) -> Splits:
    """Both splits of the data's pairs, each with its `margin`.

    Raises:
        ValueError: nothing to train on, or no answer whose end is a target.
    """
    found = examples.split(
        cfg, conversations.preferences, synthetic.preferences, synthetic.PREFERENCES
    )

    def lay_out(part: Sequence[Preference], tally: Tally) -> tuple[list[Item], dict]:
        kept = _encoded(part, lambda pair: _pair(cfg, pair, form, width, tally))
        margin = np.array([pair.margin for pair, _ in kept], np.float32)
        return [([chosen], [rejected]) for _, (chosen, rejected) in kept], {"margin": margin}

    return _splits(found, lay_out, form, width, batch_size, seed)


def ratings(
    cfg: ConversationConfig, form: Format, width: int, batch_size: int, seed: int
) -> Splits:
    """Both splits of single answers, each with `desirable`, 1 or 0 (KTO).

    Beside every answer stands its prompt with the answer to another one: the mismatched pairs by
    which KTO estimates how far the policy has moved.
    """
    found = examples.split(cfg, conversations.ratings, synthetic.ratings, synthetic.PREFERENCES)

    def lay_out(part: Sequence[Rated], tally: Tally) -> tuple[list[Item], dict]:
        # Half the data away, so that no two answers to one prompt meet.
        others = [*part[len(part) // 2 :], *part[: len(part) // 2]]

        def encode(both: tuple[Rated, Rated]) -> list[Encoded] | None:
            own, other = both
            arms = [_answer(form, own, rated.answer) for rated in (own, other)]
            return _fit(cfg, arms, width, tally)

        kept = _encoded(list(zip(part, others, strict=True)), encode, lambda both: both[0].place)
        desirable = np.array([own.desirable for (own, _), _ in kept], np.float32)
        items: list[Item] = [([answer], [mismatched]) for _, (answer, mismatched) in kept]
        return items, {"desirable": desirable}

    return _splits(found, lay_out, form, width, batch_size, seed)


def _pair(
    cfg: ConversationConfig, pair: Preference, form: Format, width: int, tally: Tally
) -> list[Encoded] | None:
    if pair.chosen == pair.rejected:
        tally.dropped["with equal answers"] += 1
        return None
    arms = [_answer(form, pair, answer) for answer in (pair.chosen, pair.rejected)]
    return _fit(cfg, arms, width, tally)


def _answer(form: Format, asked: Preference | Rated, answer: list[Message]) -> list[Encoded]:
    """Only the answer's tokens are targets, not what the assistant says in the prompt."""
    messages = asked.prompt + answer
    return chat.encode(form, messages, learn_from=len(asked.prompt), tools=asked.tools)


def _fit(
    cfg: ConversationConfig, arms: Sequence[list[Encoded]], width: int, tally: Tally
) -> list[Encoded] | None:
    if any(len(arm) > 1 for arm in arms):
        tally.dropped[
            "with answers of several turns, which the template shows in several ways"
        ] += 1
        return None
    whole = [arm[0] for arm in arms]
    return examples.fit(whole, width, cfg.long == "truncate", tally, read_end=True)


def _encoded(
    part: Sequence[T],
    encode: Callable[[T], list[Encoded] | None],
    place: Callable[[T], str] = lambda row: row.place,  # type: ignore[attr-defined]
) -> list[tuple[T, list[Encoded]]]:
    """The rows that could be encoded, with their sequences."""
    kept = []
    for row in part:
        try:
            arms = encode(row)
        except ValueError as error:
            raise ValueError(f"{place(row)}: {error}") from None
        kept += [] if arms is None else [(row, arms)]
    return kept


def _splits(
    found: tuple[list[T], list[T]],
    lay_out: Callable[[list[T], Tally], tuple[list[Item], dict[str, np.ndarray]]],
    form: Format,
    width: int,
    batch_size: int,
    seed: int,
) -> Splits:
    made = []
    for name, part in zip(("training", "held-out"), found, strict=True):
        tally = Tally()
        items, numbers = lay_out(part, tally)
        tally.report(f"{name} answers")
        made.append(Examples(items, width, batch_size, seed, numbers=numbers))
    first = [sequence[0] for item in made[0].items for sequence in item]
    examples.check_targets(first, form)
    return made[0], made[1]
