"""Episodes: what a policy writes in an environment, turn by turn, until it is done."""

import math
import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from jaxgpt import shapes
from jaxgpt.config import ModelConfig
from jaxgpt.data import chat
from jaxgpt.data.chat import Format, Message
from jaxgpt.sampling.sample import Completion, Sampling, check_prompts, generate
from jaxgpt.tasks.environment import Environment, Turn
from jaxgpt.types import Params


class Writer(NamedTuple):
    """The network that writes, and how its turns are told apart."""

    model: ModelConfig
    form: Format
    stop_ids: tuple[int, ...]


@dataclass
class Episode:
    """A conversation token by token, and what it was worth."""

    messages: list[Message]
    tokens: list[int]
    mask: list[int]  # 1: the policy drew this token
    logprobs: list[float] = field(default_factory=list)  # zero where it did not
    reward: float = 0.0
    turns: int = 0
    last_turn: int = 0  # tokens of it
    stopped: bool = False  # the last turn ended by a stop token

    def add(self, tokens: Sequence[int], logprobs: Sequence[float] | None = None) -> None:
        """What the policy drew; without `logprobs`, what it is told."""
        self.tokens += tokens
        self.mask += [int(logprobs is not None)] * len(tokens)
        self.logprobs += logprobs or [0.0] * len(tokens)


def play(
    writer: Writer,
    policy: Params,
    environments: Sequence[Environment],
    how: Sampling,
    rng: Any,
    seconds: float = 60.0,
    mesh: Any = None,
    rows: Sequence[int] | None = None,
) -> tuple[list[Episode], float]:
    """An episode in every environment, and the seconds that the policy wrote.

    The policy writes a turn up to its stop token; what the environment answers, by the chat
    template, is read but not learned. An episode ends when its environment says so, when a turn
    has no end, or when the context is full.

    Args:
        policy: laid out by `for_decoding`.
        seconds: how long an environment may think about one turn.
        rows: numbers that, with `rng`, decide the draws of each episode; default 0, 1, 2, …
    """
    episodes = [_begin(writer.form, environment) for environment in environments]
    check_prompts(writer.model, [episode.tokens for episode in episodes])
    going, spent = list(range(len(episodes))), 0.0
    numbers = going if rows is None else rows
    while going:
        # A power of two after the first turn, so that few shapes are compiled.
        size = len(episodes) if len(going) == len(episodes) else shapes.power_of_two(len(going))
        filled = [*going, *[going[-1]] * (min(size, len(episodes)) - len(going))]
        began = time.perf_counter()
        written = generate(
            writer.model, policy, [episodes[n].tokens for n in filled], how,
            stop_ids=writer.stop_ids, rng=rng, rows=[numbers[n] for n in filled], mesh=mesh,
            compact=True,
        )[: len(going)]  # fmt: skip
        spent += time.perf_counter() - began
        texts = [writer.form.tokenizer.decode(completion.tokens) for completion in written]
        turns = judge([environments[n] for n in going], texts, seconds)
        going = [
            n
            for n, completion, text, turn in zip(going, written, texts, turns, strict=True)
            if _take_turn(writer, episodes[n], completion, text, turn)
        ]
    return episodes, spent


def judge(environments: Sequence[Environment], texts: Sequence[str], seconds: float) -> list[Turn]:
    """What the environments answer.

    Raises:
        ValueError: one of them raised, took longer than `seconds`, or gave no finite reward.
    """
    answers: queue.Queue[Turn | BaseException] = queue.Queue()

    def work() -> None:
        for environment, text in zip(environments, texts, strict=True):
            try:
                answers.put(environment.step(text))
            except BaseException as error:  # raised again where the turn is asked for
                return answers.put(error)

    threading.Thread(target=work, daemon=True).start()  # one that hangs must not keep the process
    found = []
    for text in texts:
        try:
            turn = answers.get(timeout=seconds)
        except queue.Empty:
            raise ValueError(
                f"rollout.judge_seconds={seconds:g}: judging {text!r:.200} took longer"
            ) from None
        if isinstance(turn, BaseException):
            kind = type(turn).__name__
            raise ValueError(f"data.path: judging {text!r:.200} failed, {kind}: {turn}") from turn
        if not isinstance(turn.reward, int | float) or not math.isfinite(turn.reward):
            raise ValueError(
                f"data.path: the reward of {text!r:.200} is {turn.reward}, not a finite number"
            )
        found.append(turn)
    return found


def transcript(episode: Episode) -> str:
    """An episode for people: who said what, what tools gave, what it was worth."""
    lines = [
        f"  → {message['content']}" if message["role"] == "tool"
        else f"{message['role']}: {message['content']}"
        for message in episode.messages
    ]  # fmt: skip
    cut = "" if episode.stopped else ", cut off"
    return "\n".join([*lines, f"[reward {episode.reward:g}{cut}]"])


def _begin(form: Format, environment: Environment) -> Episode:
    messages = environment.reset()
    tokens = chat.prompt(form, messages)
    episode = Episode(list(messages), [], [])
    episode.add(tokens)
    return episode


def _take_turn(
    writer: Writer, episode: Episode, completion: Completion, text: str, turn: Turn
) -> bool:
    """Notes a turn and what follows it; whether there is another one."""
    drawn, logprobs = list(completion.tokens), list(completion.logprobs)
    if completion.end is not None:
        drawn, logprobs = [*drawn, completion.end[0]], [*logprobs, completion.end[1]]
    episode.add(drawn, logprobs)
    episode.turns += 1
    episode.last_turn, episode.stopped = len(drawn), completion.stopped
    episode.reward += float(turn.reward)
    episode.messages.append({"role": "assistant", "content": text})
    if turn.done or turn.observation is None or not completion.stopped:
        return False
    episode.messages.append({"role": "tool", "content": turn.observation})
    told = chat.after_turn(writer.form, episode.messages)
    if len(episode.tokens) + len(told) >= writer.model.context_length:
        episode.messages.pop()
        return False
    episode.add(told)
    return True
