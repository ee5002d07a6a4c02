"""What a policy acts in: it is asked, it writes a turn, something answers, until it is done."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from jaxgpt.data.chat import Message
from jaxgpt.tasks import tools

MAX_CALLS = 8  # of tools in one episode


class Turn(NamedTuple):
    """What follows a turn of the policy."""

    observation: str | None  # the next message, of role "tool"; None when done
    reward: float  # added to the episode's
    done: bool


class Environment(Protocol):
    """One episode on one problem."""

    def reset(self) -> list[Message]:
        """Begins the episode; the prompt."""
        ...

    def step(self, text: str) -> Turn:
        """Answers what the policy wrote in its turn, which comes without the stop token."""
        ...


class Question:
    """A question with tools at hand; the first turn that calls none of them is the answer.

    Args:
        reward: of the answer.
        max_calls: one more ends the episode without an answer, at no reward.
    """

    def __init__(
        self,
        prompt: Sequence[Message],
        reward: Callable[[str], float] = lambda answer: 0.0,
        names: Sequence[str] = (),
        max_calls: int = MAX_CALLS,
    ) -> None:
        self.prompt, self.reward, self.max_calls = list(prompt), reward, max_calls
        self.names = tools.check(names)
        self.calls = 0

    def reset(self) -> list[Message]:
        self.calls = 0
        return list(self.prompt)

    def step(self, text: str) -> Turn:
        observation = tools.observe(text, self.names)
        if observation is None:
            return Turn(None, self.reward(text), True)
        self.calls += 1
        if self.calls > self.max_calls:
            return Turn(None, 0.0, True)
        return Turn(observation, 0.0, False)
