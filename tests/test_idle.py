"""No setting is accepted and ignored: what changes nothing is named before the run."""

import dataclasses
import re
from pathlib import Path

import pytest

from jaxgpt import config
from jaxgpt.config import idle


def warnings(stage: str, *args: str) -> list[str]:
    return idle.of_run(stage, config.parse(config.RUN_CONFIGS[stage], None, args))


@pytest.mark.parametrize("stage", config.RUN_CONFIGS)
def test_the_defaults_and_the_examples_are_used_whole(stage):
    assert warnings(stage) == []
    for file in (Path(__file__).parents[1] / "configs" / stage).glob("*.yaml"):
        found = warnings(stage, "--config", str(file), "--init", "somewhere")
        assert not [line for line in found if "init brings" not in line], file


@pytest.mark.parametrize(
    ("stage", "args", "said"),
    [
        ("pretrain", "--model.experts_per_token=1", "is for a mixture"),
        ("pretrain", "--model.rope_base=5.0", "is for model.position=rope"),
        ("pretrain", "--model.expert_bias=true", "is for a mixture"),
        ("pretrain", "--model.position=none --model.position_offset=2", "is for model.pos"),
        ("pretrain", "--model.router=sigmoid", "is for a mixture"),
        ("pretrain", "--model.shared_gate=false", "is for model.shared_mlp_dim"),
        ("pretrain", "--model.dense_mlp_dim=8", "is for model.dense_layers"),
        ("pretrain", "--model.gate_limit=7", "is for model.mlp=gated"),
        ("pretrain", "--model.mlp=gated --model.gate_limit=7 --model.activation=silu", "its own"),
        ("pretrain", "--optim.schedule=constant --optim.min_ratio=0.5", "never falls"),
        ("pretrain", "--optim.decay_fraction=0.5", "is for optim.schedule=wsd"),
        ("pretrain", "--peft.rank=4", "is for peft.kind=lora and qlora"),
        ("sft", "--peft.kind=lora --peft.quantize=int8", "is for peft.kind=qlora"),
        ("sft", "--peft.kind=lora --peft.train_norms=true", "is for peft.kind=adapter"),
        ("pretrain", "--fit=auto --train.micro_batches=2", "fit=auto chooses it"),
        ("pretrain", "--sample.prompts=[] --sample.top_k=5", "there are no sample.prompts"),
        ("pretrain", "--sample.temperature=0 --sample.top_k=5", "the likeliest token"),
        ("sft", "--sample.top_p=0.5", "the likeliest token"),
        ("pretrain", "--data.tokenizer=gpt2 --data.vocab_size=300", "data.tokenizer is given"),
        ("pretrain", "--init=x --data.tokenizer=gpt2", "init brings its own"),
        ("sft", "--data.text_path=x", "is for data.text_share"),
        ("sft", "--data.val_path=a --data.val_fraction=0.2", "is what is held out"),
        ("sft", "--data.text_share=1 --data.learn=all", "reads no conversations"),
        ("dpo", "--train.z_loss=0.1", "is for pretraining and fine-tuning"),
        ("dpo", "--gamma=1", "is for loss=simpo"),
        ("dpo", "--undesirable_weight=2", "is for loss=kto"),
        ("dpo", "--loss=orpo --reference=precomputed", "has no reference"),
        ("reward", "--sample.prompts=[a]", "writes nothing"),
        ("reward", "--train.loss_chunk=8", "has no vocabulary"),
        ("distill", "--jsd_beta=0.3", "is for divergence=jsd"),
        ("distill", "--rollout.samples=2", "is for on_policy"),
        ("distill", "--hard=1 --temperature=2", "hard=1 asks no teacher"),
        ("distill", "--layers=2 --model.num_heads=2", "the teacher's layers decide"),
        ("ppo", "--kl=0 --kl_in=loss", "is for kl"),
        ("grpo", "--train.label_smoothing=0.1", "is for pretraining and fine-tuning"),
        ("pretrain", "--train.steps=20 --optim.warmup_steps=20", "never reaches its peak"),
        ("pretrain", "--train.steps=200 --checkpoint.every=300", "saves only the last step"),
        ("pretrain", "--train.steps=200 --eval.every=300", "evaluates only before"),
        ("pretrain", "--train.steps=200 --log.every=300", "logs only the last"),
        ("pretrain", "--log.profile=500:510", "traces nothing"),
        ("pretrain", "--optim.learning_rate=0", "nothing is learned"),
    ],
)  # fmt: skip
def test_what_has_no_effect_is_named_with_the_reason(stage, args, said):
    (line,) = warnings(stage, *args.split())
    assert said in line
    assert line.startswith(args.split()[-1][2:].partition("=")[0]), line


def test_what_has_an_effect_is_not_named():
    assert warnings("sft", "--peft.kind=qlora", "--peft.quantize=int8", "--peft.rank=4") == []
    assert warnings("pretrain", "--model.num_experts=4", "--model.experts_per_token=1") == []
    assert warnings("pretrain", "--optim.schedule=wsd", "--optim.decay_fraction=0.5") == []


@pytest.mark.parametrize("stage", config.RUN_CONFIGS)
def test_every_rule_is_for_settings_that_exist(stage):
    """A rule for a setting that was renamed would never speak."""
    names = set(idle.flat(dataclasses.asdict(config.RUN_CONFIGS[stage]())))
    for rules in idle._OF_STAGE.get(stage, ()):
        assert any(re.fullmatch(rules[0], name) for name in names), rules[0]


def test_other_commands_name_theirs():
    cfg = config.EvaluateConfig("m", "perplexity", "d", top_k=3, window=8)
    assert idle.of_evaluation(cfg) == ["top_k=3: has no effect; is for tasks answered in words"]
    cfg = config.EvaluateConfig("m", "gsm8k", "d", top_k=3, window=8)
    greedy = "has no effect; temperature=0 always takes the likeliest token"
    assert set(idle.of_evaluation(cfg)) == {
        f"top_k=3: {greedy}",
        "window=8: has no effect; is for task=perplexity",
    }
    cfg = config.EvaluateConfig("m", "gsm8k", "d", top_k=3, temperature=0.5)
    assert idle.of_evaluation(cfg) == []
    cfg = config.WriteConfig("m", temperature=0.0, min_p=0.1)
    assert idle.of_writing(cfg) == [f"min_p=0.1: {greedy}"]
    assert idle.of_writing(config.WriteConfig("m", min_p=0.1)) == []
    cfg = config.PrepareConfig("out", input=[__file__], hub_split="test")
    assert idle.of_preparation(cfg) == ["hub_split=test: has no effect; is for a Hub data set"]
