"""A run's directory belongs to one config."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import yaml

from jaxgpt import checkpoint, files, rundir
from jaxgpt.config import (
    CheckpointConfig,
    DistillConfig,
    LogConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    PretrainConfig,
    RopeScaling,
    SampleConfig,
)


def trained(path, **settings) -> PretrainConfig:
    """The config of a run that has begun to train there."""
    cfg = PretrainConfig(run=str(path), **settings)
    rundir.enter(cfg)
    (path / "metrics.jsonl").write_text("{}\n")
    return cfg


def test_the_same_config_enters_again(tmp_path):
    cfg = trained(tmp_path / "a" / "b", model=ModelConfig(vocab_size=0))
    rundir.write_config(replace(cfg, model=replace(cfg.model, vocab_size=300)))  # resolved
    assert rundir.enter(cfg) == tmp_path / "a" / "b"


def test_another_config_is_refused_with_the_differing_keys(tmp_path):
    cfg = trained(tmp_path / "run")
    other = replace(
        cfg, seed=1, optim=OptimConfig(learning_rate=0.5),
        model=ModelConfig(rope_scaling=RopeScaling(factor=2.0)),
    )  # fmt: skip
    with pytest.raises(ValueError) as error:
        rundir.enter(other)
    line = str(error.value)
    for part in ("seed: 0 -> 1", "optim.learning_rate: 0.001 -> 0.5", "model.rope_scaling.factor"):
        assert part in line
    assert "model.num_layers" not in line and "--run" in line


def test_a_run_of_an_older_version_goes_on_with_the_defaults_of_later_settings(tmp_path):
    cfg = trained(tmp_path / "run", optim=OptimConfig(decay_steps=7))
    file = tmp_path / "run" / "config.yaml"
    settings = yaml.safe_load(file.read_text())
    del settings["optim"]["moments"], settings["show_batch"]
    older = yaml.safe_dump(settings)
    file.write_text(older)
    rundir.enter(cfg)
    assert "moments: float32" in file.read_text()
    file.write_text(older)
    with pytest.raises(ValueError, match=r"optim\.moments: float32 -> bfloat16\)"):
        rundir.enter(replace(cfg, optim=replace(cfg.optim, moments="bfloat16")))
    with pytest.raises(ValueError, match=r"optim\.decay_steps: 7 -> None\)"):
        rundir.enter(replace(cfg, optim=OptimConfig()))


def test_what_changes_no_number_may_change(tmp_path):
    cfg = trained(tmp_path / "run")
    free = replace(
        cfg, log=LogConfig(every=1), sample=SampleConfig(every=7), mesh=MeshConfig(fsdp=2),
        checkpoint=CheckpointConfig(every=3),
    )  # fmt: skip
    rundir.enter(free)


def test_a_run_from_other_weights_takes_their_shape_and_enters_again(tmp_path):
    cfg = trained(tmp_path / "run", init="somewhere")
    rundir.write_config(replace(cfg, model=ModelConfig(num_layers=12, vocab_size=99)))
    rundir.enter(cfg)
    with pytest.raises(ValueError, match=r"model\.dropout"):
        rundir.enter(replace(cfg, model=ModelConfig(dropout=0.5)))
    with pytest.raises(ValueError, match="init: somewhere -> elsewhere"):
        rundir.enter(replace(cfg, init="elsewhere"))


def test_a_student_of_its_teachers_layers_enters_again(tmp_path):
    cfg = DistillConfig(run=str(tmp_path), teacher="somewhere", layers=2)
    rundir.enter(cfg)
    rundir.write_config(replace(cfg, model=replace(cfg.model, mlp="gated", num_layers=2)))
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    rundir.enter(cfg)
    with pytest.raises(ValueError, match="layers: 2 -> 1"):
        rundir.enter(replace(cfg, layers=1))


def test_a_mistake_before_training_may_be_mended(tmp_path):
    rundir.enter(PretrainConfig(run=str(tmp_path / "run"), seed=1))
    rundir.enter(PretrainConfig(run=str(tmp_path / "run"), seed=2))


def test_what_a_run_killed_at_its_first_file_left_is_no_obstacle(tmp_path):
    (tmp_path / f".config.yaml.0123{files.PARTIAL}").write_text("run: ha")
    assert rundir.enter(PretrainConfig(run=str(tmp_path))) == tmp_path


def test_foreign_files_are_not_written_over(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="no run of jaxgpt"):
        rundir.enter(PretrainConfig(run=str(tmp_path)))
    with pytest.raises(ValueError, match="is a file"):
        rundir.enter(PretrainConfig(run=str(tmp_path / "thesis.tex")))


def test_the_network_is_read_back(tmp_path):
    model = ModelConfig(
        vocab_size=9, position="rope", num_kv_heads=2, rope_scaling=RopeScaling(factor=3.0)
    )
    rundir.enter(PretrainConfig(run=str(tmp_path / "run"), model=model))
    assert rundir.is_run(tmp_path / "run") and not rundir.is_run(tmp_path)
    assert rundir.model_config(tmp_path / "run") == model


@pytest.mark.parametrize("averaged", [False, True])
def test_the_newest_weights_are_read_averaged_if_the_run_did(tmp_path, averaged):
    trained(tmp_path / "run", optim=OptimConfig(ema=0.9 if averaged else 0.0))
    saved = checkpoint.Checkpoints(tmp_path / "run" / "checkpoints")
    for step in (1, 2):
        network = lambda value: {"policy": {"head": {"kernel": np.full((2, 2), value)}}}
        state = {"params": network(step + 0.0), "ema": network(step + 0.5) if averaged else None}
        saved.save(step, state, {})
    saved.wait()
    params = rundir.read_params(tmp_path / "run")
    np.testing.assert_array_equal(params["head"]["kernel"], 2.5 if averaged else 2.0)


def test_a_run_without_a_checkpoint_says_so(tmp_path):
    trained(tmp_path / "run")
    with pytest.raises(ValueError, match="no intact checkpoint"):
        rundir.read_params(tmp_path / "run")


def test_processes_may_write_the_config_at_the_same_time(tmp_path):
    cfg = PretrainConfig(run=str(tmp_path))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(rundir.write_config, [cfg] * 200))  # raises what one of them raised
    assert [file.name for file in tmp_path.iterdir()] == ["config.yaml"]
