"""Rollouts: a policy writes answers to a task's problems, they are judged, and become batches.

One forward definition serves both sides: answers are drawn by the scan sampler, then scored once by
the forward pass that trains. How far the two are apart is measured in every rollout.
"""

import zlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxgpt import shapes, sharding, train
from jaxgpt.config import RolloutConfig, RunConfig
from jaxgpt.data import batches, examples
from jaxgpt.episodes import Episode, Writer, play, transcript
from jaxgpt.sampling.sample import Sampling, for_decoding
from jaxgpt.tasks import Task
from jaxgpt.tasks.environment import Environment
from jaxgpt.types import Batch, BatchSpec, Carry, Params, Report

WIDTH = 16  # rows are as wide as their longest, rounded up to a multiple of this
SHOWN = 4  # episodes in the log
# |Δ log p| between sampler and trainer from which on they are not the same function. One token in a
# thousand may lie beyond: where a network can hardly decide, rounding alone moves it further.
AGREEMENT = {"float32": 1e-4, "bfloat16": 5e-2}
QUANTILE = 0.999

Rows = dict[str, np.ndarray]  # name -> array whose first axis is the answer
Score = Callable[[Params, Batch], dict[str, Any]]  # compiled; `logprobs` must be among them
RewardFn = Callable[[Params, Batch], Any]  # compiled; the reward [B] of whole rows
# (rows, carry) -> (what else the loss reads, measures); see `Rollouts`
Prepare = Callable[[Rows, Carry], tuple[Rows, dict[str, float]]]
READ = ("tokens", "targets", "mask", "segments")  # by every loss


class Problems(NamedTuple):
    """Where episodes come from: how many there are, and number -> a new one."""

    size: int
    make: Callable[[int], Environment]
    judged: bool = True  # rewards mean something
    full: str = "exact_match"  # what the share of answers with a reward of 1 is called


class Rollouts:
    """The `next_batch` of a stage that learns from what its own policy writes.

    Every `updates` steps it makes a rollout, which depends on the parameters, the seed, the
    rollout's number and the row alone; the steps up to the next one get its rows in minibatches,
    every row once an epoch.

    Args:
        score: what the networks say of rows, [B, T] or [B].
        prepare: makes of all rows what the loss reads beside tokens, targets and mask: advantages
            for one thing. `score`'s results are among the rows, and `sampler` (log-probabilities
            as drawn), `reward`, `stopped`.
        resample: how often groups of equally good answers are replaced by others.
        loss_reads: the rows that reach the loss.
    """

    def __init__(
        self,
        cfg: RunConfig,
        settings: RolloutConfig,
        writer: Writer,
        problems: Problems,
        score: Score,
        prepare: Prepare,
        loss_reads: Sequence[str],
        resample: int = 0,
    ) -> None:
        self.seed, self.settings, self.writer, self.problems = cfg.seed, settings, writer, problems
        self.batch_size = cfg.train.batch_size
        self.num_rows = settings.rows(self.batch_size)
        self.score, self.prepare, self.resample = score, prepare, resample
        self.loss_reads = (*READ, *loss_reads)
        self.mesh = jax.sharding.get_mesh()
        self._rows: tuple[int, Rows] = (-1, {})
        if problems.size == 0:
            raise ValueError("data.path: has no problem to practise on")
        sharding.check_rows(self.mesh, self.batch_size)

    def __call__(self, params: Params, carry: Carry, step: int) -> Batch:
        number, update = divmod(step, self.settings.updates)
        report = None
        if update == 0:
            rows, report = self.roll(params, carry, number)
            self._rows = (number, rows)
        made, rows = self._rows
        assert made == number, "a run resumes where a rollout begins"
        per_epoch = self.settings.updates // self.settings.epochs
        first = update * self.batch_size + np.arange(self.batch_size)
        epoch_key = self.seed + number * self.settings.epochs
        chosen = batches.shuffled(first, per_epoch * self.batch_size, epoch_key)
        batch = self._place(rows, chosen)
        return batch if report is None else {**batch, "report": report}

    def roll(self, params: Params, carry: Carry, number: int) -> tuple[Rows, Report]:
        """Rollout `number`: all that the loss reads, and what to tell of it."""
        policy = for_decoding(self.writer.model, params["policy"], self.num_rows)
        episodes, seconds = self._write(policy, number, 0)
        first = episodes
        for attempt in range(1, self.resample + 1):
            lacking = sum(not informative(group) for group in self._groups(episodes))
            if not lacking:
                break
            more, spent = self._write(policy, number, attempt)
            seconds += spent
            episodes = self._replace(episodes, more)
        self._require_stops(number, first)
        rows = lay_out(episodes, self.writer.model.context_length)
        rows["reward"] = np.array([self._worth(episode) for episode in episodes], np.float32)
        rows |= self._by_parts(partial(self.score, params), rows)
        measures = self._measures(first, rows)
        drawn = sum(sum(e.mask) for e in first)
        measures["rollout/tokens"] = float(drawn)
        measures["speed/rollout_tokens_per_second"] = drawn / max(seconds, 1e-9)
        self._require_agreement(measures)
        if self.settings.truncated == "mask":
            rows["mask"] = rows["mask"] * rows["stopped"][:, None]
        more_rows, more_measures = self.prepare(rows, jax.device_get(carry))
        kept = {
            name: array for name, array in (rows | more_rows).items() if name in self.loss_reads
        }
        warning = "" if any(e.stopped for e in first) else self._no_stop()
        texts = [transcript(e) for e in episodes[:: self.settings.samples][:SHOWN]]
        return kept, Report(measures | more_measures, texts, warning)

    def evaluate(
        self, held_out: Problems, limit: int, params: Params, reward: RewardFn | None = None
    ) -> dict[str, float]:
        """Reward, exact match and length of greedy answers to held-out problems.

        Args:
            limit: of problems, evenly spread; 0: all.
            reward: a learnt one, to be measured too.
        """
        count = min(limit or held_out.size, held_out.size)
        numbers = [n * held_out.size // count for n in range(count)]
        policy = for_decoding(self.writer.model, params["policy"], self.num_rows)
        how = Sampling(self.settings.max_new_tokens, temperature=0.0, top_p=1.0)
        size, found, learnt = self.num_rows, [], []
        for start in range(0, count, size):
            some = numbers[start : start + size]
            filled = [*some, *[some[-1]] * (size - len(some))]  # one shape is compiled
            environments = [held_out.make(n) for n in filled]
            episodes, _ = self._play(policy, environments, how, jax.random.key(0))
            found += episodes[: len(some)]
            if reward is not None:
                rows = lay_out(episodes, self.writer.model.context_length)
                scores = self._by_parts(lambda batch: {"reward": reward(params, batch)}, rows)
                learnt += scores["reward"][: len(some)].tolist()
        measures = {
            "val/reward": [e.reward for e in found],
            f"val/{held_out.full}": [is_right(e) for e in found],
            "val/length": [sum(e.mask) for e in found],
            "val/truncated": [not e.stopped for e in found],
            "val/learnt_reward": learnt,
        }
        return {name: float(np.mean(values)) for name, values in measures.items() if values}

    def _write(self, policy: Params, number: int, attempt: int) -> tuple[list[Episode], float]:
        """New episodes, the answers to one prompt beside each other."""
        P = self.settings.samples
        num_groups = self.num_rows // P
        turn = number * (self.resample + 1) + attempt
        chosen = batches.shuffled(
            turn * num_groups + np.arange(num_groups), self.problems.size, self.seed
        )
        environments = [self.problems.make(int(n)) for n in np.repeat(chosen, P)]
        how = Sampling(self.settings.max_new_tokens, self.settings.temperature, top_p=1.0)
        rng = jax.random.fold_in(jax.random.key(self.seed), zlib.crc32(b"rollout"))
        return self._play(policy, environments, how, jax.random.fold_in(rng, turn))

    def _play(
        self, policy: Params, environments: list[Environment], how: Sampling, rng: Any
    ) -> tuple[list[Episode], float]:
        return play(
            self.writer, policy, environments, how, rng, self.settings.judge_seconds, self.mesh
        )

    def _groups(self, episodes: list[Episode]) -> list[list[Episode]]:
        P = self.settings.samples
        return [episodes[first : first + P] for first in range(0, len(episodes), P)]

    def _replace(self, episodes: list[Episode], more: list[Episode]) -> list[Episode]:
        """Informative new groups in the place of uninformative ones."""
        spare = iter([group for group in self._groups(more) if informative(group)])
        kept = [
            group if informative(group) else next(spare, group) for group in self._groups(episodes)
        ]
        return [episode for group in kept for episode in group]

    def _worth(self, episode: Episode) -> float:
        """The reward less what the last stretch of an overlong answer costs."""
        buffer = self.settings.overlong_buffer
        over = episode.last_turn - (self.settings.max_new_tokens - buffer)
        return episode.reward - (min(max(over / buffer, 0.0), 1.0) if buffer else 0.0)

    def _by_parts(self, fn: Callable[[Batch], dict[str, Any]], rows: Rows) -> Rows:
        """`fn` of all rows, as many at a time as a step reads."""
        parts = []
        for first in range(0, self.num_rows, self.batch_size):
            found = fn(self._place(rows, first + np.arange(self.batch_size)))
            parts.append({name: sharding.whole(array) for name, array in found.items()})
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _place(self, rows: Rows, chosen: np.ndarray) -> Batch:
        wanted = {n: a for n, a in rows.items() if n in self.loss_reads}
        read = lambda numbers: {name: array[chosen[numbers]] for name, array in wanted.items()}
        return sharding.place_rows(self.mesh, self.batch_size, read)

    def _measures(self, episodes: list[Episode], rows: Rows) -> dict[str, float]:
        """Of the answers as they were drawn, before any group was replaced."""
        groups = self._groups(episodes)
        difference = np.abs(rows["logprobs"] - rows["sampler"])[rows["mask"] > 0]
        mean = lambda values: float(np.mean(list(values)))
        measures = {
            "rollout/length": mean(sum(e.mask) for e in episodes),
            "rollout/truncated": mean(not e.stopped for e in episodes),
            "rollout/difference_max": float(difference.max()),
            "rollout/difference_p999": float(np.quantile(difference, QUANTILE)),
            "rollout/difference_mean": float(difference.mean()),
        }
        if self.problems.judged:
            measures["rollout/reward"] = mean(e.reward for e in episodes)
            measures["rollout/reward_std"] = float(np.std([e.reward for e in episodes]))
            measures[f"rollout/{self.problems.full}"] = mean(is_right(e) for e in episodes)
        if self.problems.judged and self.settings.samples > 1:
            measures["rollout/uninformative"] = mean(not informative(g) for g in groups)
        if any(e.turns > 1 for e in episodes):
            measures["rollout/turns"] = mean(e.turns for e in episodes)
        return measures

    def _require_stops(self, number: int, episodes: list[Episode]) -> None:
        if number == 0 and not any(e.stopped for e in episodes):
            raise ValueError(self._no_stop())

    def _no_stop(self) -> str:
        return (
            f"rollout.max_new_tokens={self.settings.max_new_tokens}: none of {self.num_rows} "
            "answers ended by a stop token, so nothing would be learned but to be cut off; raise "
            "it, or start from a model that was tuned to answer"
        )

    def _require_agreement(self, measures: dict[str, float]) -> None:
        found, dtype = measures["rollout/difference_p999"], self.writer.model.dtype
        if not found <= AGREEMENT[dtype]:
            raise FloatingPointError(
                f"the sampler's and the trainer's log-probabilities differ by {found:.3g} at one "
                f"token in a thousand, more than {AGREEMENT[dtype]:g} for model.dtype={dtype}: "
                "they are not of one policy"
            )


def minibatch(cfg: RunConfig, loss_reads: Sequence[str]) -> BatchSpec:
    """The arrays [B, T] of a minibatch, as wide as the longest rollout."""
    kinds = {name: examples.KINDS[name] for name in READ} | dict.fromkeys(loss_reads, np.float32)
    return train.spec(kinds, cfg.train.batch_size, cfg.model.context_length)


def lay_out(episodes: Sequence[Episode], context_length: int) -> Rows:
    """Episodes as rows, filled up on the right; `mask` is 1 where the policy drew the target."""
    longest = max(len(episode.tokens) for episode in episodes)
    T = shapes.multiple(longest, WIDTH, context_length)
    lay = partial(shapes.start_together, width=T)
    rows: Rows = {
        # The last token is read, too: a reward model judges there.
        "tokens": lay([e.tokens for e in episodes]),
        "targets": lay([e.tokens[1:] for e in episodes]),
        "mask": lay([e.mask[1:] for e in episodes], kind=np.float32),
        "segments": lay([[1] * len(e.tokens) for e in episodes]),
        "sampler": lay([e.logprobs[1:] for e in episodes], kind=np.float32),
    }
    rows["stopped"] = np.array([episode.stopped for episode in episodes], np.float32)
    return rows


def informative(group: Sequence[Episode]) -> bool:
    """Not all answers to the prompt are equally good."""
    return len({episode.reward for episode in group}) > 1


def is_right(episode: Episode) -> bool:
    """Tasks give an answer that is right in every way a reward of 1."""
    return episode.reward > 1 - 1e-6


def from_task(task: Task, held_out: bool) -> Problems:
    """The problems of one split of a task (tasks/__init__.py)."""
    problems = list(task.problems(held_out))
    make = lambda number: task.environment(problems[number])
    return Problems(len(problems), make, full=task.full)
