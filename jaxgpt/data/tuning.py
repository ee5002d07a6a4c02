"""Conversations, pairs and rated answers as batches: what the tuning stages train on.

Conversations give rows [B, T]. Pairs, and single answers that are good or bad, give [B, 2, T]: for
pairs, the chosen answer before the rejected one.
"""

import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from jaxgpt import files
from jaxgpt.config import ChatDataConfig, ConversationConfig
from jaxgpt.data import chat, conversations, examples, synthetic, token_files
from jaxgpt.data.batches import Windows, windows
from jaxgpt.data.chat import Encoded, Format
from jaxgpt.data.conversations import Dialogue, Message, Preference, Rated
from jaxgpt.data.examples import Examples, Item, Tally

Splits = tuple[Examples, Examples]  # training, held out
T = TypeVar("T")


def dialogues(cfg: ChatDataConfig) -> tuple[list[Dialogue], list[Dialogue]]:
    """Training and held-out conversations of `data.path`."""
    if cfg.text_share == 1:
        return [], []
    read = conversations.dialogues
    if cfg.calls == "turns":
        read = lambda *where: map(conversations.with_calls, conversations.dialogues(*where))
    return examples.split(cfg, read, synthetic.dialogues, synthetic.DIALOGUES)


def batches(
    cfg: ChatDataConfig,
    splits: tuple[list[Dialogue], list[Dialogue]],
    form: Format,
    width: int,
    batch_size: int,
    seed: int,
    run: str,
) -> Splits:
    """Both splits tokenised and laid out in rows; a summary goes to stderr.

    Raises:
        ValueError: nothing to train on, or no example whose end is a target.
    """
    made = []
    for name, part in zip(("training", "held-out"), splits, strict=True):
        tally = Tally()
        long = cfg.long == "truncate"
        encoded = _encoded(part, lambda dialogue: _learned(cfg, form, dialogue))
        made.append([
            example for _, several in encoded
            for example in examples.fit_any(several, width, long, tally)
        ])  # fmt: skip
        if part:
            tally.report(f"{name} conversations")
    unseen = 0 if "tools" in form.template else sum(bool(d.tools) for part in splits for d in part)
    if unseen:
        print(
            f"warning: {unseen:,} conversations list tools, which the chat template does not show; "
            "give a data.template that does",
            file=sys.stderr,
        )
    if cfg.text_share < 1:
        examples.check_targets(made[0], form)
    text = _text(cfg, form, width, seed, run) if cfg.text_share else None
    items, held_out = (
        examples.pack(part, width) if cfg.packing else [([example],) for example in part]
        for part in made
    )
    if text is not None and cfg.text_share == 1:
        read = (text.held_out(n, np.zeros(1, np.int64)) for n in range(text.num_held_out()))
        held_out = [examples.plain(window) for window in read]
    return (
        Examples(items, width, batch_size, seed, cfg.packing, text=text, text_share=cfg.text_share),
        Examples(held_out, width, batch_size, seed, cfg.packing),
    )


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

        kept = _encoded(list(zip(part, others, strict=True)), encode, lambda both: both[0].where)
        desirable = np.array([own.desirable for (own, _), _ in kept], np.float32)
        items: list[Item] = [([answer], [mismatched]) for _, (answer, mismatched) in kept]
        return items, {"desirable": desirable}

    return _splits(found, lay_out, form, width, batch_size, seed)


def _learned(cfg: ChatDataConfig, form: Format, dialogue: Dialogue) -> list[Encoded]:
    made = chat.encode(form, dialogue.messages, tools=dialogue.tools)
    if cfg.learn == "all":
        for example in made:
            example.target_T[:] = True
    return made


def _text(cfg: ChatDataConfig, form: Format, width: int, seed: int, run: str) -> Windows:
    """Windows of the plain text, one a batch, so that they can be had by their number."""
    directory = files.path(run)
    path = token_files.prepare(cfg.text_path, directory / "data", str(directory / "tokenizer.json"))
    return windows(path, form.tokenizer, 1, width, seed)


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
    where: Callable[[T], str] = lambda row: row.where,  # type: ignore[attr-defined]
) -> list[tuple[T, list[Encoded]]]:
    """The rows that could be encoded, with their sequences."""
    kept = []
    for row in part:
        try:
            arms = encode(row)
        except ValueError as error:
            raise ValueError(f"{where(row)}: {error}") from None
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
