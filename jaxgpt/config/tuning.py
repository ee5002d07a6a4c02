"""The stages that learn from examples: fine-tuning, rewards, preferences, distillation."""

from dataclasses import dataclass, field
from typing import Literal

from jaxgpt.config.checks import require
from jaxgpt.config.policy import RolloutConfig
from jaxgpt.config.run import OptimConfig, RunConfig, SampleConfig


@dataclass(frozen=True)
class ConversationConfig:
    """Conversations, or answers to prefer."""

    path: list[str] | str = ""
    """JSONL, JSON or Parquet file (also packed), several, a folder, a glob, a Hub data set, or an
    embedded task; empty: arithmetic. The formats are told by their columns: messages,
    conversations, instruction, prompt, question, chosen."""
    columns: dict[str, str | None] = field(default_factory=dict)
    """Which column holds what, where its name does not say it: {"prompt": "task"} reads the column
    task as the prompt; {"notes": null} leaves the column notes out."""
    roles: dict[str, str] = field(default_factory=dict)
    """Who speaks, where a role's name does not say it: {"oracle": "assistant"}. Known are system,
    user, assistant, tool, tool_call, and the usual names for them."""
    split: str = "train"
    """Split of a Hub data set."""
    val_path: list[str] | str = ""
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
        require(
            0 <= self.val_fraction < 1, "data.val_fraction", self.val_fraction, "must be in [0, 1)"
        )
        require(self.max_tokens >= 0, "data.max_tokens", self.max_tokens, "must be 0 or more")


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
        require(0 <= self.text_share <= 1, "data.text_share", self.text_share, "must be in [0, 1]")
        require(
            self.text_share == 0 or self.packing, "data.text_share", self.text_share,
            "needs rows of one width; set data.packing",
        )  # fmt: skip


def small_steps(learning_rate: float) -> OptimConfig:
    """The optimizer of a stage that starts from trained weights."""
    return OptimConfig(learning_rate=learning_rate, warmup_steps=20, weight_decay=0.0)


def questions() -> SampleConfig:
    return SampleConfig(prompts=["What is 65 - 47?", "Compute 27 + 58."], temperature=0.0)


@dataclass(frozen=True)
class SftConfig(RunConfig):
    """Supervised fine-tuning: what the assistant says in conversations."""

    run: str = "runs/sft"
    """Directory of the run; the same command on the same directory resumes."""
    data: ChatDataConfig = field(default_factory=ChatDataConfig)
    optim: OptimConfig = field(default_factory=lambda: small_steps(2e-5))
    sample: SampleConfig = field(default_factory=questions)


@dataclass(frozen=True)
class RewardConfig(RunConfig):
    """A reward model: which of two answers people prefer."""

    run: str = "runs/reward"
    """Directory of the run; the same command on the same directory resumes."""
    data: ConversationConfig = field(default_factory=ConversationConfig)
    optim: OptimConfig = field(default_factory=lambda: small_steps(1e-5))
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
    optim: OptimConfig = field(default_factory=lambda: small_steps(1e-6))
    sample: SampleConfig = field(default_factory=questions)
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
        require(self.beta > 0, "beta", self.beta, "must be positive")
        require(
            0 <= self.label_smoothing < 0.5, "label_smoothing", self.label_smoothing,
            "must be in [0, 0.5)",
        )  # fmt: skip
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

    run: str = "runs/distill"
    """Directory of the run; the same command on the same directory resumes."""
    data: ChatDataConfig = field(default_factory=ChatDataConfig)
    sample: SampleConfig = field(default_factory=questions)
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
        require(self.temperature > 0, "temperature", self.temperature, "must be positive")
        require(0 <= self.hard <= 1, "hard", self.hard, "must be in [0, 1]")
        require(0 < self.jsd_beta < 1, "jsd_beta", self.jsd_beta, "must be in (0, 1)")
        if self.on_policy:
            self.rollout.rows(self.train.batch_size)
            for name, value in (
                ("hard", self.hard), ("top_k", self.top_k), ("sequence_level", self.sequence_level),
                ("data.text_share", self.data.text_share),
            ):  # fmt: skip
                require(not value, name, value, "is for answers of the data; not with on_policy")
