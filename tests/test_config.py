"""Settings: parsing, validation, round trip, and one clear line for every mistake."""

import ast
import dataclasses
import json
import re
import typing
from pathlib import Path

import pytest

from jaxgpt import config
from jaxgpt.config import ModelConfig, PretrainConfig, command_line

DESCRIPTION = "Test."


def parse(*args: str) -> PretrainConfig:
    return config.parse(PretrainConfig, DESCRIPTION, args)


def test_defaults_are_those_of_the_dataclasses():
    assert parse() == PretrainConfig()


def test_a_file_states_what_differs_and_the_command_line_wins(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("seed: 3\nmodel:\n  num_layers: 2\n  model_dim: 64\noptim:\n  ema: 0.5\n")
    cfg = parse("--config", str(file), "--model.num_layers", "6", "--run", "somewhere")
    expected = PretrainConfig(
        run="somewhere",
        seed=3,
        model=ModelConfig(num_layers=6, model_dim=64),
        optim=config.OptimConfig(ema=0.5),
    )
    assert cfg == expected


def test_the_written_config_reads_back(tmp_path):
    cfg = PretrainConfig(
        run="r",
        model=ModelConfig(position="rope", rope_scaling=config.RopeScaling(factor=4.0), head_dim=8),
        data=config.DataConfig(mixture={"a": 0.5, "b/c": 2.0}),
        sample=config.SampleConfig(prompts=["def f(", "1: 'x'\n"]),
    )
    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml(cfg))
    assert parse("--config", str(file)) == cfg


def test_print_config_runs_again(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--model.num_heads", "2", "--optim.ema", "0.9", "--print_config")
    assert stop.value.code == 0
    file = tmp_path / "printed.yaml"
    file.write_text(capsys.readouterr().out)
    assert parse("--config", str(file)) == parse("--model.num_heads", "2", "--optim.ema", "0.9")


def classes(kind: type = PretrainConfig) -> list[type]:
    """A config and all that it is made of."""
    found = [kind]
    for hint in typing.get_type_hints(kind).values():
        for part in [hint, *typing.get_args(hint)]:
            if dataclasses.is_dataclass(part):
                found += classes(part)
    return found


def test_help_explains_every_field_and_its_default(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for kind in set(classes()) - {config.RopeScaling, config.Latent}:  # of their own --help
        for field in dataclasses.fields(kind):
            assert f"{field.name} " in shown, field.name
    assert "Largest learning rate" in shown and "default: 0.001" in shown


def test_every_option_is_used_by_a_test_an_example_or_a_document():
    """What nobody needs goes."""
    root, suffixes = Path(__file__).parents[1], {".py", ".yaml", ".md"}
    folders = [root / name for name in ("tests", "configs", "docs", "benchmarks")]
    texts = [file.read_text() for folder in folders for file in folder.rglob("*")
             if file.suffix in suffixes and file != Path(__file__)]  # fmt: skip
    words = set(re.findall(r"\w+", "\n".join([*texts, (root / "README.md").read_text()])))
    kinds = [*config.RUN_CONFIGS.values(), *OTHER_PATHS, config.PlanSettings]
    keys = {key for kind in kinds for key in command_line._keys(kind) if "rope_scaling" not in key}
    names = {key.rpartition(".")[2] for key in keys}  # scalings come from other models' files
    assert not names - words


def test_every_field_is_documented():
    for node in ast.parse(Path(config.__file__).read_text()).body:
        if isinstance(node, ast.ClassDef):
            for item, after in zip(node.body, [*node.body[1:], None], strict=True):
                if isinstance(item, ast.AnnAssign) and "Config" not in ast.unparse(item):
                    has = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                    assert has, f"{node.name}.{ast.unparse(item.target)} has no docstring"


WRONG = [
    ("--model.num_layer", "2"),
    ("--model.num_layers", "two"),
    ("--model.num_layers", "0"),
    ("--model.num_heads", "3"),
    ("--model.num_heads", "-4"),
    ("--model.num_kv_heads", "0"),
    ("--model.num_kv_heads", "3"),
    ("--model.head_dim", "0"),
    ("--model.mlp_dim", "-1"),
    ("--model.vocab_size", "-5"),
    ("--model.context_length", "0"),
    ("--model.dropout", "1.0"),
    ("--model.activation", "tanh"),
    ("--model.num_experts", "-1"),
    ("--model.expert_capacity", "-1"),
    ("--model.adapter_dim", "-1"),
    ("--model.dtype", "float16"),
    ("--data.val_fraction", "0"),
    ("--data.vocab_size", "-1"),
    ("--train.steps", "-1"),
    ("--train.batch_size", "-8"),
    ("--train.micro_batches", "3"),
    ("--train.label_smoothing", "1"),
    ("--train.z_loss", "-1"),
    ("--train.loss_chunk", "-1"),
    ("--train.max_loss", "0"),
    ("--optim.learning_rate", "-1"),
    ("--optim.warmup_steps", "-1"),
    ("--optim.min_ratio", "-0.1"),
    ("--optim.decay_steps", "-1"),
    ("--optim.decay_fraction", "1.5"),
    ("--optim.eps", "-1e-8"),
    ("--optim.weight_decay", "-0.1"),
    ("--optim.no_decay", "'('"),
    ("--optim.learning_rate", ".nan"),
    ("--optim.learning_rate", ".inf"),
    ("--train.max_loss", ".nan"),
    ("--peft.targets", "'['"),
    ("--peft.rank", "0"),
    ("--data.mixture", "{'a': 0.0}"),
    ("--optim.beta1", "1"),
    ("--optim.beta2", "0.999", "--optim.moments", "bfloat16"),
    ("--optim.clip_norm", "-1"),
    ("--optim.ema", "1"),
    ("--checkpoint.every", "0"),
    ("--checkpoint.keep", "0"),
    ("--eval.every", "-1"),
    ("--eval.batches", "-1"),
    ("--sample.every", "-1"),
    ("--sample.max_new_tokens", "-1"),
    ("--sample.temperature", "-0.5"),
    ("--sample.top_p", "0"),
    ("--sample.top_k", "-1"),
    ("--mesh.fsdp", "0"),
    ("--mesh.tensor", "-2"),
    ("--log.every", "0"),
    ("--log.profile", "3"),
    ("--log.profile", "5:2"),
    ("--seed", "1.5"),
]


@pytest.mark.parametrize("wrong", WRONG, ids=" ".join)
def test_a_bad_value_is_one_line_that_names_the_key(wrong):
    with pytest.raises(ValueError) as error:
        parse(*wrong)
    line = str(error.value)
    assert wrong[0].split(".")[-1].lstrip("-") in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("model:\n  layers: 3\n", "model.layers: unknown setting; did you mean model.num_layers?"),
        ("optim:\n  learing_rate: 3\n", "did you mean optim.learning_rate?"),
        ("steps: 3\n", "steps: unknown setting; did you mean train.steps?"),
        ("zebra: 3\n", "zebra: unknown setting; --help lists all"),
        ("model: [1\n", ""),
        ("model:\n  rope_scaling:\n    facto: 3\n", "did you mean model.rope_scaling.factor?"),
        ("optim: 3\n", "optim=3: must be a mapping"),
        ("- run\n", "config: must be a mapping"),
        ("", "is empty"),
    ],
)
def test_a_bad_file_is_one_line_that_names_the_key(tmp_path, content, named):
    file = tmp_path / "bad.yaml"
    file.write_text(content)
    with pytest.raises(ValueError) as error:
        parse("--config", str(file))
    assert named in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("--optim.learning_rate=fast", "optim.learning_rate=fast: must be float"),
        ("--model.num_kv_heads=two", "model.num_kv_heads=two: must be int or null"),
        ("--optim.name=adam", "optim.name=adam: must be 'adamw', 'muon'"),
        ("--model.rope_scaling=x", "model.rope_scaling=x: must be a mapping or null"),
        (
            "--optim={learing_rate:3}",
            "optim={learing_rate:3}: is neither a mapping of settings nor a YAML file of them",
        ),
        ("--train.steps", "--train.steps: needs a value"),
        ("--config", "--config: needs a value"),
        ("tiny", "tiny: is no option, and no text in quotes that belongs to one"),
    ],
)
def test_a_wrong_type_is_told_by_what_it_must_be(wrong, said):
    with pytest.raises(ValueError) as caught:
        config.parse(PretrainConfig, None, [wrong])
    assert str(caught.value) == said


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("--optim.learing_rate=1", "--optim.learning_rate"),
        ("--optim.learning-rate=1", "--optim.learning_rate"),
        ("--learning_rate=1", "--optim.learning_rate"),
        ("--batch-size=4", "--train.batch_size"),
        ("--model.layers=2", "--model.num_layers"),
        ("--train.step=3", "--train.steps"),
        ("--model.rope_scaling.facto=2", "model.rope_scaling.factor"),
        ("--show_batches", "--show_batch"),
        ("--every=3", "--checkpoint.every or --eval.every or --sample.every or --log.every"),
    ],
)
def test_an_unknown_option_proposes_the_nearest_name(wrong, meant):
    with pytest.raises(ValueError) as caught:
        parse(wrong)
    name = wrong.partition("=")[0]
    assert str(caught.value) in (
        f"{name}: unknown setting; did you mean {meant}?",
        f"{name[2:]}: unknown setting; did you mean {meant}?",
    )


PATHS = {  # every setting that is a path, by command
    "pretrain": "run init data.path data.tokenizer data.mixture",
    "sft": "run init data.path data.val_path data.template data.tokenizer data.text_path",
    "reward": "run init data.path data.val_path data.template data.tokenizer",
    "dpo": "run init data.path data.val_path data.template data.tokenizer",
    "distill": "run init teacher data.path data.text_path",
    "grpo": "run init data.path data.val_path data.template",
    "ppo": "run init reward_model data.path",
}
OTHER_PATHS = {
    config.WriteConfig: "checkpoint adapter",
    config.TokenizerConfig: "input output",
    config.PrepareConfig: "input output tokenizer",
    config.EvaluateConfig: "checkpoint data output reward_model",
    config.ConvertConfig: "checkpoint output",
}
SCHEMES = ["ftp://bucket/x", "hf://a/b", "S3://b/x"]


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (kind, name)
        for kind, names in {
            **{config.RUN_CONFIGS[stage]: names for stage, names in PATHS.items()},
            **OTHER_PATHS,
        }.items()
        for name in names.split()
    ],
    ids=lambda part: getattr(part, "__name__", part),
)
def test_a_path_with_an_unknown_scheme_is_refused_by_name(kind, name):
    """It would be a local folder named `ftp:`."""
    needed = {
        field.name: "perplexity" if field.name == "task" else "local"
        for field in dataclasses.fields(kind)
        if field.default is field.default_factory is dataclasses.MISSING
    }
    for path in SCHEMES[: len(SCHEMES) if name == "run" else 1]:
        value = {"adapter": f"[{path}]", "input": f"[{path}]", "data.mixture": f"{{'{path}': 1.0}}"}
        given = needed | {name: value.get(name, path)}
        with pytest.raises(ValueError) as caught:
            config.parse(kind, None, [f"--{key}={text}" for key, text in given.items()])
        line = str(caught.value)
        assert line.startswith(f"{name}={path}: {path.partition(':')[0]}:// is not supported"), line


def test_a_config_file_in_a_bucket_is_refused():
    for args in (["--config", "s3://b/run.yaml"], ["--config=gs://b/run.yaml"]):
        with pytest.raises(ValueError, match=r"config=.*:// is not supported"):
            config.parse(PretrainConfig, None, args)


def test_a_missing_config_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="absent"):
        parse("--config", str(tmp_path / "absent.yaml"))


def test_exit_cleanly_gives_one_line_and_status_2(capsys):
    def main() -> None:
        raise ValueError("model.x=1:\n  must be 2")

    with pytest.raises(SystemExit) as stop:
        config.exit_cleanly(main)
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: model.x=1: must be 2\n"


def test_exit_cleanly_gives_one_line_and_status_1_to_a_diverged_run(capsys):
    def main() -> None:
        raise FloatingPointError("step 3: the loss is nan")

    with pytest.raises(SystemExit) as stop:
        config.exit_cleanly(main)
    assert stop.value.code == 1
    assert capsys.readouterr().err == "error: step 3: the loss is nan\n"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space left on device", "run/data/0.bin"),
         "run/data/0.bin: No space left on device; make room, then the same command goes on"),
        (OSError(28, "No space left on device"),
         "a file: No space left on device; make room, then the same command goes on"),
        (PermissionError(13, "Permission denied", "/x"), "/x: Permission denied"),
        (OSError("cannot write checkpoint 3: reason"), "cannot write checkpoint 3: reason"),
    ],
)  # fmt: skip
def test_an_error_of_the_system_names_the_file_and_the_fix(error, said, capsys):
    def main() -> None:
        raise error

    with pytest.raises(SystemExit):
        config.exit_cleanly(main)
    assert capsys.readouterr().err == f"error: {said}\n"


def test_exit_cleanly_leaves_a_bug_its_traceback():
    with pytest.raises(ZeroDivisionError):
        config.exit_cleanly(lambda: 1 // 0)


def test_lists_may_be_given_in_every_way():
    joined = lambda *args: config.join_lists(args, "--p")
    assert joined("--p", "a b", "--x", "1", "--p", "c") == ["--x", "1", '--p=["a b", "c"]']
    assert joined("--p", "a", "c", "--x=1") == ["--x=1", '--p=["a", "c"]']
    assert joined("--p=[a") == ['--p=["[a"]']  # a prompt may start like YAML
    assert joined("--x", "1") == ["--x", "1"]


def test_widths_follow_from_the_heads():
    cfg = ModelConfig(model_dim=96, num_heads=4)
    assert (cfg.kv_heads, cfg.head_width, cfg.mlp_width) == (4, 24, 384)
    cfg = ModelConfig(model_dim=96, num_heads=5, num_kv_heads=1, head_dim=16, mlp_dim=7)
    assert (cfg.kv_heads, cfg.head_width, cfg.mlp_width) == (1, 16, 7)


@pytest.mark.parametrize(
    ("args", "path"),
    [
        (["--data.path", "a.jsonl"], "a.jsonl"),
        (["--data.path=a.jsonl"], "a.jsonl"),
        (["--data.path", "a.jsonl", "b.json"], ["a.jsonl", "b.json"]),
        (["--data.path", "a.jsonl", "--data.path", "b.json", "--seed", "3"], ["a.jsonl", "b.json"]),
        (["--data.path", '["a.jsonl", "b.json"]'], ["a.jsonl", "b.json"]),
        (["--data.path", "[1].jsonl"], "[1].jsonl"),
        ([], ""),
    ],
)
def test_data_may_lie_in_several_files(args, path):
    for kind in (config.SftConfig, config.PretrainConfig, config.DpoConfig):
        assert config.parse(kind, "", args).data.path == path


def test_columns_and_roles_are_json_on_the_command_line_and_mappings_in_yaml(tmp_path):
    columns, roles = {"prompt": "question", "notes": None}, {"oracle": "assistant"}
    given = ["--data.columns", json.dumps(columns), "--data.roles", json.dumps(roles)]
    (tmp_path / "a.yaml").write_text(
        "data: {columns: {prompt: question, notes: null}, roles: {oracle: assistant}}"
    )
    for kind in (config.SftConfig, config.DpoConfig, config.GrpoConfig):
        for args in (given, ["--config", str(tmp_path / "a.yaml")]):
            data = config.parse(kind, "", args).data
            assert (data.columns, data.roles) == (columns, roles)
