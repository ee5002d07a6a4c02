"""CORE: 22 few-shot tasks and the mean of their centred accuracies (DCLM, arXiv:2406.11794).

A folder holds the tasks as JSONL, in any folders of its own, under the names of DCLM's evaluation
bundle: {query, choices, gold}, {context_options, continuation, gold} or {context, continuation}.
Order and examples are drawn as nanochat's core_eval draws them, so that figures can be compared.
Accuracy is centred on what guessing gives: 0 is chance, 1 is perfect.
"""

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxgpt.config import EvaluateConfig
from jaxgpt.evals import queries, records, statistics
from jaxgpt.evals.statistics import Measures
from jaxgpt.language_model import LanguageModel

ANSWER = "\nAnswer: "


class Kind(NamedTuple):
    """How a task is asked."""

    file: str  # without .jsonl
    shots: int  # examples before the question
    chance: float  # accuracy of guessing
    between: str = " "  # context and continuation


TASKS = {
    "hellaswag_zeroshot": Kind("hellaswag", 0, 0.25),
    "jeopardy": Kind("jeopardy_all", 10, 0.0, ANSWER),
    "bigbench_qa_wikidata": Kind("bigbench_qa_wikidata", 10, 0.0),
    "arc_easy": Kind("arc_easy", 10, 0.25, ANSWER),
    "arc_challenge": Kind("arc_challenge", 10, 0.25, ANSWER),
    "copa": Kind("copa", 0, 0.5),
    "commonsense_qa": Kind("commonsense_qa", 10, 0.2),
    "piqa": Kind("piqa", 10, 0.5, ANSWER),
    "openbook_qa": Kind("openbook_qa", 0, 0.25),
    "lambada_openai": Kind("lambada_openai", 0, 0.0),
    "hellaswag": Kind("hellaswag", 10, 0.25),
    "winograd": Kind("winograd_wsc", 0, 0.5),
    "winogrande": Kind("winogrande", 0, 0.5),
    "bigbench_dyck_languages": Kind("bigbench_dyck_languages", 10, 0.0),
    "agi_eval_lsat_ar": Kind("agi_eval_lsat_ar", 3, 0.2),
    "bigbench_cs_algorithms": Kind("bigbench_cs_algorithms", 10, 0.0),
    "bigbench_operators": Kind("bigbench_operators", 10, 0.0),
    "bigbench_repeat_copy_logic": Kind("bigbench_repeat_copy_logic", 10, 0.0),
    "squad": Kind("squad", 10, 0.0),
    "coqa": Kind("coqa", 0, 0.0),
    "boolq": Kind("boolq", 10, 0.62, ANSWER),
    "bigbench_language_identification": Kind("bigbench_language_identification", 10, 0.091),
}


class Item(NamedTuple):
    """A question after its examples."""

    task: str
    of: int  # items of the task
    pairs: tuple[tuple[str, str], ...]  # context and continuation of every choice
    gold: int | None  # the right one; None: the continuation must be what the model writes


def read(lm: LanguageModel, cfg: EvaluateConfig, path: Path) -> list[Item]:
    """The items of all tasks that are there, one of each task in turn.

    Raises:
        ValueError: no folder, none of the tasks in it, or a row of another form.
    """
    if not path.is_dir():
        raise ValueError(f"data={path}: must be a folder with the tasks of CORE as JSONL")
    found = {file.stem: file for file in sorted(path.rglob("*.jsonl"))}
    columns = [_items(name, kind, found[kind.file]) for name, kind in TASKS.items()
               if kind.file in found]  # fmt: skip
    if not columns:
        known = ", ".join(sorted({kind.file for kind in TASKS.values()}))
        raise ValueError(f"data={path}: holds none of CORE's files ({known})")
    longest = max(map(len, columns))
    return [items[n] for n in range(longest) for items in columns if n < len(items)]


def score(
    lm: LanguageModel, cfg: EvaluateConfig, items: Mapping[int, Item]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Whether the likeliest choice per token, or what would be written greedily, is right."""
    asked = {number: item.pairs for number, item in items.items()}
    for number, scored, truncated in queries.score_choices(lm, asked, cfg.batch_tokens):
        item = items[number]
        if item.gold is None:
            scores = [float(scored[0].greedy.all())]
            right = scores[0] > 0
        else:
            scores = [queries.total(choice) / len(choice.logprobs) for choice in scored]
            right = np.argmax(scores) == item.gold
        yield number, {
            "task": item.task, "of": item.of, "right": bool(right), "scores": scores,
            "truncated": truncated,
        }  # fmt: skip


def summarize(results: Sequence[Mapping[str, Any]]) -> Measures:
    """Accuracy and centred accuracy of every task; `core` only if all of all tasks was asked."""
    by_task: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        by_task.setdefault(result["task"], []).append(result)
    measures: Measures = {}
    for name, mine in by_task.items():
        right = [float(result["right"]) for result in mine]
        chance = TASKS[name].chance
        accuracy = statistics.mean("acc", right)
        measures |= {
            f"{name}_acc": accuracy["acc"], f"{name}_acc_stderr": accuracy["acc_stderr"],
            f"{name}_interval": statistics.interval(sum(right), len(right)),
            f"{name}": (accuracy["acc"] - chance) / (1 - chance),
            f"{name}_stderr": accuracy["acc_stderr"] / (1 - chance),
        }  # fmt: skip
    partial = [name for name, mine in by_task.items() if len(mine) < mine[0]["of"]]
    missing = [name for name in TASKS if name not in by_task]
    if not (missing or partial):
        errors = [measures[f"{name}_stderr"] for name in TASKS]
        measures["core"] = float(np.mean([measures[name] for name in TASKS]))
        measures["core_stderr"] = math.sqrt(sum(error**2 for error in errors)) / len(TASKS)
    return measures | {
        "missing": missing, "partial": partial, "truncated": sum(r["truncated"] for r in results),
    }  # fmt: skip


def _items(name: str, kind: Kind, file: Path) -> list[Item]:
    rows = list(records.read_rows(file))
    random.Random(1337).shuffle(rows)
    made = []
    if len(rows) <= kind.shots:
        raise ValueError(f"data={file}: {name} needs {kind.shots} examples beside each item")
    for number, (where, row) in enumerate(rows):
        drawn = random.Random(1234 + number).sample(range(len(rows) - 1), kind.shots)
        others = [rows[other + (other >= number)] for other in drawn]  # all but the item itself
        before = "".join(f"{_whole(kind, shot, at)}\n\n" for at, shot in others)
        pairs, gold = _pairs(kind, row, where)
        made.append(Item(name, len(rows), tuple((before + c, a) for c, a in pairs), gold))
    return made


def _whole(kind: Kind, row: Mapping[str, Any], where: str) -> str:
    """An example with its right answer."""
    pairs, gold = _pairs(kind, row, where)
    return "".join(pairs[gold or 0])


def _pairs(
    kind: Kind, row: Mapping[str, Any], where: str
) -> tuple[list[tuple[str, str]], int | None]:
    """Context and continuation of every choice of a row, and which is right."""
    if "context_options" in row:
        contexts = records.strings(row["context_options"], "context_options", where)
        ending = records.text_field(row, "continuation", where)
        pairs = [(context, kind.between + ending) for context in contexts]
    elif "choices" in row:
        query = row.get("query")
        if not isinstance(query, str):
            raise ValueError(f"{where}: query must be text, not {query!r:.80}")
        choices = records.strings(row["choices"], "choices", where)
        pairs = [(query, kind.between + choice) for choice in choices]
    else:
        context = records.text_field(row, "context", where).strip()
        return [(context, kind.between + records.text_field(row, "continuation", where))], None
    gold = row.get("gold")
    if not isinstance(gold, int) or not 0 <= gold < len(pairs):
        raise ValueError(f"{where}: gold={gold!r}: must number one of {len(pairs)} choices from 0")
    return pairs, gold
