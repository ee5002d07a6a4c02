"""Feed-forward layers: plain, gated, and the bottleneck adapter. Notes: chapter 4."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxgpt import kernels
from jaxgpt.config import ModelConfig
from jaxgpt.model.layers import INIT_STD, Linear, residual_std
from jaxgpt.types import Array


def activate(cfg: ModelConfig, x: Array) -> Array:
    """The config's activation, returned in the compute type."""
    return getattr(kernels, cfg.activation)(x, cfg.dtype)


def gated(cfg: ModelConfig, gate: Array, up: Array) -> Array:
    """act(gate) * up; with gate_limit, gate * sigmoid(1.702 gate) * (up + 1) of clipped inputs."""
    if not cfg.gate_limit:
        gate = activate(cfg, gate)
        return gate * up.astype(gate.dtype)
    gate = jnp.minimum(gate.astype(jnp.float32), cfg.gate_limit)
    up = jnp.clip(up.astype(jnp.float32), -cfg.gate_limit, cfg.gate_limit)
    return (gate * jax.nn.sigmoid(1.702 * gate) * (up + 1)).astype(cfg.dtype)


class Mlp(nn.Module):
    """down(act(up(x)))."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: Array) -> Array:
        linear = partial(Linear, use_bias=self.cfg.bias in ("mlp", "all"), dtype=self.cfg.dtype)
        hidden_BTF = activate(self.cfg, linear(self.cfg.mlp_width, name="up")(x_BTD))
        return linear(self.cfg.model_dim, std=residual_std(self.cfg), name="down")(hidden_BTF)


class GatedMlp(nn.Module):
    """down(act(gate(x)) * up(x)); with silu this is SwiGLU (arXiv:2002.05202)."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: Array) -> Array:
        linear = partial(Linear, use_bias=self.cfg.bias in ("mlp", "all"), dtype=self.cfg.dtype)
        gate_BTF = linear(self.cfg.mlp_width, name="gate")(x_BTD)
        up_BTF = linear(self.cfg.mlp_width, name="up")(x_BTD)
        down = linear(self.cfg.model_dim, std=residual_std(self.cfg), name="down")
        return down(gated(self.cfg, gate_BTF, up_BTF))


class Adapter(nn.Module):
    """up(act(down(x))), which the caller adds to a stream; it starts as zero (arXiv:1902.00751)."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: Array) -> Array:
        linear = partial(Linear, use_bias=True, dtype=self.cfg.dtype)
        hidden_BTR = linear(self.cfg.adapter_dim, std=INIT_STD, name="down")(x_BTD)
        return linear(self.cfg.model_dim, std=0.0, name="up")(activate(self.cfg, hidden_BTR))
