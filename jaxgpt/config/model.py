"""The shape of a network."""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

from jaxgpt.config.checks import at_least, require


@dataclass(frozen=True)
class RopeScaling:
    """How RoPE is stretched to contexts longer than the trained one."""

    kind: Literal["llama3", "linear", "dynamic", "yarn", "longrope"] = "llama3"
    """llama3: Llama 3.1's; linear: position interpolation (arXiv:2306.15595); dynamic: the base
    grows with the text (NTK); yarn: arXiv:2309.00071; longrope: arXiv:2402.13753."""
    factor: float = 8.0
    """How many times longer the context becomes; longrope has one factor per frequency instead."""
    low_freq_factor: float = 1.0
    """llama3: wavelengths above original_context / low_freq_factor are stretched by the whole
    factor."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths below original_context / high_freq_factor are not stretched."""
    original_context: int = 8192
    """Context length of the original training; linear does not read it."""
    attention_factor: float = 1.0
    """yarn and longrope: factor by which cos and sin, and so queries and keys, are multiplied."""
    beta_fast: float = 32.0
    """yarn: frequencies that turn more often than beta_fast times in original_context tokens are
    not stretched."""
    beta_slow: float = 1.0
    """yarn: frequencies that turn less often than beta_slow times in original_context tokens are
    stretched by the whole factor."""
    truncate: bool = True
    """true: yarn rounds the two borders between stretched and kept frequencies to whole pairs of a
    head's entries; false: it does not."""
    query_growth: float = 0.0
    """Queries are multiplied by 1 + query_growth * log(1 + floor(position / original_context))
    (Ministral 3); 0: they are not."""
    short_factors: tuple[float, ...] = ()
    """longrope: divisors of the frequencies in texts of up to original_context tokens, one for each
    pair of a head's entries."""
    long_factors: tuple[float, ...] = ()
    """longrope: divisors of the frequencies in longer texts, one for each pair."""

    def __post_init__(self) -> None:
        at_least("model.rope_scaling", self, factor=1, original_context=1, query_growth=0)
        for name in ("short_factors", "long_factors"):  # a YAML file has lists
            object.__setattr__(self, name, tuple(getattr(self, name)))


@dataclass(frozen=True)
class Latent:
    """Widths of multi-head latent attention (arXiv:2405.04434). model.head_dim is the width of
    a query: a plain part, and the last rope_dim entries, which are rotated."""

    dim: int = 512
    """Width of the latent from which a token's keys and values are computed."""
    query_dim: int = 0
    """Width of the latent from which queries are computed; 0: from the residual stream itself."""
    rope_dim: int = 64
    """Width of the rotated part of each query, and of the rotated key that all heads share."""
    value_dim: int = 128
    """Width of a head's values."""

    def __post_init__(self) -> None:
        at_least("model.latent", self, dim=1, query_dim=0, rope_dim=2, value_dim=1)
        require(self.rope_dim % 2 == 0, "model.latent.rope_dim", self.rope_dim, "must be even")


@dataclass(frozen=True)
class ModelConfig:
    """The shape of the network. GPT-2, Llama, Qwen and Mixtral are settings of this one class."""

    vocab_size: int = 0
    """Rows of the embedding table; 0 takes the tokenizer's size."""
    context_length: int = 256
    """Largest number of tokens in a sequence."""
    num_layers: int = 4
    """Number of transformer blocks."""
    model_dim: int = 128
    """Width of the residual stream."""
    num_heads: int = 4
    """Number of query heads; 1: single-head attention."""
    num_kv_heads: int | None = None
    """Number of key/value heads; fewer than num_heads: grouped-query attention; null: num_heads."""
    head_dim: int | None = None
    """Width of one head; null: model_dim / num_heads."""
    mlp_dim: int | None = None
    """Hidden width of the MLP, or of each expert; null: 4 * model_dim."""
    mlp: Literal["plain", "gated"] = "plain"
    """plain: down(act(up(x))); gated: down(act(gate(x)) * up(x))."""
    activation: Literal["gelu", "gelu_tanh", "silu", "relu"] = "gelu"
    """gelu is the exact erf form, gelu_tanh GPT-2's approximation; silu with gated is SwiGLU."""
    gate_limit: float = 0.0
    """Above 0: mlp=gated computes gate * sigmoid(1.702 * gate) * (up + 1) in place of the
    activation, as gpt-oss does. gate is cut off above the limit, up at plus and minus the limit."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """Kind of the norms; norm_place says where they stand."""
    norm_eps: float = 1e-5
    """Number added to the variance, or mean square, by whose root a norm divides."""
    norm_offset: float = 0.0
    """Number added to the trained scale of RMSNorm (Gemma: 1)."""
    norm_place: Literal["before", "after", "both"] = "before"
    """before: x + f(norm(x)); after: x + norm(f(x)) (OLMo 2); both: x + norm(f(norm(x))) with two
    norms (Gemma 3, GLM-4)."""
    qk_norm: bool = False
    """true: normalise queries and keys by RMSNorm (Qwen3)."""
    qk_norm_over: Literal["head", "width"] = "head"
    """What qk_norm normalises: head: every head by itself; width: all heads of a token together
    (OLMo 2)."""
    parallel_residual: bool = False
    """true: x + attention(norm(x)) + mlp(norm(x)) (GPT-NeoX); false: first attention, then the
    MLP on its result."""
    embedding_scale: float | None = 1.0
    """Factor by which token embeddings are multiplied (Granite); null: sqrt(model_dim) (Gemma)."""
    residual_scale: float = 1.0
    """Factor by which the outputs of attention and MLP are multiplied before they are added to the
    residual stream (Granite)."""
    latent: Latent | None = None
    """Multi-head latent attention, whose cache is one narrow vector a token (DeepSeek-V2 and V3);
    null: every head has keys and values of its own."""
    attention_scale: float | None = None
    """Factor by which queries times keys are multiplied; null: 1 / sqrt(head_dim)."""
    attention_sinks: bool = False
    """true: every head has a trained score that takes part in its softmax and has no value, so that
    the head can attend to nothing (gpt-oss)."""
    attention_softcap: float = 0.0
    """Scores of attention become softcap * tanh(score / softcap) (Gemma 2); 0: no cap."""
    logit_softcap: float = 0.0
    """Logits become softcap * tanh(logit / softcap) (Gemma 2); 0: no cap."""
    logit_divisor: float = 1.0
    """Number by which the logits are divided (Granite)."""
    position: Literal["learned", "rope", "none"] = "learned"
    """How the model knows positions: learned: by a trained vector for each position; rope: by
    rotating queries and keys; none: by the causal mask alone."""
    position_offset: int = 0
    """Number of rows before the first position's row in the table of learned positions (OPT: 2)."""
    sliding_window: int | None = None
    """Number of tokens that a token attends to, itself included (Mistral); null: all up to it."""
    layer_pattern: str = ""
    """Kind of each layer as a letter; the pattern repeats. L, local: with sliding_window; G,
    global: sees all tokens before (Gemma 3: LLLLLG). Empty: all layers are alike."""
    rope_base: float = 10000.0
    """RoPE's theta, from which the frequencies of the rotations follow."""
    rope_local_base: float | None = None
    """RoPE's theta in the local layers of layer_pattern, to which rope_scaling then does not apply
    (Gemma 3, OLMo 3); null: local layers use rope_base and rope_scaling, as global ones do."""
    rope_scaling: RopeScaling | None = None
    """How RoPE is stretched to a longer context; null: it is not."""
    rope_share: float = 1.0
    """Share of a head's entries that are rotated, from the first on; the rest stays."""
    rope_pairs: Literal["halves", "neighbours"] = "halves"
    """Which entries of a head are rotated as a pair: halves: i and i + width / 2 (Llama in Hugging
    Face's layout); neighbours: 2i and 2i + 1 (GLM-4, ERNIE 4.5)."""
    rope_skip: int = 0
    """Every rope_skip-th layer has no rotary positions (SmolLM3: 4); 0: all layers have them."""
    bias: Literal["none", "qkv", "attention", "mlp", "all"] = "none"
    """Which layers have biases: none; qkv: query, key and value (Qwen2); attention: all linear
    layers of attention; mlp: those of the MLP; all: all of these and LayerNorm (GPT-2)."""
    tie_embeddings: bool = True
    """true: the output head is the embedding table; false: it is a matrix of its own."""
    dropout: float = 0.0
    """Probability with which training sets an entry to zero, in the embedding and in the outputs of
    attention and MLP."""
    num_experts: int = 0
    """Number of experts in the mixture that replaces the MLP; 0: a dense MLP."""
    experts_per_token: int = 2
    """Number of experts that each token visits."""
    normalize_expert_weights: bool = True
    """true: the gate weights of a token's experts sum to one (Mixtral); false: they are those of
    the softmax over all experts."""
    router: Literal["softmax", "sigmoid"] = "softmax"
    """How experts are scored: softmax: over all of them; sigmoid: each one by itself, with a bias
    for their choice that is a parameter without a gradient (DeepSeek-V3)."""
    expert_groups: int = 1
    """Number of groups of experts; a token visits groups_per_token of them (DeepSeek)."""
    groups_per_token: int = 1
    """Number of groups that each token visits. A group is scored by its best expert, or with
    router=sigmoid by its best two."""
    expert_scale: float = 1.0
    """Factor by which the gate weights are multiplied."""
    dense_layers: int = 0
    """Number of layers, the first ones, with a dense MLP in place of the mixture (DeepSeek)."""
    dense_mlp_dim: int | None = None
    """Hidden width of the MLP in the layers of dense_layers; null: 4 * model_dim."""
    expert_bias: bool = False
    """true: the experts and their router have biases (gpt-oss)."""
    shared_mlp_dim: int = 0
    """Hidden width of a shared expert, which every token visits; 0: there is none."""
    shared_gate: bool = True
    """true: the shared expert stands behind a gate of its own (Qwen2-MoE); false: it does not
    (DeepSeek)."""
    expert_capacity: float = 0.0
    """Largest load of an expert, as a multiple of an even share; tokens beyond it skip the expert;
    0: an expert takes all tokens that choose it."""
    balance: Literal["loss", "bias", "none"] = "loss"
    """How the load of the experts is kept even: loss: by a loss for every sequence; bias: by a bias
    on their choice, which every step adjusts (aux-loss-free); none: not at all."""
    balance_weight: float = 0.01
    """Weight of the balance loss, or step size of the selection bias."""
    adapter_dim: int = 0
    """Width of a bottleneck adapter in every block; 0: none."""
    adapter_parallel: bool = False
    """true: one bottleneck adapter beside the MLP; false: two, behind attention and behind the MLP
    (Houlsby)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute type of matrix products; parameters, norms, softmax and losses stay float32."""
    remat: Literal["none", "dots", "qkv", "attention", "full"] = "none"
    """What the backward pass computes again to save memory: none: nothing; dots: all but the matrix
    products; qkv: all but attention's queries, keys, values and output; attention: all but its
    output; full: every block."""

    def __post_init__(self) -> None:
        at_least(
            "model", self, context_length=1, num_layers=1, model_dim=1, num_heads=1,
            num_kv_heads=1, head_dim=1, mlp_dim=1, vocab_size=0, num_experts=0, expert_capacity=0,
            shared_mlp_dim=0, adapter_dim=0, norm_eps=0, sliding_window=1, rope_skip=0,
            attention_softcap=0, logit_softcap=0, gate_limit=0, expert_groups=1,
            groups_per_token=1, dense_layers=0, dense_mlp_dim=1, position_offset=0,
        )  # fmt: skip
        self._check_mixture()
        if self.latent is not None:
            require(
                self.head_width > self.latent.rope_dim, "model.head_dim", self.head_width,
                f"must be above model.latent.rope_dim={self.latent.rope_dim}",
            )  # fmt: skip
            for name, usual in (("kv_heads", self.num_heads), ("qk_norm", False), ("bias", "none"),
                                ("attention_sinks", False), ("rope_share", 1.0)):  # fmt: skip
                value = getattr(self, name)
                require(
                    value == usual, f"model.{name}", value, f"must be {usual} with model.latent"
                )
        if self.head_dim is None:
            require(
                self.model_dim % self.num_heads == 0, "model.num_heads", self.num_heads,
                f"must divide model.model_dim={self.model_dim} (or set model.head_dim)",
            )  # fmt: skip
        require(
            self.num_heads % self.kv_heads == 0, "model.num_kv_heads", self.kv_heads,
            f"must divide model.num_heads={self.num_heads}",
        )  # fmt: skip
        require(0 <= self.dropout < 1, "model.dropout", self.dropout, "must be in [0, 1)")
        for name in ("embedding_scale", "residual_scale", "attention_scale", "logit_divisor"):
            value = getattr(self, name)
            require(value is None or value > 0, f"model.{name}", value, "must be above 0")
        require(
            set(self.layer_pattern) <= {"L", "G"}, "model.layer_pattern", self.layer_pattern,
            "must be letters L and G",
        )  # fmt: skip
        local = "L" in self.layer_pattern
        require(
            self.sliding_window is not None or not local, "model.layer_pattern", self.layer_pattern,
            "has local layers; set model.sliding_window",
        )  # fmt: skip
        require(
            local or self.rope_local_base is None, "model.rope_local_base", self.rope_local_base,
            "is for the local layers of model.layer_pattern",
        )  # fmt: skip
        require(0 < self.rope_share <= 1, "model.rope_share", self.rope_share, "must be in (0, 1]")
        require(
            self.position != "rope" or self.rotary_width % 2 == 0, "model.head_dim",
            self.head_width, "must be even for model.position=rope",
        )  # fmt: skip
        scaling = self.rope_scaling
        if self.position == "rope" and scaling is not None and scaling.kind == "longrope":
            for name in ("short_factors", "long_factors"):
                factors = getattr(scaling, name)
                require(
                    len(factors) == self.rotary_width // 2 and min(factors, default=0) > 0,
                    f"model.rope_scaling.{name}", factors,
                    f"must be {self.rotary_width // 2} positive numbers",
                )  # fmt: skip
        require(
            self.num_experts > 0 or self.shared_mlp_dim == 0, "model.shared_mlp_dim",
            self.shared_mlp_dim, "stands beside a mixture; set model.num_experts",
        )  # fmt: skip
        require(
            self.num_experts == 0 or 1 <= self.experts_per_token <= self.num_experts,
            "model.experts_per_token", self.experts_per_token,
            f"must be between 1 and model.num_experts={self.num_experts}",
        )  # fmt: skip

    def _check_mixture(self) -> None:
        for name, most, least in (
            ("groups_per_token", self.expert_groups, "model.expert_groups"),
            ("dense_layers", self.num_layers - 1, "model.num_layers - 1"),
        ):
            value = getattr(self, name)
            require(value <= most, f"model.{name}", value, f"must be at most {least}={most}")
        groups = self.expert_groups
        if groups > 1:
            size = self.num_experts // groups
            require(
                self.num_experts % groups == 0 and size > 1, "model.expert_groups", groups,
                f"must cut model.num_experts={self.num_experts} into groups of two or more",
            )  # fmt: skip
            require(
                self.experts_per_token <= self.groups_per_token * size, "model.groups_per_token",
                self.groups_per_token, f"has too few experts for {self.experts_per_token} a token",
            )  # fmt: skip
        require(
            not self.dense_layers or (self.num_experts > 0 and len(self.period) == 1),
            "model.dense_layers", self.dense_layers,
            "stands before a mixture whose layers are alike; set model.num_experts, and neither "
            "model.layer_pattern nor model.rope_skip",
        )  # fmt: skip

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_width(self) -> int:
        return self.model_dim // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def embedding_factor(self) -> float:
        return self.model_dim**0.5 if self.embedding_scale is None else self.embedding_scale

    @property
    def rotary_width(self) -> int:
        """Entries of a head that RoPE rotates."""
        if self.latent is not None:
            return self.latent.rope_dim
        return int(self.head_width * self.rope_share)

    @property
    def cached(self) -> tuple[int, int, int]:
        """Of a cache: (number of heads, width of a key, width of a value).

        Latent attention caches one vector, a part of which is also the value.
        """
        if self.latent is not None:
            return 1, self.latent.dim + self.latent.rope_dim, 0
        return self.kv_heads, self.head_width, self.head_width

    @property
    def parts(self) -> tuple[tuple[str, int, "ModelConfig"], ...]:
        """Stacks of layers with equal shapes: (name, first layer, config of such a model)."""
        first = self.dense_layers
        if not first:
            return (("blocks", 0, self),)
        rest = replace(self, num_layers=self.num_layers - first, dense_layers=0)
        dense = replace(
            rest, num_layers=first, num_experts=0, shared_mlp_dim=0, mlp_dim=self.dense_mlp_dim,
            expert_groups=1, groups_per_token=1,
        )  # fmt: skip
        return (("dense_blocks", 0, dense), ("blocks", first, rest))

    @property
    def period(self) -> tuple["ModelConfig", ...]:
        """The kinds of layers, as configs of models that have only one kind; the kinds repeat."""
        length = math.lcm(len(self.layer_pattern) or 1, self.rope_skip or 1)
        kinds = tuple(self.of_layer(layer) for layer in range(min(length, self.num_layers)))
        return kinds if len(set(kinds)) > 1 else kinds[:1]

    def of_layer(self, layer: int) -> "ModelConfig":
        """The config of a model in which all layers are like this one."""
        if not self.layer_pattern and not self.rope_skip:
            return self
        own: dict[str, Any] = {"layer_pattern": "", "rope_skip": 0, "rope_local_base": None}
        if self.layer_pattern and self.layer_pattern[layer % len(self.layer_pattern)] == "G":
            own["sliding_window"] = None
        elif self.rope_local_base is not None:
            own |= {"rope_base": self.rope_local_base, "rope_scaling": None}
        if self.rope_skip and (layer + 1) % self.rope_skip == 0 and self.position == "rope":
            own["position"] = "none"
        return replace(self, **own)

    @property
    def mlp_width(self) -> int:
        return 4 * self.model_dim if self.mlp_dim is None else self.mlp_dim
