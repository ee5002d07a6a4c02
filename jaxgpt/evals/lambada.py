"""LAMBADA: does the model know the last word of a passage (arXiv:1606.06031)?"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxgpt.config import EvaluateConfig
from jaxgpt.evals import queries, records, statistics
from jaxgpt.evals.statistics import Measures
from jaxgpt.language_model import LanguageModel

Item = tuple[str, str]  # the passage and its last word


def read(lm: LanguageModel, cfg: EvaluateConfig, path: Path) -> list[Item]:
    """{context, continuation}, or the Hub's {text} whose last word is asked for."""
    items = []
    for where, row in records.read_rows(path):
        if "continuation" in row:
            context = records.text_field(row, "context", where)
            word = records.text_field(row, "continuation", where).strip()
        else:
            context, _, word = records.text_field(row, "text", where).rstrip().rpartition(" ")
        if not context.strip():
            raise ValueError(f"{where}: has no text before the last word")
        items.append((context.rstrip(), word))
    return items


def score(
    lm: LanguageModel, cfg: EvaluateConfig, items: Mapping[int, Item]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """log p of the last word, and whether greedy decoding writes it."""
    asked = {number: [(context, f" {word}")] for number, (context, word) in items.items()}
    for number, (scored,), truncated in queries.score_choices(lm, asked, cfg.batch_tokens):
        yield (
            number,
            {
                "logprob": queries.total(scored),
                "greedy": bool(scored.greedy.all()),
                "truncated": truncated,
            },
        )


def summarize(results: Sequence[Mapping[str, Any]]) -> Measures:
    """Accuracy, and perplexity per word."""
    nll = statistics.mean("nll", [-r["logprob"] for r in results])
    return {
        **statistics.mean("acc", [float(r["greedy"]) for r in results]),
        **statistics.exponential("perplexity", nll["nll"], nll["nll_stderr"]),
        "truncated": sum(r["truncated"] for r in results),
    }
