"""Generated answers that must be right to the digit: GSM8K and arithmetic."""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxgpt.config import EvaluateConfig
from jaxgpt.evals import records, statistics
from jaxgpt.evals.statistics import Measures
from jaxgpt.language_model import LanguageModel
from jaxgpt.sampling.sample import Sampling

NUMBER = r"-?\$?\d[\d,]*(?:\.\d+)?"
FEWEST_ROWS = 8  # of a batch, however long: decoding reads all weights for each token


class Item(NamedTuple):
    """A prompt, the right number, and where an answer ends at the latest."""

    prompt: str
    answer: str
    stop: tuple[str, ...]


def read_gsm8k(lm: LanguageModel, cfg: EvaluateConfig, path: Path) -> list[Item]:
    """{question, answer} where the answer ends in "#### N"; the harness's prompt, or a chat's."""
    items = []
    for place, row in records.read_rows(path):
        question = records.text_field(row, "question", place)
        answer = stated(records.text_field(row, "answer", place))
        if answer is None:
            raise ValueError(f'{place}: answer must end in "#### N"')
        prompt = question if cfg.chat else f"Question: {question}\nAnswer:"
        items.append(Item(prompt, answer, () if cfg.chat else ("Question:",)))
    return items


def read_arithmetic(lm: LanguageModel, cfg: EvaluateConfig, path: Path) -> list[Item]:
    """{context, continuation}, such as "25-759=" and "-734"."""
    items = []
    for place, row in records.read_rows(path):
        answer = last_number(records.text_field(row, "continuation", place))
        if answer is None:
            raise ValueError(f"{place}: continuation={row['continuation']!r:.40} is no number")
        items.append(Item(records.text_field(row, "context", place), answer, ("\n",)))
    return items


def score(
    lm: LanguageModel, cfg: EvaluateConfig, items: Sequence[Item]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Every sample's answers: as stated after ####, and as the last number that was written."""
    settings = Sampling(cfg.max_new_tokens, cfg.temperature, cfg.top_p, cfg.top_k)
    room = lm.config.context_length - cfg.max_new_tokens
    if room < 1:
        raise ValueError(
            f"max_new_tokens={cfg.max_new_tokens}: leaves no room for a prompt in the model's "
            f"context of {lm.config.context_length}"
        )
    prompts = [_encode(lm, cfg, item) for item in items]
    order = sorted(range(len(items)), key=lambda n: -len(prompts[n]))
    rows = [(n, sample) for n in order for sample in range(cfg.samples)]
    texts: dict[int, list[str]] = {}
    for batch in _batches(rows, [len(prompt) for prompt in prompts], cfg):
        written = lm.complete(
            [prompts[n][-room:] for n, _ in batch], settings, cfg.seed, items[batch[0][0]].stop,
            rows=[n * cfg.samples + sample for n, sample in batch],
        )  # fmt: skip
        for (n, _), text in zip(batch, written, strict=True):
            texts.setdefault(n, []).append(text)
            if len(texts[n]) == cfg.samples:
                yield n, _judge(items[n], texts.pop(n)) | {"truncated": len(prompts[n]) > room}


def summarize(results: Sequence[Mapping[str, Any]]) -> Measures:
    """exact_match asks for the stated answer (####), flexible_match for the last number."""
    measures: Measures = {}
    for name, key in (("exact_match", "stated"), ("flexible_match", "last")):
        shares = [sum(a == r["answer"] for a in r[key]) / len(r[key]) for r in results]
        measures |= statistics.mean(name, shares)
    samples = len(results[0]["last"])
    if samples > 1:
        right = [sum(a == r["answer"] for a in r["last"]) for r in results]
        for k in _powers_of_two(samples):
            chances = [statistics.pass_at_k(samples, count, k) for count in right]
            measures |= statistics.mean(f"pass@{k}", chances)
        votes = [float(statistics.majority(r["last"]) == r["answer"]) for r in results]
        measures |= statistics.mean(f"maj@{samples}", votes)
    return measures | {"truncated": sum(r["truncated"] for r in results)}


def stated(text: str) -> str | None:
    """The number after ####."""
    found = re.search(rf"####\s*({NUMBER})", text)
    return plain(found[1]) if found else None


def last_number(text: str) -> str | None:
    """The last number of the text, without the calculator's <<48/2=24>>."""
    found = re.findall(rf"(?<![\d.)]){NUMBER}|{NUMBER}", re.sub(r"<<.*?>>", "", text))
    return plain(found[-1]) if found else None


def plain(number: str) -> str:
    """1,000 and $1000.00 are 1000."""
    digits = number.replace(",", "").replace("$", "")
    if "." in digits:
        digits = digits.rstrip("0").rstrip(".")
    return digits


def _encode(lm: LanguageModel, cfg: EvaluateConfig, item: Item) -> list[int]:
    if cfg.chat:
        text = lm.render([{"role": "user", "content": item.prompt}])
        return lm.tokenizer.encode(text, allow_special=True)
    return lm.encode(item.prompt)


def _batches(
    rows: list[tuple[int, int]], lengths: Sequence[int], cfg: EvaluateConfig
) -> Iterator[list[tuple[int, int]]]:
    """Rows of like length, as many as fit beside what they will write."""
    start = 0
    while start < len(rows):
        width = lengths[rows[start][0]] + cfg.max_new_tokens
        size = max(FEWEST_ROWS, cfg.batch_tokens // width)
        yield rows[start : start + size]
        start += size


def _judge(item: Item, texts: Sequence[str]) -> dict[str, Any]:
    return {
        "answer": item.answer,
        "stated": [stated(text) for text in texts],
        "last": [last_number(text) for text in texts],
        "texts": list(texts),
    }


def _powers_of_two(largest: int) -> Iterator[int]:
    return itertools.takewhile(lambda k: k <= largest, (1 << n for n in itertools.count()))
