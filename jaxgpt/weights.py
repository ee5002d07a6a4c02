"""What a kernel leaf may be, and the only place where a weight meets an activation.

A kernel is a plain array, `Int8`, `Nf4`, `Blocks`, or `Lora` around one of these. Layers
hand over whatever the parameter tree holds; no layer knows of quantisation or adapters. Every leaf
may have leading axes (layers, experts), which the scan over layers takes off as it does an array's.

Axes of this file: C slots of one expert; R the rank of an adapter, or rows sorted by expert.

Notes: chapter 19.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp

from jaxgpt import kernels, tree
from jaxgpt.kernels import blocks, grouped, int8, nf4
from jaxgpt.kernels.blocks import Blocks
from jaxgpt.kernels.int8 import Int8Rows
from jaxgpt.kernels.nf4 import Nf4
from jaxgpt.kernels.platform import accumulator_dtype, dot
from jaxgpt.types import Array, Params


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Int8:
    """codes * scale; an output channel's scale is its largest magnitude over 127."""

    codes: Array  # [D, F] int8
    scale: Array  # [F]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Lora:
    """w + strength * a @ b, of which w is frozen (arXiv:2106.09685).

    With DoRA (arXiv:2402.09353) every column of the sum is then given the length `magnitude`.
    """

    w: Any  # [D, F]: a plain array, Int8, Nf4 or Blocks
    a: Array  # [D, R]; or [B, D, R], an adapter for every row of the batch, as is b
    b: Array  # [R, F]
    magnitude: Array | None = None  # [F], DoRA's
    norm: Array | None = None  # [F], DoRA's: the lengths of w's columns
    rng: Array | None = None  # [B], keys of the dropout in front of a; None: no dropout
    strength: float = field(default=1.0, metadata={"static": True})
    dropout: float = field(default=0.0, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Transposed:
    """A kernel with its output channels first, for decoding on a CPU or GPU.

    A product with few rows takes most of its time to read the kernel, and this layout is read
    faster: on a CPU for one row in float32 and for 2 to 16 rows in bfloat16, on a GPU for one row
    (benchmarks/decode.py). With more rows it is no faster: `sample.for_decoding` decides.
    """

    rows: Array  # [F, D]


Kernel = Array | Int8 | Nf4 | Blocks | Lora
QUANTIZED = (Int8, Int8Rows, Nf4, Blocks)


def matmul(x: Array, kernel: Kernel | Int8Rows | Transposed) -> Array:
    """x [..., D] times a kernel [D, F]."""
    if isinstance(kernel, Int8Rows):
        return int8.product(x, kernel)
    if isinstance(kernel, Transposed):
        return kernels.linear_by_rows(x, kernel.rows, accumulator_dtype(x.dtype))
    return _apply(
        kernels.linear, lambda y_F, y: y_F.reshape((1,) * (y.ndim - 1) + y_F.shape), x, kernel
    )


def scores(x: Array, kernel: Kernel | Int8Rows | Transposed) -> Array:
    """`matmul` in float32: a bfloat16 product of accelerators would round scores of 30 to 1/8."""
    if isinstance(kernel, Transposed):
        return kernels.linear_by_rows(x, kernel.rows, jnp.float32)
    if isinstance(kernel, jax.Array):
        return kernels.scores(x, kernel)
    return matmul(x, kernel).astype(jnp.float32)


def grouped_matmul(rows_RD: Array, kernel: Kernel, layout: grouped.Layout) -> Array:
    """Each row times the kernel of its expert, of the kernels [E, D, F]."""
    product = lambda rows_RD, kernel_EDF: kernels.grouped_matmul(rows_RD, kernel_EDF, layout)
    return _apply(product, lambda y_EF, _: y_EF[layout.expert_R], rows_RD, kernel)


def batched_matmul(slots_BECD: Array, kernel: Kernel) -> Array:
    """Every expert's slots [B, E, C, D] times its kernel, of the kernels [E, D, F]."""
    product = lambda x, kernel_EDF: dot("BECD,EDF->BECF", x, kernel_EDF.astype(x.dtype))
    return _apply(product, lambda y_EF, _: y_EF[None, :, None], slots_BECD, kernel)


def dense(kernel: Kernel | Int8Rows | Transposed) -> Array:
    """The kernel as one plain array; adapters are merged in float32."""
    if isinstance(kernel, Transposed):
        return kernel.rows.mT
    if isinstance(kernel, Int8):
        return kernel.codes * kernel.scale[..., None, :]
    if isinstance(kernel, Int8Rows):
        return int8.dequantize(kernel)
    if isinstance(kernel, Nf4):
        return nf4.dequantize(kernel)
    if isinstance(kernel, Blocks):
        return blocks.dequantize(kernel)
    if isinstance(kernel, Lora):
        change = jnp.matmul(kernel.a, kernel.b, precision="highest") * kernel.strength
        merged = dense(kernel.w) + change
        if kernel.magnitude is None:
            return merged
        return merged * (kernel.magnitude / jnp.linalg.norm(merged, axis=-2))[..., None, :]
    return kernel


def table(embedding_VD: Array | Blocks) -> Array:
    """An embedding table as one plain array."""
    return blocks.table(embedding_VD) if isinstance(embedding_VD, Blocks) else embedding_VD


def transpose(embedding_VD: Array | Blocks) -> Kernel:
    """An embedding table as a kernel [D, V]; rows of blocks serve as both."""
    return embedding_VD if isinstance(embedding_VD, Blocks) else embedding_VD.T


def take(embedding_VD: Array | Blocks, tokens_BT: Array) -> Array:
    """Rows of an embedding table, in float32."""
    if isinstance(embedding_VD, Blocks):
        return blocks.take(embedding_VD, tokens_BT)
    return embedding_VD[tokens_BT].astype(jnp.float32)


def quantize(kernel: Array, kind: str) -> Int8 | Nf4:
    """A plain kernel [..., D, F] as "int8" or "nf4"."""
    if kind == "nf4":
        return nf4.quantize(kernel)
    codes_FD, scale_F = int8.round_rows(kernel.mT)
    return Int8(codes_FD.mT, scale_F)


def is_quantized(params: Params) -> bool:
    """Whether any kernel is stored in fewer bits."""
    found = lambda leaf: isinstance(leaf, QUANTIZED)
    return any(map(found, jax.tree.leaves(params, is_leaf=found)))


def map_kernels(fn: Callable[[str, Kernel], Any], params: Params) -> Params:
    """The tree with fn(name, leaf) in place of every leaf; a kernel of any kind is one leaf."""
    return jax.tree.map_with_path(
        lambda path, leaf: fn(tree.name_of(path), leaf),
        params,
        is_leaf=lambda leaf: isinstance(leaf, (*QUANTIZED, Lora)),
    )


def store_transposed(params: Params) -> Params:
    """Plain kernels, of experts apart, with their output channels first."""

    def turn(name: str, kernel: Kernel) -> Any:
        chosen = name.endswith("kernel") and "moe/" not in name
        return Transposed(kernel.mT) if chosen and isinstance(kernel, jax.Array) else kernel

    return map_kernels(turn, params)


def layers_apart(params: Params) -> bool:
    """Whether layers have arrays of their own, {"blocks": {"0": …, "1": …}}, as for decoding."""
    return "0" in params.get("blocks", {})


def by_row(params: Params) -> bool:
    """Whether every row of a batch has an adapter of its own (`peft.for_rows`)."""
    is_lora = lambda leaf: isinstance(leaf, Lora)
    adapted = [
        kernel
        for path, kernel in jax.tree.leaves_with_path(params, is_leaf=is_lora)
        if is_lora(kernel) and "moe/" not in tree.name_of(path)
    ]
    return layers_apart(params) and any(kernel.a.ndim == 3 for kernel in adapted)


def cast_kernels(params: Params, dtype: str) -> Params:
    """Kernels in another type; routers, embeddings, norms, biases and quantised kernels stay."""

    def cast(kernel: Kernel) -> Kernel:
        if isinstance(kernel, Lora):
            a, b = kernel.a.astype(dtype), kernel.b.astype(dtype)
            return replace(kernel, w=cast(kernel.w), a=a, b=b)
        return kernel if isinstance(kernel, QUANTIZED) else kernel.astype(dtype)

    chosen = lambda name: name.endswith("kernel") and "router/" not in name
    return map_kernels(lambda name, k: cast(k) if chosen(name) else k, params)


def _apply(
    product: Callable[[Array, Array], Array],
    spread: Callable[[Array, Array], Array],
    x: Array,
    kernel: Kernel,
) -> Array:
    """product(x, kernel) for any kind of kernel.

    Quantised kernels are decoded under a checkpoint: the backward pass keeps their codes, not
    what they decode to.

    Args:
        spread: brings one number per output channel into the form of a product y.
    """
    if isinstance(kernel, Int8):
        cast = lambda x, codes: product(x, codes.astype(x.dtype))
        y = jax.checkpoint(cast)(x, kernel.codes)
        return (y * spread(kernel.scale, y)).astype(y.dtype)
    if isinstance(kernel, Nf4):
        return jax.checkpoint(lambda x, codes: product(x, nf4.dequantize(codes)))(x, kernel)
    if isinstance(kernel, Blocks):
        if product is kernels.linear:
            return kernels.linear_by_blocks(x, kernel.tiles, kernel.kind)
        return jax.checkpoint(lambda x, kernel: product(x, blocks.dequantize(kernel)))(x, kernel)
    if isinstance(kernel, Lora):
        y = _apply(product, spread, x, kernel.w)
        y = y + (_low_rank(product, x, kernel) * kernel.strength).astype(y.dtype)
        if kernel.magnitude is None:
            return y
        return (y * spread(_stretch(kernel), y)).astype(y.dtype)
    return product(x, kernel)


def _low_rank(product: Callable[[Array, Array], Array], x: Array, kernel: Lora) -> Array:
    """(x @ a) @ b, which costs R / D of x @ w and never builds a @ b."""
    if kernel.rng is not None:
        x = _drop(x, kernel.rng, kernel.dropout)
    if product is kernels.linear and kernel.a.ndim == 3:
        a_BDR, b_BRF = kernel.a.astype(x.dtype), kernel.b.astype(x.dtype)
        low_BTR = dot("BTD,BDR->BTR", x, a_BDR).astype(x.dtype)
        return dot("BTR,BRF->BTF", low_BTR, b_BRF)
    return product(product(x, kernel.a).astype(x.dtype), kernel.b)


def _drop(x_BTD: Array, rng_B: Array, rate: float) -> Array:
    """Inverted dropout with a key per row; the sequences of a row, which lie together, each have
    one folded from it.
    """
    num_arms = len(x_BTD) // len(rng_B)
    assert num_arms * len(rng_B) == len(x_BTD)
    if num_arms > 1:
        arms = jnp.tile(jnp.arange(num_arms), len(rng_B))
        rng_B = jax.vmap(jax.random.fold_in)(jnp.repeat(rng_B, num_arms), arms)
    draw = lambda rng: jax.random.bernoulli(rng, 1 - rate, x_BTD.shape[1:])
    return jnp.where(jax.vmap(draw)(rng_B), x_BTD / (1 - rate), 0)


def _stretch(kernel: Lora) -> Array:
    """DoRA's factor of every column: magnitude / |w + s a b|; the length has no gradient.

    |w + s a b|^2 = |w|^2 + 2 s sum_r (a'w * b) + s^2 sum_r (b * a'a b) needs products of rank R
    only, and its ratio to |w|^2 is exactly 1 while b is zero.
    """
    assert kernel.magnitude is not None and kernel.norm is not None
    a_DR, b_RF = jax.lax.stop_gradient((kernel.a, kernel.b))
    s, square_F = kernel.strength, jnp.square(kernel.norm)
    cross_F = (matmul(a_DR.T, kernel.w) * b_RF).sum(0)
    change_F = (b_RF * ((a_DR.T @ a_DR) @ b_RF)).sum(0)
    ratio_F = 1 + (2 * s * cross_F + s * s * change_F) / square_F
    return kernel.magnitude / kernel.norm / jnp.sqrt(ratio_F)
