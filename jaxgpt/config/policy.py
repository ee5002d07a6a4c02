"""The stages that learn from what the policy writes."""

from dataclasses import dataclass, field
from typing import Literal

from jaxgpt.config.checks import at_least, require
from jaxgpt.config.run import (
    CheckpointConfig,
    EvalConfig,
    OptimConfig,
    RunConfig,
    SampleConfig,
    TrainConfig,
)


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
        at_least("rollout", self, updates=1, epochs=1, samples=1, max_new_tokens=1)
        at_least("rollout", self, overlong_buffer=0)
        for name in ("temperature", "judge_seconds"):
            value = getattr(self, name)
            require(value > 0, f"rollout.{name}", value, "must be positive")
        require(
            self.updates % self.epochs == 0, "rollout.updates", self.updates,
            f"must be a multiple of rollout.epochs={self.epochs}",
        )  # fmt: skip

    def rows(self, batch_size: int) -> int:
        """Answers of one rollout.

        Raises:
            ValueError: they do not come to whole groups.
        """
        rows = batch_size * self.updates // self.epochs
        require(
            rows % self.samples == 0, "rollout.samples", self.samples,
            f"must divide the {rows} answers of a rollout, train.batch_size={batch_size} * "
            f"rollout.updates={self.updates} / rollout.epochs={self.epochs}",
        )  # fmt: skip
        return rows


@dataclass(frozen=True)
class TaskConfig:
    """The problems that a policy practises on."""

    path: list[str] | str = "arithmetic"
    """Embedded task (arithmetic, arithmetic-concise, arithmetic-calculator, multi-step, products,
    products-calculator), or {question, answer} in JSONL, JSON or Parquet: a file (also packed) or
    several, a folder, a glob or a Hub data set."""
    columns: dict[str, str | None] = field(default_factory=dict)
    """Which column holds what, where its name does not say it: {"answer": "result"} reads the
    column result as the answer; {"notes": null} leaves the column notes out."""
    roles: dict[str, str] = field(default_factory=dict)
    """Who speaks in a prompt of messages, where a role's name does not say it."""
    tools: list[str] = field(default_factory=list)
    """Tools that may be called: [calculator]; empty: those that the embedded task offers."""
    split: str = "train"
    """Split of a Hub data set."""
    val_path: list[str] | str = ""
    """Held-out rows; empty: one in ten of path. Embedded tasks hold out by themselves."""
    template: str = ""
    """chatml, llama3, plain or a Jinja file; empty: the model's own, else chatml, or plain where
    the vocabulary has no tokens for chat."""
    format_weight: float = 0.0
    """Share of the reward that <think>…</think><answer>…</answer> earns."""

    def __post_init__(self) -> None:
        require(
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
            require(value > 0, name, value, "must be positive")
        require(self.clip_low < 1, "clip_low", self.clip_low, "must be below 1")
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
        at_least("", self, kl=0, resample=0)
        require(
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
        at_least("", self, rule_weight=0, kl=0, kl_target=0, kl_stop=0, value_weight=0)
        require(self.value_clip > 0, "value_clip", self.value_clip, "must be positive")
        for name in ("gamma", "lam"):
            value = getattr(self, name)
            require(0 <= value <= 1, name, value, "must be in [0, 1]")
        require(
            bool(self.reward_model) or self.rule_weight != 0, "rule_weight", self.rule_weight,
            "leaves no reward; give --reward_model PATH",
        )  # fmt: skip
        require(
            self.kl_target == 0 or self.kl > 0, "kl", self.kl, "must be positive with kl_target"
        )
