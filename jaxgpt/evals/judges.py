"""What a reward model thinks: of pairs of answers (task reward), and of samples (best-of-n)."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt import rundir, scoring
from jaxgpt.config import EvaluateConfig, ModelConfig
from jaxgpt.convert import chatting
from jaxgpt.convert.load import load
from jaxgpt.data import chat, conversations, synthetic
from jaxgpt.data.chat import Message
from jaxgpt.data.conversations import Preference
from jaxgpt.evals import statistics
from jaxgpt.evals.statistics import Measures
from jaxgpt.language_model import LanguageModel
from jaxgpt.types import Array, Batch, Params

BUCKET = 64  # rows are as wide as their longest, rounded up: few shapes are compiled


class Judge:
    """A run of scripts/reward.py: the body, the head, and the template by which it reads.

    Raises:
        ValueError: it is another run, or has no intact checkpoint.
    """

    def __init__(self, path: str, setting: str) -> None:
        if not rundir.is_run(path):
            raise ValueError(f"{setting}={path}: is no run of scripts/reward.py")
        try:
            self.head = rundir.read_params(path, "reward")
        except ValueError as error:
            raise ValueError(f"{setting}={path}: is no run of scripts/reward.py, {error}") from None
        body = load(path, merged=True)
        self.model, self.body = body.config, body.params
        self.form = chatting.chat_format(body)

    def rewards(
        self, conversations: Sequence[Sequence[Message]], batch_tokens: int
    ) -> Iterator[tuple[int, float, bool]]:
        """(number, reward, whether it lost its beginning) of every conversation, in no certain
        order. A conversation is read up to the end of its last turn, at most a context of it.
        """
        rows = [self._encode(messages) for messages in conversations]
        order = sorted(range(len(rows)), key=lambda n: -len(rows[n]))
        room = self.model.context_length
        while order:
            width = min(-(-len(rows[order[0]]) // BUCKET) * BUCKET, room)
            size = max(1, batch_tokens // width)
            some, order = order[:size], order[size:]
            tokens_BT, segments_BT = np.zeros((2, size, width), np.int32)
            for place, number in enumerate(some):
                kept = rows[number][-room:]
                tokens_BT[place, : len(kept)], segments_BT[place, : len(kept)] = kept, 1
            batch = {"tokens": tokens_BT, "segments": segments_BT}
            reward_B = np.asarray(_final_reward(self.model, self.body, self.head, batch))
            for number, reward in zip(some, reward_B, strict=False):
                yield number, float(reward), len(rows[number]) > room

    def _encode(self, messages: Sequence[Message]) -> np.ndarray:
        """Up to the last token that the assistant wrote: there the head was trained."""
        encoded = chat.encode(self.form, messages)[-1]
        return encoded.tokens_T[: int(np.flatnonzero(encoded.target_T)[-1]) + 1]


def read(lm: LanguageModel, cfg: EvaluateConfig, path: Path) -> list[Preference]:
    """Pairs in any format of data/conversations.py, or the held-out ones of an embedded task."""
    if cfg.data in synthetic.PREFERENCES:
        return synthetic.preferences(cfg.data, held_out=True)
    return list(conversations.preferences(str(path)))


def score(
    lm: LanguageModel, cfg: EvaluateConfig, items: Mapping[int, Preference]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rewards of both answers."""
    judge = Judge(cfg.checkpoint, "checkpoint")
    numbers = list(items)
    arms = [
        [*item.prompt, *answer]
        for item in items.values()
        for answer in (item.chosen, item.rejected)
    ]
    found: dict[int, dict[int, tuple[float, bool]]] = {}
    for row, reward, truncated in judge.rewards(arms, cfg.batch_tokens):
        index, arm = divmod(row, 2)
        mine = found.setdefault(index, {})
        mine[arm] = (reward, truncated)
        if len(mine) == 2:
            result = {"chosen": mine[0][0], "rejected": mine[1][0]}
            yield numbers[index], result | {"truncated": mine[0][1] or mine[1][1]}


def summarize(results: Sequence[Mapping[str, Any]]) -> Measures:
    """Share of pairs whose chosen answer gets more, with its 95 % interval; equal counts half."""
    margins = [r["chosen"] - r["rejected"] for r in results]
    right = [0.5 + 0.5 * float(np.sign(margin)) for margin in margins]
    return {
        **statistics.mean("accuracy", right),
        "accuracy_interval": statistics.interval(sum(right), len(right)),
        **statistics.mean("margin", margins),
        "truncated": sum(r["truncated"] for r in results),
    }


@partial(jax.jit, static_argnums=0)
def _final_reward(model: ModelConfig, body: Params, head: Params, batch: Batch) -> Array:
    return scoring.final_reward(model, body, head, jax.tree.map(jnp.asarray, batch))
