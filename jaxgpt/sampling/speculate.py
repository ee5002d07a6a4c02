"""Several tokens in one pass: a draft proposes them, and the model checks them.

Weights are read once for all tokens of a pass, so that a pass over eight takes a CPU three times as
long as one over a single token. A draft, a smaller model or what stands earlier in the text,
proposes the next tokens. The model reads them all, and keeps those that it would have drawn itself:

    text        the cat sat on the mat. So the cat sat
    proposed                                           on  the mat .
    drawn                                              on  the rug .  And

Three tokens are new: the two that are kept, and the one that the model draws in place of the third.

The text is the same as without a draft. Each token is drawn with noise that belongs to its row and
its place (`sample.draw`), whatever was proposed there. A proposal is kept if it is the token drawn,
so the distribution is that of the model. A draft that is a model draws with the same noise, and so
proposes the right token more often (arXiv:2408.07978). Only rounding can make the text differ: a
pass over several tokens may add numbers up in another order.

Axes of this file: K proposals; T of a pass, the last token and the proposals after it; S places of
a row's text. Notes: chapter 10.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt import shapes, tree
from jaxgpt.config import ModelConfig, Sampling
from jaxgpt.kernels.platform import jit, platform
from jaxgpt.model import gpt
from jaxgpt.model.attention import KVCache, rows_first
from jaxgpt.model.slots import BLOCK, SlotCache
from jaxgpt.sampling import sample
from jaxgpt.sampling.sample import SCAN_STEPS, Completion, DecodeState
from jaxgpt.types import Array, Params

FROM_TEXT, FROM_MODEL = 7, 4  # tokens that are proposed at a time
LEAST, MOST = 3, 8  # tokens that must be, and that are looked at to be, the same
# Time that may be lost, in steps of one token: at first, at most, and what each such step adds.
CREDIT, MOST_CREDIT, EARNED = 2.0, 5.0, 0.015


class Draft(NamedTuple):
    """A model that proposes."""

    cfg: ModelConfig
    params: Params


class State(NamedTuple):
    """The state of a batch between two passes."""

    cache: KVCache | SlotCache  # all tokens of a row but the last one
    draft_cache: KVCache | SlotCache | None
    tokens_BS: Array  # the prompt, and what was written; anything behind `length_B`
    logprobs_BS: Array
    length_B: Array  # tokens of the row
    done_B: Array
    seen_BV: Array | None  # for the repetition penalty
    credit: Array


def generate(
    cfg: ModelConfig,
    params: Params,
    prompts: Sequence[Sequence[int]],
    settings: Sampling,
    draft: Draft | None,
    *,
    stop_ids: Sequence[int] = (),
    rng: Array | None = None,
    rows: Sequence[int] | None = None,
    on_tokens: Callable[[list[Completion]], bool] | None = None,
) -> list[Completion]:
    """As `sample.generate`; a draft model or, if draft is None, the text itself proposes tokens.

    Raises:
        ValueError: as `sample.generate`, or a draft whose context is too short.
    """
    sample.check_prompts(cfg, prompts)
    rng = jax.random.key(0) if rng is None else rng
    rows_B = jnp.arange(len(prompts)) if rows is None else jnp.asarray(rows)
    rng_B = jax.vmap(jax.random.fold_in, (None, 0))(rng, rows_B)
    stops = jnp.asarray(list(stop_ids), jnp.int32)
    length_B = np.array([len(prompt) for prompt in prompts])
    room_B = np.minimum(settings.max_new_tokens, cfg.context_length - length_B)
    end_B = length_B + room_B
    if draft is not None and end_B.max() > draft.cfg.context_length:
        raise ValueError(
            f"draft: its context of {draft.cfg.context_length} is shorter than prompt and answer, "
            f"{end_B.max()} tokens; lower max_new_tokens, or use draft=prompt"
        )
    completions = [Completion([], [], False) for _ in prompts]
    if not settings.max_new_tokens:
        return completions

    num_proposed = FROM_MODEL if draft else FROM_TEXT
    room = -(-settings.max_new_tokens // SCAN_STEPS) * SCAN_STEPS + num_proposed + 1
    width = shapes.bucket(int(length_B.max()))
    room += -(width + room) % BLOCK
    begin = lambda cfg, params: sample.begin(cfg, params, prompts, width, room, settings, None)
    drafted = begin(*draft).cache if draft else None
    text_BS = shapes.start_together(prompts, width + room)
    state = _begin(begin(cfg, params), drafted, text_BS, rng_B, stops, end_B, settings)
    cost = _cost(len(prompts), params, draft)
    while True:
        written_B, done_B = jax.device_get((state.length_B, state.done_B))
        if done_B.all() or on_tokens is not None:
            texts = jax.device_get((state.tokens_BS, state.logprobs_BS))
            spans = map(slice, length_B, written_B)
            completions = [
                sample.completion(tokens_S[span], logprobs_S[span], room, set(stop_ids))
                for tokens_S, logprobs_S, span, room in zip(*texts, spans, room_B, strict=True)
            ]
        enough = on_tokens is not None and on_tokens(completions)
        if done_B.all() or enough:
            return completions
        draft_cfg, draft_params = draft or (None, None)
        state = decode(
            cfg, params, draft_cfg, draft_params, state, rng_B, stops, end_B, cost, settings
        )


def _cost(num_rows: int, params: Params, draft: Draft | None) -> float:
    """What a check costs beyond a step of one token, in such steps.

    Estimated, on a busy CPU; on a quiet one drafts of text still lost 5 to 13 % with SmolLM2
    (benchmarks/speculate.py). An accelerator has products to spare.
    """
    spent = min(1.1 * (num_rows + 1), FROM_TEXT) if platform() == "cpu" else 0.25
    if draft is None:
        return spent
    share = tree.count(draft.params) / tree.count(params)
    return spent * FROM_MODEL / FROM_TEXT + (FROM_MODEL + 1) * share


@partial(jit, static_argnames="settings")
def _begin(
    begun: DecodeState,
    drafted: KVCache | None,
    tokens_BS: Array,
    rng_B: Array,
    stop_ids: Array,
    end_B: Array,
    settings: Sampling,
) -> State:
    """The prompts and the first token of each row."""
    length_B = jnp.asarray(begun.index_B)
    first_B, logprob_B = sample.draw(begun.logits_BV, begun.seen_BV, rng_B, length_B, settings)
    logprobs_BS = jnp.zeros(tokens_BS.shape)
    empty = State(
        _by_row(begun.cache), None if drafted is None else _by_row(drafted), tokens_BS,
        logprobs_BS, length_B, begun.done_B, begun.seen_BV, jnp.float32(CREDIT),
    )  # fmt: skip
    one_B = jnp.ones_like(length_B)
    return _written(empty, first_B[:, None], logprob_B[:, None], one_B, stop_ids, end_B)


def _by_row(cache: KVCache) -> KVCache | SlotCache:
    """With lengths of their own, rows begin together; a single row stays as it is."""
    if len(cache.start_B) == 1:
        return cache
    move = jax.vmap(lambda slots_KSH, start: jnp.roll(slots_KSH, -start, axis=1))
    keys, values = jax.tree.map(
        lambda slots: move(rows_first(slots), cache.start_B), (cache.keys, cache.values)
    )
    return SlotCache(keys, values, cache.length - cache.start_B, jnp.int32(0))


@partial(jit, static_argnames=("cfg", "draft_cfg", "settings"), donate_argnames="state")
def decode(
    cfg: ModelConfig,
    params: Params,
    draft_cfg: ModelConfig | None,
    draft_params: Params | None,
    state: State,
    rng_B: Array,
    stop_ids: Array,
    end_B: Array,
    cost: float,
    settings: Sampling,
) -> State:
    """Goes on until a row has SCAN_STEPS more tokens, or all rows are done.

    Proposals are made while there is credit: a check takes its cost from it, and adds what was
    won by it. So text in which nothing is hit is written hardly slower. A model that spent its
    credit never comes back, since its cache has not followed; the text itself earns new credit.

    Args:
        end_B: the length at which a row is done.
        cost: as `_cost` says.
    """
    given = (cfg, params, rng_B, stop_ids, end_B, settings)
    begin_B = state.length_B

    def going(state: State) -> Array:
        return ~state.done_B.all() & ((state.length_B - begin_B).max() < SCAN_STEPS)

    def plain(state: State) -> State:
        none_BK = jnp.zeros((len(state.length_B), 0), jnp.int32)
        credit = state.credit + (EARNED if draft_cfg is None else 0)
        return _advance(state, none_BK, *given)._replace(credit=credit)

    def pays(state: State) -> Array:
        _, found_B = _from_text(state.tokens_BS, state.length_B)
        found_B = found_B | (draft_cfg is not None)
        return (state.credit > 0) & (found_B & ~state.done_B).any()

    def check(state: State) -> State:
        if draft_cfg is None:
            proposed_BK, _ = _from_text(state.tokens_BS, state.length_B)
        else:
            state, proposed_BK = _from_model(draft_cfg, draft_params, state, rng_B, settings)
        new = _advance(state, proposed_BK, *given)
        num_going = jnp.maximum((~state.done_B).sum(), 1)
        won = (new.length_B - state.length_B).sum() / num_going - 1
        return new._replace(credit=jnp.minimum(state.credit + won - cost, MOST_CREDIT))

    def turn(state: State) -> State:
        # Loops, since XLA would copy the whole cache for a branch of `lax.cond`.
        state = jax.lax.while_loop(lambda state: going(state) & ~pays(state), plain, state)
        return jax.lax.while_loop(lambda state: going(state) & pays(state), check, state)

    return jax.lax.while_loop(going, turn, state)


def _from_text(tokens_BS: Array, length_B: Array) -> tuple[Array, Array]:
    """What followed where the text's last tokens stand, too, and whether LEAST of them do.

    Of the places that have most of them, the last one:

        a b c d a b c e a b c       e a b c e a b
    """
    S = tokens_BS.shape[1]
    place_S = jnp.arange(S)[None]

    def look_back(back: Array, found: tuple[Array, Array]) -> tuple[Array, Array]:
        same_BS, matched_BS = found
        last_B1 = jnp.take_along_axis(tokens_BS, length_B[:, None] - 1 - back, axis=1)
        same_BS &= (jnp.roll(tokens_BS, back, axis=1) == last_B1) & (place_S >= back)
        return same_BS, matched_BS + same_BS

    earlier_BS = place_S < length_B[:, None] - 1
    none_BS = jnp.zeros(tokens_BS.shape, jnp.int32)
    _, matched_BS = jax.lax.fori_loop(0, MOST, look_back, (earlier_BS, none_BS))
    score_BS = matched_BS * S + place_S * (matched_BS > 0)
    best_B1 = score_BS.argmax(-1, keepdims=True)
    # Where the text ends, what would follow begins again: of "ababab", abab…
    next_BK = jnp.arange(FROM_TEXT)[None] % jnp.maximum(length_B[:, None] - 1 - best_B1, 1)
    proposed_BK = jnp.take_along_axis(tokens_BS, best_B1 + 1 + next_BK, axis=1)
    return proposed_BK, score_BS.max(-1) >= LEAST * S


def _from_model(
    cfg: ModelConfig, params: Params | None, state: State, rng_B: Array, settings: Sampling
) -> tuple[State, Array]:
    """What the draft draws; its cache then holds all proposals."""
    assert params is not None

    def step(carry: tuple[Any, Array, Array | None], number: Array) -> tuple[Any, Array]:
        cache, token_B1, seen_BV = carry
        index_B = state.length_B + number
        logits_BTV, cache = _read(cfg, params, cache, token_B1, index_B - 1)
        token_B, _ = sample.draw(logits_BTV[:, 0], seen_BV, rng_B, index_B, settings)
        if seen_BV is not None:
            seen_BV |= jax.nn.one_hot(token_B, cfg.vocab_size, dtype=bool)
        return (cache, token_B[:, None], seen_BV), token_B

    begin = (state.draft_cache, _last(state), state.seen_BV)
    (cache, *_), tokens_TB = jax.lax.scan(step, begin, jnp.arange(FROM_MODEL + 1))
    return state._replace(draft_cache=cache), tokens_TB[:-1].T


def _advance(
    state: State,
    proposed_BK: Array,
    cfg: ModelConfig,
    params: Params,
    rng_B: Array,
    stop_ids: Array,
    end_B: Array,
    settings: Sampling,
) -> State:
    """Reads every row's last token and the proposals, and draws the token after each of them."""
    B, T = len(proposed_BK), proposed_BK.shape[1] + 1
    read_BT = jnp.concatenate([_last(state), proposed_BK], axis=1)
    logits_BTV, cache = _read(cfg, params, state.cache, read_BT, state.length_B - 1)
    seen_BTV = None
    if state.seen_BV is not None:
        ahead_BTV = jnp.cumsum(jax.nn.one_hot(read_BT, cfg.vocab_size, dtype=jnp.int8), axis=1) > 0
        seen_BTV = (state.seen_BV[:, None] | ahead_BTV).reshape(B * T, -1)
    index_BT = state.length_B[:, None] + jnp.arange(T)[None]
    drawn = sample.draw(
        logits_BTV.reshape(B * T, -1), seen_BTV, jnp.repeat(rng_B, T), index_BT.reshape(-1),
        settings,
    )  # fmt: skip
    token_BT, logprob_BT = (x.reshape(B, T) for x in drawn)
    stands_BK = jnp.cumprod(proposed_BK == token_BT[:, :-1], axis=1)
    new_B = jnp.where(state.done_B, 0, 1 + stands_BK.sum(-1))
    back_B = T - new_B
    state = state._replace(cache=_shortened(cache, back_B))
    if T > 1 and state.draft_cache is not None:
        state = state._replace(draft_cache=_shortened(state.draft_cache, back_B))
    return _written(state, token_BT, logprob_BT, new_B, stop_ids, end_B)


def _last(state: State) -> Array:
    return jnp.take_along_axis(state.tokens_BS, state.length_B[:, None] - 1, axis=1)


def _read(
    cfg: ModelConfig, params: Params, cache: Any, tokens_BT: Array, first_B: Array
) -> tuple[Array, Any]:
    """Scores [B, T, V], and the cache; behind the context's end they mean nothing."""
    index_BT = first_B[:, None] + jnp.arange(tokens_BT.shape[1])[None]
    positions_BT = jnp.minimum(index_BT, cfg.context_length - 1)  # a table has no more rows
    output = gpt.apply(cfg, params, tokens_BT, cache=cache, positions_BT=positions_BT)
    return gpt.logits(cfg, params, output.hidden_BTD), output.cache


def _shortened(cache: KVCache | SlotCache, back_B: Array) -> KVCache | SlotCache:
    """Without each row's last tokens, whose slots are written again."""
    if isinstance(cache, SlotCache):
        return replace(cache, length_B=cache.length_B - back_B)
    return replace(cache, length=cache.length - back_B[0])


def _written(
    state: State, token_BT: Array, logprob_BT: Array, new_B: Array, stop_ids: Array, end_B: Array
) -> State:
    """The state with the first `new_B` of the drawn tokens."""
    put = jax.vmap(lambda row_S, new_T, at: jax.lax.dynamic_update_slice(row_S, new_T, (at,)))
    is_new_BT = jnp.arange(token_BT.shape[1])[None] < new_B[:, None]
    stopped_BT = (token_BT[..., None] == stop_ids[None, None]).any(-1)
    length_B, seen_BV = state.length_B + new_B, state.seen_BV
    if seen_BV is not None:
        new_BTV = jax.nn.one_hot(token_BT, seen_BV.shape[-1], dtype=bool) & is_new_BT[..., None]
        seen_BV = seen_BV | new_BTV.any(1)
    return state._replace(
        tokens_BS=put(state.tokens_BS, token_BT, state.length_B),
        logprobs_BS=put(state.logprobs_BS, logprob_BT, state.length_B),
        length_B=length_B,
        done_B=state.done_B | (stopped_BT & is_new_BT).any(-1) | (length_B >= end_B),
        seen_BV=seen_BV,
    )  # fmt: skip
