"""Settings that were given and change nothing, and lengths that cannot be meant: one line each.

Nothing is accepted and ignored in silence. What is wrong for sure is refused where a setting is
checked; what is only unused, or strange, is named here before a run begins.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

from jaxgpt import files
from jaxgpt.config.commands import EvaluateConfig, PrepareConfig, WriteConfig
from jaxgpt.config.run import RunConfig

# (settings, whether they matter to this config, what they are for)
Rule = tuple[str, Callable[[Any], bool], str]

_GREEDY = "temperature=0 always takes the likeliest token"
_LORA = ("lora", "qlora")
_OF_ALL: tuple[Rule, ...] = (
    (r"model\.(experts_per_token|normalize_expert_weights|expert_(capacity|bias|scale)|router"
     r"|balance(_weight)?)",
     lambda c: c.model.num_experts > 0 or bool(c.init), "is for a mixture, model.num_experts"),
    (r"model\.shared_gate", lambda c: c.model.shared_mlp_dim > 0 or bool(c.init),
     "is for model.shared_mlp_dim"),
    (r"model\.dense_mlp_dim", lambda c: c.model.dense_layers > 0 or bool(c.init),
     "is for model.dense_layers"),
    (r"model\.(rope_base|rope_local_base|rope_scaling.*|rope_share|rope_pairs|rope_skip)",
     lambda c: c.model.position == "rope" or bool(c.init), "is for model.position=rope"),
    (r"model\.position_offset", lambda c: c.model.position == "learned" or bool(c.init),
     "is for model.position=learned"),
    (r"model\.gate_limit", lambda c: c.model.mlp == "gated" or bool(c.init),
     "is for model.mlp=gated"),
    (r"model\.activation", lambda c: not c.model.gate_limit or c.model.mlp == "plain",
     "model.gate_limit brings its own"),
    (r"model\.adapter_parallel", lambda c: c.model.adapter_dim > 0, "is for model.adapter_dim"),
    (r"optim\.(min_ratio|decay_steps)", lambda c: c.optim.schedule != "constant",
     "a constant learning rate never falls"),
    (r"optim\.decay_fraction", lambda c: c.optim.schedule == "wsd", "is for optim.schedule=wsd"),
    (r"optim\.(name|beta1|beta2|eps|moments|weight_decay|no_decay)", lambda c: not c.optim.custom,
     "optim.custom is another optimizer"),
    (r"train\.(z_loss|label_smoothing)", lambda c: not c.train.loss, "train.loss is another loss"),
    (r"data\.(path|val_path|split|columns|roles)", lambda c: not getattr(c.data, "task", ""),
     "data.task has its own problems"),
    (r"optim\.no_decay", lambda c: c.optim.weight_decay > 0, "is for optim.weight_decay"),
    (r"peft\.(targets|rank|alpha|rslora|dora|dropout)", lambda c: c.peft.kind in _LORA,
     "is for peft.kind=lora and qlora"),
    (r"peft\.quantize", lambda c: c.peft.kind == "qlora", "is for peft.kind=qlora"),
    (r"peft\.(adapter_dim|adapter_parallel|train_norms)", lambda c: c.peft.kind == "adapter",
     "is for peft.kind=adapter"),
    (r"train\.micro_batches|model\.remat", lambda c: c.fit != "auto", "fit=auto chooses it"),
    (r"sample\.(?!every|prompts).*", lambda c: c.sample.prompts != [],
     "there are no sample.prompts"),
    (r"sample\.(top_p|top_k|min_p)", lambda c: c.sample.temperature > 0, f"sample.{_GREEDY}"),
    (r"data\.(tokenizer|vocab_size)", lambda c: not c.init, "init brings its own"),
    (r"data\.vocab_size", lambda c: not c.data.tokenizer, "data.tokenizer is given"),
    (r"data\.cache", lambda c: not all(map(files.is_local, _token_files(c))),
     "no token files are in a bucket"),
    (r"data\.text_path", lambda c: c.data.text_share > 0, "is for data.text_share"),
    (r"data\.(learn|calls|long|packing|val_path|template|system)",
     lambda c: getattr(c.data, "text_share", 0) < 1, "data.text_share=1 reads no conversations"),
    (r"data\.val_fraction", lambda c: not getattr(c.data, "val_path", ""),
     "data.val_path is what is held out"),
)  # fmt: skip
_SMOOTH: Rule = (
    r"train\.(z_loss|label_smoothing)", lambda c: False, "is for pretraining and fine-tuning",
)  # fmt: skip
_OF_STAGE: dict[str, tuple[Rule, ...]] = {
    "reward": (
        _SMOOTH,
        (r"train\.loss_chunk", lambda c: False, "a reward model has no vocabulary"),
        (r"sample\..*", lambda c: False, "a reward model writes nothing"),
    ),
    "dpo": (
        _SMOOTH,
        (r"gamma", lambda c: c.loss == "simpo", "is for loss=simpo"),
        (r"(un)?desirable_weight", lambda c: c.loss == "kto", "is for loss=kto"),
        (r"reference", lambda c: c.loss not in ("orpo", "simpo"), "this loss has no reference"),
    ),
    "distill": (
        _SMOOTH,
        (r"divergence|temperature|top_k|jsd_beta", lambda c: c.hard < 1, "hard=1 asks no teacher"),
        (r"jsd_beta", lambda c: c.divergence == "jsd", "is for divergence=jsd"),
        (r"layers", lambda c: not c.init, "init brings its own"),
        (r"rollout\..*", lambda c: c.on_policy, "is for on_policy"),
        (
            r"model\.(?!dtype|remat|dropout).*",
            lambda c: not c.layers,
            "the teacher's layers decide",
        ),
    ),
    "grpo": (_SMOOTH,),
    "ppo": (_SMOOTH, (r"kl_in", lambda c: c.kl > 0, "is for kl")),
}
_OF_EVALUATION: tuple[Rule, ...] = (
    (r"window|stride", lambda c: c.task == "perplexity", "is for task=perplexity"),
    (r"samples|temperature|top_p|top_k|max_new_tokens|seed",
     lambda c: c.task in ("gsm8k", "arithmetic"), "is for tasks answered in words"),
    (r"top_p|top_k", lambda c: c.temperature > 0, _GREEDY),
)  # fmt: skip
_OF_WRITING: tuple[Rule, ...] = ((r"top_p|top_k|min_p|seed", lambda c: c.temperature > 0, _GREEDY),)
_OF_PREPARATION: tuple[Rule, ...] = (
    (r"hub_config|hub_split", lambda c: any(not files.path(path).exists() for path in c.input),
     "is for a Hub data set"),
)  # fmt: skip


def of_run(stage: str, cfg: RunConfig) -> list[str]:
    """Warnings about a training command's settings."""
    return _unused(cfg, _OF_ALL + _OF_STAGE.get(stage, ())) + _lengths(cfg)


def of_evaluation(cfg: EvaluateConfig) -> list[str]:
    """Warnings about the settings of evaluate.py."""
    return _unused(cfg, _OF_EVALUATION)


def of_writing(cfg: WriteConfig) -> list[str]:
    """Warnings about the settings of sample.py."""
    return _unused(cfg, _OF_WRITING)


def of_preparation(cfg: PrepareConfig) -> list[str]:
    """Warnings about the settings of prepare_data.py."""
    return _unused(cfg, _OF_PREPARATION)


def given(cfg: Any) -> dict[str, Any]:
    """The settings that differ from the defaults of their class, by dotted name."""
    fields = dataclasses.fields(cfg)
    needed = {f.name: getattr(cfg, f.name) for f in fields
              if f.default is f.default_factory is dataclasses.MISSING}  # fmt: skip
    default = flat(dataclasses.asdict(type(cfg)(**needed)))
    own = flat(dataclasses.asdict(cfg))
    return {name: value for name, value in own.items() if value != default.get(name)}


def _unused(cfg: Any, rules: tuple[Rule, ...]) -> list[str]:
    lines = []
    for name, value in given(cfg).items():
        idle = (why for names, matters, why in rules if re.fullmatch(names, name)
                and not matters(cfg))  # fmt: skip
        if why := next(idle, ""):
            lines.append(f"{name}={value}: has no effect; {why}")
    return lines


def _token_files(cfg: Any) -> list[str]:
    """Where token files may be: as they are given, or of a text in the run's directory."""
    path = cfg.data.path
    return [cfg.run, *([path] if isinstance(path, str) else path), *cfg.data.mixture]


def _lengths(cfg: RunConfig) -> list[str]:
    """What is asked for after the run's last step."""
    steps, lines = cfg.train.steps, []
    if 0 < steps <= cfg.optim.warmup_steps:
        lines.append(
            f"optim.warmup_steps={cfg.optim.warmup_steps}: is no shorter than train.steps={steps}; "
            "the learning rate never reaches its peak"
        )
    if steps and cfg.optim.learning_rate == 0:
        lines.append("optim.learning_rate=0: nothing is learned")
    asked = given(cfg)
    for name, rest in (
        ("checkpoint.every", "saves only the last step"),
        ("eval.every", "evaluates only before the first step and after the last"),
        ("sample.every", "samples only after the last step"),
        ("log.every", "logs only the last step"),
    ):
        if asked.get(name, 0) > steps > 0:
            lines.append(f"{name}={asked[name]}: is beyond train.steps={steps}; it {rest}")
    if cfg.log.profile and int(cfg.log.profile.partition(":")[0]) >= steps:
        lines.append(
            f"log.profile={cfg.log.profile}: is beyond train.steps={steps}; traces nothing"
        )
    return lines


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by their dotted names."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        nested = isinstance(value, dict) and value
        found |= flat(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return found
