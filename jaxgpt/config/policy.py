"""The stages that learn from what the policy writes."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from jaxgpt.config.checks import (
    Amount,
    BelowOne,
    Count,
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
    """The answers that the policy writes and then learns from."""

    updates: Count = 2
    """Optimizer steps that learn from one rollout; checkpoint.every must be a multiple of it."""
    epochs: Count = 1
    """How many times each answer of a rollout is learned from, within rollout.updates steps. A
    rollout has train.batch_size * updates / epochs answers."""
    samples: Count = 8
    """Number of answers that the policy writes to each prompt."""
    max_new_tokens: Count = 128
    """Largest number of tokens in one turn; a turn that is cut off there ends its answer."""
    temperature: Positive = 1.0
    """Temperature of the distribution from which answers are drawn and by which they are scored."""
    truncated: Literal["judge", "mask"] = "judge"
    """How an answer that was cut off counts: judge: it is judged as it stands; mask: its reward
    counts for its group, but nothing is learned from it (DAPO's overlong filtering)."""
    overlong_buffer: Amount = 0
    """Number of tokens before max_new_tokens over which an answer's reward falls, by up to 1
    (DAPO's soft punishment); 0: it does not fall."""
    judge_seconds: Positive = 30.0
    """Seconds that a rule or a tool may take over one turn; one that takes longer ends the run."""

    def __post_init__(self) -> None:
        check("rollout", self)
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

    path: Paths = "arithmetic"
    """Embedded task (arithmetic, arithmetic-concise, arithmetic-calculator, multi-step, products,
    products-calculator), or {question, answer} in JSONL, JSON or Parquet: a file (also packed) or
    several, a folder, a glob or a Hub data set."""
    task: str = ""
    """Problems of your own, in place of data.path: FILE.py:NAME of a jaxgpt.tasks.Task, or of a
    function that makes one."""
    reward: str = ""
    """Reward of your own, in place of the task's rule: FILE.py:NAME of a function (problem, answer)
    -> number. For rows of a file, problem.answer is the right answer."""
    environment: str = ""
    """Environment of your own, in place of a question: FILE.py:NAME of a function (problem) ->
    object with reset() -> messages and step(text) -> jaxgpt.tasks.environment.Turn."""
    columns: dict[str, str | None] = field(default_factory=dict)
    """Columns of the data that have unusual names: {"answer": "result"} reads the column result as
    the answer; {"notes": null} leaves the column notes out."""
    roles: dict[str, str] = field(default_factory=dict)
    """Meaning of unusual names of roles in a prompt of messages: {"bot": "assistant"}."""
    tools: list[str] = field(default_factory=list)
    """Tools that the policy may call: calculator, or FILE.py:NAME of a function of yours; empty:
    those of the embedded task."""
    split: str = "train"
    """Split of a Hub data set to read."""
    val_path: Paths = ""
    """Held-out rows, in any form of data.path; empty: one row in ten of data.path. Embedded tasks
    hold out problems by themselves."""
    template: FilePath = ""
    """Chat template: chatml, llama3, plain or a Jinja file; empty: the model's own, else chatml, or
    plain where the vocabulary has no tokens for chat."""
    system: str | None = None
    """System prompt of conversations that have none; null: the template's own, if it has one. The
    model's files keep it."""
    format_weight: BelowOne = 0.0
    """Share of the reward that the form <think>…</think><answer>…</answer> earns."""

    def __post_init__(self) -> None:
        check("data", self)
        for name, value, why in (
            ("reward", self.reward, "an environment gives its own rewards"),
            ("tools", self.tools, "an environment answers by itself"),
        ):
            require(not (value and self.environment), f"data.{name}", value, f"{why}; drop one")


@dataclass(frozen=True)
class PolicyConfig(RunConfig):
    """The settings that GRPO and PPO share."""

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
    clip_low: Annotated[float, within("(0, 1)")] = 0.2
    """PPO's lower clip: no gradient pushes the ratio of a token's probability to its probability in
    the rollout below 1 - clip_low."""
    clip_high: Positive = 0.28
    """PPO's upper clip: no gradient pushes the ratio of a token's probability to its probability in
    the rollout above 1 + clip_high. A value above clip_low lets rare tokens grow (DAPO)."""
    entropy: Weight = 0.0
    """Weight of a bonus for the policy's entropy, in nats, in the loss; 0: no bonus."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.rollout.rows(self.train.batch_size)


@dataclass(frozen=True)
class GrpoConfig(PolicyConfig):
    """GRPO and its relatives: answers are compared with others to the same prompt."""

    run: FilePath = "runs/grpo"
    """Directory of the run; the same command on the same directory resumes it."""
    baseline: Literal["group", "mean", "others", "batch"] = "group"
    """How an answer's reward r becomes its advantage: group: (r - mean) / std of the answers to its
    prompt (GRPO); mean: r - mean of them (Dr. GRPO); others: r - mean of the others (RLOO);
    batch: (r - mean) / std of all answers (REINFORCE++)."""
    normalize: Literal["tokens", "sequences", "constant"] = "tokens"
    """How the loss of the tokens is averaged: tokens: all tokens count alike (DAPO); sequences: all
    answers count alike (GRPO as published); constant: the sum over tokens is divided by
    rollout.max_new_tokens for every answer (Dr. GRPO)."""
    ratio: Literal["token", "sequence"] = "token"
    """Which ratio of probabilities is clipped: token: each token's; sequence: that of the whole
    answer (RLOO)."""
    kl: Weight = 0.0
    """Weight of KL(policy || reference), by its k3 estimate, in the loss; 0: no reference."""
    resample: Amount = 0
    """Largest number of further rollouts that replace groups of equally good answers by groups of
    other prompts (DAPO's dynamic sampling); 0: such groups stay."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.rollout.samples > 1 or self.baseline == "batch", "rollout.samples",
            self.rollout.samples, f"must be 2 or more for baseline={self.baseline}",
        )  # fmt: skip


@dataclass(frozen=True)
class PpoConfig(PolicyConfig):
    """PPO: answers are compared with the reward that a value network expected."""

    run: FilePath = "runs/ppo"
    """Directory of the run; the same command on the same directory resumes it."""
    rollout: RolloutConfig = field(
        default_factory=lambda: RolloutConfig(updates=4, epochs=2, samples=1)
    )
    clip_high: Positive = 0.2
    """PPO's upper clip: no gradient pushes the ratio of a token's probability to its probability in
    the rollout above 1 + clip_high."""
    reward_model: ModelPath = ""
    """Run of scripts/reward.py whose reward is learned from; empty: the task's rule alone."""
    rule_weight: Weight | None = None
    """Weight of the task's rule in the reward; null: 1, or 0 with a reward model."""
    kl: Weight = 0.05
    """Weight of KL(policy || reference); with kl_target its smallest weight."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Where the KL penalty stands: reward: it is subtracted from every token's reward (k1); loss:
    it is a term of the loss (k3)."""
    kl_target: Weight = 0.0
    """Budget of an answer's KL, in nats: after each rollout the weight is multiplied by its KL over
    kl_target, which counts as 0.5 to 2, but never falls below kl; 0: the weight is fixed."""
    kl_stop: Weight = 0.0
    """KL for each token, in nats, between the policy and that of the rollout, above which the other
    updates of the rollout are skipped; 0: they never are."""
    value: Literal["separate", "shared"] = "separate"
    """The value network: separate: a copy of the policy's with a scalar head; shared: only a head
    on the policy's."""
    value_weight: Weight = 0.5
    """Weight of the value loss."""
    value_clip: Positive = 0.2
    """Clip of the value loss: no gradient pushes a value further than this from its value in the
    rollout."""
    gamma: Share = 1.0
    """Discount of a reward for each token that lies between it and an earlier token; 1: none."""
    lam: Share = 0.95
    """GAE's lambda: 0 trusts the value network (bias), 1 the rewards alone (variance)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            bool(self.reward_model) or self.rule_weight != 0, "rule_weight", self.rule_weight,
            "leaves no reward; give --reward_model PATH",
        )  # fmt: skip
        require(
            self.kl_target == 0 or self.kl > 0, "kl", self.kl, "must be positive with kl_target"
        )
