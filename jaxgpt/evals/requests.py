"""What follows a context, in tokens, as EleutherAI's lm-evaluation-harness cuts it."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from jaxgpt.language_model import LanguageModel
from jaxgpt.sampling import likelihood
from jaxgpt.sampling.likelihood import Group, Scored


class Pair(NamedTuple):
    """A context and a continuation."""

    context: list[int]
    continuation: list[int]
    truncated: bool = False


def encode_pair(lm: LanguageModel, context: str, continuation: str) -> Pair:
    """Both are encoded together, so that a token is what it is in running text.

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
    lm: LanguageModel, requests: Sequence[Sequence[Pair]], batch_tokens: int
) -> Iterator[tuple[int, list[Scored]]]:
    """The scores of each request's pairs, (number of the request, scores), in no certain order.

    Pairs of one request that share their context read it once.
    """
    groups: list[Group] = []
    members: list[tuple[int, list[int]]] = []  # of each group: request, and places therein
    for number, pairs in enumerate(requests):
        by_context: dict[tuple[int, ...], list[int]] = {}
        for place, pair in enumerate(pairs):
            by_context.setdefault(tuple(pair.context), []).append(place)
        for context, places in by_context.items():
            groups.append(Group(context, [pairs[place].continuation for place in places]))
            members.append((number, places))
    found: dict[int, dict[int, Scored]] = {}
    scored = likelihood.score_continuations(lm.config, lm.params, groups, batch_tokens)
    for group, scores in scored:
        number, places = members[group]
        mine = found.setdefault(number, {})
        mine |= dict(zip(places, scores, strict=True))
        if len(mine) == len(requests[number]):
            yield number, [found[number][place] for place in range(len(mine))]
            del found[number]


def total(scored: Scored) -> float:
    """log p of a whole continuation."""
    return float(scored.logprobs.sum(dtype=np.float64))
