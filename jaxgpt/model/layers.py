"""The small parts: linear layers, norms, rotary positions, dropout. Notes: chapters 2 and 5."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxgpt import kernels, weights
from jaxgpt.config import ModelConfig, RopeScaling
from jaxgpt.types import Array

INIT_STD = 0.02  # GPT-2


def residual_std(cfg: ModelConfig) -> float:
    """GPT-2 shrinks the two layers of a block that write to the residual stream by sqrt(2L)."""
    return INIT_STD / math.sqrt(2 * cfg.num_layers)


def parameter(module: nn.Module, name: str, std: float, shape: tuple[int, ...]) -> Array:
    """A float32 parameter: drawn from a normal distribution when initialising, else as it is.

    `self.param` would refuse a leaf of another shape, such as a quantised kernel.
    """
    if module.is_initializing():
        return module.param(name, nn.initializers.normal(std), shape)
    return module.get_variable("params", name)


class Linear(nn.Module):
    """x @ kernel + bias, in the compute type."""

    features: int
    use_bias: bool
    dtype: str
    std: float = INIT_STD

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel_DF = parameter(self, "kernel", self.std, (x.shape[-1], self.features))
        # weights.matmul knows what the kernel is: plain, with LoRA beside it, int8 or NF4.
        y = weights.matmul(x.astype(self.dtype), kernel_DF)
        if self.use_bias:
            bias_F = self.param("bias", nn.initializers.zeros, (self.features,))
            y = kernels.add_bias(y, bias_F)
        return y


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(var + eps) * scale + bias (arXiv:1607.06450)."""

    eps: float
    use_bias: bool
    dtype: str

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale_D = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias_D = (
            self.param("bias", nn.initializers.zeros, (x.shape[-1],)) if self.use_bias else None
        )
        return kernels.layer_norm(x, scale_D, bias_D, self.eps, self.dtype)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * (scale + offset) (arXiv:1910.07467)."""

    eps: float
    dtype: str
    offset: float = 0.0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        first = nn.initializers.constant(1 - self.offset)
        scale_D = self.param("scale", first, (x.shape[-1],))
        if self.offset:
            scale_D = scale_D + self.offset
        return kernels.rms_norm(x, scale_D, self.eps, self.dtype)


def make_norm(cfg: ModelConfig, name: str) -> nn.Module:
    """The norm that the config asks for."""
    if cfg.norm == "rmsnorm":
        return RMSNorm(cfg.norm_eps, cfg.dtype, cfg.norm_offset, name=name)
    return LayerNorm(cfg.norm_eps, cfg.bias == "all", cfg.dtype, name=name)


def dropout(x_BTD: Array, rng_B: Array | None, site: Array | int, rate: float) -> Array:
    """Inverted dropout; every row has its own key, so a row's mask does not depend on its batch.

    Args:
        rng_B: one key for each row; None: no dropout.
        site: number of the place in the network, so that no two places share a mask.
    """
    if rng_B is None or rate == 0:
        return x_BTD
    # One byte per entry is four times cheaper to draw than a float; the rate is exact to 1/256.
    cut = round(rate * 256)
    keys_B = jax.vmap(jax.random.fold_in, (0, None))(rng_B, site)
    bits_BTD = jax.vmap(lambda key: jax.random.bits(key, x_BTD.shape[1:], jnp.uint8))(keys_B)
    return jnp.where(bits_BTD >= cut, x_BTD * (256 / (256 - cut)), 0)


def rope_tables(cfg: ModelConfig, positions_BT: Array) -> tuple[Array, Array]:
    """cos and sin [B, T, H/2] of position * theta^(-2i/H) (arXiv:2104.09864), in float32.

    H is the rotated width of a head, `cfg.rotary_width`.
    """
    half, scaling = cfg.rotary_width // 2, cfg.rope_scaling
    frequency_B1H = cfg.rope_base ** (-jnp.arange(half, dtype=jnp.float32) / half)[None, None]
    strength = 1.0
    if scaling is not None:
        # The farthest position of each row decides for dynamic and longrope.
        length_B11 = positions_BT.max(axis=1)[:, None, None] + 1
        frequency_B1H = STRETCH[scaling.kind](frequency_B1H, length_B11, cfg.rope_base, scaling)
        strength = scaling.attention_factor
    angle_BTH = positions_BT[..., None].astype(jnp.float32) * frequency_B1H
    return strength * jnp.cos(angle_BTH), strength * jnp.sin(angle_BTH)


def query_growth(cfg: ModelConfig, positions_BT: Array) -> Array | None:
    """The factor of the queries at each position (RopeScaling.query_growth); None: it is 1."""
    scaling = cfg.rope_scaling
    if scaling is None or not scaling.query_growth:
        return None
    return 1 + scaling.query_growth * jnp.log1p(positions_BT // scaling.original_context)


def rotate(x_BTNH: Array, rope: tuple[Array, Array], pairs: str = "halves") -> Array:
    """Rotates the pairs (i, i + H/2) of every head (the half-split layout of Hugging Face).

    If the tables are narrower than H/2, only the first entries are rotated, and the rest stays.

    Args:
        pairs: "neighbours" rotates the pairs (2i, 2i + 1) in their place.
    """
    # One angle for all heads. Turning query and key by their positions makes their product depend
    # on the distance between them only.
    cos_BT1H, sin_BT1H = (table[:, :, None] for table in rope)
    half = cos_BT1H.shape[-1]
    first, second, rest = jnp.split(x_BTNH.astype(jnp.float32), (half, 2 * half), axis=-1)
    if pairs == "neighbours":
        turned = jnp.concatenate((first, second), axis=-1)
        first, second = turned[..., ::2], turned[..., 1::2]
    rotated = (first * cos_BT1H - second * sin_BT1H, second * cos_BT1H + first * sin_BT1H)
    if pairs == "neighbours":
        rotated = (jnp.stack(rotated, axis=-1).reshape(*first.shape[:-1], 2 * half),)
    return jnp.concatenate((*rotated, rest), axis=-1).astype(x_BTNH.dtype)


# How each kind of RopeScaling changes the frequencies [1, 1, H], for rows of the given lengths.


def _llama3(frequency_B1H: Array, length_B11: Array, base: float, scaling: RopeScaling) -> Array:
    """Llama 3.1: long wavelengths are stretched, short ones kept, those between blended."""
    turns_B1H = scaling.original_context * frequency_B1H / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep_B1H = jnp.clip((turns_B1H - low) / (high - low), 0, 1)
    return keep_B1H * frequency_B1H + (1 - keep_B1H) * frequency_B1H / scaling.factor


def _linear(frequency_B1H: Array, length_B11: Array, base: float, scaling: RopeScaling) -> Array:
    return frequency_B1H / scaling.factor


def _dynamic(frequency_B1H: Array, length_B11: Array, base: float, scaling: RopeScaling) -> Array:
    """The base grows so that the slowest frequency is stretched as the text is too long."""
    half = frequency_B1H.shape[-1]
    excess_B11 = jnp.maximum(length_B11 / scaling.original_context, 1) - 1
    power_H = -jnp.arange(half, dtype=jnp.float32) / max(half - 1, 1)
    return frequency_B1H * (scaling.factor * excess_B11 + 1) ** power_H[None, None]


def _yarn(frequency_B1H: Array, length_B11: Array, base: float, scaling: RopeScaling) -> Array:
    """Pairs before the one that turns beta_fast times are kept, those after beta_slow stretched."""
    half = frequency_B1H.shape[-1]
    pair = lambda turns: (
        half * math.log(scaling.original_context / (turns * 2 * math.pi)) / math.log(base)
    )
    low, high = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half - 1)
    width = high - low or 0.001
    stretch_H = jnp.clip((jnp.arange(half, dtype=jnp.float32) - low) / width, 0, 1)
    stretch_B1H = stretch_H[None, None]
    return frequency_B1H * (1 - stretch_B1H + stretch_B1H / scaling.factor)


def _longrope(frequency_B1H: Array, length_B11: Array, base: float, scaling: RopeScaling) -> Array:
    short_B1H, long_B1H = (
        jnp.asarray(factors, jnp.float32)[None, None]
        for factors in (scaling.short_factors, scaling.long_factors)
    )
    long_row_B11 = length_B11 > scaling.original_context
    return frequency_B1H / jnp.where(long_row_B11, long_B1H, short_B1H)


STRETCH = {
    "llama3": _llama3, "linear": _linear, "dynamic": _dynamic, "yarn": _yarn,
    "longrope": _longrope,
}  # fmt: skip
