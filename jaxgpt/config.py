"""Every setting of a run: frozen dataclasses, read from YAML and the command line.

A default lives here and nowhere else; the text under a field is what `--help` prints.
"""

import dataclasses
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

C = TypeVar("C")


def _require(holds: bool, setting: str, value: Any, fix: str) -> None:
    if not holds:
        raise ValueError(f"{setting}={value}: {fix}")


def _at_least(section: str, cfg: Any, **least: float) -> None:
    for name, bound in least.items():
        value = getattr(cfg, name)
        fix = f"must be {bound} or more"
        setting = f"{section}.{name}" if section else name
        _require(value is None or value >= bound, setting, value, fix)


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's stretching of RoPE to contexts longer than the trained one."""

    factor: float = 8.0
    """How many times longer the context becomes."""
    low_freq_factor: float = 1.0
    """Wavelengths above original_context / this are stretched whole."""
    high_freq_factor: float = 4.0
    """Wavelengths below original_context / this stay."""
    original_context: int = 8192
    """Context length of the original training."""


@dataclass(frozen=True)
class ModelConfig:
    """The shape of the network. GPT-2, Llama, Qwen and Mixtral are settings of this one class."""

    vocab_size: int = 0
    """Rows of the embedding table; 0 takes the tokenizer's size."""
    context_length: int = 256
    """Longest sequence in tokens."""
    num_layers: int = 4
    """Transformer blocks."""
    model_dim: int = 128
    """Width of the residual stream."""
    num_heads: int = 4
    """Query heads; 1 is single-head attention."""
    num_kv_heads: int | None = None
    """Key/value heads, fewer than num_heads for grouped-query attention; null: as many."""
    head_dim: int | None = None
    """Width of one head; null: model_dim / num_heads."""
    mlp_dim: int | None = None
    """Hidden width of the MLP (of each expert); null: 4 * model_dim."""
    mlp: Literal["plain", "gated"] = "plain"
    """plain: down(act(up(x))); gated: down(act(gate(x)) * up(x))."""
    activation: Literal["gelu", "gelu_tanh", "silu"] = "gelu"
    """gelu is the exact erf form, gelu_tanh GPT-2's approximation; silu with gated is SwiGLU."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """Normalisation before attention, MLP and head."""
    norm_eps: float = 1e-5
    """Added to the variance."""
    qk_norm: bool = False
    """RMS-normalise every query and key head (Qwen3)."""
    position: Literal["learned", "rope"] = "learned"
    """Learned absolute positions, or rotary ones."""
    sliding_window: int | None = None
    """Tokens that attention sees, the present one included (Mistral); null: all before it."""
    rope_base: float = 10000.0
    """RoPE's theta."""
    rope_scaling: RopeScaling | None = None
    """Llama 3's context extension; null: none."""
    bias: Literal["none", "qkv", "all"] = "none"
    """Biases nowhere, on query/key/value (Qwen2), or on every linear layer and norm (GPT-2)."""
    tie_embeddings: bool = True
    """The output head is the embedding table."""
    dropout: float = 0.0
    """Probability of dropping an entry of the embedding, of attention's and the MLP's output."""
    num_experts: int = 0
    """Experts of the mixture that replaces the MLP; 0: a dense MLP."""
    experts_per_token: int = 2
    """Experts that each token visits."""
    normalize_expert_weights: bool = True
    """Chosen experts' gate weights sum to one (Mixtral); off: the plain softmax."""
    shared_mlp_dim: int = 0
    """Hidden width of a further expert that every token visits, behind a gate of its own
    (Qwen2-MoE); 0: none."""
    expert_capacity: float = 0.0
    """Slots per expert as a multiple of an even share; 0: dropless."""
    balance: Literal["loss", "bias", "none"] = "loss"
    """Keep experts busy by a per-sequence loss, by a selection bias (aux-loss-free), or not."""
    balance_weight: float = 0.01
    """Weight of the balance loss, or step size of the selection bias."""
    adapter_dim: int = 0
    """Width of a bottleneck adapter in every block; 0: none."""
    adapter_parallel: bool = False
    """The adapter runs beside the MLP instead of after attention and MLP (Houlsby)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute type of matrix products; parameters, norms, softmax and losses stay float32."""
    remat: Literal["none", "dots", "full"] = "none"
    """What the backward pass recomputes: nothing, all but matrix products, every block."""

    def __post_init__(self) -> None:
        _at_least(
            "model", self, context_length=1, num_layers=1, model_dim=1, num_heads=1,
            num_kv_heads=1, head_dim=1, mlp_dim=1, vocab_size=0, num_experts=0, expert_capacity=0,
            shared_mlp_dim=0, adapter_dim=0, norm_eps=0, sliding_window=1,
        )  # fmt: skip
        if self.head_dim is None:
            _require(
                self.model_dim % self.num_heads == 0, "model.num_heads", self.num_heads,
                f"must divide model.model_dim={self.model_dim} (or set model.head_dim)",
            )  # fmt: skip
        _require(
            self.num_heads % self.kv_heads == 0, "model.num_kv_heads", self.kv_heads,
            f"must divide model.num_heads={self.num_heads}",
        )  # fmt: skip
        _require(0 <= self.dropout < 1, "model.dropout", self.dropout, "must be in [0, 1)")
        _require(
            self.position != "rope" or self.head_width % 2 == 0, "model.head_dim", self.head_width,
            "must be even for model.position=rope",
        )  # fmt: skip
        _require(
            self.num_experts > 0 or self.shared_mlp_dim == 0, "model.shared_mlp_dim",
            self.shared_mlp_dim, "stands beside a mixture; set model.num_experts",
        )  # fmt: skip
        _require(
            self.num_experts == 0 or 1 <= self.experts_per_token <= self.num_experts,
            "model.experts_per_token", self.experts_per_token,
            f"must be between 1 and model.num_experts={self.num_experts}",
        )  # fmt: skip

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_width(self) -> int:
        return self.model_dim // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def mlp_width(self) -> int:
        return 4 * self.model_dim if self.mlp_dim is None else self.mlp_dim


@dataclass(frozen=True)
class DataConfig:
    """The text to train on."""

    path: str = ""
    """Token directory (prepare_data.py), .bin file, or plain text file or folder;
    empty: the source code of Python's standard library."""
    mixture: dict[str, float] = field(default_factory=dict)
    """Several token directories with their weights, instead of path."""
    tokenizer: str = ""
    """byte, a tiktoken name (gpt2, cl100k_base), or a tokenizer.json; empty: the one recorded
    beside the token files, else our BPE trained on the text."""
    vocab_size: int = 2048
    """Size of the BPE that is trained when there is no tokenizer."""
    val_fraction: float = 0.1
    """Share of the end of each file that is held out; a token directory records its own."""
    documents: bool = False
    """Pack whole documents with segment ids and restarted positions; off: one endless stream."""

    def __post_init__(self) -> None:
        _at_least("data", self, vocab_size=1)
        _require(
            0 < self.val_fraction < 1, "data.val_fraction", self.val_fraction, "must be in (0, 1)"
        )
        _require(
            not (self.path and self.mixture),
            "data.mixture",
            self.mixture,
            "excludes data.path; drop one",
        )
        _require(
            all(w > 0 for w in self.mixture.values()),
            "data.mixture",
            self.mixture,
            "weights must be positive",
        )


@dataclass(frozen=True)
class TrainConfig:
    """How long and how wide to train."""

    steps: int = 500
    """Optimizer steps."""
    batch_size: int = 16
    """Sequences per optimizer step, over all devices and micro-batches."""
    micro_batches: int = 1
    """Parts into which the batch is cut to save memory; the gradient stays the same."""
    z_loss: float = 0.0
    """Weight of (log of the softmax's normaliser)^2; 1e-4 steadies large runs."""
    label_smoothing: float = 0.0
    """Share of the target probability that is spread over the vocabulary."""
    loss_chunk: int = 1024
    """Tokens of a device whose logits exist at one time; 0: all."""
    max_loss: float = 1e4
    """A loss above this, or not finite, stops the run."""

    def __post_init__(self) -> None:
        _at_least("train", self, steps=0, batch_size=1, micro_batches=1, z_loss=0, loss_chunk=0)
        _require(self.max_loss > 0, "train.max_loss", self.max_loss, "must be positive")
        _require(
            self.batch_size % self.micro_batches == 0,
            "train.micro_batches", self.micro_batches,
            f"must divide train.batch_size={self.batch_size}",
        )  # fmt: skip
        _require(
            0 <= self.label_smoothing < 1,
            "train.label_smoothing",
            self.label_smoothing,
            "must be in [0, 1)",
        )


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its schedule."""

    name: Literal["adamw", "muon"] = "adamw"
    """muon orthogonalises the updates of the blocks' matrices and leaves the rest to AdamW."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """After warm-up: cosine decay, warm-up-stable-decay, or constant."""
    warmup_steps: int = 100
    """Linear warm-up, in optimizer steps."""
    min_ratio: float = 0.1
    """Final learning rate as a share of the peak."""
    decay_steps: int | None = None
    """Step at which the decay ends; null: train.steps."""
    decay_fraction: float = 0.2
    """Share of the run that wsd spends decaying."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay."""
    no_decay: str = r"(bias|scale|embedding|magnitude)$"
    """Parameters (regular expression on the path) that are not decayed."""
    clip_norm: float = 1.0
    """Largest global gradient norm; 0: no clipping."""
    ema: float = 0.0
    """Decay of an exponential moving average of the parameters, used to evaluate; 0: none."""

    def __post_init__(self) -> None:
        _at_least(
            "optim", self, learning_rate=0, warmup_steps=0, min_ratio=0, decay_steps=1, eps=0,
            weight_decay=0, clip_norm=0,
        )  # fmt: skip
        for name in ("beta1", "beta2", "ema"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"optim.{name}", value, "must be in [0, 1)")
        share = self.decay_fraction
        _require(0 <= share <= 1, "optim.decay_fraction", share, "must be in [0, 1]")
        try:
            re.compile(self.no_decay)
        except re.error as error:
            _require(False, "optim.no_decay", self.no_decay, f"no regular expression: {error}")


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save and what to keep."""

    every: int = 500
    """Steps between checkpoints; the last step is always saved."""
    keep: int = 2
    """Latest checkpoints kept, beside the one with the best validation loss."""

    def __post_init__(self) -> None:
        _at_least("checkpoint", self, every=1, keep=1)


@dataclass(frozen=True)
class EvalConfig:
    """Held-out loss during training."""

    every: int = 250
    """Steps between evaluations; the first and last step always are; 0: only those."""
    batches: int = 20
    """Batches per evaluation, the same ones each time; the last evaluation reads them all if 0."""

    def __post_init__(self) -> None:
        _at_least("eval", self, every=0, batches=0)


@dataclass(frozen=True)
class SampleConfig:
    """Text written by the model during training, and how to draw it."""

    every: int = 250
    """Steps between samples; 0: only after the last step."""
    prompts: list[str] = field(default_factory=lambda: ["\n"])
    """Texts to continue."""
    max_new_tokens: int = 200
    """Tokens to write."""
    temperature: float = 0.8
    """0 is greedy."""
    top_p: float = 0.95
    """Nucleus: the fewest tokens whose probability reaches this."""
    top_k: int = 0
    """Only the k likeliest tokens; 0: all."""

    def __post_init__(self) -> None:
        _at_least("sample", self, every=0, max_new_tokens=0, temperature=0, top_k=0)
        _require(0 < self.top_p <= 1, "sample.top_p", self.top_p, "must be in (0, 1]")
        _require(all(self.prompts), "sample.prompts", self.prompts, "none may be empty")


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; -1 takes what is left."""

    data: int = -1
    """Copies of the model, each with its own rows."""
    fsdp: int = 1
    """Parameters, gradients and moments cut over devices that have their own rows too."""
    tensor: int = 1
    """Heads and hidden units cut over devices."""
    context: int = 1
    """Positions of one sequence cut over devices."""
    expert: int = 1
    """Experts cut over devices."""

    def __post_init__(self) -> None:
        for axis, size in dataclasses.asdict(self).items():
            _require(size == -1 or size > 0, f"mesh.{axis}", size, "must be positive, or -1")


@dataclass(frozen=True)
class LogConfig:
    """What a run reports, beside metrics.jsonl and report.html."""

    every: int = 10
    """Steps between lines of metrics.jsonl."""
    tensorboard: bool = False
    """Write TensorBoard events into the run directory."""
    wandb: str = ""
    """Weights & Biases project; empty: off."""
    profile: str = ""
    """Steps to trace with JAX's profiler, as first:last; empty: none."""

    def __post_init__(self) -> None:
        _at_least("log", self, every=1)
        if self.profile:
            first, _, last = self.profile.partition(":")
            holds = first.isdecimal() and last.isdecimal() and int(first) <= int(last)
            _require(holds, "log.profile", self.profile, "must be first:last, such as 10:12")


@dataclass(frozen=True)
class PeftConfig:
    """Training a small addition to frozen weights, in place of the weights."""

    kind: Literal["none", "lora", "qlora", "adapter"] = "none"
    """lora: low-rank changes of kernels; qlora: the same over quantised kernels; adapter: a
    bottleneck after attention and MLP."""
    targets: str = "all-linear"
    """Kernels of lora and qlora: attention, mlp, all-linear, or a regular expression on names such
    as blocks/attention/query/kernel."""
    rank: int = 16
    """Width of a low-rank change."""
    alpha: float = 32.0
    """A low-rank change is multiplied by alpha / rank."""
    rslora: bool = False
    """Multiply by alpha / sqrt(rank) instead."""
    dora: bool = False
    """Train the length of every kernel's columns apart from their direction."""
    dropout: float = 0.0
    """Probability of dropping an entry of what a low-rank change reads."""
    quantize: Literal["nf4", "int8"] = "nf4"
    """How qlora stores the blocks' kernels."""
    adapter_dim: int = 64
    """Width of a bottleneck."""
    adapter_parallel: bool = False
    """One bottleneck beside the MLP in place of two behind attention and MLP (Houlsby)."""
    train_norms: bool = False
    """Train the norms along with the bottlenecks, as Houlsby did."""

    def __post_init__(self) -> None:
        _at_least("peft", self, rank=1, alpha=0, adapter_dim=1)
        _require(0 <= self.dropout < 1, "peft.dropout", self.dropout, "must be in [0, 1)")
        try:
            re.compile(self.targets)
        except re.error as error:
            _require(False, "peft.targets", self.targets, f"no regular expression: {error}")


@dataclass(frozen=True)
class RunConfig:
    """What every training command has."""

    run: str
    """Directory of the run; the same command on the same directory resumes."""
    init: str = ""
    """Start from these weights: a run directory or a Hugging Face directory; empty: at random."""
    seed: int = 0
    """Seed of initialisation, data order, dropout and sampling."""
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    peft: PeftConfig = field(default_factory=PeftConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    log: LogConfig = field(default_factory=LogConfig)
    fit: Literal["off", "auto"] = "off"
    """auto: choose train.micro_batches and model.remat so that a step fits into the devices' memory
    and takes the least time by estimate; a resumed run keeps the choice. See scripts/plan.py."""
    show_batch: bool = False
    """Print the first batch, token by token, and end."""


@dataclass(frozen=True)
class PretrainConfig(RunConfig):
    """Next-token prediction on plain text."""

    run: str = "runs/pretrain"
    """Directory of the run; the same command on the same directory resumes."""
    data: DataConfig = field(default_factory=DataConfig)


@dataclass(frozen=True)
class ConversationConfig:
    """Conversations, or answers to prefer."""

    path: str = ""
    """JSONL, JSON or Parquet file (or its .gz), Hub data set, or embedded task; empty: arithmetic.
    The formats are told by their columns: messages, conversations, instruction, prompt, question,
    chosen."""
    split: str = "train"
    """Split of a Hub data set."""
    val_path: str = ""
    """Held-out rows; empty: every n-th row of path. Embedded tasks hold out by themselves."""
    val_fraction: float = 0.05
    """Share of path that is held out where there is no val_path."""
    template: str = ""
    """chatml, llama3, plain or a Jinja file; empty: the model's own, else chatml, or plain where
    the vocabulary has no tokens for chat."""
    tokenizer: str = "byte"
    """For a model that starts at random; init brings its own."""
    max_tokens: int = 0
    """Longest row; 0: model.context_length."""
    long: Literal["truncate", "drop"] = "truncate"
    """What happens to a longer one."""

    def __post_init__(self) -> None:
        _require(
            0 <= self.val_fraction < 1, "data.val_fraction", self.val_fraction, "must be in [0, 1)"
        )
        _require(self.max_tokens >= 0, "data.max_tokens", self.max_tokens, "must be 0 or more")


@dataclass(frozen=True)
class ChatDataConfig(ConversationConfig):
    """Conversations to learn from, and plain text beside them."""

    packing: bool = True
    """Several conversations to a row; off: one, padded to the longest of the batch."""
    learn: Literal["assistant", "all"] = "assistant"
    """Whose words are targets."""
    calls: Literal["text", "turns"] = "text"
    """GSM8K's <<48/2=24>> is text, or a turn that calls the calculator and what that gives."""
    text_share: float = 0.0
    """Share of the rows that are windows of plain text, against forgetting; 1: nothing else."""
    text_path: str = ""
    """That text, as data.path of pretraining; empty: the source code of Python's library."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(0 <= self.text_share <= 1, "data.text_share", self.text_share, "must be in [0, 1]")
        _require(
            self.text_share == 0 or self.packing, "data.text_share", self.text_share,
            "needs rows of one width; set data.packing",
        )  # fmt: skip


def _tuning(learning_rate: float) -> OptimConfig:
    """The optimizer of a stage that starts from trained weights."""
    return OptimConfig(learning_rate=learning_rate, warmup_steps=20, weight_decay=0.0)


def _questions() -> SampleConfig:
    return SampleConfig(prompts=["What is 65 - 47?", "Compute 27 + 58."], temperature=0.0)


@dataclass(frozen=True)
class SftConfig(RunConfig):
    """Supervised fine-tuning: what the assistant says in conversations."""

    run: str = "runs/sft"
    """Directory of the run; the same command on the same directory resumes."""
    data: ChatDataConfig = field(default_factory=ChatDataConfig)
    optim: OptimConfig = field(default_factory=lambda: _tuning(2e-5))
    sample: SampleConfig = field(default_factory=_questions)


@dataclass(frozen=True)
class RewardConfig(RunConfig):
    """A reward model: which of two answers people prefer."""

    run: str = "runs/reward"
    """Directory of the run; the same command on the same directory resumes."""
    data: ConversationConfig = field(default_factory=ConversationConfig)
    optim: OptimConfig = field(default_factory=lambda: _tuning(1e-5))
    margin: bool = False
    """Ask for the margin that the data states (Llama 2)."""
    centering: float = 0.01
    """Weight of (chosen + rejected)^2, which keeps rewards around zero."""


@dataclass(frozen=True)
class DpoConfig(RunConfig):
    """Direct preference optimisation and its relatives."""

    run: str = "runs/dpo"
    """Directory of the run; the same command on the same directory resumes."""
    data: ConversationConfig = field(default_factory=ConversationConfig)
    optim: OptimConfig = field(default_factory=lambda: _tuning(1e-6))
    sample: SampleConfig = field(default_factory=_questions)
    loss: Literal["sigmoid", "ipo", "hinge", "kto", "orpo", "simpo"] = "sigmoid"
    """kto learns from single answers, orpo and simpo need no reference."""
    beta: float = 0.1
    """How closely the policy keeps to the reference; orpo: weight of the odds; simpo: scale."""
    label_smoothing: float = 0.0
    """Chance that a pair is labelled the wrong way round (cDPO)."""
    gamma: float = 0.5
    """By how much simpo's chosen answer should win."""
    desirable_weight: float = 1.0
    """Weight of kto's good answers."""
    undesirable_weight: float = 1.0
    """Weight of kto's bad answers."""
    reference: Literal["live", "precomputed"] = "live"
    """Run the frozen reference with every batch, or once over all data, to be read from disk."""

    def __post_init__(self) -> None:
        _require(self.beta > 0, "beta", self.beta, "must be positive")
        _require(
            0 <= self.label_smoothing < 0.5, "label_smoothing", self.label_smoothing,
            "must be in [0, 0.5)",
        )  # fmt: skip
        _require(
            self.label_smoothing == 0 or self.loss == "sigmoid",
            "label_smoothing", self.label_smoothing, "is for loss=sigmoid",
        )  # fmt: skip
        _require(
            self.loss != "kto" or self.train.batch_size > 1,
            "train.batch_size", self.train.batch_size, "must be at least 2 for loss=kto",
        )  # fmt: skip


@dataclass(frozen=True)
class RolloutConfig:
    """What the policy writes, to learn from it."""

    updates: int = 2
    """Optimizer steps made of one rollout; checkpoint.every must be a multiple."""
    epochs: int = 1
    """Times that every answer is learned from, within those steps. A rollout has
    train.batch_size * updates / epochs answers."""
    samples: int = 8
    """Answers to each prompt."""
    max_new_tokens: int = 128
    """Tokens of a turn; a turn that is longer ends the episode there."""
    temperature: float = 1.0
    """Of the distribution that answers are drawn from, and scored by."""
    truncated: Literal["judge", "mask"] = "judge"
    """What becomes of answers without a stop token: judged as they stand, or judged for their
    group's sake but not learned from (DAPO's overlong filtering)."""
    overlong_buffer: int = 0
    """The last so many of max_new_tokens cost an answer up to 1 (DAPO's soft punishment)."""
    judge_seconds: float = 30.0
    """A rule or a tool that takes longer over one turn ends the run."""

    def __post_init__(self) -> None:
        _at_least("rollout", self, updates=1, epochs=1, samples=1, max_new_tokens=1)
        _at_least("rollout", self, overlong_buffer=0)
        for name in ("temperature", "judge_seconds"):
            value = getattr(self, name)
            _require(value > 0, f"rollout.{name}", value, "must be positive")
        _require(
            self.updates % self.epochs == 0, "rollout.updates", self.updates,
            f"must be a multiple of rollout.epochs={self.epochs}",
        )  # fmt: skip

    def rows(self, batch_size: int) -> int:
        """Answers of one rollout.

        Raises:
            ValueError: they do not come to whole groups.
        """
        rows = batch_size * self.updates // self.epochs
        _require(
            rows % self.samples == 0, "rollout.samples", self.samples,
            f"must divide the {rows} answers of a rollout, train.batch_size={batch_size} * "
            f"rollout.updates={self.updates} / rollout.epochs={self.epochs}",
        )  # fmt: skip
        return rows


@dataclass(frozen=True)
class TaskConfig:
    """The problems that a policy practises on."""

    path: str = "arithmetic"
    """Embedded task (arithmetic, arithmetic-concise, arithmetic-calculator, multi-step, products,
    products-calculator), or a JSONL, JSON or Parquet file or Hub data set of {question, answer}."""
    tools: list[str] = field(default_factory=list)
    """Tools that may be called: [calculator]; empty: those that the embedded task offers."""
    split: str = "train"
    """Split of a Hub data set."""
    val_path: str = ""
    """Held-out rows; empty: one in ten of path. Embedded tasks hold out by themselves."""
    template: str = ""
    """chatml, llama3, plain or a Jinja file; empty: the model's own, else chatml, or plain where
    the vocabulary has no tokens for chat."""
    format_weight: float = 0.0
    """Share of the reward that <think>…</think><answer>…</answer> earns."""

    def __post_init__(self) -> None:
        _require(
            0 <= self.format_weight < 1, "data.format_weight", self.format_weight,
            "must be in [0, 1)",
        )  # fmt: skip


@dataclass(frozen=True)
class PolicyConfig(RunConfig):
    """What both ways to learn from rewards have."""

    data: TaskConfig = field(default_factory=TaskConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(steps=400, batch_size=32))
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(
            learning_rate=1e-6, schedule="constant", warmup_steps=10, weight_decay=0.0
        )
    )
    checkpoint: CheckpointConfig = field(default_factory=lambda: CheckpointConfig(every=100))
    eval: EvalConfig = field(default_factory=lambda: EvalConfig(every=100, batches=8))
    sample: SampleConfig = field(default_factory=lambda: SampleConfig(every=100, prompts=[]))
    clip_low: float = 0.2
    """A token's probability may fall by this share, by one rollout, until its gradient ends."""
    clip_high: float = 0.28
    """And grow by this; more than clip_low lets rare tokens grow (DAPO)."""
    entropy: float = 0.0
    """Weight of a bonus for the policy's entropy."""

    def __post_init__(self) -> None:
        for name in ("clip_low", "clip_high"):
            value = getattr(self, name)
            _require(value > 0, name, value, "must be positive")
        _require(self.clip_low < 1, "clip_low", self.clip_low, "must be below 1")
        self.rollout.rows(self.train.batch_size)


@dataclass(frozen=True)
class GrpoConfig(PolicyConfig):
    """GRPO and its relatives: answers are compared with others to the same prompt."""

    run: str = "runs/grpo"
    """Directory of the run; the same command on the same directory resumes."""
    baseline: Literal["group", "mean", "others", "batch"] = "group"
    """What an answer's reward is compared with: (r - mean) / std of its group (GRPO), r - mean
    (Dr. GRPO), r - mean of the others (RLOO), (r - mean) / std of all (REINFORCE++)."""
    normalize: Literal["tokens", "sequences", "constant"] = "tokens"
    """All tokens count alike (DAPO), or all answers (GRPO as published), or all tokens, divided by
    rollout.max_new_tokens for every answer (Dr. GRPO)."""
    ratio: Literal["token", "sequence"] = "token"
    """Whose change of probability is clipped: each token's, or the whole answer's (RLOO)."""
    kl: float = 0.0
    """Weight of KL(policy || reference), by its k3 estimate, in the loss; 0: no reference."""
    resample: int = 0
    """How often, at most, groups of equally good answers are replaced by groups of other prompts
    (DAPO's dynamic sampling)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least("", self, kl=0, resample=0)
        _require(
            self.rollout.samples > 1 or self.baseline == "batch", "rollout.samples",
            self.rollout.samples, f"must be 2 or more for baseline={self.baseline}",
        )  # fmt: skip


@dataclass(frozen=True)
class PpoConfig(PolicyConfig):
    """PPO: rewards against what a value network expected."""

    run: str = "runs/ppo"
    """Directory of the run; the same command on the same directory resumes."""
    rollout: RolloutConfig = field(
        default_factory=lambda: RolloutConfig(updates=4, epochs=2, samples=1)
    )
    clip_high: float = 0.2
    """And grow by this."""
    reward_model: str = ""
    """A run of scripts/reward.py, whose reward is learned from; empty: the task's rule alone."""
    rule_weight: float | None = None
    """Weight of the task's rule in the reward; null: 1, or 0 with a reward model."""
    kl: float = 0.05
    """Weight of KL(policy || reference); with kl_target only the first one."""
    kl_in: Literal["reward", "loss"] = "reward"
    """A penalty on every token's reward (k1), or a term of the loss (k3)."""
    kl_target: float = 0.0
    """KL of an answer towards which the weight is moved, up to a tenth a rollout; 0: fixed."""
    kl_stop: float = 0.0
    """A minibatch whose tokens have moved further than this from the rollout's policy ends the
    rollout's updates; 0: never."""
    value: Literal["separate", "shared"] = "separate"
    """The value network is a copy of the policy's with a scalar head, or only a head on it."""
    value_weight: float = 0.5
    """Weight of the value loss."""
    value_clip: float = 0.2
    """How far a value may move, by one rollout, until its gradient ends."""
    gamma: float = 1.0
    """Discount of a token."""
    lam: float = 0.95
    """GAE's trade of bias (0) for variance (1)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least("", self, rule_weight=0, kl=0, kl_target=0, kl_stop=0, value_weight=0)
        _require(self.value_clip > 0, "value_clip", self.value_clip, "must be positive")
        for name in ("gamma", "lam"):
            value = getattr(self, name)
            _require(0 <= value <= 1, name, value, "must be in [0, 1]")
        _require(
            bool(self.reward_model) or self.rule_weight != 0, "rule_weight", self.rule_weight,
            "leaves no reward; give --reward_model PATH",
        )  # fmt: skip
        _require(
            self.kl_target == 0 or self.kl > 0, "kl", self.kl, "must be positive with kl_target"
        )


@dataclass(frozen=True)
class DistillConfig(RunConfig):
    """Distillation: a student imitates a teacher's distribution, or its answers."""

    run: str = "runs/distill"
    """Directory of the run; the same command on the same directory resumes."""
    data: ChatDataConfig = field(default_factory=ChatDataConfig)
    sample: SampleConfig = field(default_factory=_questions)
    teacher: str = ""
    """The model to imitate: a run directory or a Hugging Face directory."""
    layers: int = 0
    """Without init: the student takes this many of the teacher's layers, evenly spaced; 0: it is
    random, of the shape that model says."""
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    """KL(teacher || student), KL(student || teacher), or the generalised Jensen-Shannon one."""
    jsd_beta: float = 0.5
    """Share of the teacher in jsd's mixture."""
    temperature: float = 1.0
    """Flattens both distributions; the loss is scaled by its square."""
    hard: float = 0.0
    """Share of the loss that is cross-entropy with the data; 1: no teacher."""
    top_k: int = 0
    """Run the teacher once over all data and keep this many of its likeliest tokens on disk;
    0: it runs with every batch."""
    sequence_level: bool = False
    """The teacher writes the answers that the student learns."""
    on_policy: bool = False
    """The student writes the answers, and learns what the teacher thinks of every token of them
    (GKD, arXiv:2306.13649)."""
    rollout: RolloutConfig = field(default_factory=lambda: RolloutConfig(samples=1))
    """How it writes them."""

    def __post_init__(self) -> None:
        _require(self.temperature > 0, "temperature", self.temperature, "must be positive")
        _require(0 <= self.hard <= 1, "hard", self.hard, "must be in [0, 1]")
        _require(0 < self.jsd_beta < 1, "jsd_beta", self.jsd_beta, "must be in (0, 1)")
        if self.on_policy:
            self.rollout.rows(self.train.batch_size)
            for name, value in (
                ("hard", self.hard), ("top_k", self.top_k), ("sequence_level", self.sequence_level),
                ("data.text_share", self.data.text_share),
            ):  # fmt: skip
                _require(not value, name, value, "is for answers of the data; not with on_policy")


# Of the training commands, by the name of their stage.
RUN_CONFIGS: dict[str, type[RunConfig]] = {
    "pretrain": PretrainConfig,
    "sft": SftConfig,
    "reward": RewardConfig,
    "dpo": DpoConfig,
    "distill": DistillConfig,
    "grpo": GrpoConfig,
    "ppo": PpoConfig,
}


@dataclass(frozen=True)
class PlanSettings:
    """For which devices a run is planned."""

    topology: str = ""
    """TPU slice, which need not be here, such as v5e:4x4 or v5p:4x4x8; needs libtpu."""
    devices: int = 0
    """Virtual devices of a CPU; 0: the devices that are here."""
    price: float = 0.0
    """Dollars per device and hour; 0: the list price, where one is known."""

    def __post_init__(self) -> None:
        _require(
            not (self.topology and self.devices), "devices", self.devices,
            "excludes topology; drop one",
        )  # fmt: skip
        _require(self.devices >= 0, "devices", self.devices, "must be 0 or more")
        _require(self.price >= 0, "price", self.price, "must be 0 or more")


def planned(kind: type[RunConfig]) -> type[Any]:
    """The config of a stage together with PlanSettings; settings are searched for by default."""
    search = ("fit", Literal["off", "auto"], field(default="auto"))
    return dataclasses.make_dataclass(
        f"Plan{kind.__name__}", [search], bases=(kind, PlanSettings), frozen=True
    )


def parse(kind: type[C], description: str | None, args: Sequence[str] | None = None) -> C:
    """The config that `--config FILE` and dotted overrides describe.

    Raises:
        ValueError: an unknown key, a wrong type or a value that a config refuses.
    """
    import jsonargparse  # here: only commands parse, and the library imports quickly without it

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        prog=Path(sys.argv[0]).name, description=description, exit_on_error=False,
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument(
        "--config", action="config", help="YAML file that states what differs from the defaults"
    )
    parser.add_class_arguments(kind, sub_configs=True)
    try:
        given = _bare_flags(sys.argv[1:] if args is None else args)
        fields = parser.instantiate(parser.parse_args(given))
    except jsonargparse.ArgumentError as error:
        raise ValueError(" ".join(str(error).split())) from error
    return kind(**{f.name: fields[f.name] for f in dataclasses.fields(kind)})  # type: ignore[arg-type]


def _bare_flags(args: Sequence[str]) -> list[str]:
    """`--chat` alone means `--chat=true`, which is all that the parser takes."""
    own = ("--help", "--print_config")
    alone = [
        arg.startswith("--") and "=" not in arg and arg not in own
        and (n + 1 == len(args) or args[n + 1].startswith("--"))
        for n, arg in enumerate(args)
    ]  # fmt: skip
    return [f"{arg}=true" if bare else arg for arg, bare in zip(args, alone, strict=True)]


def to_yaml(cfg: Any) -> str:
    """The whole config as YAML that `--config` reads back."""
    import yaml

    return yaml.safe_dump(dataclasses.asdict(cfg), sort_keys=False)


def exit_cleanly(main: Callable[[], None]) -> None:
    """Runs a command; a failure becomes one line on stderr.

    The exit status is 2 for a user's mistake, 1 for a run that diverged.
    """
    try:
        main()
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(1 if isinstance(error, FloatingPointError) else 2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


@dataclass(frozen=True)
class WriteConfig:
    """Let a model write."""

    checkpoint: str
    """A run directory, a Hugging Face directory, a GGUF file or a llama2.c file."""
    prompt: list[str] = field(default_factory=list)
    """Texts to continue, or with chat messages to answer; none: read from standard input."""
    adapter: list[str] = field(default_factory=list)
    """Runs with --peft.kind lora or qlora on this checkpoint, or PEFT directories: one for all
    prompts, or one for each; none is the checkpoint alone."""
    max_new_tokens: int = 128
    """Tokens to write."""
    temperature: float = 0.8
    """0 is greedy."""
    top_p: float = 0.95
    """Nucleus: the fewest tokens whose probability reaches this."""
    top_k: int = 0
    """Only the k likeliest tokens; 0: all."""
    min_p: float = 0.0
    """Only tokens at least this times as likely as the likeliest."""
    repetition_penalty: float = 1.0
    """Makes tokens that were written before less likely; 1: does not."""
    stop: list[str] = field(default_factory=list)
    """Strings before which the text ends."""
    seed: int = 0
    """The same seed writes the same text."""
    chat: bool = False
    """Answer as the assistant, by the model's chat template."""
    tools: list[str] = field(default_factory=list)
    """Tools that the assistant may call, with --chat: calculator."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Compute type; null: the one that the model was trained with."""
    quantize: Literal["int8"] | None = None
    """int8 reads a quarter of float32's bytes per token; null: the weights as they are."""


@dataclass(frozen=True)
class TokenizerConfig:
    """What to learn a vocabulary from."""

    input: list[str] = field(default_factory=list)
    """Text files, folders, JSONL, JSON or Parquet files, or Hub data sets; none: the source code
    of Python's standard library."""
    vocab_size: int = 4096
    """Ids, of which 256 are the bytes and 4 special."""
    output: str = "tokenizer.json"
    """File to write, in Hugging Face's format."""
    column: str = "text"
    """Column of JSONL, JSON, Parquet and Hub rows."""
    errors: Literal["strict", "replace"] = "strict"
    """Invalid UTF-8 is an error with its place, or becomes U+FFFD."""
    max_characters: int = 1 << 24
    """How much text to read; more hardly changes the vocabulary."""


@dataclass(frozen=True)
class PrepareConfig:
    """Text to turn into token files."""

    output: str
    """Directory to write; a killed run is continued, another data set is never written over."""
    input: list[str] = field(default_factory=list)
    """Text files, folders, JSONL, JSON or Parquet files, or Hub data sets; none: the source code
    of Python's standard library."""
    tokenizer: str = "gpt2"
    """byte, a tiktoken name (gpt2, cl100k_base), a tokenizer.json or a directory that holds one."""
    val_fraction: float = 0.1
    """Share held out for validation: every n-th document, or the end of each of few text files."""
    column: str = "text"
    """Column of JSONL, JSON, Parquet and Hub rows."""
    errors: Literal["strict", "replace"] = "strict"
    """Invalid UTF-8 is an error with its place, or becomes U+FFFD."""
    hub_config: str = ""
    """Configuration of a Hub data set, such as sample-10BT."""
    hub_split: str = "train"
    """Split of a Hub data set."""
    shard_tokens: int = 1 << 25
    """Tokens per file, also what a killed run may lose."""

    def __post_init__(self) -> None:
        _require(0 <= self.val_fraction < 1, "val_fraction", self.val_fraction, "must be in [0, 1)")
        _require(self.shard_tokens > 0, "shard_tokens", self.shard_tokens, "must be at least 1")


def join_lists(args: Sequence[str], *flags: str) -> list[str]:
    """Command-line arguments in which `--flag a b` and `--flag a --flag b` are one YAML list.

    jsonargparse itself takes a list only as `--flag '[a, b]'` or `--flag+ a --flag+ b`.
    """
    rest: list[str] = []
    values: dict[str, list[str]] = {}
    flag = ""
    for arg in args:
        name, equals, value = arg.partition("=")
        if arg.startswith("--"):
            flag = name if name in flags else ""
        if not flag:
            rest.append(arg)
        elif arg.startswith("--"):
            values.setdefault(flag, []).extend([value] if equals else [])
        else:
            values.setdefault(flag, []).append(arg)
    return rest + [f"{name}={json.dumps(found)}" for name, found in values.items()]


@dataclass(frozen=True)
class EvaluateConfig:
    """What to measure, and on what."""

    checkpoint: str
    """A run directory, a Hugging Face directory, a GGUF or a llama2.c file."""
    task: Literal[
        "perplexity", "multiple_choice", "hellaswag", "piqa", "arc", "winogrande", "lambada",
        "gsm8k", "arithmetic", "reward",
    ]  # fmt: skip
    """Measure; multiple_choice reads any JSONL of {query, choices, gold}, reward any pairs."""
    data: str
    """Plain text (perplexity), or JSONL as on the Hub or in its local layout, also .gz or .bz2; or
    the held-out part of an embedded task: arithmetic, multi-step, … with task arithmetic and
    --chat, arithmetic-correct or arithmetic-concise with task reward."""
    limit: int = 0
    """Only the first items; 0: all."""
    output: str = ""
    """JSONL of single items' results, from which the same command continues; empty: a file in
    the run directory, and none for other checkpoints."""
    window: int = 1024
    """Tokens of a window of perplexity, at most the model's context."""
    stride: int = 1024
    """Tokens between two windows; fewer than window: only that many are scored in each."""
    samples: int = 1
    """Answers drawn for each question; more than one gives pass@k and a majority vote."""
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    """Nucleus: the fewest tokens whose probability reaches this."""
    top_k: int = 0
    """Only the k likeliest tokens; 0: all."""
    max_new_tokens: int = 256
    """Tokens of a generated answer."""
    seed: int = 0
    """Of the samples."""
    chat: bool = False
    """Ask generative questions by the model's chat template."""
    tools: list[str] = field(default_factory=list)
    """Tools that a chatting model may call: calculator."""
    reward_model: str = ""
    """A run of scripts/reward.py, which chooses the best of the samples: gives best@n."""
    batch_tokens: int = 2048
    """Positions computed at a time, padding included."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Compute type; null: the model's own."""

    def __post_init__(self) -> None:
        for name, least in (
            ("limit", 0), ("window", 2), ("stride", 1), ("samples", 1), ("batch_tokens", 1),
        ):  # fmt: skip
            value = getattr(self, name)
            _require(value >= least, name, value, f"must be {least} or more")
        _require(
            self.samples == 1 or self.temperature > 0,
            "samples", self.samples, "greedy answers are all the same; set a temperature",
        )  # fmt: skip
        generative = self.task in ("gsm8k", "arithmetic")
        _require(
            not self.tools or (self.chat and generative), "tools", self.tools,
            "are for gsm8k and arithmetic with --chat",
        )  # fmt: skip
        _require(
            not self.reward_model or (self.samples > 1 and generative), "reward_model",
            self.reward_model, "chooses between several samples of gsm8k or arithmetic",
        )  # fmt: skip


@dataclass(frozen=True)
class ConvertConfig:
    """Which model to write, and how."""

    checkpoint: str
    """A run directory, a Hugging Face directory, a GGUF or a llama2.c file."""
    output: str
    """Directory to write; never over something else's."""
    to: Literal["huggingface", "jaxgpt"] = "huggingface"
    """Hugging Face's layout, or a run directory."""
    merge_lora: bool = False
    """Fold adapters into the weights they adapt."""
