"""What a model computes on its way through a text: `lm.inspect(text)` gives an Inspection.

Axes of this file: A places between blocks (before the first, after each), J a token's experts,
C the likeliest tokens, U stretches of a text.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt import shapes
from jaxgpt.config import ModelConfig
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.model import inside
from jaxgpt.sampling.likelihood import rolled
from jaxgpt.sampling.sample import Sampling
from jaxgpt.sampling.truncation import penalize_repetition, truncate_rows
from jaxgpt.types import Array, Params


@dataclass(frozen=True)
class Inspection:
    """What one text is to one model. The arrays are NumPy's, in float32; logarithms are natural.

    Row t of an array belongs to token t of the text; a distribution in it is that of token t + 1.
    """

    config: ModelConfig
    params: Params
    settings: Sampling  # by which `truncated_TV` cuts the distributions
    pieces: tuple[bytes, ...]  # what each token writes; a character may be spread over several
    start: int  # so many tokens, such as <s>, stand before the text
    tokens_T: np.ndarray
    logits_TV: np.ndarray  # scores of the next token, as the model says them
    hidden_ATD: np.ndarray  # the residual stream, before the final norm
    q_LTNH: np.ndarray  # queries and keys as they meet: normed and rotated
    k_LSKH: np.ndarray
    expert_LTJ: np.ndarray | None  # each token's experts, best first; None without experts
    gate_LTJ: np.ndarray | None  # the weights of their outputs

    @property
    def texts(self) -> list[str]:
        r"""The tokens as text; bytes that are no whole character are written as \xe2."""
        return [piece.decode(errors="backslashreplace") for piece in self.pieces]

    @cached_property
    def logprobs_TV(self) -> np.ndarray:
        """log p of the next token, before anything is excluded."""
        from scipy import special  # here, as in kernels/int8.py

        return special.log_softmax(self.logits_TV, axis=-1)

    @property
    def token_logprobs_T(self) -> np.ndarray:
        """log p of each token, given those before it; nan for the first, which none predicts."""
        places_T = np.arange(1, len(self.tokens_T))
        found_T = self.logprobs_TV[places_T - 1, self.tokens_T[1:]]
        return np.concatenate([np.full(1, np.nan, np.float32), found_T])

    @property
    def surprisal_T(self) -> np.ndarray:
        """-log p of each token, in nats."""
        return -self.token_logprobs_T

    @cached_property
    def truncated_TV(self) -> np.ndarray:
        """log p of the next token as it is drawn: after temperature, top-k, top-p, min-p.

        -inf where a token is excluded; temperature 0 leaves the likeliest only.
        """
        padded_TV, padded_T = self._padded(self.logits_TV), self._padded(self.tokens_T)
        how, T = self.settings, len(self.tokens_T)
        if how.repetition_penalty != 1:
            padded_TV = np.asarray(_penalized(padded_TV, padded_T, how.repetition_penalty))
        if how.temperature == 0:
            best_T1 = padded_TV.argmax(-1)[:, None]
            padded_TV = np.where(np.arange(padded_TV.shape[-1]) == best_T1, 0.0, -np.inf)
        else:  # by row, as arrays: other numbers need no other program
            values = (how.temperature, how.top_k, how.top_p, how.min_p)
            padded_TV = _truncated(padded_TV, *(np.full(len(padded_T), value) for value in values))
        return np.asarray(padded_TV)[:T]

    @cached_property
    def attention_LNTS(self) -> np.ndarray:
        """How much token t of layer l and head n reads from token s.

        Every row sums to one, or with sinks to less.
        """
        return np.stack([self.attention(layer) for layer in range(self.config.num_layers)])

    def attention(self, layer: int) -> np.ndarray:
        """The weights [N, T, S] of one layer."""
        T = len(self.tokens_T)
        q_1TNH, k_1SKH = (self._padded(x[layer])[None] for x in (self.q_LTNH, self.k_LSKH))
        cfg = self.config.of_layer(layer)
        sinks_N = inside.sinks(self.config, self.params, layer)
        return np.asarray(_attention(cfg, q_1TNH, k_1SKH, sinks_N))[0, :, :T, :T]

    @cached_property
    def lens_ATV(self) -> np.ndarray:
        """log p of the next token if the head read each place between blocks (the logit lens).

        The last place is the model's own answer. The array is large: `lens` has one place of it,
        `lens_top` the likeliest tokens only.
        """
        return np.stack([self.lens(place) for place in range(len(self.hidden_ATD))])

    def lens(self, place: int) -> np.ndarray:
        """log p [T, V] of the next token by the stream at one place; 0 is the embedding."""
        hidden_1TD = self._padded(self.hidden_ATD[place])[None]
        return np.asarray(_lens(self.config, self.params, hidden_1TD))[0, : len(self.tokens_T)]

    def lens_top(self, count: int = 5, first: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """The likeliest ids [A, T, C] at every place and their log p, from token `first` on."""
        hidden_ATD = self.hidden_ATD[:, first:]
        padded_ATD = self._padded(hidden_ATD.swapaxes(0, 1)).swapaxes(0, 1)
        found = _lens_top(self.config, self.params, padded_ATD, count)
        ids_ATC, logprobs_ATC = (np.asarray(x)[:, : hidden_ATD.shape[1]] for x in found)
        return ids_ATC, logprobs_ATC

    @property
    def induction_LN(self) -> np.ndarray:
        """`induction_scores` of this text."""
        return induction_scores(self.tokens_T, map(self.attention, range(self.config.num_layers)))

    def _padded(self, x_T: np.ndarray) -> np.ndarray:
        """With more tokens behind it, which change nothing before them: few programs are made."""
        room = _width(self.config, len(x_T)) - len(x_T)
        return np.pad(x_T, [(0, room)] + [(0, 0)] * (x_T.ndim - 1))


class Comparison(NamedTuple):
    """One text to two models, in stretches that are whole tokens of both."""

    texts: list[str]
    first_U: np.ndarray  # log p of the stretch by the first model; nan where it is not predicted
    second_U: np.ndarray
    divergence_T: np.ndarray | None  # KL(first, second) of the next token; None: other vocabularies

    @property
    def difference_U(self) -> np.ndarray:
        """Positive where the second model finds the text likelier."""
        return self.second_U - self.first_U


def inspect(
    cfg: ModelConfig,
    params: Params,
    tokenizer: Tokenizer,
    tokens: Sequence[int],
    settings: Sampling,
    start: int = 0,
) -> Inspection:
    """Reads the tokens once and keeps what `model.inside` sees.

    Args:
        start: so many of the tokens stand before the text itself.

    Raises:
        ValueError: no token, more than the context holds, or ids outside the vocabulary.
    """
    T = len(tokens)
    if not 0 < T <= cfg.context_length:
        raise ValueError(
            f"text: has {T} tokens; inspect needs 1 to the context's {cfg.context_length}"
        )
    if not 0 <= min(tokens) <= max(tokens) < cfg.vocab_size:
        raise ValueError(f"tokens must lie in [0, vocab_size={cfg.vocab_size})")
    tokens_T = np.asarray(tokens, np.int32)
    padded_1T = np.pad(tokens_T, (0, _width(cfg, T) - T))[None]
    logits_1TV, found = jax.device_get(_look(rolled(cfg), params, padded_1T))
    # One row, without what fills it up; dense models have no experts.
    own: Any = lambda x_LBT: None if x_LBT is None else x_LBT[:, 0, :T]
    return Inspection(
        cfg, params, settings, tuple(pieces(tokenizer, tokens, start)), start, tokens_T,
        logits_1TV[0, :T], *map(own, found),
    )  # fmt: skip


def compare(first: Inspection, second: Inspection) -> Comparison:
    """log p of the same text by two models, whose tokenizers may differ.

    Raises:
        ValueError: the texts differ.
    """
    ends = [np.cumsum([0, *map(len, x.pieces[x.start :])]) for x in (first, second)]
    written = b"".join(first.pieces[first.start :])
    if written != b"".join(second.pieces[second.start :]):
        raise ValueError("the two models did not read the same text: nothing can be compared")
    shared = sorted({*ends[0].tolist()} & {*ends[1].tolist()})
    sums = [
        [x.token_logprobs_T[x.start :][(low <= own[:-1]) & (own[:-1] < high)].sum()
         for low, high in itertools.pairwise(shared)]
        for x, own in zip((first, second), ends, strict=True)
    ]  # fmt: skip
    divergence_T = None
    if (
        np.array_equal(first.tokens_T, second.tokens_T)
        and first.config.vocab_size == second.config.vocab_size
    ):
        p_TV, q_TV = first.logprobs_TV, second.logprobs_TV
        divergence_T = (np.exp(p_TV) * (p_TV - q_TV)).sum(-1)
    texts = [written[a:b].decode(errors="backslashreplace") for a, b in itertools.pairwise(shared)]
    return Comparison(texts, np.array(sums[0]), np.array(sums[1]), divergence_T)


def induction_scores(tokens_T: np.ndarray, attention_LNTS: Iterable[np.ndarray]) -> np.ndarray:
    """How much each head [L, N] reads what followed the present token before (arXiv:2209.11895).

    In "A B … A" the head reads B from the second A. The score is the mean over all tokens that
    stood before; nan where no token of the text did.
    """
    T = len(tokens_T)
    # follows[t, s]: the token before s is the token at t, and stands before it.
    same_TS = tokens_T[:, None] == tokens_T[None]
    follows_TS = np.zeros((T, T), bool)
    follows_TS[:, 1:] = np.tril(same_TS, -1)[:, :-1]
    repeated_T = follows_TS.any(-1)
    if not repeated_T.any():
        return np.stack([np.full(len(layer), np.nan) for layer in attention_LNTS])
    scores = [
        (layer_NTS * follows_TS).sum(-1)[:, repeated_T].mean(-1) for layer_NTS in attention_LNTS
    ]
    return np.stack(scores)


def repeated_tokens(vocab_size: int, length: int = 48, seed: int = 0) -> list[int]:
    """Random tokens, twice: no head can tell what comes but by looking back."""
    once = np.random.default_rng(seed).choice(vocab_size, min(length, vocab_size), replace=False)
    return [*once.tolist(), *once.tolist()]


def pieces(tokenizer: Tokenizer, tokens: Sequence[int], start: int = 0) -> Iterator[bytes]:
    """What each token writes. A decoder may treat the first one differently, which is that after
    `start` others, so all behind it are decoded after another.
    """
    for token in tokens[: start + 1]:
        yield tokenizer.decode_bytes([token])
    for before, token in itertools.pairwise(tokens[start:]):
        yield tokenizer.decode_bytes([before, token])[len(tokenizer.decode_bytes([before])) :]


def _width(cfg: ModelConfig, num_tokens: int) -> int:
    """Positions that are computed. Slots of experts are shared by all, so none may be added."""
    return num_tokens if cfg.expert_capacity else min(shapes.bucket(num_tokens), cfg.context_length)


@partial(jax.jit, static_argnames="cfg")
def _look(cfg: ModelConfig, params: Params, tokens_BT: Array) -> tuple[Array, tuple]:
    found = inside.look(cfg, params, tokens_BT)
    kept = (found.hidden_ABTD, found.q_LBTNH, found.k_LBSKH, found.expert_LBTJ, found.gate_LBTJ)
    return found.logits_BTV, kept


_attention = jax.jit(inside.attention_weights, static_argnums=0)


@partial(jax.jit, static_argnames="cfg")
def _lens(cfg: ModelConfig, params: Params, hidden_BTD: Array) -> Array:
    return jax.nn.log_softmax(inside.lens(cfg, params, hidden_BTD))


@partial(jax.jit, static_argnames=("cfg", "count"))
def _lens_top(
    cfg: ModelConfig, params: Params, hidden_ATD: Array, count: int
) -> tuple[Array, Array]:
    def place(hidden_TD: Array) -> tuple[Array, Array]:
        logprobs_TC, ids_TC = jax.lax.top_k(_lens(cfg, params, hidden_TD[None])[0], count)
        return ids_TC, logprobs_TC

    return jax.lax.map(place, hidden_ATD)


@jax.jit
def _penalized(logits_TV: Array, tokens_T: Array, penalty: Array) -> Array:
    V = logits_TV.shape[-1]
    seen_TV = jnp.cumsum(jax.nn.one_hot(tokens_T, V, dtype=jnp.int32), axis=0) > 0
    return penalize_repetition(logits_TV, seen_TV, penalty)


_truncated = jax.jit(truncate_rows)
