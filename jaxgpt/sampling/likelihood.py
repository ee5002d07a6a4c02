"""Log-likelihoods of given tokens, in few compiled shapes.

`score_rows` reads whole rows. `score_continuations` reads a context once for all the texts that
may follow it, and computes the head only where a continuation is predicted.

Axes of this file: R continuations, each going on from one row of the cache. Notes: chapter 11.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt import kernels, shapes
from jaxgpt.config import ModelConfig
from jaxgpt.model import gpt
from jaxgpt.model.attention import KVCache, init_cache, rows_first
from jaxgpt.types import Array, Params

BATCH_TOKENS = 2048  # positions of one batch, padding included
HEAD_TOKENS = 256  # of which the logits exist at one time


class Scored(NamedTuple):
    """Of each predicted token: its log-probability, and whether it is the likeliest."""

    logprobs: np.ndarray
    greedy: np.ndarray


class Window(NamedTuple):
    """A stretch of a text, of which the last `scored` tokens are predicted."""

    start: int
    stop: int
    scored: int


class Group(NamedTuple):
    """Texts that may follow one context; none of them is empty."""

    context: Sequence[int]
    continuations: Sequence[Sequence[int]]


def windows(num_tokens: int, window: int, stride: int, context_length: int) -> list[Window]:
    """The windows of a text of `num_tokens` tokens.

    A window does not score its first token, nor tokens that an earlier window has scored.

    Raises:
        ValueError: a window of fewer than 2 tokens, or a stride below 1.
    """
    window = min(window, context_length)
    stride = min(stride, window)
    if window < 2 or stride < 1:
        raise ValueError(f"window={window}, stride={stride}: need a window >= 2 and a stride >= 1")
    found, done = [], 0
    for start in range(0, num_tokens, stride):
        stop = min(start + window, num_tokens)
        scored = min(stop - done, stop - start - 1)
        if scored > 0:
            found.append(Window(start, stop, scored))
        done = stop
        if stop == num_tokens:
            break
    return found


def score_rows(
    cfg: ModelConfig,
    params: Params,
    rows: Sequence[Sequence[int]],
    batch_tokens: int = BATCH_TOKENS,
) -> Iterator[tuple[int, Scored]]:
    """Yields (row number, scores of all its tokens but the first, each given those before it).

    Rows are scored in batches of similar length, so they come in another order than given.
    """
    lengths = [len(row) - 1 for row in rows]
    for width, numbers in _batches(lengths, batch_tokens):
        size = _batch_size(len(numbers), width, batch_tokens)
        tokens_BT = shapes.start_together([rows[n][:-1] for n in numbers], width, size)
        targets_BT = shapes.start_together([rows[n][1:] for n in numbers], width, size)
        scores = jax.device_get(_score(cfg, params, None, None, tokens_BT, targets_BT))
        for row, n in enumerate(numbers):
            yield n, Scored(*(x_BT[row, : len(rows[n]) - 1] for x_BT in scores))


def score_continuations(
    cfg: ModelConfig, params: Params, groups: Sequence[Group], batch_tokens: int = BATCH_TOKENS
) -> Iterator[tuple[int, list[Scored]]]:
    """Yields (group number, scores of all tokens of its continuations, given their context).

    Groups are scored in batches of similar length, so they come in another order than given. The
    last token of a context predicts the first of a continuation, so it is read with that.
    """
    lengths = [len(group.context) - 1 for group in groups]
    for width, numbers in _batches(lengths, batch_tokens):
        size = _batch_size(len(numbers), width, batch_tokens)
        contexts = [groups[n].context[:-1] for n in numbers]
        cache = _read(cfg, params, *shapes.end_together(contexts, width, size))

        texts = [groups[n].continuations for n in numbers]
        found: dict[tuple[int, int], Scored] = {}
        for tail, count, part in _parts(texts, batch_tokens // 4):
            parent_R = np.zeros(count, np.int32)
            parent_R[: len(part)] = [row for row, _ in part]
            inputs = [[groups[numbers[row]].context[-1], *texts[row][i][:-1]] for row, i in part]
            tokens_RC = shapes.start_together(inputs, tail, count)
            targets_RC = shapes.start_together([texts[row][i] for row, i in part], tail, count)
            scores = jax.device_get(_score(cfg, params, cache, parent_R, tokens_RC, targets_RC))
            for place, (row, i) in enumerate(part):
                found[row, i] = Scored(*(x_RC[place, : len(texts[row][i])] for x_RC in scores))
        for row, n in enumerate(numbers):
            yield n, [found[row, i] for i in range(len(texts[row]))]


@partial(jax.jit, static_argnames="cfg")
def _read(cfg: ModelConfig, params: Params, tokens_BT: Array, start_B: Array) -> KVCache:
    """The keys and values of the contexts."""
    B, T = tokens_BT.shape
    cache = init_cache(cfg, B, T, start_B)
    read = gpt.apply(rolled(cfg), params, tokens_BT, cache=cache).cache
    assert isinstance(read, KVCache)
    return read


@partial(jax.jit, static_argnames="cfg")
def _score(
    cfg: ModelConfig,
    params: Params,
    cache: KVCache | None,
    parent_R: Array | None,
    tokens_RC: Array,
    targets_RC: Array,
) -> tuple[Array, Array]:
    """Log-probability of every target, and whether it is the likeliest token.

    Args:
        parent_R: the row of the cache that a row of tokens goes on from.
    """
    if cache is not None and parent_R is not None:
        room = [(0, 0), (0, 0), (0, tokens_RC.shape[1]), (0, 0)]
        grow = partial(jax.tree.map, lambda slots: jnp.pad(rows_first(slots)[parent_R], room))
        keys, values = grow(cache.keys), grow(cache.values)
        cache = KVCache(keys, values, cache.length, cache.start_B[parent_R], fresh=False)
    hidden_RCD = gpt.apply(rolled(cfg), params, tokens_RC, cache=cache).hidden_BTD

    def judge(hidden_CD: Array, targets_C: Array) -> tuple[Array, Array]:
        logits_CV = gpt.logits(cfg, params, hidden_CD[None])[0]
        gold_C = jnp.take_along_axis(logits_CV, targets_C[:, None], axis=-1)[:, 0]
        return gold_C - jax.nn.logsumexp(logits_CV, axis=-1), logits_CV.argmax(-1) == targets_C

    flat = (hidden_RCD.reshape(-1, cfg.model_dim), targets_RC.reshape(-1))
    both_A = kernels.by_chunks(judge, flat, HEAD_TOKENS)
    return both_A[0].reshape(targets_RC.shape), both_A[1].reshape(targets_RC.shape)


def rolled(cfg: ModelConfig) -> ModelConfig:
    """The config with remat, which makes the layers a loop also on CPU (see layer_unroll).

    Without a gradient, remat has no other effect. At thousands of tokens the loop costs nothing,
    and 30 layers compile 7x faster.
    """
    return replace(cfg, remat="full")


def _batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[tuple[int, list[int]]]:
    """(width, numbers of those that fit into it), longest first: it shows what fits."""
    widths = [shapes.bucket(length) for length in lengths]
    order = sorted(range(len(widths)), key=widths.__getitem__, reverse=True)
    for width, same in itertools.groupby(order, key=widths.__getitem__):
        numbers = list(same)
        size = max(1, batch_tokens // width)
        for start in range(0, len(numbers), size):
            yield width, numbers[start : start + size]


def _parts(
    texts: Sequence[Sequence[Sequence[int]]], part_tokens: int
) -> Iterator[tuple[int, int, list[tuple[int, int]]]]:
    """(width, rows, which ones) of parts of like length: most texts are far from the longest."""
    left = [(row, i) for row, those in enumerate(texts) for i in range(len(those))]
    left.sort(key=lambda pair: -len(texts[pair[0]][pair[1]]))
    while left:
        row, i = left[0]
        width = shapes.bucket(len(texts[row][i]), smallest=4)
        count = _batch_size(len(left), width, part_tokens)
        yield width, count, left[:count]
        left = left[count:]


def _batch_size(count: int, width: int, batch_tokens: int) -> int:
    """Rows of a batch: as many as fit, or the next power of two where fewer are left."""
    return min(max(1, batch_tokens // width), shapes.power_of_two(count))
