"""Perplexity of a text: per token, per word, and as bits per byte."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxgpt.config import EvaluateConfig
from jaxgpt.data import rows
from jaxgpt.evals import statistics
from jaxgpt.evals.statistics import Measures
from jaxgpt.language_model import LanguageModel
from jaxgpt.sampling import likelihood

UNITS = ("tokens", "bytes", "words")


class Item(NamedTuple):
    """A window of which the last `scored` tokens are predicted."""

    tokens: list[int]
    scored: int
    num_bytes: int  # of the text that the scored tokens spell
    num_words: float  # in proportion to the bytes


def read(lm: LanguageModel, cfg: EvaluateConfig, path: Path) -> list[Item]:
    """The windows of the whole file, as LanguageModel.perplexity describes them."""
    text = rows.read_text(path)
    tokens = [*lm.begin_ids, *lm.tokenizer.encode(text)]
    words_per_byte = len(re.findall(r"\S+", text)) / len(text.encode())
    items = []
    for start, stop, scored in likelihood.windows(
        len(tokens), cfg.window, cfg.stride, lm.config.context_length
    ):
        row = tokens[start:stop]
        size = len(lm.tokenizer.decode_bytes(row)) - len(lm.tokenizer.decode_bytes(row[:-scored]))
        items.append(Item(row, scored, size, size * words_per_byte))
    if not items:
        raise ValueError(f"data={path}: is a single token; nothing is predicted")
    return items


def score(
    lm: LanguageModel, cfg: EvaluateConfig, items: Mapping[int, Item]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Summed negative log-likelihood of each window's scored tokens."""
    numbers, rows = list(items), [item.tokens for item in items.values()]
    for row, found in likelihood.score_rows(lm.config, lm.params, rows, cfg.batch_tokens):
        item = items[numbers[row]]
        nll = -float(found.logprobs[-item.scored :].sum(dtype=np.float64))
        counts = {"tokens": item.scored, "bytes": item.num_bytes, "words": item.num_words}
        yield numbers[row], {"nll": nll, **counts}


def summarize(results: Sequence[Mapping[str, Any]]) -> Measures:
    """Standard errors take the windows as the sample."""
    nll = [r["nll"] for r in results]
    per = {unit: statistics.ratio(nll, [r[unit] for r in results]) for unit in UNITS}
    bits, bits_error = (value / math.log(2) for value in per["bytes"])
    return {
        **statistics.exponential("perplexity", *per["tokens"]),
        **statistics.exponential("word_perplexity", *per["words"]),
        "bits_per_byte": bits,
        "bits_per_byte_stderr": bits_error,
        **{unit: round(sum(r[unit] for r in results)) for unit in UNITS},
    }
