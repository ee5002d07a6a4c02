"""The command `jaxgpt`: commands by name, configs by theirs, and what a shell completes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import jaxgpt
from jaxgpt import commands, config
from jaxgpt.config import named

ROOT = Path(__file__).parents[1]
OF_THE_REPOSITORY = {"notes"}  # builds the notes, which are in no wheel


def call(monkeypatch, capsys, *args: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/jaxgpt", *args])
    code = 0
    try:
        commands.main()
    except SystemExit as stop:
        code = stop.code or 0
    return code, *capsys.readouterr()


def test_every_script_is_a_command_and_the_other_way_round():
    scripts = {file.stem for file in (ROOT / "scripts").glob("*.py")} - OF_THE_REPOSITORY
    assert scripts == set(commands.names())


def test_help_lists_every_command(monkeypatch, capsys):
    for args in ((), ("--help",)):
        code, out, _ = call(monkeypatch, capsys, *args)
        assert code == 0 and all(f"\n  {name} " in out for name in commands.names())
        assert max(map(len, out.splitlines())) < 120


def test_the_version_stands_in_one_place(monkeypatch, capsys):
    assert call(monkeypatch, capsys, "--version") == (0, f"{jaxgpt.__version__}\n", "")
    assert jaxgpt.__version__ not in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("pretrian",), "error: pretrian: is no command; did you mean 'pretrain'?"),
        (
            ("pretrain", "--config", "pretrain/shakespear-char"),
            "error: config=pretrain/shakespear-char: there is no such file; did you mean "
            "pretrain/shakespeare-char or ",
        ),
        (("sft", "--config=products"), "or grpo/products?"),
        (("life", "--plan", "--config", "tiny"), "did you mean life/tiny"),
        (("sft", "--config", "quite-another"), "those of jaxgpt are in"),
        (("pretrain", "--config", "."), "config=.: is a folder"),
    ],
)
def test_a_wrong_name_is_one_line_with_the_nearest(monkeypatch, capsys, tmp_path, args, said):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(monkeypatch, capsys, *args)
    assert (code, out) == (2, "") and said in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "name",
    ["pretrain/moe-tiny", "pretrain/moe-tiny.yaml", "configs/pretrain/moe-tiny.yaml",
     "configs/pretrain/moe-tiny"],
)  # fmt: skip
def test_configs_are_found_from_any_folder(monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    expected = yaml.safe_load((ROOT / "configs/pretrain/moe-tiny.yaml").read_text())
    for args in (["--config", name], [f"--config={name}"]):
        cfg = config.parse(config.PretrainConfig, "", args)
        assert cfg.model.num_experts == expected["model"]["num_experts"]
    cfg = config.parse(config.PretrainConfig, "", ["--model", "model/llama-tiny"])
    assert cfg.model.norm == "rmsnorm"


def test_a_file_of_ones_own_comes_first(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    mine = tmp_path / "configs" / "pretrain" / "default.yaml"
    mine.parent.mkdir(parents=True)
    mine.write_text("seed: 77\n")
    for name in ("configs/pretrain/default.yaml", str(mine)):
        assert config.parse(config.PretrainConfig, "", ["--config", name]).seed == 77
    assert named.ours("../../pyproject.toml") is None


def test_every_config_is_in_the_package():
    listed = {file.relative_to(ROOT / "configs") for file in (ROOT / "configs").glob("*/*")}
    packed = {file.relative_to(named.CONFIGS) for file in named.CONFIGS.glob("*/*")}
    assert listed == packed and Path("life/unseen.txt") in packed
    assert {file.suffix for file in packed} == {".yaml", ".txt"}, "package-data knows only these"


def test_pretraining_begins_with_the_recipe_unless_something_else_is_named():
    recipe = yaml.safe_load((ROOT / "configs/pretrain/default.yaml").read_text())
    parse = lambda *args: config.parse(
        config.PretrainConfig, "", config.with_recipe("pretrain", args)
    )
    assert parse().optim.name == recipe["optim"]["name"] == "muon"
    for args in (
        ["--config=pretrain/shakespeare-char-cpu"], ["--model", "model/gpt2-tiny"],
        ["--init", "run"], ["--optim.name", "adamw"], ["--optim.custom=my.py:lion"],
    ):  # fmt: skip
        cfg = parse(*args)
        assert (cfg.optim.name, cfg.model.norm) == ("adamw", "layernorm"), args
    assert config.with_recipe("sft", []) == []


COMPLETED = {
    "jaxgpt pre": {"prepare_data", "pretrain"},
    "jaxgpt pretrain --optim.wa": {"--optim.warmup_steps"},
    "jaxgpt dpo --loss s": {"sigmoid", "simpo"},
    "jaxgpt sft --show_batch ": {"true", "false"},
    "jaxgpt runs --so": {"--sort"},
}


@pytest.mark.parametrize("line", COMPLETED)
def test_a_shell_is_told_what_may_follow(tmp_path, line):
    """The variables are those that bash sets for argcomplete's function."""
    pytest.importorskip("argcomplete")
    asked = {
        "_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\n", "COMP_TYPE": "9", "COMP_LINE": line,
        "COMP_POINT": str(len(line)), "_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "said"),
    }  # fmt: skip
    subprocess.run([sys.executable, "-m", "jaxgpt"], env=os.environ | asked, cwd=ROOT)
    assert {word.strip() for word in (tmp_path / "said").read_text().split("\n")} == COMPLETED[line]


def test_a_missing_package_is_named_with_its_extra(monkeypatch, capsys):
    known = {"serve": ["starlette", "sse-starlette"], "notes": ["markdown-it-py"]}
    monkeypatch.setattr("jaxgpt.config.command_line.extras", lambda: known)

    def lacks(module: str):
        def main():
            raise ModuleNotFoundError(f"No module named {module!r}", name=module)

        return main

    for module, extra in (("sse_starlette", "serve"), ("markdown_it.renderer", "notes")):
        with pytest.raises(SystemExit, match="2"):
            config.exit_cleanly(lacks(module))
        assert f'pip install "jaxgpt[{extra}]"' in capsys.readouterr().err
    with pytest.raises(ModuleNotFoundError):  # a mistake of ours is no advice to install
        config.exit_cleanly(lacks("jaxgpt.nothing"))


@pytest.mark.slow
def test_the_doctor_finds_this_machine_well(monkeypatch, capsys):
    code, out, _ = call(monkeypatch, capsys, "doctor")
    lines = out.splitlines()
    assert code == 0, out
    assert {"jaxgpt", "Python", "devices", "cache", "training"} <= {
        line.split()[1] for line in lines
    }


def test_the_doctor_names_what_must_be_mended(monkeypatch, capsys, tmp_path):
    from jaxgpt.commands import doctor

    monkeypatch.setattr(doctor, "LOW_DISK", 1e18)
    for part in ("_devices", "_cache"):
        monkeypatch.setattr(doctor, part, lambda: iter(()))
    monkeypatch.setattr(doctor, "_training", lambda: doctor.Finding("training", "fine"))
    code, out, err = call(monkeypatch, capsys, "doctor", "--run", str(tmp_path / "runs"))
    assert code == 1 and "BAD  runs" in out and "make room" in out and "2 of these" in err
