"""The field's standard measures. A task reads items, scores them one batch at a time, sums up."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxgpt import files, rundir, tasks, train
from jaxgpt.config import EvaluateConfig
from jaxgpt.data import synthetic
from jaxgpt.evals import choice, core, exact_match, judges, lambada, perplexity, records
from jaxgpt.evals.statistics import Measures
from jaxgpt.language_model import LanguageModel


class Task(NamedTuple):
    """Three pure functions."""

    read: Callable[[LanguageModel, EvaluateConfig, Path], Sequence[Any]]
    # Items by their number; yields (number, result), in whatever order is quick.
    score: Callable[[LanguageModel, EvaluateConfig, Mapping[int, Any]], Iterator]
    summarize: Callable[[Sequence[Mapping[str, Any]]], Measures]


TASKS = {
    "perplexity": Task(perplexity.read, perplexity.score, perplexity.summarize),
    **{name: Task(read, choice.score, choice.summarize) for name, read in choice.READERS.items()},
    "lambada": Task(lambada.read, lambada.score, lambada.summarize),
    "gsm8k": Task(exact_match.read_gsm8k, exact_match.score, exact_match.summarize),
    "arithmetic": Task(exact_match.read_arithmetic, exact_match.score, exact_match.summarize),
    "core": Task(core.read, core.score, core.summarize),
    "reward": Task(judges.read, judges.score, judges.summarize),
}

# Settings that change no result: where things are, how many items, how many at a time.
FREE = ("checkpoint", "data", "limit", "output", "batch_tokens", "reward_model")


def evaluate(lm: LanguageModel, cfg: EvaluateConfig, output: Path | None = None) -> dict[str, Any]:
    """The measures of a task, their standard errors and the count.

    Args:
        output: keeps the results of single items; the same call then continues from them.

    Raises:
        ValueError: a data file of another layout, or results of another evaluation.
    """
    import tqdm

    task, path = TASKS[cfg.task], files.path(cfg.data)
    items = task.read(lm, cfg, path)
    items = items[: cfg.limit] if cfg.limit else items
    results = records.Results(output, _question(lm, cfg) if output else {})
    pending = {n: item for n, item in enumerate(items) if n not in results.found}
    bar = tqdm.tqdm(
        total=len(items), initial=len(items) - len(pending), desc=cfg.task, disable=None
    )
    with bar:
        for number, result in task.score(lm, cfg, pending):
            results.add(number, result)
            bar.update()
    results.close()
    measures = task.summarize([results.found[n] for n in range(len(items))])
    return {"task": cfg.task, **measures, "count": len(items)}


def is_embedded(cfg: EvaluateConfig) -> bool:
    """Whether `data` names an embedded task rather than a file."""
    known = {"arithmetic": tasks.TASKS, "reward": synthetic.PREFERENCES}
    return cfg.data in known.get(cfg.task, {})


def results_name(lm: LanguageModel, cfg: EvaluateConfig) -> str:
    """A file name of its own for every evaluation of a run, which is trained on in between."""
    question = json.dumps(_question(lm, cfg), sort_keys=True)
    return f"{cfg.task}-{hashlib.sha256(question.encode()).hexdigest()[:12]}.jsonl"


def _question(lm: LanguageModel, cfg: EvaluateConfig) -> dict[str, Any]:
    """All that decides the results."""
    settings = {name: value for name, value in vars(cfg).items() if name not in FREE}
    judge = {"reward_model": rundir.fingerprint(cfg.reward_model)} if cfg.reward_model else {}
    return {
        **settings,
        **judge,
        "data": cfg.data if is_embedded(cfg) else records.digest(cfg.data),
        "weights": train.fingerprint(lm.params),
        "tokenizer": lm.tokenizer.fingerprint,
    }
