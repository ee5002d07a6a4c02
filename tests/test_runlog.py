"""What a running loop tells the world."""

import jax.numpy as jnp
import pytest

from jaxgpt import metrics
from jaxgpt.config import LogConfig, ModelConfig, RunConfig, TrainConfig
from jaxgpt.runlog import Diverged, RunLog


def run_of(path, every: int = 3) -> RunConfig:
    return RunConfig(
        run=str(path), model=ModelConfig(vocab_size=10), train=TrainConfig(steps=10, max_loss=50.0),
        log=LogConfig(every=every),
    )  # fmt: skip


def measures(loss: float, norm: float = 1.0) -> dict:
    return {
        "loss": jnp.float32(loss),
        "grad_norm": jnp.float32(norm),
        "router/load_max": jnp.ones(()),
    }


def lines(path) -> list[dict]:
    return metrics.read_jsonl(path / "metrics.jsonl")


def test_lines_are_due_every_so_often_and_at_the_end(tmp_path):
    with RunLog(run_of(tmp_path), 0) as log:
        for done in range(1, 11):
            log.step(done, measures(done), tokens=40)
    assert [(line["step"], line["train/loss"]) for line in lines(tmp_path)] == [
        (3, 3), (6, 6), (9, 9), (10, 10)
    ]  # fmt: skip
    assert lines(tmp_path)[1]["train/tokens"] == 240
    assert lines(tmp_path)[1]["router/load_max"] == 1


def test_resuming_drops_what_will_be_written_again(tmp_path):
    with RunLog(run_of(tmp_path, 1), 0) as log:
        log.held_out(0, {"loss": 4.0})
        for done in range(1, 6):
            log.step(done, measures(done), tokens=1)
    with RunLog(run_of(tmp_path, 1), 3) as log:
        log.step(4, measures(44), tokens=1)
    assert [line["step"] for line in lines(tmp_path)] == [0, 1, 2, 3, 4]
    assert lines(tmp_path)[-1]["train/loss"] == 44
    with RunLog(run_of(tmp_path, 1), 0) as log:  # killed before its first checkpoint
        log.held_out(0, {"loss": 4.5})
    assert lines(tmp_path) == [{"step": 0, "val/loss": 4.5}]


@pytest.mark.parametrize(
    ("loss", "norm", "said"),
    [
        (float("nan"), 1.0, "step 2: the loss is nan"),
        (51.0, 1.0, "step 2: the loss is 51"),
        (1.0, float("inf"), "step 2: the gradient's norm is inf"),
    ],
)
def test_divergence_is_seen_before_anything_is_saved(tmp_path, loss, norm, said):
    with RunLog(run_of(tmp_path), 0) as log, pytest.raises(Diverged, match=said):
        log.step(1, measures(1.0), tokens=1)
        log.step(2, measures(loss, norm), tokens=1)
        log.flush()


def test_the_held_out_loss_belongs_to_its_step(tmp_path):
    with RunLog(run_of(tmp_path), 0) as log:
        log.held_out(4, {"loss": 2.0, "accuracy": 0.5})
        assert log.held_out_loss(4) == 2.0 and log.held_out_loss(5) is None
    assert lines(tmp_path) == [{"step": 4, "val/loss": 2.0, "val/accuracy": 0.5}]


def test_progress_shows_the_first_step_at_once(tmp_path, capsys):
    with RunLog(run_of(tmp_path, 5), 0) as log:
        log.step(1, measures(3.25), tokens=1)
        assert "3.25" in capsys.readouterr().err
        log.write("a line")
    assert "a line" in capsys.readouterr().err


def test_the_environment_is_recorded(tmp_path):
    with RunLog(run_of(tmp_path), 0):
        pass
    recorded = (tmp_path / "environment.json").read_text()
    assert all(f'"{name}"' in recorded for name in ("jax", "xla_flags", "visible_cores", "command"))
