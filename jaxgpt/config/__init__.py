"""Every setting of a run: frozen dataclasses, read from YAML and the command line.

A default lives here and nowhere else; the text under a field is what `--help` prints.
"""

from jaxgpt.config.command_line import (
    as_args,
    complete,
    exit_cleanly,
    extras,
    join_lists,
    parse,
    to_yaml,
)
from jaxgpt.config.commands import (
    ChatConfig,
    ConvertConfig,
    EvaluateConfig,
    InspectConfig,
    PlanSettings,
    PrepareConfig,
    ServeConfig,
    TokenizerConfig,
    WriteConfig,
    planned,
)
from jaxgpt.config.model import Latent, ModelConfig, RopeScaling
from jaxgpt.config.named import with_recipe
from jaxgpt.config.policy import GrpoConfig, PolicyConfig, PpoConfig, RolloutConfig, TaskConfig
from jaxgpt.config.run import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    LogConfig,
    MeshConfig,
    OptimConfig,
    PeftConfig,
    PretrainConfig,
    RunConfig,
    SampleConfig,
    Sampling,
    TrainConfig,
    sampling,
)
from jaxgpt.config.tuning import (
    ChatDataConfig,
    ConversationConfig,
    DistillConfig,
    DpoConfig,
    RewardConfig,
    SftConfig,
)

__all__ = [
    "RUN_CONFIGS", "ChatConfig", "ChatDataConfig", "CheckpointConfig", "ConversationConfig",
    "ConvertConfig", "DataConfig", "DistillConfig", "DpoConfig", "EvalConfig", "EvaluateConfig",
    "GrpoConfig", "InspectConfig", "Latent", "LogConfig", "MeshConfig", "ModelConfig",
    "OptimConfig", "PeftConfig", "PlanSettings", "PolicyConfig", "PpoConfig", "PrepareConfig",
    "PretrainConfig", "RewardConfig", "RolloutConfig", "RopeScaling", "RunConfig", "SampleConfig",
    "Sampling", "ServeConfig", "SftConfig", "TaskConfig", "TokenizerConfig", "TrainConfig",
    "WriteConfig", "as_args", "complete", "exit_cleanly", "extras", "join_lists", "parse",
    "planned", "sampling", "to_yaml", "with_recipe",
]  # fmt: skip

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
