"""Parameter-efficient fine-tuning: what is added to frozen weights, and how it comes off again.

Low-rank changes stand in place of the kernels that they change (weights.py), so that no layer and
no stage knows of them. Bottlenecks are a setting of the model (`ModelConfig.adapter_dim`).
"""

import dataclasses
import math
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt import tree, weights
from jaxgpt.config import ModelConfig, PeftConfig
from jaxgpt.kernels import blocks, compiled, int8
from jaxgpt.kernels.blocks import Blocks
from jaxgpt.kernels.int8 import Int8Rows
from jaxgpt.kernels.platform import platform
from jaxgpt.types import Array, Batch, LossFn, Metrics, Params
from jaxgpt.weights import Int8, Kernel, Lora, Nf4

PRESETS = {
    "attention": r"^(dense_)?blocks/attention/"
    r"(query|key|value|output|latent|query_latent|query_up|key_value)/kernel$",
    "mlp": r"^(dense_)?blocks/(mlp|moe|moe/shared)/(gate|up|down)/kernel$",
    "all-linear": r"^(dense_)?blocks/(attention|mlp|moe|moe/shared)/"
    r"(query|key|value|output|latent|query_latent|query_up|key_value|gate|up|down)/kernel$",
}


def model_config(cfg: PeftConfig, model: ModelConfig) -> ModelConfig:
    """The model with its bottlenecks, if it shall have some."""
    if cfg.kind != "adapter":
        return model
    width = {"adapter_dim": cfg.adapter_dim, "adapter_parallel": cfg.adapter_parallel}
    if model.adapter_dim:
        raise ValueError(f"peft.kind=adapter: init has bottlenecks of {model.adapter_dim} already")
    return dataclasses.replace(model, **width)


def place(cfg: PeftConfig) -> Callable[[str, Any], Any] | None:
    """What a converter does with each tensor as it is read: quantise it, if it is to be."""
    if cfg.kind != "qlora":
        return None

    def quantized(name: str, kernel: Any) -> Any:
        if not re.search(PRESETS["all-linear"], name):
            return kernel
        width, size = kernel.shape[-2], kernel.shape[-2] * kernel.shape[-1]
        if cfg.quantize == "nf4" and (width % 2 or size % 64):
            raise ValueError(
                f"peft.quantize=nf4: {name} is {list(kernel.shape)}, which 64 does not divide; "
                "use int8"
            )
        return weights.quantize(jnp.asarray(kernel), cfg.quantize)

    return quantized


def add(cfg: PeftConfig, params: Params, rng: Array) -> Params:
    """The network with fresh low-rank changes, which change nothing yet.

    a is drawn as PEFT draws it, Kaiming-uniform(sqrt 5), which is U(-1, 1) / sqrt(D); b is zero.

    Raises:
        ValueError: no kernel is a target, or one cannot have what is asked.
    """
    if cfg.kind not in ("lora", "qlora"):
        return params
    pattern = PRESETS.get(cfg.targets, cfg.targets)
    added: list[str] = []

    def adapt(name: str, kernel: Kernel) -> Kernel:
        if not name.endswith("kernel") or not re.search(pattern, name):
            return kernel
        _check_target(cfg, name)
        added.append(name)
        *stack, D, F = shape_of(kernel)
        own = jax.random.fold_in(rng, np.uint32(zlib.crc32(name.encode())))
        a = jax.random.uniform(own, (*stack, D, cfg.rank), minval=-1, maxval=1) / math.sqrt(D)
        norm = column_norms(kernel) if cfg.dora else None
        b, magnitude = jnp.zeros((*stack, cfg.rank, F)), norm
        return Lora(kernel, a, b, magnitude, norm, None, strength(cfg), cfg.dropout)

    adapted = weights.map_kernels(adapt, params)
    if not added:
        raise ValueError(f"peft.targets={cfg.targets}: matches no kernel; try {'|'.join(PRESETS)}")
    return adapted


def strength(cfg: PeftConfig) -> float:
    """What a low-rank change is multiplied by."""
    return cfg.alpha / (math.sqrt(cfg.rank) if cfg.rslora else cfg.rank)


def trainable(cfg: PeftConfig, pattern: str) -> str:
    """What of `pattern` is trained: the additions, and heads made for the task."""
    if cfg.kind == "none":
        return pattern
    own = r"/kernel/(a|b|magnitude)$" if cfg.kind != "adapter" else "_adapter/"
    norms = r"|norm/(scale|bias)$" if cfg.kind == "adapter" and cfg.train_norms else ""
    return rf"^(?=.*(?:{pattern}))(?=.*(?:{own}{norms}|/score/))"


def with_dropout(cfg: PeftConfig, loss: LossFn) -> LossFn:
    """The loss under LoRA's dropout: every row's keys go into the kernels, one per layer."""
    if not cfg.dropout or cfg.kind not in ("lora", "qlora"):
        return loss

    def dropped(params: Params, batch: Batch, rng_B: Array) -> tuple[Array, Array, Metrics]:
        def give_keys(name: str, kernel: Kernel) -> Kernel:
            if not isinstance(kernel, Lora):
                return kernel
            fold = jax.vmap(jax.random.fold_in, (0, None))
            own_B = fold(rng_B, np.uint32(zlib.crc32(name.encode())))
            layers = jnp.arange(kernel.a.shape[0])
            rng_LB = jax.vmap(fold, (None, 0))(own_B, layers)
            return dataclasses.replace(kernel, rng=rng_LB)

        return loss(weights.map_kernels(give_keys, params), batch, rng_B)

    return dropped


def without(params: Params) -> Params:
    """The network under its low-rank changes; shares its arrays."""
    return weights.map_kernels(lambda _, k: k.w if isinstance(k, Lora) else k, params)


def has_changes(params: Params) -> bool:
    """Whether low-rank changes stand beside any kernel."""
    return any(isinstance(kernel, Lora) for kernel in leaves(params).values())


def merge(params: Params) -> Params:
    """Plain float32 kernels that compute the same: changes added, codes decoded."""

    def plain(name: str, kernel: Kernel) -> Array:
        if name.endswith("embedding"):
            return weights.table(kernel)  # type: ignore[arg-type]
        return weights.dense(kernel) if isinstance(kernel, (*weights.QUANTIZED, Lora)) else kernel

    return weights.map_kernels(plain, params)


def restore(cfg: PeftConfig, base: Params, trained: Mapping[str, Any]) -> Params:
    """A base with what a run on it has trained, by the names of the checkpoint."""
    trained = dict(trained)

    def put(name: str, kernel: Kernel) -> Kernel:
        if f"{name}/a" not in trained:
            return trained.pop(name, kernel)
        a, b = trained.pop(f"{name}/a"), trained.pop(f"{name}/b")
        magnitude = trained.pop(f"{name}/magnitude", None)
        norm = None if magnitude is None else column_norms(kernel)
        return Lora(kernel, a, b, magnitude, norm, None, strength(cfg), cfg.dropout)

    whole = leaves(weights.map_kernels(put, base))
    return tree.nest({**whole, **trained})


def for_rows(networks: Sequence[Params], choice: Sequence[int]) -> Params:
    """One network whose row b of a batch computes what networks[choice[b]] does.

    Args:
        networks: the same base with different low-rank changes, or none.

    Raises:
        ValueError: changes of experts or by DoRA, which have no form by row.
    """
    rows = np.asarray(choice)

    def stacked(name: str, *kernels: Kernel) -> Kernel:
        bases = [jax.tree.leaves(k.w if isinstance(k, Lora) else k) for k in kernels]
        if any(a is not b for base in bases for a, b in zip(base, bases[0], strict=True)):
            raise ValueError(f"{name}: an adapter has its own, where rows share one")
        changes = [k for k in kernels if isinstance(k, Lora)]
        if not changes:
            return kernels[0]
        # Against a cache, latent attention takes key_value as one array for all rows.
        whole = "moe/" in name or "/key_value/" in name
        if whole or any(k.magnitude is not None for k in changes):
            raise ValueError(
                f"{name}: adapters by row change dense layers other than key_value, and without "
                "DoRA; serve this one alone"
            )
        rank = max(k.a.shape[-1] for k in changes)
        pairs = [_padded(k, changes[0], rank) for k in kernels]
        a, b = (jnp.stack(parts, axis=-3)[..., rows, :, :] for parts in zip(*pairs, strict=True))
        return Lora(changes[0].w, a, b)

    return jax.tree.map_with_path(
        lambda path, *kernels: stacked(tree.name_of(path), *kernels),
        *networks,
        is_leaf=lambda leaf: isinstance(leaf, (*weights.QUANTIZED, Lora)),
    )


def choose(params: Params, choice_B: Array) -> Params:
    """The network whose row b computes what number choice_B[b] of those in `for_rows` does.

    Layers stand apart, as for decoding: a change is [networks, D, R], or [D, R] for all rows.
    """

    def chosen(_: str, kernel: Kernel) -> Kernel:
        if not isinstance(kernel, Lora) or kernel.a.ndim < 3:
            return kernel
        return dataclasses.replace(kernel, a=kernel.a[choice_B], b=kernel.b[choice_B])

    return weights.map_kernels(chosen, params)


def quantize_int8(params: Params) -> Params:
    """int8 kernels for decoding: all of the blocks' but the router's, and the head's.

    A tied head becomes a kernel of its own, since the embedding is still looked up in float32.
    A CPU takes blocks of 32 numbers that share a scale (`kernels.blocks`). Without a program for
    these it rounds activations, too, but those of experts (`kernels.int8`).
    """
    if "head" not in params:
        params = {**params, "head": {"kernel": weights.transpose(params["embed"]["embedding"])}}
    chosen = re.compile(rf"{PRESETS['all-linear']}|^head/kernel$").search

    def quantize(name: str, kernel: Kernel) -> Kernel | Int8Rows:
        if not chosen(name):
            return kernel
        plain = weights.dense(kernel)
        if platform() != "cpu" or "moe/" in name:
            return weights.quantize(plain, "int8")
        D, F = plain.shape[-2:]
        as_blocks = D % 32 == 0 and F % blocks.LANES == 0 and compiled.load()
        return blocks.quantize(plain) if as_blocks else int8.quantize(plain)

    return weights.map_kernels(quantize, params)


def leaves(params: Params) -> dict[str, Kernel]:
    """Every leaf by its name, a kernel of any kind being one."""
    found: dict[str, Kernel] = {}
    weights.map_kernels(found.__setitem__, params)
    return found


def shape_of(kernel: Kernel) -> tuple[int, ...]:
    """The shape [..., D, F] of what a kernel stands for."""
    if isinstance(kernel, Lora):
        return shape_of(kernel.w)
    if isinstance(kernel, Nf4):
        *stack, F, C = kernel.packed.shape
        return (*stack, 2 * C, F)
    if isinstance(kernel, Blocks):
        return (*kernel.tiles.shape[:-3], kernel.width, kernel.count)
    return (kernel.codes if isinstance(kernel, Int8) else kernel).shape


def column_norms(kernel: Kernel) -> Array:
    """The lengths of the columns; layer by layer, so that codes are not decoded all at once."""
    norms = lambda kernel: jnp.linalg.norm(weights.dense(kernel), axis=-2)
    return norms(kernel) if len(shape_of(kernel)) == 2 else jax.lax.map(norms, kernel)


def _check_target(cfg: PeftConfig, name: str) -> None:
    """Where the change is not x @ a @ b of one sequence per row, it can have no more than that."""
    if re.search(r"router/|shared_gate/|score/|_adapter/", name):
        raise ValueError(f"peft.targets={cfg.targets}: {name} is no kernel that LoRA may change")
    for setting in ("dora", "dropout"):
        if getattr(cfg, setting) and re.search(r"moe/|^head/", name):
            raise ValueError(
                f"peft.{setting}={getattr(cfg, setting)}: not for {name}; set peft.targets"
            )


def _padded(kernel: Kernel, like: Lora, rank: int) -> tuple[Array, Array]:
    """a and strength * b of `rank`; zeros where there is no change."""
    if not isinstance(kernel, Lora):
        return _padded(dataclasses.replace(like, b=jnp.zeros_like(like.b)), like, rank)
    none = [(0, 0)] * (kernel.a.ndim - 2)
    more = (0, rank - kernel.a.shape[-1])
    a = jnp.pad(kernel.a, [*none, (0, 0), more])
    return a, jnp.pad(kernel.b * kernel.strength, [*none, more, (0, 0)])
