"""Feed-forward layers: plain, gated, and the bottleneck adapter. Notes: chapter 4."""

from functools import partial

import flax.linen as nn

from jaxgpt import kernels
from jaxgpt.config import ModelConfig
from jaxgpt.model.layers import INIT_STD, Linear, residual_std
from jaxgpt.types import Array


def activate(cfg: ModelConfig, x: Array) -> Array:
    """The config's activation, returned in the compute type."""
    return getattr(kernels, cfg.activation)(x, cfg.dtype)


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
        gate_BTF = activate(self.cfg, linear(self.cfg.mlp_width, name="gate")(x_BTD))
        up_BTF = linear(self.cfg.mlp_width, name="up")(x_BTD)
        down = linear(self.cfg.model_dim, std=residual_std(self.cfg), name="down")
        return down(gate_BTF * up_BTF.astype(gate_BTF.dtype))


class Adapter(nn.Module):
    """x + up(act(down(x))) without the x: a bottleneck that starts as zero (arXiv:1902.00751)."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: Array) -> Array:
        linear = partial(Linear, use_bias=True, dtype=self.cfg.dtype)
        hidden_BTR = linear(self.cfg.adapter_dim, std=INIT_STD, name="down")(x_BTD)
        return linear(self.cfg.model_dim, std=0.0, name="up")(activate(self.cfg, hidden_BTR))
