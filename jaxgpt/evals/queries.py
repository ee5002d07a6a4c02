"""What tasks ask of a model: how likely a continuation is, or to write one."""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from jaxgpt.data.chat import Message
from jaxgpt.language_model import LanguageModel
from jaxgpt.sampling import likelihood
from jaxgpt.sampling.likelihood import Group, Scored
from jaxgpt.sampling.sample import Sampling
from jaxgpt.tasks.environment import Question

K = TypeVar("K", bound=Hashable)

MOST_SHARING = 16  # continuations that share one reading of their context
FEWEST_ROWS = 8  # of a batch that is written: decoding reads all weights for each token


class Pair(NamedTuple):
    """A context and a continuation."""

    context: list[int]
    continuation: list[int]
    truncated: bool = False


def encode_pair(lm: LanguageModel, context: str, continuation: str) -> Pair:
    """As EleutherAI's lm-evaluation-harness cuts it: both are encoded together, so that a token is
    what it is in running text.

    Blanks at the end of the context belong to the continuation. An empty context is the token
    that begins or separates texts.
    """
    blanks = len(context) - len(context.rstrip())
    if not context:
        prefix = list(lm.begin_ids) or [lm.tokenizer.eos_id]
        whole = lm.tokenizer.encode(continuation, allow_special=True)
        return fit(lm, prefix, whole)
    if blanks:
        context, continuation = context[:-blanks], context[-blanks:] + continuation
    start = len(lm.encode(context))
    whole = lm.encode(context + continuation)
    if start == 0:
        return encode_pair(lm, "", continuation)
    return fit(lm, whole[:start] if len(whole) > start else lm.encode(context), whole[start:])


def fit(lm: LanguageModel, context: list[int], continuation: list[int]) -> Pair:
    """Drops tokens from the left of the context until the model can read both.

    The last token of the continuation is only predicted, never read.
    """
    room = lm.config.context_length + 1 - len(continuation)
    if room < 1:
        raise ValueError(
            f"a continuation has {len(continuation)} tokens: the model's context is "
            f"{lm.config.context_length}"
        )
    if not continuation:
        raise ValueError("a continuation adds no token to its context: drop that item")
    return Pair(context[-room:], continuation, len(context) > room)


def score(
    lm: LanguageModel, pairs: Mapping[K, Pair], batch_tokens: int
) -> Iterator[tuple[K, Scored]]:
    """The scores of every continuation under its pair's key, in no certain order.

    Pairs that share a context read it once.
    """
    keys_of: dict[tuple[int, ...], list[K]] = {}
    for key, pair in pairs.items():
        keys_of.setdefault(tuple(pair.context), []).append(key)
    members = [
        (context, keys[start : start + MOST_SHARING])
        for context, keys in keys_of.items()
        for start in range(0, len(keys), MOST_SHARING)
    ]
    groups = [
        Group(context, [pairs[key].continuation for key in keys])
        for context, keys in members
        if len(context) > 1
    ]
    shared = [keys for context, keys in members if len(context) > 1]
    for number, scores in likelihood.score_continuations(
        lm.config, lm.params, groups, batch_tokens
    ):
        yield from zip(shared[number], scores, strict=True)

    # After a single token, such as a text's first, there is nothing to share.
    lone = [key for context, keys in members if len(context) == 1 for key in keys]
    rows = [[*pairs[key].context, *pairs[key].continuation] for key in lone]
    for number, scored in likelihood.score_rows(lm.config, lm.params, rows, batch_tokens):
        yield lone[number], scored


def score_choices(
    lm: LanguageModel, items: Mapping[int, Sequence[tuple[str, str]]], batch_tokens: int
) -> Iterator[tuple[int, list[Scored], bool]]:
    """The scores of every item's continuations, and whether a context lost its beginning.

    Args:
        items: number -> context and continuation of every choice.
    """
    pairs = {
        (number, choice): encode_pair(lm, *texts)
        for number, choices in items.items()
        for choice, texts in enumerate(choices)
    }
    found: dict[int, dict[int, Scored]] = {}
    for (number, choice), scored in score(lm, pairs, batch_tokens):
        mine = found.setdefault(number, {})
        mine[choice] = scored
        if len(mine) == len(items[number]):
            truncated = any(pairs[number, choice].truncated for choice in mine)
            yield number, [mine[choice] for choice in range(len(mine))], truncated


def total(scored: Scored) -> float:
    """log p of a whole continuation."""
    return float(scored.logprobs.sum(dtype=np.float64))


def write(
    lm: LanguageModel,
    prompts: Mapping[int, Sequence[int]],
    settings: Sampling,
    stop: Sequence[str],
    batch_tokens: int,
    seed: int = 0,
) -> Iterator[tuple[int, str]]:
    """What the model writes after each prompt, under its number, in no certain order.

    A number and the seed decide a prompt's draws, whatever else is asked. Prompts lose their
    beginning where they leave no room for `max_new_tokens`.
    """
    room = prompt_room(lm, settings)
    order = sorted(prompts, key=lambda n: -len(prompts[n]))
    while order:
        width = min(len(prompts[order[0]]), room) + settings.max_new_tokens
        size = max(FEWEST_ROWS, batch_tokens // width)
        batch, order = order[:size], order[size:]
        ids = [prompts[n][-room:] for n in batch]
        yield from zip(batch, lm.complete(ids, settings, seed, stop, rows=batch), strict=True)


def play(
    lm: LanguageModel,
    asked: Mapping[int, Sequence[Message]],
    prompts: Mapping[int, Sequence[int]],
    tools: Sequence[str],
    settings: Sampling,
    batch_tokens: int,
    seed: int = 0,
) -> Iterator[tuple[int, tuple[str, int]]]:
    """`write` for conversations in which the model may call tools: its last turn, and how many
    calls it made.

    Args:
        prompts: the same as tokens; one that leaves no room is answered by nothing.
    """
    room = prompt_room(lm, settings)
    order = sorted(asked, key=lambda n: -len(prompts[n]))
    yield from ((n, ("", 0)) for n in order if len(prompts[n]) > room)
    order = [n for n in order if len(prompts[n]) <= room]
    while order:
        # Tools make a conversation longer by what they give and by the turns that follow.
        width = min(len(prompts[order[0]]) + 2 * settings.max_new_tokens, lm.config.context_length)
        size = max(FEWEST_ROWS, batch_tokens // width)
        batch, order = order[:size], order[size:]
        environments = [Question(asked[n], names=tools) for n in batch]
        for n, episode in zip(batch, lm.play(environments, settings, seed, batch), strict=True):
            calls = sum(message["role"] == "tool" for message in episode.messages)
            yield n, (episode.messages[-1]["content"], calls)


def prompt_room(lm: LanguageModel, settings: Sampling) -> int:
    """How long a prompt may be."""
    room = lm.config.context_length - settings.max_new_tokens
    if room < 1:
        raise ValueError(
            f"max_new_tokens={settings.max_new_tokens}: leaves no room for a prompt in the "
            f"model's context of {lm.config.context_length}"
        )
    return room
