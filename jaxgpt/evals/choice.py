"""Multiple choice by likelihood: the choice that the model finds likeliest.

`acc` compares log p(choice | context); `acc_norm` divides it by the number of characters, as the
lm-evaluation-harness does, because long choices are unlikely for their length alone.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxgpt.config import EvaluateConfig
from jaxgpt.data import rows
from jaxgpt.evals import queries, records, statistics
from jaxgpt.evals.statistics import Measures
from jaxgpt.language_model import LanguageModel

Layout = Callable[[Mapping[str, Any], str], "Item"]


class Item(NamedTuple):
    """A question. Most ask which of several endings fits, WinoGrande which of two beginnings."""

    contexts: tuple[str, ...]  # one, or one for each choice
    endings: tuple[str, ...]
    gold: int
    blank: str = " "  # between context and ending

    @property
    def num_choices(self) -> int:
        return max(len(self.contexts), len(self.endings))

    def pairs(self) -> list[tuple[str, str]]:
        """Context and continuation of every choice."""
        contexts = self.contexts * (self.num_choices // len(self.contexts))
        endings = self.endings * (self.num_choices // len(self.endings))
        return [(c, self.blank + e) for c, e in zip(contexts, endings, strict=True)]


def read(layout: Layout, lm: LanguageModel, cfg: EvaluateConfig, path: Path) -> list[Item]:
    """One item for each row of a JSONL file."""
    return [layout(row, where) for where, row in records.read_rows(path)]


def read_hellaswag(lm: LanguageModel, cfg: EvaluateConfig, path: Path) -> list[Item]:
    """JSONL, or text with six lines an item: context, number of the right ending, four endings."""
    if ".txt" not in path.suffixes:
        return read(hellaswag, lm, cfg, path)
    lines = rows.read_text(path).rstrip("\n").split("\n")
    items = []
    for start in range(0, len(lines), 6):
        context, label, *endings = lines[start : start + 6]
        if len(endings) != 4 or label not in ("0", "1", "2", "3"):
            raise ValueError(
                f"data={path}, line {start + 1}: must begin six lines: context, number of the "
                "right ending (0 to 3), four endings"
            )
        items.append(Item((context,), tuple(endings), int(label)))
    return items


def score(
    lm: LanguageModel, cfg: EvaluateConfig, items: Mapping[int, Item]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """log p of every choice, the two decisions, and which would be right."""
    asked = {number: item.pairs() for number, item in items.items()}
    for number, scored, truncated in queries.score_choices(lm, asked, cfg.batch_tokens):
        item, logprobs = items[number], [queries.total(choice) for choice in scored]
        # The likelihood of one ending under several beginnings needs no correction.
        lengths = [len(ending) for ending in item.endings] if len(item.endings) > 1 else [1]
        yield (
            number,
            {
                "logprobs": logprobs,
                "gold": item.gold,
                "choice": int(np.argmax(logprobs)),
                "choice_norm": int(np.argmax(np.divide(logprobs, lengths))),
                "truncated": truncated,
            },
        )


def summarize(results: Sequence[Mapping[str, Any]]) -> Measures:
    """Accuracies."""
    right = [float(r["choice"] == r["gold"]) for r in results]
    right_norm = [float(r["choice_norm"] == r["gold"]) for r in results]
    return {
        **statistics.mean("acc", right),
        **statistics.mean("acc_norm", right_norm),
        "truncated": sum(r["truncated"] for r in results),
    }


def local(row: Mapping[str, Any], where: str) -> Item:
    """{query, choices, gold}: query, a blank, choice."""
    if not isinstance(row.get("query"), str) or not row["query"]:
        raise ValueError(f"{where}: must have query, choices and gold; it has {', '.join(row)}")
    endings = records.strings(row.get("choices"), "choices", where)
    return Item((row["query"],), tuple(endings), _gold(row, "gold", len(endings), where))


def hellaswag(row: Mapping[str, Any], where: str) -> Item:
    """The Hub's {ctx_a, ctx_b, activity_label, endings, label}, cleaned as the harness does."""
    if "query" in row:
        return local(row, where)
    endings = records.strings(row.get("endings"), "endings", where)
    first, second = (str(row.get(name) or "") for name in ("ctx_a", "ctx_b"))
    context = f"{first} {second.capitalize()}" if first else records.text_field(row, "ctx", where)
    activity = records.text_field(row, "activity_label", where)
    return Item(
        (_clean(f"{activity}: {context}"),),
        tuple(_clean(ending) for ending in endings),
        _gold(row, "label", len(endings), where),
    )


def piqa(row: Mapping[str, Any], where: str) -> Item:
    """The Hub's {goal, sol1, sol2, label}."""
    if "query" in row:
        return _answering(local(row, where))
    goal, *endings = (records.text_field(row, name, where) for name in ("goal", "sol1", "sol2"))
    gold = _gold(row, "label", len(endings), where)
    return Item((f"Question: {goal}\nAnswer:",), tuple(endings), gold)


def arc(row: Mapping[str, Any], where: str) -> Item:
    """The Hub's {question, choices: {text, label}, answerKey}."""
    if "query" in row:
        return _answering(local(row, where))
    question, choices = records.text_field(row, "question", where), row.get("choices")
    if not isinstance(choices, Mapping):
        raise ValueError(f"{where}: choices must have text and label")
    endings = records.strings(choices.get("text"), "choices.text", where)
    labels, key = choices.get("label"), row.get("answerKey")
    if not isinstance(labels, list) or len(labels) != len(endings) or key not in labels:
        raise ValueError(f"{where}: answerKey={key!r:.20} is none of the choices' labels")
    return Item((f"Question: {question}\nAnswer:",), tuple(endings), labels.index(key))


def winogrande(row: Mapping[str, Any], where: str) -> Item:
    """The Hub's {sentence with _, option1, option2, answer}: p(rest | beginning with option)."""
    if "query" in row:
        return local(row, where)
    fields = (records.text_field(row, name, where) for name in ("sentence", "option1", "option2"))
    sentence, *options = fields
    before, gap, after = sentence.partition("_")
    if not gap or not after.strip():
        raise ValueError(f"{where}: sentence must have a _ with text after it")
    contexts = tuple(before + option for option in options)
    return Item(contexts, (after.strip(),), _gold(row, "answer", 2, where, first=1))


LAYOUTS: dict[str, Layout] = {
    "multiple_choice": local, "piqa": piqa, "arc": arc, "winogrande": winogrande,
}  # fmt: skip
READERS = {name: partial(read, layout) for name, layout in LAYOUTS.items()} | {
    "hellaswag": read_hellaswag
}


def _answering(item: Item) -> Item:
    """The harness's prompt from a local query such as "Question: …"."""
    (query,) = item.contexts
    query = query.rstrip()
    return item._replace(contexts=(query if query.endswith("Answer:") else f"{query}\nAnswer:",))


def _gold(row: Mapping[str, Any], name: str, count: int, where: str, first: int = 0) -> int:
    value = row.get(name)
    number = int(str(value)) if re.fullmatch(r"\d{1,9}", str(value)) else -1
    if not first <= number < first + count:
        raise ValueError(f"{where}: {name}={value!r:.20} must be {first} to {first + count - 1}")
    return number - first


def _clean(text: str) -> str:
    """WikiHow's section titles and other brackets do not belong to the sentence."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")
