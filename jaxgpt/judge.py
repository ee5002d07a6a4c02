"""A reward model as it judges: one number for a conversation or a text."""

from collections.abc import Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt import rundir, scoring, shapes
from jaxgpt.config import ModelConfig
from jaxgpt.convert import chatting
from jaxgpt.convert.load import Loaded, load
from jaxgpt.data import chat
from jaxgpt.data.chat import Message
from jaxgpt.types import Array, Batch, Params


class Judge:
    """A run of scripts/reward.py: the body, the head, and the template by which it reads.

    Args:
        setting: that names the path, for messages.
        body: what the run's network is, where that is loaded already.

    Raises:
        ValueError: it is another run, or has no intact checkpoint.
    """

    def __init__(self, path: str, setting: str, body: Loaded | None = None) -> None:
        if not rundir.is_run(path):
            raise ValueError(f"{setting}={path}: is no run of scripts/reward.py")
        try:
            self.head = rundir.read_params(path, "reward")
        except ValueError as error:
            raise ValueError(f"{setting}={path}: is no run of scripts/reward.py, {error}") from None
        body = load(path, merged=True) if body is None else body
        self.model, self.body = body.config, body.params
        self.form = chatting.chat_format(body)

    def rewards(
        self, conversations: Sequence[Sequence[Message]], batch_tokens: int
    ) -> Iterator[tuple[int, float, bool]]:
        """(number, reward, whether it lost its beginning) of every conversation, in no certain
        order. A conversation is read up to the end of its last turn, at most a context of it.
        """
        return self.score([self._encode(messages) for messages in conversations], batch_tokens)

    def score(
        self, rows: Sequence[Sequence[int] | np.ndarray], batch_tokens: int
    ) -> Iterator[tuple[int, float, bool]]:
        """`rewards` of rows of tokens, each read at its last one."""
        order = sorted(range(len(rows)), key=lambda n: -len(rows[n]))
        room = self.model.context_length
        while order:
            width = min(shapes.bucket(len(rows[order[0]]), 64), room)
            size = max(1, batch_tokens // width)
            some, order = order[:size], order[size:]
            kept = [rows[number][-room:] for number in some]
            batch = {
                "tokens": shapes.start_together(kept, width, size),
                "segments": shapes.start_together([np.ones_like(row) for row in kept], width, size),
            }
            reward_B = np.asarray(_final_reward(self.model, self.body, self.head, batch))
            for number, reward in zip(some, reward_B, strict=False):
                yield number, float(reward), len(rows[number]) > room

    def _encode(self, messages: Sequence[Message]) -> np.ndarray:
        """Up to the last token that the assistant wrote: there the head was trained."""
        *_, encoded = chat.encode(self.form, messages)
        if not encoded.target_T.any():
            raise ValueError("messages: hold no answer of the assistant, which could be judged")
        return encoded.tokens_T[: int(np.flatnonzero(encoded.target_T)[-1]) + 1]


@partial(jax.jit, static_argnums=0)
def _final_reward(model: ModelConfig, body: Params, head: Params, batch: Batch) -> Array:
    return scoring.final_reward(model, body, head, jax.tree.map(jnp.asarray, batch))
