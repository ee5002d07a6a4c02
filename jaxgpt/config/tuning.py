"""The stages that learn from examples: fine-tuning, rewards, preferences, distillation."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from jaxgpt.config.checks import (
    Amount,
    BelowOne,
    FilePath,
    ModelPath,
    Paths,
    Positive,
    Share,
    Weight,
    check,
    require,
    within,
)
from jaxgpt.config.policy import RolloutConfig
from jaxgpt.config.run import OptimConfig, RunConfig, SampleConfig


@dataclass(frozen=True)
class ConversationConfig:
    """Conversations, or answers with preferences."""

    path: Paths = ""
    """JSONL, JSON or Parquet file (also packed), several, a folder, a glob, a Hub data set, or an
    embedded task; empty: arithmetic. The columns tell the format: messages, conversations,
    instruction, prompt, question, chosen."""
    columns: dict[str, str | None] = field(default_factory=dict)
    """Columns of the data that have unusual names: {"prompt": "task"} reads the column task as the
    prompt; {"notes": null} leaves the column notes out."""
    roles: dict[str, str] = field(default_factory=dict)
    """Meaning of unusual names of roles in the data: {"oracle": "assistant"}. Known names are
    system, user, assistant, tool, tool_call, and the usual names for them."""
    split: str = "train"
    """Split of a Hub data set to read."""
    val_path: Paths = ""
    """Held-out rows, in any form of data.path; empty: every n-th row of data.path, by
    data.val_fraction. Embedded tasks hold out rows by themselves."""
    val_fraction: BelowOne = 0.05
    """Share of the rows of data.path that is held out where there is no data.val_path; 0: none."""
    template: FilePath = ""
    """Chat template: chatml, llama3, plain or a Jinja file; empty: the model's own, else chatml, or
    plain where the vocabulary has no tokens for chat."""
    system: str | None = None
    """System prompt of conversations that have none; null: the template's own, if it has one. The
    model's files keep it."""
    tokenizer: FilePath = "byte"
    """Tokenizer of a model that starts at random: byte, a tiktoken name (gpt2) or a tokenizer.json;
    a model of --init brings its own."""
    max_tokens: Amount = 0
    """Largest number of tokens in a row; 0: model.context_length."""
    long: Literal["truncate", "drop"] = "truncate"
    """What happens to a row of more than max_tokens: truncate: its end is left out; drop: the whole
    row is."""

    def __post_init__(self) -> None:
        check("data", self)


@dataclass(frozen=True)
class ChatDataConfig(ConversationConfig):
    """Conversations to learn from, and plain text beside them."""

    packing: bool = True
    """true: put several conversations into a row; false: one, padded to the batch's longest."""
    learn: Literal["assistant", "all"] = "assistant"
    """Whose words the model learns to predict: assistant: the assistant's; all: everybody's."""
    calls: Literal["text", "turns"] = "text"
    """How GSM8K's <<48/2=24>> is read: text: as it stands; turns: as a call of the calculator and
    a turn with its result."""
    text_share: Share = 0.0
    """Share of the rows that are windows of plain text, against forgetting; 1: all rows are."""
    text_path: FilePath = ""
    """Plain text for data.text_share, in any form that data.path of pretraining has; empty: the
    source code of Python's standard library."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.text_share == 0 or self.packing, "data.text_share", self.text_share,
            "needs rows of one width; set data.packing",
        )  # fmt: skip


def small_steps(learning_rate: float) -> OptimConfig:
    """The optimizer of a stage that starts from trained weights."""
    return OptimConfig(learning_rate=learning_rate, warmup_steps=20, weight_decay=0.0)


def greedy() -> SampleConfig:
    return SampleConfig(temperature=0.0)


@dataclass(frozen=True)
class SftConfig(RunConfig):
    """Supervised fine-tuning: what the assistant says in conversations."""

    run: FilePath = "runs/sft"
    """Directory of the run; the same command on the same directory resumes it."""
    data: ChatDataConfig = field(default_factory=ChatDataConfig)
    optim: OptimConfig = field(default_factory=lambda: small_steps(2e-5))
    sample: SampleConfig = field(default_factory=greedy)


@dataclass(frozen=True)
class RewardConfig(RunConfig):
    """A reward model: which of two answers people prefer."""

    run: FilePath = "runs/reward"
    """Directory of the run; the same command on the same directory resumes it."""
    data: ConversationConfig = field(default_factory=ConversationConfig)
    optim: OptimConfig = field(default_factory=lambda: small_steps(1e-5))
    margin: bool = False
    """true: the chosen answer must win by the margin that its row states (Llama 2)."""
    centering: Weight = 0.01
    """Weight of (chosen + rejected)^2 in the loss, which keeps rewards around zero."""


@dataclass(frozen=True)
class DpoConfig(RunConfig):
    """Direct preference optimisation and its relatives."""

    run: FilePath = "runs/dpo"
    """Directory of the run; the same command on the same directory resumes it."""
    data: ConversationConfig = field(default_factory=ConversationConfig)
    optim: OptimConfig = field(default_factory=lambda: small_steps(1e-6))
    sample: SampleConfig = field(default_factory=greedy)
    loss: Literal["sigmoid", "ipo", "hinge", "kto", "orpo", "simpo"] = "sigmoid"
    """Loss; sigmoid is DPO's own, kto learns from single answers, orpo and simpo need no
    reference."""
    beta: Positive = 0.1
    """How closely the policy keeps to the reference; orpo: weight of the odds term; simpo: factor
    of the margin."""
    label_smoothing: Annotated[float, within("[0, 0.5)")] = 0.0
    """Chance that a pair is labelled the wrong way round (cDPO)."""
    gamma: Weight = 0.5
    """Margin by which simpo's chosen answer should win, after the factor beta."""
    desirable_weight: Weight = 1.0
    """Weight of kto's good answers."""
    undesirable_weight: Weight = 1.0
    """Weight of kto's bad answers."""
    reference: Literal["live", "precomputed"] = "live"
    """When the frozen reference runs: live: with every batch; precomputed: once over all data,
    which is then read from disk."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.label_smoothing == 0 or self.loss == "sigmoid",
            "label_smoothing", self.label_smoothing, "is for loss=sigmoid",
        )  # fmt: skip
        require(
            self.loss != "kto" or self.train.batch_size > 1,
            "train.batch_size", self.train.batch_size, "must be at least 2 for loss=kto",
        )  # fmt: skip


@dataclass(frozen=True)
class DistillConfig(RunConfig):
    """Distillation: a student imitates a teacher's distribution, or its answers."""

    run: FilePath = "runs/distill"
    """Directory of the run; the same command on the same directory resumes it."""
    data: ChatDataConfig = field(default_factory=ChatDataConfig)
    sample: SampleConfig = field(default_factory=greedy)
    teacher: ModelPath = ""
    """Model to imitate: a run directory, a Hugging Face directory or org/name on the Hub."""
    layers: Amount = 0
    """Number of the teacher's layers, evenly spaced, from which the student starts if there is no
    init; 0: the student starts at random, in the shape that model says."""
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    """Distance to the teacher: forward_kl: KL(teacher || student); reverse_kl: KL(student ||
    teacher); jsd: the generalised Jensen-Shannon divergence."""
    jsd_beta: Annotated[float, within("(0, 1)")] = 0.5
    """Share of the teacher in the mixture of jsd."""
    temperature: Positive = 1.0
    """Temperature that flattens both distributions; the loss is scaled by its square."""
    hard: Share = 0.0
    """Share of the loss that is cross-entropy with the data; 1: no teacher."""
    top_k: Amount = 0
    """Run the teacher once over all data and keep this many of its likeliest tokens on disk;
    0: the teacher runs with every batch."""
    sequence_level: bool = False
    """true: the teacher writes the answers that the student learns."""
    on_policy: bool = False
    """true: the student writes the answers, and learns the teacher's distribution at every token of
    them (GKD, arXiv:2306.13649)."""
    rollout: RolloutConfig = field(default_factory=lambda: RolloutConfig(samples=1))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.on_policy:
            self.rollout.rows(self.train.batch_size)
            for name, value in (
                ("hard", self.hard), ("top_k", self.top_k), ("sequence_level", self.sequence_level),
                ("data.text_share", self.data.text_share),
            ):  # fmt: skip
                require(not value, name, value, "is for answers of the data; not with on_policy")
