"""Conversations to learn from, as batches: what fine-tuning and distillation train on."""

import sys
from collections.abc import Sequence

import numpy as np

from jaxgpt import files
from jaxgpt.config import ChatDataConfig
from jaxgpt.data import chat, conversations, examples, synthetic, token_files
from jaxgpt.data.batches import Windows, windows
from jaxgpt.data.chat import Encoded, Format
from jaxgpt.data.conversations import Dialogue
from jaxgpt.data.examples import Examples, Tally

Splits = tuple[Examples, Examples]  # training, held out


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
        encoded = _encode(cfg, part, form, width, tally)
        if part:
            tally.report(f"{name} conversations")
        made.append(encoded)
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
    lay_out = (lambda part: examples.pack(part, width)) if cfg.packing else _singly
    items, held_out = (lay_out(part) for part in made)
    if text is not None and cfg.text_share == 1:
        read = (text.held_out(n, np.zeros(1, np.int64)) for n in range(text.num_held_out()))
        held_out = [examples.plain(window) for window in read]
    return (
        Examples(items, width, batch_size, seed, cfg.packing, text=text, text_share=cfg.text_share),
        Examples(held_out, width, batch_size, seed, cfg.packing),
    )


def _encode(
    cfg: ChatDataConfig, part: list[Dialogue], form: Format, width: int, tally: Tally
) -> list[Encoded]:
    found = []
    for dialogue in part:
        try:
            made = chat.encode(form, dialogue.messages, tools=dialogue.tools)
        except ValueError as error:
            raise ValueError(f"{dialogue.place}: {error}") from None
        if cfg.learn == "all":
            for example in made:
                example.target_T[:] = True
        found += examples.fit_any(made, width, cfg.long == "truncate", tally)
    return found


def _singly(encoded: Sequence[Encoded]) -> list[examples.Item]:
    return [([example],) for example in encoded]


def _text(cfg: ChatDataConfig, form: Format, width: int, seed: int, run: str) -> Windows:
    """Windows of the plain text, one a batch, so that they can be had by their number."""
    directory = files.path(run)
    path = token_files.prepare(cfg.text_path, directory / "data", str(directory / "tokenizer.json"))
    return windows(path, form.tokenizer, 1, width, seed)
