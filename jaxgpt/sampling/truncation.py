"""Which tokens may be drawn: temperature, then top-k, then top-p, then min-p.

All find a threshold on the probabilities by bisection instead of sorting the vocabulary, which
costs milliseconds per token. Tokens exactly as likely as the last one kept are kept too.

Notes: chapter 10.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxgpt.types import Array


def truncate(
    logits_BV: Array, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Array:
    """Log-probabilities [B, V] of the distribution to draw from; -inf where a token is excluded.

    Args:
        temperature: must be positive; greedy decoding is an argmax, not a small temperature.
        top_k: keeps the k likeliest tokens; 0 keeps all.
        top_p: keeps the likeliest tokens until their probability reaches top_p, the one that
            crosses it included (arXiv:1904.09751).
        min_p: keeps tokens at least min_p times as likely as the likeliest (arXiv:2407.01082).
    """
    probs_BV = jax.nn.softmax(logits_BV.astype(jnp.float32) / temperature, axis=-1)
    if 0 < top_k < probs_BV.shape[-1]:
        kept = lambda above_BV: above_BV.sum(-1) >= top_k
        probs_BV = _keep(probs_BV, _highest_threshold(probs_BV, kept))
    if top_p < 1:
        kept = lambda above_BV: jnp.where(above_BV, probs_BV, 0).sum(-1) >= top_p
        probs_BV = _keep(probs_BV, _highest_threshold(probs_BV, kept))
    if min_p > 0:
        probs_BV = _keep(probs_BV, min_p * probs_BV.max(-1))
    return jnp.log(probs_BV)


def truncate_rows(
    logits_BV: Array, temperature_B: Array, top_k_B: Array, top_p_B: Array, min_p_B: Array
) -> Array:
    """`truncate` with settings of its own for every row; what no row asks for is not computed.

    A row's numbers do not depend on what the others ask for. A temperature of 0 counts as 1.
    """
    V = logits_BV.shape[-1]
    temperature_B = jnp.where(temperature_B > 0, temperature_B, 1)
    probs_BV = jax.nn.softmax(logits_BV.astype(jnp.float32) / temperature_B[:, None], axis=-1)

    def limited(wanted_B: Array, probs_BV: Array, enough: Callable[[Array, Array], Array]) -> Array:
        def cut(probs_BV: Array) -> Array:
            threshold_B = _highest_threshold(probs_BV, lambda above_BV: enough(above_BV, probs_BV))
            return jnp.where(wanted_B[:, None], _keep(probs_BV, threshold_B), probs_BV)

        return jax.lax.cond(wanted_B.any(), cut, lambda probs_BV: probs_BV, probs_BV)

    k_holds = lambda above_BV, _: above_BV.sum(-1) >= top_k_B
    p_holds = lambda above_BV, probs_BV: jnp.where(above_BV, probs_BV, 0).sum(-1) >= top_p_B
    probs_BV = limited((top_k_B > 0) & (top_k_B < V), probs_BV, k_holds)
    probs_BV = limited(top_p_B < 1, probs_BV, p_holds)
    least_B = min_p_B * probs_BV.max(-1)
    probs_BV = jnp.where(min_p_B[:, None] > 0, _keep(probs_BV, least_B), probs_BV)
    return jnp.log(probs_BV)


def penalize_repetition(logits_BV: Array, seen_BV: Array, penalty: float | Array) -> Array:
    """Divides positive and multiplies negative logits of seen tokens (CTRL, arXiv:1909.05858)."""
    penalized_BV = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return jnp.where(seen_BV, penalized_BV, logits_BV)


def _keep(probs_BV: Array, threshold_B: Array) -> Array:
    kept_BV = jnp.where(probs_BV >= threshold_B[:, None], probs_BV, 0)
    return kept_BV / kept_BV.sum(-1, keepdims=True)


def _highest_threshold(probs_BV: Array, enough: Callable[[Array], Array]) -> Array:
    """The largest t such that the tokens with probability >= t are `enough`.

    Non-negative floats sort like their bit patterns, so 31 halvings find it exactly.
    """
    as_float = lambda bits_B: jax.lax.bitcast_convert_type(bits_B, jnp.float32)

    def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low_B, high_B = bounds
        middle_B = low_B + (high_B - low_B) // 2
        holds_B = enough(probs_BV >= as_float(middle_B)[:, None])
        return jnp.where(holds_B, middle_B, low_B), jnp.where(holds_B, high_B, middle_B)

    low_B = jnp.zeros(probs_BV.shape[0], jnp.int32)
    above_one = jax.lax.bitcast_convert_type(jnp.float32(2), jnp.int32)
    low_B, _ = jax.lax.fori_loop(0, 31, halve, (low_B, jnp.full_like(low_B, above_one)))
    return as_float(low_B)
