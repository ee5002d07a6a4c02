"""What a reward model thinks: of pairs of answers (task reward), and of samples (best-of-n)."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxgpt.config import EvaluateConfig
from jaxgpt.data import conversations, synthetic
from jaxgpt.data.columns import Columns
from jaxgpt.data.conversations import Preference
from jaxgpt.evals import statistics
from jaxgpt.evals.statistics import Measures
from jaxgpt.judge import Judge
from jaxgpt.language_model import LanguageModel


def read(lm: LanguageModel, cfg: EvaluateConfig, path: Path) -> list[Preference]:
    """Pairs in any format of data/conversations.py, or the held-out ones of an embedded task."""
    if cfg.data in synthetic.PREFERENCES:
        return synthetic.preferences(cfg.data, held_out=True)
    return list(conversations.preferences(cfg.data, columns=Columns(setting="")))


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
