"""Generated answers that must be right to the digit: GSM8K and arithmetic."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxgpt import tasks
from jaxgpt.config import EvaluateConfig
from jaxgpt.data import synthetic
from jaxgpt.data.chat import Message
from jaxgpt.evals import queries, records, statistics
from jaxgpt.evals.statistics import Measures
from jaxgpt.judge import Judge
from jaxgpt.language_model import LanguageModel
from jaxgpt.sampling.sample import Sampling
from jaxgpt.tasks import verify

# What begins the next question, or ends the line, when a model just goes on.
STOP = {"gsm8k": ("Question:",), "arithmetic": ("\n",)}


class Item(NamedTuple):
    """A prompt and the right number."""

    prompt: str
    answer: str
    rule: Callable[[str], float] | None = None  # an embedded task's opinion of an answer

    @property
    def messages(self) -> list[Message]:
        return [{"role": "user", "content": self.prompt}]


def read_gsm8k(lm: LanguageModel, cfg: EvaluateConfig, path: Path) -> list[Item]:
    """{question, answer} where the answer ends in "#### N"; the harness's prompt, or a chat's."""
    items = []
    for where, row in records.read_rows(path):
        question = records.text_field(row, "question", where)
        answer = verify.stated(records.text_field(row, "answer", where))
        if answer is None:
            raise ValueError(f'{where}: answer must end in "#### N"')
        prompt = question if cfg.chat else f"Question: {question}\nAnswer:"
        items.append(Item(prompt, answer))
    return items


def read_arithmetic(lm: LanguageModel, cfg: EvaluateConfig, path: Path) -> list[Item]:
    """{context, continuation}, such as "25-759=" and "-734", or an embedded task's held-out part.

    Raises:
        ValueError: rows of another form, or an embedded task without a chat.
    """
    if cfg.data in tasks.TASKS:
        if not cfg.chat:
            raise ValueError(f"data={cfg.data}: is asked by the chat template; add --chat")
        task = tasks.TASKS[cfg.data]
        return [
            Item(synthetic.question(p), str(p.answer), partial(task.reward, p))
            for p in task.problems(True)
        ]
    items = []
    for where, row in records.read_rows(path):
        answer = verify.last_number(records.text_field(row, "continuation", where))
        if answer is None:
            raise ValueError(f"{where}: continuation={row['continuation']!r:.40} is no number")
        items.append(Item(records.text_field(row, "context", where), answer))
    return items


def score(
    lm: LanguageModel, cfg: EvaluateConfig, items: Mapping[int, Item]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Every sample's answers: as stated after ####, and as the last number that was written."""
    settings = Sampling(cfg.max_new_tokens, cfg.temperature, cfg.top_p, cfg.top_k)
    stop = () if cfg.chat else STOP[cfg.task]
    room = queries.prompt_room(lm, settings)
    prompts = {number: _encode(lm, cfg, item) for number, item in items.items()}
    samples = {
        number * cfg.samples + sample: prompt
        for number, prompt in prompts.items()
        for sample in range(cfg.samples)
    }
    if cfg.tools:
        asked = {row: items[row // cfg.samples].messages for row in samples}
        written = queries.play(lm, asked, samples, cfg.tools, settings, cfg.batch_tokens, cfg.seed)
    else:
        texts_of = queries.write(lm, samples, settings, stop, cfg.batch_tokens, cfg.seed)
        written = ((row, (text, 0)) for row, text in texts_of)
    judge = Judge(cfg.reward_model, "reward_model") if cfg.reward_model else None
    texts: dict[int, dict[int, tuple[str, int]]] = {}
    for row, answer in written:
        number, sample = divmod(row, cfg.samples)
        mine = texts.setdefault(number, {})
        mine[sample] = answer
        if len(mine) == cfg.samples:
            item, answers = items[number], [mine[sample][0] for sample in range(cfg.samples)]
            found = _judge(item, answers) | {"truncated": len(prompts[number]) > room}
            if item.rule:
                found["rule"] = [item.rule(text) for text in answers]
            if cfg.tools:
                found["calls"] = [mine[sample][1] for sample in range(cfg.samples)]
            if judge is not None:
                found["rewards"] = _rewards(judge, item, answers, cfg.batch_tokens)
            yield number, found


def summarize(results: Sequence[Mapping[str, Any]]) -> Measures:
    """exact_match asks for the stated answer (####), flexible_match for the last number, rule for
    what an embedded task rewards; called_tool is the share of answers with a call on the way.
    """
    measures: Measures = {}
    for name, key in (("exact_match", "stated"), ("flexible_match", "last")):
        shares = [sum(a == r["answer"] for a in r[key]) / len(r[key]) for r in results]
        measures |= statistics.mean(name, shares)
    if all("rule" in r for r in results):
        measures |= statistics.mean("rule", [sum(r["rule"]) / len(r["rule"]) for r in results])
    if all("calls" in r for r in results):
        used = [sum(calls > 0 for calls in r["calls"]) / len(r["calls"]) for r in results]
        measures |= statistics.mean("called_tool", used)
    samples = len(results[0]["last"])
    if samples > 1:
        right = [sum(a == r["answer"] for a in r["last"]) for r in results]
        for k in _powers_of_two(samples):
            chances = [statistics.pass_at_k(samples, count, k) for count in right]
            measures |= statistics.mean(f"pass@{k}", chances)
        votes = [float(statistics.majority(r["last"]) == r["answer"]) for r in results]
        measures |= statistics.mean(f"maj@{samples}", votes)
    if "rewards" in results[0]:
        best = [float(r["last"][int(np.argmax(r["rewards"]))] == r["answer"]) for r in results]
        measures |= statistics.mean(f"best@{samples}", best)
    return measures | {"truncated": sum(r["truncated"] for r in results)}


def _encode(lm: LanguageModel, cfg: EvaluateConfig, item: Item) -> list[int]:
    if cfg.chat:
        return lm.encode_chat(item.messages)
    return lm.encode(item.prompt)


def _judge(item: Item, texts: Sequence[str]) -> dict[str, Any]:
    return {
        "answer": item.answer,
        "stated": [verify.stated(text) for text in texts],
        "last": [verify.last_number(text) for text in texts],
        "texts": list(texts),
    }


def _rewards(judge: Judge, item: Item, answers: Sequence[str], batch_tokens: int) -> list[float]:
    said = [[*item.messages, {"role": "assistant", "content": answer}] for answer in answers]
    found = {number: reward for number, reward, _ in judge.rewards(said, batch_tokens)}
    return [found[number] for number in range(len(answers))]


def _powers_of_two(largest: int) -> Iterator[int]:
    return itertools.takewhile(lambda k: k <= largest, (1 << n for n in itertools.count()))
