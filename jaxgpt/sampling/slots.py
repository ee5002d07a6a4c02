"""A batch of fixed size whose rows are requests of their own, each at its own length and settings.

Five programs do everything, so that no request compiles anything: `admit` gives a row to a
request, `read` reads a chunk of its prompt, `write` writes the next tokens of all rows, `save` and
`put` copy a chunk of keys and values out of a row and into one. A row's tokens depend on its
prompt, its settings and its seed, never on its neighbours or its place in the batch.

Axes of this file: N tokens written by one call; J likeliest tokens, or shifted ones; W words of 32
bits; I bits of a word. Notes: chapter 10.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt import peft, sharding
from jaxgpt.config import ModelConfig
from jaxgpt.kernels.platform import jit
from jaxgpt.model import gpt
from jaxgpt.model.slots import SlotCache, init_slots
from jaxgpt.sampling.sample import largest
from jaxgpt.sampling.truncation import penalize_repetition, truncate_rows
from jaxgpt.types import Array, Params

MOST_STEPS = 16  # tokens that one call of `write` can add to every row
NUM_TOP = 20  # alternatives that are reported with a token
MOST_BIASES = 300  # tokens of one request whose scores may be shifted


ByRow = Any  # an array of the host, where it is set, or of the device


class RowSettings(NamedTuple):
    """How every row is written; arrays [B]."""

    active_B: ByRow  # the row is being written
    temperature_B: ByRow  # 0: greedy
    top_k_B: ByRow  # 0: all
    top_p_B: ByRow
    min_p_B: ByRow
    repetition_B: ByRow  # 1: no penalty
    presence_B: ByRow  # taken from the scores of tokens that the answer holds
    frequency_B: ByRow  # the same for each time that it holds them
    seed_B2: ByRow  # the upper and lower 32 bits of the seed
    number_B: ByRow  # of the answer among those to one prompt
    adapter_B: ByRow  # 0: none
    tops_B: ByRow  # the likeliest tokens are asked for
    masked_B: ByRow  # a grammar allows some tokens only


class SlotState(NamedTuple):
    """The state of all rows between two calls."""

    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    length_B: Array
    logits_BV: Array  # scores of the next token
    seen_BV: Array  # the token stands in the prompt or the answer
    count_BV: Array  # how often it stands in the answer
    bias_BV: Array  # what the request adds to its score


class Written(NamedTuple):
    """New tokens; N is MOST_STEPS, of which the first `steps` count."""

    tokens_BN: Array
    logprobs_BN: Array  # of the model itself, before penalties, temperature and truncation
    top_ids_BNJ: Array
    top_logprobs_BNJ: Array


class Read(NamedTuple):
    """What a chunk of a prompt gave."""

    hidden_2D: Array  # the sum of its hidden states, and the last of them
    logprobs_C: Array  # of the targets; zeros unless asked for, as are the likeliest tokens
    top_ids_CJ: Array
    top_logprobs_CJ: Array


def default_settings(num_rows: int) -> RowSettings:
    """Greedy, and no row active."""
    whole = lambda value, kind: np.full(num_rows, value, kind)
    return RowSettings(
        active_B=whole(False, bool), temperature_B=whole(0, np.float32),
        top_k_B=whole(0, np.int32), top_p_B=whole(1, np.float32), min_p_B=whole(0, np.float32),
        repetition_B=whole(1, np.float32), presence_B=whole(0, np.float32),
        frequency_B=whole(0, np.float32), seed_B2=np.zeros((num_rows, 2), np.uint32),
        number_B=whole(0, np.int32), adapter_B=whole(0, np.int32), tops_B=whole(False, bool),
        masked_B=whole(False, bool),
    )  # fmt: skip


@partial(jax.jit, static_argnames=("cfg", "num_rows", "capacity"))
def init_state(cfg: ModelConfig, num_rows: int, capacity: int) -> SlotState:
    """Empty rows of at least `capacity` tokens."""
    cache = init_slots(cfg, num_rows, capacity)
    table = lambda kind: jnp.zeros((num_rows, cfg.vocab_size), kind)
    return _placed(SlotState(
        cache.keys, cache.values, cache.length_B, table(jnp.float32), table(bool),
        table(jnp.int32), table(jnp.float32),
    ))  # fmt: skip


def _placed(state: SlotState) -> SlotState:
    """The state where it always lies on the mesh, so that no call is compiled again."""
    return jax.tree.map(sharding.by_slots, state)


@partial(jit, donate_argnames="state")
def admit(
    state: SlotState, row: Array, bias_ids_J: Array, bias_J: Array, prompt_S: Array
) -> SlotState:
    """Empties a row for a request.

    Args:
        bias_ids_J: tokens whose scores are shifted; what fills them up is no token (-1).
        prompt_S: the prompt's tokens, filled up with -1; S is the capacity.
    """
    V = state.seen_BV.shape[-1]
    place = lambda ids: jnp.where(ids < 0, V, ids)  # out of range: dropped
    seen_V = jnp.zeros(V, bool).at[place(prompt_S)].set(True, mode="drop")
    bias_V = jnp.zeros(V).at[place(bias_ids_J)].set(bias_J, mode="drop")
    return _placed(state._replace(
        length_B=state.length_B.at[row].set(0),
        seen_BV=state.seen_BV.at[row].set(seen_V),
        count_BV=state.count_BV.at[row].set(0),
        bias_BV=state.bias_BV.at[row].set(bias_V),
    ))  # fmt: skip


@partial(jit, static_argnames="cfg", donate_argnames="state")
def read(
    cfg: ModelConfig,
    params: Params,
    state: SlotState,
    row: Array,
    adapter: Array,
    tokens_C: Array,
    count: Array,
    targets_C: Array,
    scored: Array,
) -> tuple[SlotState, Read]:
    """Reads `count` more tokens of a row's prompt; the rest of the chunk is filling.

    Args:
        targets_C: the token after each one, whose log-probability is found if `scored`.
    """
    params = peft.choose(params, adapter[None])
    length = state.length_B[row]
    cache = SlotCache(state.keys, state.values, length[None], row)
    output = gpt.apply(cfg, params, tokens_C[None], cache=cache)
    assert isinstance(output.cache, SlotCache)
    hidden_CD = output.hidden_BTD[0].astype(jnp.float32)
    real_C = jnp.arange(len(tokens_C)) < count
    sum_D = jnp.where(real_C[:, None], hidden_CD, 0).sum(0)
    last_1TD = jax.lax.dynamic_slice_in_dim(output.hidden_BTD, count - 1, 1, axis=1)
    logits_V = gpt.logits(cfg, params, last_1TD)[0, 0]

    def score(_: None) -> tuple[Array, Array, Array]:
        logits_CV = gpt.logits(cfg, params, output.hidden_BTD)[0]
        logprobs_CV = jax.nn.log_softmax(logits_CV, axis=-1)
        target_C = jnp.take_along_axis(logprobs_CV, targets_C[:, None], axis=-1)[:, 0]
        top_logprobs_CJ, top_ids_CJ = jax.lax.top_k(logprobs_CV, _num_top(cfg))
        return target_C, top_ids_CJ, top_logprobs_CJ

    nothing = lambda _: _no_tops(cfg, len(tokens_C))
    scores = jax.lax.cond(scored, score, nothing, None)
    state = state._replace(
        keys=output.cache.keys, values=output.cache.values,
        length_B=state.length_B.at[row].set(length + count),
        logits_BV=state.logits_BV.at[row].set(logits_V),
    )  # fmt: skip
    return _placed(state), Read(jnp.stack([sum_D, last_1TD[0, 0].astype(jnp.float32)]), *scores)


@partial(jit, static_argnames="cfg", donate_argnames="state")
def write(
    cfg: ModelConfig,
    params: Params,
    state: SlotState,
    settings: RowSettings,
    allowed_BW: Array,
    steps: Array,
) -> tuple[SlotState, Written]:
    """`steps` more tokens of every active row, at most MOST_STEPS.

    Args:
        allowed_BW: a bit for every token, 32 of them in an int32, for rows under a grammar.
    """
    settings = RowSettings(*map(jnp.asarray, settings))
    params = peft.choose(params, settings.adapter_B)
    B, J = len(settings.active_B), _num_top(cfg)

    def step(number: Array, carry: tuple[SlotState, Written]) -> tuple[SlotState, Written]:
        state, written = carry
        token_B, *found = _draw(cfg, state, settings, allowed_BW)
        cache = SlotCache(state.keys, state.values, state.length_B, jnp.int32(0))
        # A token of -1 is nobody's: of zeros in blocks.py, whose products skip them.
        read_B1 = jnp.where(settings.active_B, token_B, -1)[:, None]
        output = gpt.apply(cfg, params, read_B1, cache=cache)
        assert isinstance(output.cache, SlotCache)
        rows_B, new_B = jnp.arange(B), settings.active_B.astype(jnp.int32)
        # Rows that are not active keep their length and scores: what was written behind their end
        # is overwritten by the next chunk of their prompt.
        logits_BV = gpt.logits(cfg, params, output.hidden_BTD)[:, 0]
        state = state._replace(
            keys=output.cache.keys, values=output.cache.values,
            length_B=state.length_B + new_B,
            logits_BV=jnp.where(settings.active_B[:, None], logits_BV, state.logits_BV),
            seen_BV=state.seen_BV.at[rows_B, token_B].set(True),
            count_BV=state.count_BV.at[rows_B, token_B].add(new_B),
        )  # fmt: skip
        put = lambda all_, new: all_.at[:, number].set(new)
        return state, Written(*map(put, written, (token_B, *found)))

    empty = Written(
        jnp.zeros((B, MOST_STEPS), jnp.int32), jnp.zeros((B, MOST_STEPS)),
        jnp.zeros((B, MOST_STEPS, J), jnp.int32), jnp.zeros((B, MOST_STEPS, J)),
    )  # fmt: skip
    state, written = jax.lax.fori_loop(0, steps, step, (state, empty))
    return _placed(state), written


@partial(jit, static_argnames="size")
def save(state: SlotState, row: Array, start: Array, size: int) -> tuple[Array, Array]:
    """Keys and values of `size` tokens of a row, each [L, K, size, H]."""
    _, K, _, H = state.keys[0].shape
    cut = lambda x: jax.lax.dynamic_slice(x, (row, 0, start, 0), (1, K, size, H))[0]
    return jnp.stack(list(map(cut, state.keys))), jnp.stack(list(map(cut, state.values)))


@partial(jit, donate_argnames="state")
def put(state: SlotState, row: Array, start: Array, chunk: tuple[Array, Array]) -> SlotState:
    """Writes what `save` returned into a row, which then ends behind it."""
    into = lambda x, new: jax.lax.dynamic_update_slice(x, new[None], (row, 0, start, 0))
    length = start + chunk[0].shape[-2]
    return _placed(state._replace(
        keys=tuple(map(into, state.keys, chunk[0])),
        values=tuple(map(into, state.values, chunk[1])),
        length_B=state.length_B.at[row].set(length),
    ))  # fmt: skip


def _draw(
    cfg: ModelConfig, state: SlotState, settings: RowSettings, allowed_BW: Array
) -> tuple[Array, Array, Array, Array]:
    """The next token of every row, its log-probability, and the likeliest tokens with theirs."""
    own_BV = jax.nn.log_softmax(state.logits_BV, axis=-1)
    logits_BV = (
        penalize_repetition(state.logits_BV, state.seen_BV, settings.repetition_B[:, None])
        + state.bias_BV
    )
    logits_BV -= settings.presence_B[:, None] * (state.count_BV > 0)
    logits_BV -= settings.frequency_B[:, None] * state.count_BV
    masked_BV = settings.masked_B[:, None] & ~_unpacked(allowed_BW, cfg.vocab_size)
    logits_BV = jnp.where(masked_BV, -jnp.inf, logits_BV)
    greedy_B = largest(logits_BV)

    def random(_: None) -> Array:
        logprobs_BV = truncate_rows(
            logits_BV, settings.temperature_B, settings.top_k_B, settings.top_p_B, settings.min_p_B
        )
        seeds_B = jax.random.wrap_key_data(settings.seed_B2)
        rng_B = jax.vmap(jax.random.fold_in)(seeds_B, settings.number_B)
        keys_B = jax.vmap(jax.random.fold_in)(rng_B, state.length_B)  # as sample.draw
        noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, logprobs_BV.shape[1:]))(keys_B)
        return jnp.where(settings.temperature_B > 0, largest(logprobs_BV + noise_BV), greedy_B)

    drawn = (settings.active_B & (settings.temperature_B > 0)).any()
    token_B = jax.lax.cond(drawn, random, lambda _: greedy_B, None)
    logprob_B = jnp.take_along_axis(own_BV, token_B[:, None], axis=-1)[:, 0]

    def tops(_: None) -> tuple[Array, Array]:
        top_logprobs_BJ, top_ids_BJ = jax.lax.top_k(own_BV, _num_top(cfg))
        return top_ids_BJ, top_logprobs_BJ

    nothing = lambda _: _no_tops(cfg, len(token_B))[1:]
    return token_B, logprob_B, *jax.lax.cond(settings.tops_B.any(), tops, nothing, None)


def _unpacked(bits_BW: Array, size: int) -> Array:
    """Booleans [B, size] from bits, the lowest of each int32 first."""
    found_BWI = (bits_BW[..., None] >> jnp.arange(32)[None, None]) & 1
    return found_BWI.reshape(len(bits_BW), -1)[:, :size].astype(bool)


def _num_top(cfg: ModelConfig) -> int:
    return min(NUM_TOP, cfg.vocab_size)


def _no_tops(cfg: ModelConfig, count: int) -> tuple[Array, Array, Array]:
    shape = (count, _num_top(cfg))
    return jnp.zeros(count), jnp.zeros(shape, jnp.int32), jnp.zeros(shape)
