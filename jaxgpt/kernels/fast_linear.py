"""x @ kernel in the compute dtype, with backward passes of its own.

The gradients of out = x @ W are dx = g @ W^T and dW = x^T @ g, where g is the gradient of out.
On a CPU these are written as products that XLA has fast programs for. On accelerators the
backward pass reads W as it is stored, cut over devices: autodiff would keep the copy that was
cast and gathered, for every layer.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxgpt.kernels.platform import platform, separate, transposed
from jaxgpt.sharding import gather_kernel
from jaxgpt.types import Array


def on_cpu(x_BTD: Array, kernel_DF: Array) -> Array:
    """x @ kernel over any leading axes, returned in float32."""
    return on_rows(lambda x_AD: _linear(x_AD, kernel_DF), x_BTD)


def in_float32(x_BTD: Array, kernel_DF: Array) -> Array:
    """x @ kernel, gathered from the devices that share it, returned in float32."""
    return jnp.matmul(
        x_BTD, gather_kernel(kernel_DF.astype(x_BTD.dtype)), preferred_element_type=jnp.float32
    )


def by_rows(x_BTD: Array, rows_FD: Array, dtype: DTypeLike) -> Array:
    """x @ rows^T in `dtype`: the kernel is read as it lies."""
    return jnp.einsum("...D,FD->...F", x_BTD, rows_FD, preferred_element_type=dtype)


def by_rows_on_cpu(x_BTD: Array, rows_FD: Array, dtype: DTypeLike) -> Array:
    """`by_rows`, of two rows where x has one."""
    return on_rows(lambda x_AD: by_rows(x_AD, rows_FD, dtype), x_BTD)


def by_rows_on_gpu(x_BTD: Array, rows_FD: Array, dtype: DTypeLike) -> Array:
    """`by_rows`; a single row of x is multiplied and summed up in one pass over the kernel.

    Written as a product of a single row XLA:GPU would multiply the whole kernel by it first, in the
    kernel's type, write that down, and sum up its columns.
    """
    if x_BTD.size > x_BTD.shape[-1]:
        return by_rows(x_BTD, rows_FD, dtype)
    x_1D, rows_FD = x_BTD.reshape(1, -1).astype(jnp.float32), rows_FD.astype(jnp.float32)
    return (rows_FD * x_1D).sum(-1).astype(dtype)[None, None]


def on_rows(product: Callable[[Array], Array], x_BTD: Array) -> Array:
    """product(x_AD), made for a CPU, over any leading axes of x."""
    x_AD = x_BTD.reshape(-1, x_BTD.shape[-1])
    if len(x_AD) == 1 and x_AD.dtype != jnp.float32:
        # One row makes XLA:CPU widen the whole kernel for a matrix-vector product: give it two.
        x_AD = jnp.concatenate([x_AD, jnp.zeros_like(x_AD)])
    out_AF = product(x_AD)[: x_BTD.size // x_BTD.shape[-1]]
    return out_AF.reshape(*x_BTD.shape[:-1], -1)


@jax.custom_vjp
def add_bias(y: Array, bias_F: Array) -> Array:
    """y + bias in y's type; the bias's gradient is summed over all rows in float32.

    Autodiff would sum it in y's type, and half precision loses a share of every long sum.
    """
    return y + jnp.expand_dims(bias_F, range(y.ndim - 1)).astype(y.dtype)


def _bias_backward(like_bias: Array, g: Array) -> tuple[Array, Array]:
    g = separate(g)  # else XLA:GPU would sum, and so write down, what g was before it was rounded
    total_F = g.astype(jnp.float32).sum(tuple(range(g.ndim - 1)))
    return g, total_F.astype(like_bias.dtype)


add_bias.defvjp(
    lambda y, bias_F: (add_bias(y, bias_F), jnp.zeros((), bias_F.dtype)), _bias_backward
)


@jax.custom_vjp
def _linear(x_AD: Array, kernel_DF: Array) -> Array:
    return _forward(x_AD, kernel_DF)[0]


def _forward(x_AD: Array, kernel_DF: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    cast_DF = kernel_DF.astype(x_AD.dtype)
    out_AF = jnp.einsum("AD,DF->AF", x_AD, cast_DF, preferred_element_type=jnp.float32)
    like_kernel = jnp.zeros((), kernel_DF.dtype)  # residuals must be arrays: this carries a dtype
    return out_AF, (x_AD, cast_DF, like_kernel)


def _backward(saved: tuple[Array, Array, Array], g_AF: Array) -> tuple[Array, Array]:
    x_AD, cast_DF, like_kernel = saved
    g_AF = g_AF.astype(x_AD.dtype)
    dx_AD = jnp.einsum("AF,DF->AD", g_AF, cast_DF, preferred_element_type=jnp.float32)
    dkernel_DF = _pull(x_AD, g_AF)
    return dx_AD.astype(x_AD.dtype), dkernel_DF.astype(like_kernel.dtype)


_linear.defvjp(_forward, _backward)


def _pull(x_AD: Array, g_AF: Array) -> Array:
    """x^T g, the kernel's gradient [D, F], with a copy of the smaller of x and g turned.

    XLA:CPU multiplies bfloat16 fast only where the left operand is not transposed, so one of them
    must be turned in memory first. There are two ways, and they cost:

        x^T, then x^T @ g                A * D numbers turned
        g^T, then g^T @ x, then turn it  A * F numbers turned, and F * D of the result

    For a square kernel the first is cheaper; where F is an adapter's rank of 16 and D is 768, the
    second turns a fiftieth.
    """
    (A, D), F = x_AD.shape, g_AF.shape[1]
    dot = partial(jnp.einsum, preferred_element_type=jnp.float32)
    if F * (A + D) < D * A:
        # The barrier: XLA:CPU would turn the operands instead of the result, into a product of
        # bfloat16 that it does not have.
        return jax.lax.optimization_barrier(dot("FA,AD->FD", transposed(g_AF), x_AD)).T
    return dot("DA,AF->DF", transposed(x_AD), g_AF)


@jax.custom_vjp
def gathered(x_BTD: Array, kernel_DF: Array) -> Array:
    """x @ kernel in the dtype of x; the backward pass gathers the kernel again."""
    return _gathered_product(x_BTD, kernel_DF)


def _gathered_product(x_BTD: Array, kernel_DF: Array) -> Array:
    return x_BTD @ gather_kernel(_rounded(kernel_DF, x_BTD.dtype))


def _gathered_backward(saved: tuple[Array, Array], g_BTF: Array) -> tuple[Array, Array]:
    x_BTD, kernel_DF = saved
    dx_BTD = g_BTF @ gather_kernel(_rounded(kernel_DF, x_BTD.dtype)).T
    leading = tuple(range(x_BTD.ndim - 1))
    dkernel_DF = jax.lax.dot_general(
        x_BTD, g_BTF, ((leading, leading), ((), ())), preferred_element_type=jnp.float32
    )
    return dx_BTD, dkernel_DF.astype(kernel_DF.dtype)


# The forward rule is the product itself, not a call of `gathered`: a checkpoint policy that keeps
# products (model.remat=dots) does not look into the calls of functions with rules of their own.
gathered.defvjp(
    lambda x_BTD, kernel_DF: (_gathered_product(x_BTD, kernel_DF), (x_BTD, kernel_DF)),
    _gathered_backward,
)


def _rounded(kernel_DF: Array, dtype: DTypeLike) -> Array:
    """The kernel in `dtype`. On a TPU in two steps: seeing a plain cast, its compiler would make a
    bfloat16 copy of all layers before the loop over them and hold it beside the float32 one.
    """
    if platform() == "tpu" and kernel_DF.dtype == jnp.float32 and dtype == jnp.bfloat16:
        kernel_DF = jax.lax.reduce_precision(kernel_DF, exponent_bits=8, mantissa_bits=7)
    return kernel_DF.astype(dtype)
