"""docs/new_stage.md, done: its code adds a stage that trains, resumes and can be planned."""

import importlib
import re
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml

from jaxgpt import config, metrics, run, sharding, stages
from jaxgpt.config import MeshConfig
from jaxgpt.model import gpt

PAGE = (Path(__file__).parents[2] / "docs" / "new_stage.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.slow
def test_the_stage_of_the_page_trains_as_the_page_says(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "STAGES", dict(stages.STAGES))
    monkeypatch.setattr(run, "STAGES", stages.STAGES)
    (tmp_path / "focal_of_the_page.py").write_text("\n\n".join(blocks("python")))
    monkeypatch.syspath_prepend(tmp_path)
    page = importlib.import_module("focal_of_the_page")
    monkeypatch.setitem(config.RUN_CONFIGS, "focal", page.FocalConfig)
    (example,) = blocks("yaml")
    (tmp_path / "focal.yaml").write_text(example)
    args = ["--config", str(tmp_path / "focal.yaml"), "--run", str(tmp_path / "run"),
            "--optim.warmup_steps", "1", "--mesh.data", "-1"]  # fmt: skip
    cfg = config.parse(page.FocalConfig, None, args)
    assert cfg.gamma == 1.0 and cfg.train.steps == yaml.safe_load(example)["train"]["steps"]

    run.launch("focal", cfg)
    lines = metrics.read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert {"val/loss", "val/hard"} <= lines[0].keys() and lines[-1]["step"] == cfg.train.steps
    assert "gamma" in (tmp_path / "run" / "report.html").read_text()

    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    planned, step = run.plan("focal", cfg, mesh)
    assert step.tokens == 8 * 64 and planned.model.vocab_size > 0

    network = gpt.init(planned.model, jax.random.key(1))
    rng = np.random.default_rng(0)
    tokens_BT = rng.integers(0, planned.model.vocab_size, (8, 64)).astype(np.int32)
    batch = {"tokens": tokens_BT, "targets": np.roll(tokens_BT, -1, 1),
             "mask": (rng.random((8, 64)) < 0.5).astype(np.float32)}  # fmt: skip
    page.test_gamma_zero_is_fine_tuning(planned, network, batch)
