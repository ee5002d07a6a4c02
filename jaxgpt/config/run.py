"""What every training command has: data, optimizer, checkpoints, devices, logs; and pretraining."""

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Literal

from jaxgpt.config.checks import at_least, require
from jaxgpt.config.model import ModelConfig


@dataclass(frozen=True)
class DataConfig:
    """The text to train on."""

    path: list[str] | str = ""
    """Token directory (prepare_data.py), .bin file, or text: a file or several, a folder, a glob,
    JSONL, JSON or Parquet; empty: the source code of Python's standard library."""
    columns: dict[str, str] = field(default_factory=dict)
    """{"text": "body"}: the column of JSONL, JSON and Parquet that holds the text; empty: text."""
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
        at_least("data", self, vocab_size=1)
        require(
            not self.columns.keys() - {"text"}, "data.columns", self.columns, "only text is read"
        )
        require(
            0 < self.val_fraction < 1, "data.val_fraction", self.val_fraction, "must be in (0, 1)"
        )
        require(
            not (self.path and self.mixture),
            "data.mixture",
            self.mixture,
            "excludes data.path; drop one",
        )
        require(
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
        at_least("train", self, steps=0, batch_size=1, micro_batches=1, z_loss=0, loss_chunk=0)
        require(self.max_loss > 0, "train.max_loss", self.max_loss, "must be positive")
        require(
            self.batch_size % self.micro_batches == 0,
            "train.micro_batches", self.micro_batches,
            f"must divide train.batch_size={self.batch_size}",
        )  # fmt: skip
        require(
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
    moments: Literal["float32", "bfloat16"] = "float32"
    """Type in which the moments are kept; bfloat16 halves their memory (arXiv:2412.19437)."""
    weight_decay: float = 0.1
    """Decoupled weight decay."""
    no_decay: str = r"(bias|scale|embedding|magnitude)$"
    """Parameters (regular expression on the path) that are not decayed."""
    clip_norm: float = 1.0
    """Largest global gradient norm; 0: no clipping."""
    ema: float = 0.0
    """Decay of an exponential moving average of the parameters, used to evaluate; 0: none."""

    def __post_init__(self) -> None:
        at_least(
            "optim", self, learning_rate=0, warmup_steps=0, min_ratio=0, decay_steps=1, eps=0,
            weight_decay=0, clip_norm=0,
        )  # fmt: skip
        for name in ("beta1", "beta2", "ema"):
            value = getattr(self, name)
            require(0 <= value < 1, f"optim.{name}", value, "must be in [0, 1)")
        # bfloat16 has 8 bits: an average that moves by less than 2^-8 of itself stands still. At
        # 0.999 it would stay three times too large after the gradients fall tenfold.
        most = 1.0 if self.moments == "float32" else 0.99
        for name in ("beta1", "beta2"):
            value, moments = getattr(self, name), f"optim.moments={self.moments}"
            require(value <= most, f"optim.{name}", value, f"must be at most {most} with {moments}")
        share = self.decay_fraction
        require(0 <= share <= 1, "optim.decay_fraction", share, "must be in [0, 1]")
        try:
            re.compile(self.no_decay)
        except re.error as error:
            require(False, "optim.no_decay", self.no_decay, f"no regular expression: {error}")


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save and what to keep."""

    every: int = 500
    """Steps between checkpoints; the last step is always saved."""
    keep: int = 2
    """Latest checkpoints kept, beside the one with the best validation loss."""

    def __post_init__(self) -> None:
        at_least("checkpoint", self, every=1, keep=1)


@dataclass(frozen=True)
class EvalConfig:
    """Held-out loss during training."""

    every: int = 250
    """Steps between evaluations; the first and last step always are; 0: only those."""
    batches: int = 20
    """Batches per evaluation, the same ones each time; the last evaluation reads them all if 0."""

    def __post_init__(self) -> None:
        at_least("eval", self, every=0, batches=0)


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
        at_least("sample", self, every=0, max_new_tokens=0, temperature=0, top_k=0)
        require(0 < self.top_p <= 1, "sample.top_p", self.top_p, "must be in (0, 1]")
        require(all(self.prompts), "sample.prompts", self.prompts, "none may be empty")


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
            require(size == -1 or size > 0, f"mesh.{axis}", size, "must be positive, or -1")


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
        at_least("log", self, every=1)
        if self.profile:
            first, _, last = self.profile.partition(":")
            holds = first.isdecimal() and last.isdecimal() and int(first) <= int(last)
            require(holds, "log.profile", self.profile, "must be first:last, such as 10:12")


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
        at_least("peft", self, rank=1, alpha=0, adapter_dim=1)
        require(0 <= self.dropout < 1, "peft.dropout", self.dropout, "must be in [0, 1)")
        try:
            re.compile(self.targets)
        except re.error as error:
            require(False, "peft.targets", self.targets, f"no regular expression: {error}")


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
    kernels: Literal["fast", "plain"] = "fast"
    """plain: compute every operation by its equation in jaxgpt/kernels/__init__.py, slowly; to
    read, to experiment, or to check a bug against."""
    show_batch: bool = False
    """Print the first batch, token by token, and end."""


@dataclass(frozen=True)
class PretrainConfig(RunConfig):
    """Next-token prediction on plain text."""

    run: str = "runs/pretrain"
    """Directory of the run; the same command on the same directory resumes."""
    data: DataConfig = field(default_factory=DataConfig)
