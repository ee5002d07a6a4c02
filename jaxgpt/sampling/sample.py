"""Prefill, then decode in short scans: one compiled program per shape, streaming between scans.

Axes of this file: W tokens that are written, R rows that are still being written.

Notes: chapter 10.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxgpt import shapes, sharding, weights
from jaxgpt.config import ModelConfig, Sampling
from jaxgpt.kernels.platform import jit, platform
from jaxgpt.model import gpt
from jaxgpt.model.attention import KVCache, init_cache, rows_first
from jaxgpt.sampling.truncation import penalize_repetition, truncate
from jaxgpt.types import Array, Params

SCAN_STEPS = 16  # tokens per compiled scan: what streaming and early exit are rounded to
SMALLEST_BATCH = 8  # fewer rows decode no faster

T = TypeVar("T")


class Completion(NamedTuple):
    """What was written after one prompt."""

    tokens: list[int]  # without the stop token
    logprobs: list[float]  # of each token, under the distribution it was drawn from
    stopped: bool  # by a stop token, rather than by running out of room
    end: tuple[int, float] | None = None  # that stop token and its log-probability


class DecodeState(NamedTuple):
    """The state of a batch between two tokens."""

    cache: KVCache
    logits_BV: Array  # scores of the next token
    index_B: Array  # its index in the row
    done_B: Array
    seen_BV: Array | None  # for the repetition penalty


def generate(
    cfg: ModelConfig,
    params: Params,
    prompts: Sequence[Sequence[int]],
    settings: Sampling,
    *,
    stop_ids: Sequence[int] = (),
    rng: Array | None = None,
    rows: Sequence[int] | None = None,
    on_tokens: Callable[[list[Completion]], bool] | None = None,
    mesh: Mesh | None = None,
    compact: bool = False,
) -> list[Completion]:
    """Continues every prompt until a stop token, `max_new_tokens` or the context's end.

    Args:
        rng: key of the draws; None: key 0. A row's draws depend on it, the row's number and the
            index of the token, never on the other prompts of the batch.
        rows: numbers of the rows; default 0, 1, 2, …
        on_tokens: sees the completions so far after every scan; True ends the generation.
        mesh: spreads the rows over its devices, if it can.
        compact: on one device, finished rows leave the batch once half of it can go. Every batch
            size is compiled, so this pays only if many batches are written.

    Raises:
        ValueError: an empty prompt, or one that leaves no room in the context.
    """
    check_prompts(cfg, prompts)
    rng = jax.random.key(0) if rng is None else rng
    B = len(prompts)
    rows_B = jnp.arange(B) if rows is None else jnp.asarray(rows)
    rng_B = jax.vmap(jax.random.fold_in, (None, 0))(rng, rows_B)
    stops = jnp.asarray(list(stop_ids), jnp.int32)
    room_B = [min(settings.max_new_tokens, cfg.context_length - len(p)) for p in prompts]

    width = shapes.bucket(max(len(prompt) for prompt in prompts))
    num_scans = -(-settings.max_new_tokens // SCAN_STEPS)
    state = begin(cfg, params, prompts, width, num_scans * SCAN_STEPS, settings, mesh)
    if mesh is not None:
        rng_B = sharding.spread(sharding.over_rows(mesh, B), rng_B)
        compact = compact and rng_B.sharding.num_devices == 1
    tokens_BW = np.zeros((B, num_scans * SCAN_STEPS), np.int32)
    logprobs_BW = np.zeros(tokens_BW.shape, np.float32)
    prompt_R = np.arange(B)  # which prompt each row of the state continues
    done_R = np.zeros(B, bool)
    completions = [Completion([], [], False) for _ in prompts]

    def scans() -> Iterator[tuple[Array, Array]]:
        nonlocal state
        for _ in range(num_scans):
            state, new_tokens, new_logprobs = decode(cfg, params, state, rng_B, stops, settings)
            yield new_tokens, new_logprobs

    # An accelerator goes on while the host reads what it wrote; rows that leave must be known.
    ahead = 0 if compact or platform() == "cpu" else 1
    for scan, (new_tokens, new_logprobs) in enumerate(_begun_ahead(scans(), ahead)):
        span = slice(scan * SCAN_STEPS, (scan + 1) * SCAN_STEPS)
        tokens_BW[prompt_R, span] = sharding.whole(new_tokens)
        logprobs_BW[prompt_R, span] = sharding.whole(new_logprobs)
        done_R |= np.isin(tokens_BW[prompt_R, span], stop_ids).any(-1)
        last = scan + 1 == num_scans or bool(done_R.all())
        if last or on_tokens is not None:
            written = (tokens_BW[:, : span.stop], logprobs_BW[:, : span.stop])
            completions = [
                completion(*row, set(stop_ids)) for row in zip(*written, room_B, strict=True)
            ]
        enough = on_tokens is not None and on_tokens(completions)  # sees the last ones, too
        if last or enough:
            break
        if compact and (kept_R := _still_going(done_R)) is not None:
            state, rng_B = _take(state, kept_R), rng_B[kept_R]
            prompt_R, done_R = prompt_R[kept_R], done_R[kept_R]
    return completions


def _begun_ahead(items: Iterator[T], count: int) -> Iterator[T]:
    """The items, each handed out when `count` after it have been begun."""
    begun: deque[T] = deque()
    for item in items:
        begun.append(item)
        if len(begun) > count:
            yield begun.popleft()
    yield from begun


def begin(
    cfg: ModelConfig,
    params: Params,
    prompts: Sequence[Sequence[int]],
    width: int,
    room: int,
    settings: Sampling,
    mesh: Mesh | None,
) -> DecodeState:
    """The state after all prompts were read into a cache with `room` more slots.

    On one device, equal prompts that stand side by side are read once, unless rows have adapters.
    """
    placed = None if mesh is None else sharding.over_rows(mesh, len(prompts))
    together = (placed is None or placed.num_devices == 1) and not weights.by_row(params)
    copies = _copies(prompts) if together else 1
    tokens_BT, start_B = shapes.end_together(prompts[::copies], width)
    if placed is not None:
        tokens_BT, start_B = (sharding.spread(placed, x) for x in (tokens_BT, start_B))
    state = prefill(cfg, params, tokens_BT, start_B, width + room, settings)
    return state if copies == 1 else _take(state, np.arange(len(prompts)) // copies)


def for_decoding(cfg: ModelConfig, params: Params, num_rows: int | None = None) -> Params:
    """The same parameters in the layout that decodes fastest: a step reads every weight once.

    Layers stand apart, and kernels have the compute type. The embedding stays as it is for the
    lookup, so a tied head becomes a kernel of its own if the compute type is narrower.

    Args:
        num_rows: how many prompts will be continued at a time, if that is known.
    """
    if weights.layers_apart(params):
        return params  # a server keeps its weights so
    alone = num_rows == 1
    faster = {"cpu": alone or cfg.dtype != "float32", "gpu": alone}  # see `weights.Transposed`
    outputs_first = faster.get(platform(), False)
    stacks = {name: part for name, part in params.items() if name.endswith("blocks")}
    ends = {name: part for name, part in params.items() if name not in stacks}
    layers = lambda stack: range(jax.tree.leaves(stack)[0].shape[0])
    # A program for one layer, run for each: one for all layers takes longer to compile.
    apart = {
        name: {str(n): _decoding_layer(cfg.dtype, outputs_first, stack, n) for n in layers(stack)}
        for name, stack in stacks.items()
    }
    return _decoding_ends(cfg.dtype, outputs_first, ends) | apart


@partial(jax.jit, static_argnames=("dtype", "outputs_first"))
def _decoding_layer(dtype: str, outputs_first: bool, blocks: Params, layer: Array) -> Params:
    take = lambda leaf: jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False)
    return _stored(dtype, outputs_first, jax.tree.map(take, blocks))


@partial(jax.jit, static_argnames=("dtype", "outputs_first"))
def _decoding_ends(dtype: str, outputs_first: bool, params: Params) -> Params:
    if dtype != "float32" and not weights.is_quantized({"embed": params["embed"]}):
        params = {"head": {"kernel": gpt.head(params).T}} | params
    return _stored(dtype, outputs_first, params)


def _stored(dtype: str, outputs_first: bool, params: Params) -> Params:
    if dtype != "float32":
        params = weights.cast_kernels(params, dtype)
    return weights.store_transposed(params) if outputs_first else params


@partial(jit, static_argnames=("cfg", "capacity", "settings"))
def prefill(
    cfg: ModelConfig,
    params: Params,
    tokens_BT: Array,
    start_B: Array,
    capacity: int,
    settings: Sampling,
) -> DecodeState:
    """Reads the prompts, whose first tokens stand at `start_B`, into a cache of `capacity`."""
    cache = init_cache(cfg, tokens_BT.shape[0], capacity, start_B)
    output = gpt.apply(cfg, params, tokens_BT, cache=cache)
    last_B1D = output.hidden_BTD[:, -1:]  # rows end together, on the right
    logits_BTV = gpt.logits(cfg, params, last_B1D)
    seen_BV = None
    if settings.repetition_penalty != 1:
        real_BT = jnp.arange(tokens_BT.shape[1])[None] >= start_B[:, None]
        one_hot_BTV = jax.nn.one_hot(tokens_BT, cfg.vocab_size, dtype=bool)
        seen_BV = (one_hot_BTV & real_BT[..., None]).any(1)
    index_B = tokens_BT.shape[1] - start_B
    done_B = jnp.zeros(tokens_BT.shape[0], bool)
    assert isinstance(output.cache, KVCache)
    return DecodeState(output.cache, logits_BTV[:, 0], index_B, done_B, seen_BV)


@partial(jit, static_argnames=("cfg", "settings"), donate_argnames="state")
def decode(
    cfg: ModelConfig,
    params: Params,
    state: DecodeState,
    rng_B: Array,
    stop_ids: Array,
    settings: Sampling,
) -> tuple[DecodeState, Array, Array]:
    """SCAN_STEPS more tokens of every row and their log-probabilities, each [B, SCAN_STEPS]."""

    def step(state: DecodeState, _: None) -> tuple[DecodeState, tuple[Array, Array]]:
        # The state holds the scores of the next token; drawing it comes first, computing the
        # scores of the one after it second.
        token_B, logprob_B = draw(state.logits_BV, state.seen_BV, rng_B, state.index_B, settings)
        stopped_B = (token_B[:, None] == stop_ids[None]).any(-1)
        output = gpt.apply(cfg, params, token_B[:, None], cache=state.cache)
        seen_BV = state.seen_BV
        if seen_BV is not None:
            seen_BV |= jax.nn.one_hot(token_B, cfg.vocab_size, dtype=bool)
        logits_BV = gpt.logits(cfg, params, output.hidden_BTD)[:, 0]
        done_B = state.done_B | stopped_B
        new = DecodeState(output.cache, logits_BV, state.index_B + 1, done_B, seen_BV)  # type: ignore[arg-type]
        return new, (token_B, logprob_B)

    state, (tokens_WB, logprobs_WB) = jax.lax.scan(step, state, None, length=SCAN_STEPS)
    return state, tokens_WB.T, logprobs_WB.T


def draw(
    logits_BV: Array, seen_BV: Array | None, rng_B: Array, index_B: Array, settings: Sampling
) -> tuple[Array, Array]:
    """The next token [B] of every row, and its log-probability in the distribution drawn from.

    At temperature 0 this is the model's own distribution.
    """
    if seen_BV is not None:
        logits_BV = penalize_repetition(logits_BV, seen_BV, settings.repetition_penalty)
    if settings.temperature == 0:
        token_B = largest(logits_BV)
        logprobs_BV = jax.nn.log_softmax(logits_BV, axis=-1)
    else:
        logprobs_BV = truncate(
            logits_BV, settings.temperature, settings.top_k, settings.top_p, settings.min_p
        )
        # A key for each row and place: what a row draws does not depend on who shares its batch.
        keys_B = jax.vmap(jax.random.fold_in)(rng_B, index_B)
        noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, logprobs_BV.shape[1:]))(keys_B)
        token_B = largest(logprobs_BV + noise_BV)  # arXiv:1611.01144, as jax.random.categorical
    return token_B, jnp.take_along_axis(logprobs_BV, token_B[:, None], axis=-1)[:, 0]


def largest(scores_BV: Array) -> Array:
    """The place of every row's first largest score.

    XLA:CPU's argmax takes one number at a time: 1.0 ms for 8 rows of GPT-2, this a quarter of it.
    """
    V = scores_BV.shape[-1]
    is_largest_BV = scores_BV == scores_BV.max(-1, keepdims=True)
    place_B = jnp.where(is_largest_BV, jnp.arange(V)[None], V).min(-1)
    return jnp.minimum(place_B, V - 1).astype(jnp.int32)  # V: none of a row with NaN is the largest


def check_prompts(cfg: ModelConfig, prompts: Sequence[Sequence[int]]) -> None:
    """Raises ValueError for a prompt that is empty or leaves no room in the context."""
    for number, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"prompt {number} is empty: give it at least one token")
        if len(prompt) >= cfg.context_length:
            raise ValueError(
                f"prompt {number} has {len(prompt)} tokens: the model's context of "
                f"{cfg.context_length} must hold it and at least one more; shorten it"
            )


def _copies(prompts: Sequence[Sequence[int]]) -> int:
    """How often every prompt stands there, one copy beside the other, as in groups of samples."""
    whole = [tuple(prompt) for prompt in prompts]
    count = next((i for i, prompt in enumerate(whole) if prompt != whole[0]), len(whole))
    first_of = [whole[i - i % count] for i in range(len(whole))]
    return count if len(whole) % count == 0 and whole == first_of else 1


def completion(
    tokens_W: np.ndarray, logprobs_W: np.ndarray, room: int, stop_ids: set[int]
) -> Completion:
    """The drawn tokens of a row up to its first stop token, at most `room` of them."""
    tokens = tokens_W[:room].tolist()
    length = next((i for i, token in enumerate(tokens) if token in stop_ids), len(tokens))
    stopped = length < len(tokens)
    end = (tokens[length], float(logprobs_W[length])) if stopped else None
    return Completion(tokens[:length], logprobs_W[:length].tolist(), stopped, end)


def _still_going(done_R: np.ndarray) -> np.ndarray | None:
    """The rows to keep, a power of two of them; None unless at least half can go.

    Finished rows fill the number up: what they go on to write is never looked at.
    """
    going = int((~done_R).sum())
    size = max(SMALLEST_BATCH, shapes.power_of_two(going))
    if 2 * size > len(done_R):
        return None
    return np.sort(np.argsort(done_R, kind="stable")[:size])


@jax.jit
def _take(state: DecodeState, rows_R: Array) -> DecodeState:
    """The state of some of its rows."""
    of_rows = partial(jax.tree.map, lambda x_B: x_B[rows_R])
    cache = state.cache
    keys, values = of_rows(jax.tree.map(rows_first, (cache.keys, cache.values)))
    cache = replace(cache, keys=keys, values=values, start_B=cache.start_B[rows_R])
    return of_rows(state._replace(cache=None))._replace(cache=cache)  # type: ignore[arg-type]
