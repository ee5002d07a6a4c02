"""GPT: token embeddings, a stack of blocks, a final norm.

    tokens_BT -> embed -> block 1 -> … -> block L -> final_norm -> hidden_BTD -> logits_BTV

Each block adds to x_BTD, the residual stream, what attention and then the MLP make of a
normalised copy of it. The last step, the product with the head, is a function of its own
(`logits`): a loss that goes through the tokens in chunks never builds all scores.

Notes: chapters 5 and 12.
"""

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxgpt import weights
from jaxgpt.config import ModelConfig
from jaxgpt.kernels import by_rows
from jaxgpt.kernels.platform import layer_unroll
from jaxgpt.model.attention import Attention, BlockInputs, KVCache, Slots
from jaxgpt.model.latent import LatentAttention
from jaxgpt.model.layers import (
    INIT_STD,
    Linear,
    dropout,
    make_norm,
    parameter,
    query_growth,
    rope_tables,
)
from jaxgpt.model.mlp import Adapter, GatedMlp, Mlp
from jaxgpt.model.moe import MoE, RouterStats
from jaxgpt.model.slots import SlotCache
from jaxgpt.types import Array, Params


class Output(NamedTuple):
    """What GPT returns; `logits` turns hidden states into scores."""

    hidden_BTD: Array
    cache: KVCache | SlotCache | None
    router: RouterStats | None  # every array with a leading L; None without experts


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), on a float32 residual stream.

    ModelConfig's norm_place and parallel_residual change the order.
    """

    cfg: ModelConfig

    @nn.compact
    def __call__(
        self, x_BTD: Array, own: tuple[Array, Array | None, Slots | None], inputs: BlockInputs
    ) -> tuple[Array, tuple[RouterStats | None, Slots | None]]:
        # What is this layer's own: its number, its experts' selection bias, its part of the cache.
        cfg, (layer, bias_E, slots) = self.cfg, own

        # The stream itself is never normalised (pre-norm): the sum of all layers' contributions
        # reaches the head, and gradients reach the embedding, without passing through a norm.
        before = cfg.norm_place != "after"
        read_BTD = make_norm(cfg, "attention_norm")(x_BTD) if before else x_BTD
        attention = Attention if cfg.latent is None else LatentAttention
        attended_BTD, slots = attention(cfg, name="attention")(read_BTD, inputs, slots)
        if cfg.adapter_dim and not cfg.adapter_parallel:
            attended_BTD += Adapter(cfg, name="attention_adapter")(attended_BTD)
        # Dropout numbers its places in the network: 0 the embedding, then two for each layer.
        added_BTD = _added(cfg, "attention", attended_BTD, inputs.rng_B, 2 * layer + 1)
        begin_BTD, x_BTD = x_BTD, by_rows(x_BTD + added_BTD)

        read_BTD = begin_BTD if cfg.parallel_residual else x_BTD
        read_BTD = make_norm(cfg, "mlp_norm")(read_BTD) if before else read_BTD
        if cfg.num_experts:
            mixed_BTD, stats = MoE(cfg, name="moe")(read_BTD, bias_E, inputs.segments_BT)
        else:
            mlp = GatedMlp if cfg.mlp == "gated" else Mlp
            mixed_BTD, stats = mlp(cfg, name="mlp")(read_BTD), None
        if cfg.adapter_dim:
            seen_BTD = read_BTD if cfg.adapter_parallel else mixed_BTD
            mixed_BTD += Adapter(cfg, name="mlp_adapter")(seen_BTD)
        added_BTD = _added(cfg, "mlp", mixed_BTD, inputs.rng_B, 2 * layer + 2)
        return by_rows(x_BTD + added_BTD), (stats, slots)


def _added(
    cfg: ModelConfig, half: str, out_BTD: Array, rng_B: Array | None, site: Array | int
) -> Array:
    """What half a block adds to the residual stream, of what it computed."""
    if cfg.norm_place == "after":
        out_BTD = make_norm(cfg, f"{half}_norm")(out_BTD)
    elif cfg.norm_place == "both":
        out_BTD = make_norm(cfg, f"{half}_post_norm")(out_BTD)
    out_BTD = dropout(out_BTD, rng_B, site, cfg.dropout)
    return out_BTD if cfg.residual_scale == 1 else out_BTD * cfg.residual_scale


class Table(nn.Module):
    """An embedding table [rows, D]."""

    rows: int
    width: int

    @nn.compact
    def __call__(self, index_BT: Array) -> Array:
        return weights.take(
            parameter(self, "embedding", INIT_STD, (self.rows, self.width)), index_BT
        )


class GPT(nn.Module):
    """Tokens to hidden states.

    Args of the call:
        positions_BT: default 0, 1, 2, … counted from the row's first token.
        segments_BT: documents packed into a row, numbered from 1; 0 is padding. Default: all one.
        cache: keys and values of the tokens before these; the returned cache holds these too.
        rng_B: one dropout key per row; None switches dropout off.
        bias_LE: selection bias of the experts (ModelConfig.balance = "bias").
    """

    cfg: ModelConfig

    @nn.compact
    def __call__(
        self,
        tokens_BT: Array,
        positions_BT: Array | None = None,
        segments_BT: Array | None = None,
        cache: KVCache | SlotCache | None = None,
        rng_B: Array | None = None,
        bias_LE: Array | None = None,
    ) -> Output:
        cfg = self.cfg
        index_BT, segments_BT, mask_BTS = _look_up(tokens_BT, segments_BT, cache)
        # Packed documents count their positions themselves, each from 0.
        positions_BT = index_BT if positions_BT is None else positions_BT

        x_BTD = Table(cfg.vocab_size, cfg.model_dim, name="embed")(tokens_BT)
        if cfg.embedding_factor != 1:
            x_BTD = x_BTD * cfg.embedding_factor
        if cfg.position == "learned":
            rows = cfg.context_length + cfg.position_offset
            places = Table(rows, cfg.model_dim, name="positions")
            x_BTD += places(
                positions_BT + cfg.position_offset if cfg.position_offset else positions_BT
            )
        x_BTD = by_rows(dropout(x_BTD, rng_B, 0, cfg.dropout))

        # What layers share: rotary tables, segments, dropout keys, the place in the cache.
        slots = None if cache is None else tuple(zip(cache.keys, cache.values, strict=True))
        length = first_row = None
        if isinstance(cache, SlotCache):
            length, first_row = cache.length_B, cache.first_row
        elif cache is not None:
            length = cache.length
        common = BlockInputs(None, segments_BT, rng_B, length, mask_BTS, first_row)
        found, written = [], ()
        for name, first, part in cfg.parts:
            end = first + part.num_layers
            own = (jnp.arange(first, end), bias_LE if part.num_experts else None)
            x_BTD, stats, part_slots = self._run(
                name, part, x_BTD, (*own, slots and slots[first:end]), common, positions_BT
            )
            found.append(stats)
            written += part_slots or ()
        # Dense layers have no statistics, unless somebody watches (inside.py).
        found = [stats for stats in found if stats is not None]
        join = lambda *x_L: x_L[0] if len(x_L) == 1 else jnp.concatenate(x_L)
        router = jax.tree.map(join, *found) if found else None

        if not cfg.tie_embeddings and self.is_initializing():
            # `logits` reads this kernel; calling it on one token is how Linen makes it exist.
            Linear(cfg.vocab_size, False, cfg.dtype, name="head")(x_BTD[:1, :1])
        hidden_BTD = make_norm(cfg, "final_norm")(x_BTD)
        if cfg.logit_divisor != 1:  # here, since the heads know no config
            hidden_BTD = hidden_BTD / cfg.logit_divisor
        if cache is not None:
            keys, values = zip(*written, strict=True)
            cache = cache.grown(keys, values, tokens_BT.shape[1])
        return Output(hidden_BTD, cache, router)

    def _run(
        self, name: str, cfg: ModelConfig, x_BTD: Array,
        own: tuple[Array, Array | None, tuple[Slots, ...] | None], common: BlockInputs,
        positions_BT: Array,
    ) -> tuple[Array, RouterStats | None, tuple[Slots, ...] | None]:  # fmt: skip
        """One stack of layers: the stream behind it, and the layers' statistics and slots."""
        kinds = cfg.period
        inputs = {kind: _of_kind(kind, common, positions_BT) for kind in kinds}
        layers_L, bias_LE, slots = own
        if weights.layers_apart(self.variables.get("params", {})):
            x_BTD, (stats, slots) = Unstacked(cfg, name=name)(x_BTD, own, inputs)
            return x_BTD, stats, slots
        own = (layers_L, bias_LE, slots and jax.tree.map(lambda *x: jnp.stack(x), *slots))
        quantized = weights.is_quantized(self.variables)
        if len(kinds) == 1 or self.is_initializing():
            blocks = _stack(kinds[0], quantized)(kinds[0], name=name)
            x_BTD, (stats, written) = blocks(x_BTD, own, inputs[kinds[0]])
        else:
            params = self.variables["params"][name]
            x_BTD, (stats, written) = _by_period(kinds, quantized, params, x_BTD, own, inputs)
        # The slots are cut again into one pair a layer.
        return x_BTD, stats, slots and tuple(zip(*written, strict=True))


class Unstacked(nn.Module):
    """The blocks when every layer has arrays of its own, as `for_decoding` makes them.

    A scan over a stack copies each layer's slice before it is multiplied, and decoding one token
    does little else than read the weights once.
    """

    cfg: ModelConfig

    @nn.compact
    def __call__(
        self,
        x_BTD: Array,
        own: tuple[Array, Array | None, tuple[Slots, ...] | None],
        inputs: dict[ModelConfig, BlockInputs],
    ) -> tuple[Array, tuple[RouterStats | None, tuple[Slots, ...] | None]]:
        layers_L, bias_LE, slots = own
        kinds, found, params = self.cfg.period, [], self.variables["params"]
        # One function for all layers: its first call is traced, the others find it so. It is made
        # anew each time, since those who watch a block (inside.py) change what it returns.
        block = jax.jit(
            lambda kind, params, *x: Block(kind).apply({"params": params}, *x), static_argnums=0
        )
        for layer in range(self.cfg.num_layers):
            bias_E = None if bias_LE is None else bias_LE[layer]
            of_layer = (layers_L[layer], bias_E, None if slots is None else slots[layer])
            kind = kinds[layer % len(kinds)]
            x_BTD, of_layer = block(kind, params[str(layer)], x_BTD, of_layer, inputs[kind])
            found.append(of_layer)
        stats, written = zip(*found, strict=True)
        stats = jax.tree.map(lambda *leaves: jnp.stack(leaves), *stats)
        return x_BTD, (stats, None if slots is None else written)


class ScalarHead(nn.Module):
    """One number per position: a reward or a value."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self, hidden_BTD: Array) -> Array:
        score_BT1 = Linear(1, False, "float32", name="score")(hidden_BTD)
        return score_BT1[..., 0].astype(jnp.float32)


@partial(jax.jit, static_argnums=0)  # one program: some hundred small ones take seconds to compile
def init(cfg: ModelConfig, rng: Array) -> Params:
    """Random parameters; the layout is the one in `sharding.RULES`."""
    return GPT(cfg).init(rng, jnp.zeros((1, 1), jnp.int32))["params"]


def apply(cfg: ModelConfig, params: Params, tokens_BT: Array, **inputs: Any) -> Output:
    """GPT as a function of its parameters; `inputs` as in `GPT.__call__`."""
    return GPT(cfg).apply({"params": params}, tokens_BT, **inputs)  # type: ignore[return-value]


def head(params: Params) -> Array:
    """The output matrix [V, D]: its own kernel, or the embedding table when tied."""
    if "head" in params:
        return weights.dense(params["head"]["kernel"]).T
    return weights.table(params["embed"]["embedding"])


def logits(cfg: ModelConfig, params: Params, hidden_BTD: Array) -> Array:
    """Logits [B, T, V] in float32; apart from GPT, so that a chunked loss never builds them all."""
    kernel = params["head"]["kernel"] if "head" in params else None
    if kernel is None:
        kernel = weights.transpose(params["embed"]["embedding"])
    logits_BTV = weights.scores(hidden_BTD, kernel)
    cap = cfg.logit_softcap
    return cap * jnp.tanh(logits_BTV / cap) if cap else logits_BTV


def _stack(cfg: ModelConfig, quantized: bool) -> Any:
    """Block, rematerialised as asked, scanned over layers with one stacked parameter tree."""
    block: Any = Block
    if cfg.remat != "none":
        # Inside a scan nothing can be merged with the forward pass, so no barrier is needed.
        block = nn.remat(Block, policy=_kept(cfg), prevent_cse=False)
    return nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(0, nn.broadcast),  # pyright: ignore[reportArgumentType]
        length=cfg.num_layers,
        unroll=layer_unroll(cfg.num_layers, remat=cfg.remat != "none", quantized=quantized),
    )


def _kept(cfg: ModelConfig) -> Any:
    """What a rematerialised block keeps for the backward pass."""
    policies = jax.checkpoint_policies
    return {
        "dots": policies.dots_with_no_batch_dims_saveable,
        "qkv": policies.save_only_these_names("qkv", "attention"),
        "attention": policies.save_only_these_names("attention"),
        "full": None,
    }[cfg.remat]


def _by_period(
    kinds: tuple[ModelConfig, ...],
    quantized: bool,
    blocks: Params,
    x_BTD: Array,
    own: Any,
    inputs: dict[ModelConfig, BlockInputs],
) -> tuple[Array, Any]:
    """`_stack` for layers of several kinds: a scan over whole periods, whose body has a block of
    each kind; what is left of a last period follows.

    Every block keeps its place in the stacked parameters, so that nothing else tells them apart.
    """

    def run(x_BTD: Array, of_period: Any, kinds: tuple[ModelConfig, ...], looped: bool) -> Any:
        found = []
        for place, kind in enumerate(kinds):
            block = lambda x, params, own, kind=kind: Block(kind).apply(
                {"params": params}, x, own, inputs[kind]
            )
            if kind.remat != "none":
                block = jax.checkpoint(block, policy=_kept(kind), prevent_cse=not looped)
            params, own = jax.tree.map(lambda leaf_P: leaf_P[place], of_period)  # noqa: B023
            x_BTD, of_layer = block(x_BTD, params, own)
            found.append(of_layer)
        return x_BTD, jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)

    num_layers, length = kinds[0].num_layers, len(kinds)
    num_periods, left = divmod(num_layers, length)
    end = num_layers - left
    found = []
    if num_periods:
        whole = lambda leaf_L: leaf_L[:end].reshape(num_periods, length, *leaf_L.shape[1:])
        x_BTD, of_layers = jax.lax.scan(
            lambda x_BTD, of_period: run(x_BTD, of_period, kinds, True),
            x_BTD,
            jax.tree.map(whole, (blocks, own)),
            unroll=layer_unroll(num_periods, remat=kinds[0].remat != "none", quantized=quantized),
        )
        found.append(jax.tree.map(lambda leaf: leaf.reshape(end, *leaf.shape[2:]), of_layers))
    if left:
        rest = jax.tree.map(lambda leaf_L: leaf_L[end:], (blocks, own))
        x_BTD, of_layers = run(x_BTD, rest, kinds[:left], False)
        found.append(of_layers)
    return x_BTD, jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *found)


def _of_kind(cfg: ModelConfig, common: BlockInputs, positions_BT: Array) -> BlockInputs:
    """What layers of one kind read: their rotary tables, and their window of the cache."""
    mask_BTS = common.mask_BTS
    if cfg.sliding_window and mask_BTS is not None:
        assert common.length is not None
        _, T, S = mask_BTS.shape
        slots_T = jnp.arange(T) + common.length
        seen_TS = jnp.arange(S)[None] > slots_T[:, None] - cfg.sliding_window
        mask_BTS = mask_BTS & seen_TS[None]
    rope = rope_tables(cfg, positions_BT) if cfg.position == "rope" else None
    growth_BT = query_growth(cfg, positions_BT)
    return common._replace(rope=rope, mask_BTS=mask_BTS, growth_BT=growth_BT)


def _look_up(
    tokens_BT: Array, segments_BT: Array | None, cache: KVCache | SlotCache | None
) -> tuple[Array, Array | None, Array | None]:
    """Every token's index in its row, its segment, and the cache slots that stand before it.

    The mask is None where the tokens need to look only at each other: without a cache, and while a
    prompt is read into an empty one.
    """
    slots_T = jnp.arange(tokens_BT.shape[1])
    if cache is None:
        return jnp.broadcast_to(slots_T[None], tokens_BT.shape), segments_BT, None
    if isinstance(cache, SlotCache):
        return cache.length_B[:, None] + slots_T[None], segments_BT, None
    slots_T = slots_T + cache.length
    index_BT = slots_T[None] - cache.start_B[:, None]
    real_BT = (index_BT >= 0).astype(jnp.int32)  # 0, padding, in front of a row's first token
    if cache.fresh:
        return jnp.maximum(index_BT, 0), real_BT, None
    keys_S = jnp.arange(cache.capacity)
    # A token sees the slots from its row's first token to its own, not the empty ones around.
    written_BS = keys_S[None] >= cache.start_B[:, None]
    mask_BTS = (keys_S[None, None] <= slots_T[None, :, None]) & written_BS[:, None]
    return jnp.maximum(index_BT, 0), real_BT, mask_BTS
