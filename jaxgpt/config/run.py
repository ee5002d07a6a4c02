"""What every training command has: data, optimizer, checkpoints, devices, logs; and pretraining."""

from dataclasses import dataclass, field, fields
from typing import Annotated, Literal

from jaxgpt import files
from jaxgpt.config.checks import (
    Amount,
    BelowOne,
    Count,
    FilePath,
    ModelPath,
    Paths,
    Pattern,
    Positive,
    Rule,
    Share,
    Weight,
    check,
    require,
    within,
)
from jaxgpt.config.model import ModelConfig


@dataclass(frozen=True)
class DataConfig:
    """The text to train on."""

    path: Paths = ""
    """A token directory (of prepare_data.py), a .bin file, or text: a file or several, a folder, a
    glob, JSONL, JSON or Parquet; empty: the source code of Python's standard library."""
    columns: dict[str, str] = field(default_factory=dict)
    """Column of JSONL, JSON and Parquet that holds the text, as {"text": "body"}; empty: text."""
    mixture: dict[FilePath, Positive] = field(default_factory=dict)
    """Several token directories in place of data.path, with their weights: {"data/books": 2}."""
    tokenizer: FilePath = ""
    """Tokenizer: byte, a tiktoken name (gpt2, cl100k_base), or a tokenizer.json; empty: the one
    recorded beside the token files, else a BPE that is trained on the text."""
    vocab_size: Count = 2048
    """Number of ids of the BPE that is trained if there is no tokenizer."""
    val_fraction: Annotated[float, within("(0, 1)")] = 0.1
    """Share at the end of each text file that is held out for validation; a token directory
    records its own."""
    documents: bool = False
    """true: pack whole documents, each with its own attention and its own positions; false: read
    the text as one endless stream."""
    cache: Weight = 20.0
    """Space in GB for copies on this machine of token files in a bucket: as many as fit are copied
    while the others are read from the bucket; 0: no copies."""

    def __post_init__(self) -> None:
        check("data", self)
        require(
            not self.columns.keys() - {"text"}, "data.columns", self.columns, "only text is read"
        )
        require(
            not (self.path and self.mixture), "data.mixture", self.mixture,
            "excludes data.path; drop one",
        )  # fmt: skip


@dataclass(frozen=True)
class TrainConfig:
    """How long and how wide to train."""

    steps: Amount = 500
    """Optimizer steps of the run; a finished run goes on if it is given more."""
    batch_size: Count = 16
    """Sequences in one optimizer step, over all devices and micro-batches together."""
    micro_batches: Count = 1
    """Parts into which the batch is cut to save memory; the gradient stays the same."""
    z_loss: Weight = 0.0
    """Weight of (log of the softmax's normaliser)^2 in the loss; 1e-4 steadies large runs."""
    label_smoothing: BelowOne = 0.0
    """Share of the target probability that is spread over the whole vocabulary."""
    loss_chunk: Amount = 1024
    """Number of tokens on a device whose logits are in memory at one time; 0: all."""
    loss: str = ""
    """Loss of your own, in place of the stage's: FILE.py:NAME of a function (config, params, batch,
    rng_B) -> (sum, weight, metrics), see docs/python.md; held-out measures stay the stage's."""
    max_loss: Positive = 1e4
    """A loss above this, or one that is not finite, stops the run."""

    def __post_init__(self) -> None:
        check("train", self)
        require(
            self.batch_size % self.micro_batches == 0,
            "train.micro_batches", self.micro_batches,
            f"must divide train.batch_size={self.batch_size}",
        )  # fmt: skip


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its schedule."""

    name: Literal["adamw", "muon"] = "adamw"
    """muon orthogonalises the updates of the blocks' matrices and leaves the rest to AdamW."""
    custom: str = ""
    """Optimizer of your own, in place of name: FILE.py:NAME, or optax:lion, of a function (learning
    rate by step) -> optax.GradientTransformation; clip_norm and ema still hold."""
    learning_rate: Weight = 1e-3
    """Largest learning rate of the run."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """Learning rate after the warm-up: cosine falls to the last step, wsd (warm-up, stable, decay)
    falls at the end only, constant stays."""
    warmup_steps: Amount = 100
    """Optimizer steps in which the learning rate rises from zero in a straight line."""
    min_ratio: Weight = 0.1
    """Learning rate at the end of the decay, as a share of the largest."""
    decay_steps: Count | None = None
    """Step at which the decay ends; null: train.steps. It also says where the decay ends when a
    finished run is given more train.steps."""
    decay_fraction: Share = 0.2
    """Share of the run in which wsd decays the learning rate."""
    beta1: BelowOne = 0.9
    """Decay of AdamW's first moment, the mean of the gradient."""
    beta2: BelowOne = 0.95
    """Decay of AdamW's second moment, the mean of the squared gradient."""
    eps: Weight = 1e-8
    """Added to the root of AdamW's second moment."""
    moments: Literal["float32", "bfloat16"] = "float32"
    """Type in which the moments are kept; bfloat16 halves their memory (arXiv:2412.19437)."""
    weight_decay: Weight = 0.1
    """Each step shrinks the weights by learning rate * weight_decay (decoupled weight decay)."""
    no_decay: Pattern = r"(bias|scale|embedding|magnitude)$"
    """Parameters that are not decayed: a regular expression on their paths."""
    clip_norm: Weight = 1.0
    """Largest norm of the whole gradient; a larger one is scaled down to it; 0: no clipping."""
    ema: BelowOne = 0.0
    """Decay of a moving average of the parameters, which evaluation and sampling use; 0: none."""

    def __post_init__(self) -> None:
        check("optim", self)
        # bfloat16 has 8 bits: an average that moves by less than 2^-8 of itself stands still. At
        # 0.999 it would stay three times too large after the gradients fall tenfold.
        if self.moments == "bfloat16":
            for name in ("beta1", "beta2"):
                value = getattr(self, name)
                fix = "must be at most 0.99 with optim.moments=bfloat16"
                require(value <= 0.99, f"optim.{name}", value, fix)


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save and what to keep."""

    every: Count = 500
    """Steps between two checkpoints; the last step is always saved."""
    keep: Count = 2
    """Number of latest checkpoints to keep, besides the one with the best validation loss."""
    grace: Positive = 60.0
    """Seconds after SIGTERM in which an evaluation, samples or a rollout may still end. What takes
    longer is left, the run saves, and a resumed run makes it again. A step always ends."""

    def __post_init__(self) -> None:
        check("checkpoint", self)


@dataclass(frozen=True)
class EvalConfig:
    """Held-out loss during training."""

    every: Amount = 250
    """Steps between two evaluations. The run always evaluates before the first step and after the
    last; 0: only then."""
    batches: Amount = 20
    """Number of batches in an evaluation, the same ones each time; 0: all held-out rows."""

    def __post_init__(self) -> None:
        check("eval", self)


@dataclass(frozen=True)
class Sampling:
    """How a model draws the tokens that it writes."""

    max_new_tokens: Amount = 128
    """Largest number of tokens that the model writes for one answer."""
    temperature: Weight = 0.8
    """Temperature: below 1 likely tokens become likelier, above 1 less likely; 0: always the
    likeliest."""
    top_p: Annotated[float, within("(0, 1]")] = 0.95
    """Draw from the fewest tokens whose probabilities reach this sum (nucleus); 1: from all."""
    top_k: Amount = 0
    """Draw from this many of the likeliest tokens; 0: from all."""
    min_p: BelowOne = 0.0
    """Draw from tokens with at least this share of the likeliest one's probability; 0: from all."""
    repetition_penalty: Positive = 1.0
    """Makes tokens that the text already holds less likely if it is above 1; 1: changes nothing."""

    def __post_init__(self) -> None:
        check("", self)


def sampling(cfg: Sampling) -> Sampling:
    """Only the settings that say how tokens are drawn."""
    return Sampling(**{f.name: getattr(cfg, f.name) for f in fields(Sampling)})


@dataclass(frozen=True)
class SampleConfig(Sampling):
    """Text that the model writes during training, and how it is drawn."""

    every: Amount = 250
    """Steps between two samples; 0: only after the last step."""
    prompts: list[str] | None = None
    """Texts to continue, or messages to answer; null: a line break, or the first held-out prompts
    where the data are conversations; []: no samples."""
    max_new_tokens: Amount = 200
    """Largest number of tokens that the model writes for a sample."""

    def __post_init__(self) -> None:
        check("sample", self)
        require(all(self.prompts or []), "sample.prompts", self.prompts, "none may be empty")


AxisSize = Annotated[
    int, Rule("positive or -1", lambda n: "" if n == -1 or n > 0 else "must be positive, or -1")
]


@dataclass(frozen=True)
class MeshConfig:
    """Number of devices along each axis of the mesh; -1 takes what the other axes leave."""

    data: AxisSize = -1
    """Devices that hold copies of the model, each with its own rows of the batch."""
    fsdp: AxisSize = 1
    """Devices over which parameters, gradients and moments are cut; each also has its own rows."""
    tensor: AxisSize = 1
    """Devices over which heads and hidden units are cut."""
    context: AxisSize = 1
    """Devices over which the positions of a sequence are cut."""
    expert: AxisSize = 1
    """Devices over which experts are cut."""

    def __post_init__(self) -> None:
        check("mesh", self)


@dataclass(frozen=True)
class LogConfig:
    """What a run reports, beside metrics.jsonl and report.html."""

    every: Count = 10
    """Steps between two lines of metrics.jsonl."""
    tensorboard: bool = False
    """true: also write TensorBoard events into the run directory."""
    wandb: str = ""
    """Project of Weights & Biases to write to; empty: none."""
    profile: str = ""
    """Steps that JAX's profiler traces, as first:last; empty: none."""

    def __post_init__(self) -> None:
        check("log", self)
        if self.profile:
            first, _, last = self.profile.partition(":")
            holds = first.isdecimal() and last.isdecimal() and int(first) <= int(last)
            require(holds, "log.profile", self.profile, "must be first:last, such as 10:12")


@dataclass(frozen=True)
class PeftConfig:
    """Training a small addition to frozen weights, in place of the weights."""

    kind: Literal["none", "lora", "qlora", "adapter"] = "none"
    """What is trained: none: the weights themselves; lora: low-rank changes of kernels; qlora: the
    same on quantised kernels; adapter: bottlenecks beside or behind attention and MLP."""
    targets: Pattern = "all-linear"
    """Kernels that lora and qlora change: attention, mlp, all-linear, or a regular expression on
    names such as blocks/attention/query/kernel."""
    rank: Count = 16
    """Rank of a low-rank change: the width of its narrow path."""
    alpha: Weight = 32.0
    """A low-rank change is multiplied by peft.alpha / peft.rank."""
    rslora: bool = False
    """true: multiply a low-rank change by alpha / sqrt(rank) instead."""
    dora: bool = False
    """true: train the length of every kernel's columns apart from their direction (DoRA)."""
    dropout: BelowOne = 0.0
    """Probability with which training sets an entry of a low-rank change's input to zero."""
    quantize: Literal["nf4", "int8"] = "nf4"
    """Format in which qlora stores the blocks' kernels."""
    adapter_dim: Count = 64
    """Width of an adapter's bottleneck."""
    adapter_parallel: bool = False
    """true: one bottleneck beside the MLP; false: two, behind attention and behind the MLP
    (Houlsby)."""
    train_norms: bool = False
    """true: train the norms along with the bottlenecks, as Houlsby did."""

    def __post_init__(self) -> None:
        check("peft", self)


@dataclass(frozen=True)
class RunConfig:
    """What every training command has."""

    run: FilePath
    """Directory of the run; the same command on the same directory resumes it."""
    init: ModelPath = ""
    """Weights to start from: a run directory, a Hugging Face directory, a GGUF file or org/name on
    the Hub, whose commit the run keeps; empty: random ones."""
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
    """Which kernels compute: fast: those for this machine; plain: every operation by its equation
    in jaxgpt/kernels/__init__.py, slowly, to read, to experiment, or to look for a bug."""
    show_batch: bool = False
    """true: print the first batch, token by token, and end."""

    def __post_init__(self) -> None:
        check("", self)
        for setting in ("tensorboard", "profile"):
            value = getattr(self.log, setting)
            require(
                not value or files.is_local(self.run), f"log.{setting}", value,
                f"writes no files to {self.run}; drop it, or give a --run on this machine",
            )  # fmt: skip


@dataclass(frozen=True)
class PretrainConfig(RunConfig):
    """Next-token prediction on plain text."""

    run: FilePath = "runs/pretrain"
    """Directory of the run; the same command on the same directory resumes it."""
    data: DataConfig = field(default_factory=DataConfig)
