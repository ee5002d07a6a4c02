import dataclasses
import json
import re
import xml.etree.ElementTree as ElementTree
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxgpt import config, machine, metrics, report
from jaxgpt.run import summary


class Page(HTMLParser):
    """Every tag, and the text inside of each kind of tag."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(path.read_text(encoding="utf-8"))
        for texts in self.texts.values():
            texts[:] = [text.strip() for text in texts]

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.texts.setdefault(tag, []).append("")

    def handle_data(self, data):
        if self.tags:
            self.texts[self.tags[-1]][-1] += data


def run_of(tmp_path: Path, *records: tuple[int, dict]) -> Path:
    run = tmp_path / "my-run"
    log = metrics.MetricsLog(run / "metrics.jsonl")
    for step, values in records:
        log(step, values)
    return run


def test_a_whole_run_becomes_a_page(tmp_path):
    train = lambda s: {"train/loss": 5 - s / 50, "train/tokens": 64 * s, "router/load": s % 3}
    run = run_of(
        tmp_path, (0, {"val/loss": 5.1}), *((s, train(s)) for s in range(1, 101)),
        (50, {"val/loss": 3.25}), (100, {"val/loss": 3.5}),
    )  # fmt: skip
    metrics.append_samples(run / "samples.md", 50, ["early"])
    metrics.append_samples(run / "samples.md", 100, ["late <b>&amp;"])
    cfg = config.PretrainConfig(run=str(run), model=config.ModelConfig(num_layers=7))
    (run / "config.yaml").write_text(config.to_yaml(cfg))
    (run / "environment.json").write_text(json.dumps(machine.environment()))

    path = report.write_report(run)
    page = Page(path)
    assert path == run / "report.html" and page.texts["h1"] == ["my-run"]
    assert page.texts["dd"][:3] == ["5.100 → 3.500", "3.250", "4.980 → 3.000"]
    assert page.texts["pre"][:2] == ["late <b>&amp;", "early"]
    assert page.tags.count("svg") == 3
    names = {file.name for file in (run / "plots").iterdir()}
    assert names == {"loss.png", "loss-by-tokens.png", "router-load.png"}
    assert "jaxlib" in page.texts["td"]


def test_the_page_needs_nothing_from_elsewhere(tmp_path):
    page = Page(report.write_report(run_of(tmp_path, (1, {"train/loss": 2.0}))))
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    links = [value for name, value in page.attributes if name in ("src", "href", "xlink:href")]
    assert all(value is not None and value.startswith("#") for value in links)
    styles = " ".join(page.texts["style"])
    assert "url(http" not in styles and "@import" not in styles


def test_plots_take_the_colour_of_the_page(tmp_path):
    text = report.write_report(run_of(tmp_path, (1, {"train/loss": 2.0}))).read_text()
    assert "currentColor" in text and report._INK not in text
    assert "prefers-color-scheme: dark" in text


def stated(run, stage):
    """The lineage of a run that has neither parents nor files."""
    found = {"stage": stage, "command": "python", "parents": [], "data": [], "sessions": []}
    (run / "lineage.json").write_text(json.dumps(found))


def test_changed_settings_are_marked_against_their_own_commands_defaults(tmp_path):
    run = run_of(tmp_path)
    cfg = config.PretrainConfig(
        run=str(run),
        data=config.DataConfig(mixture={"a<b": 0.5}),
        optim=config.OptimConfig(learning_rate=3e-4),
    )
    (run / "config.yaml").write_text(config.to_yaml(cfg))
    stated(run, "pretrain")
    page = Page(report.write_report(run))
    rows = np.reshape(page.texts["td"][-6:], (-1, 3))  # after those of where the run comes from
    assert ["optim.learning_rate", "0.0003", "0.001"] in rows.tolist()
    marked = re.findall(r"<mark>(.*?)</mark>", (run / "report.html").read_text())
    assert [unescape(line) for line in marked] == [f"{name}: {value}" for name, value, _ in rows]
    assert marked == ["optim.learning_rate: 0.0003", "data.mixture.a&lt;b: 0.5"]
    assert "model.num_layers: 4" in page.texts["pre"][-1]


@pytest.mark.parametrize("stage", config.RUN_CONFIGS)
def test_the_defaults_are_those_of_the_command_that_ran(tmp_path, stage):
    """They were guessed from the names of the settings: sft's were pretraining's."""
    run = run_of(tmp_path)
    cfg = config.RUN_CONFIGS[stage](run=str(run))
    changed = dataclasses.replace(cfg, optim=dataclasses.replace(cfg.optim, warmup_steps=7))
    (run / "config.yaml").write_text(config.to_yaml(changed))
    stated(run, stage)
    page = Page(report.write_report(run))
    rows = np.reshape(page.texts["td"][-3:], (-1, 3)).tolist()
    assert rows == [["optim.warmup_steps", "7", str(cfg.optim.warmup_steps)]]


def test_a_reward_that_asks_for_more_than_right_answers_is_no_exact_match(tmp_path):
    page = lambda name: report.write_report(
        run_of(tmp_path / name, (0, {f"val/{name}": 0.25}), (4, {f"val/{name}": 0.5}))
    ).read_text()
    assert "<dt>exact match</dt><dd>25.0% → 50.0%" in page("exact_match")
    shaped = page("full_reward")
    assert "<dt>full reward</dt><dd>25.0% → 50.0%" in shaped and "xact match" not in shaped


# KL and learnt reward of the rollouts of benchmarks/learning.py ppo-reward-model with seed 7919,
# whose answers ended short and wrong at kl 0.05.
DECEIVED = (0.0, -0.23), (0.28, 1.75), (0.81, 3.09), (1.34, 3.29), (5.28, 3.22), (9.87, 3.23)
HELD = (0.0, -0.23), (0.28, 1.75), (0.79, 3.09), (0.99, 3.25), (0.87, 3.28), (1.05, 3.14)  # 0.3
RISING = (0.0, 0.1), (2.0, 0.6), (5.0, 1.1), (9.0, 1.6)  # what it leaves for, it still gets


DIVERGED = (0.0, 1.0), (float("nan"), 2.0), (9.0, float("nan"))  # the page is still written


@pytest.mark.parametrize("rollouts", [DECEIVED, HELD, RISING, DIVERGED, ()])
def test_a_policy_that_leaves_its_reference_for_no_more_reward_is_named(tmp_path, rollouts):
    lines = [
        (step, {"rollout/kl": kl, "rollout/learnt_reward": reward})
        for step, (kl, reward) in enumerate(rollouts, 1)
    ]
    run = run_of(tmp_path, (0, {"val/loss": 1.0}), *lines)
    page = report.write_report(run)
    said = "from step 4 to 6 the KL of an answer grew from 1.3 to 9.9 nats and the learnt reward"
    for text in (page.read_text(), summary(run, page)):
        assert (said in text) == (rollouts is DECEIVED)


def test_loss_over_tokens_places_evaluations_between_the_logged_steps():
    steps = np.array([10.0, 20.0])
    series = {
        "train/loss": (steps, np.array([3.0, 2.0])),
        "train/tokens": (steps, np.array([640.0, 1280.0])),
        "val/loss": (np.array([15.0]), np.array([2.5])),
    }
    plot = report._plots(series)["loss by tokens"]
    assert [x.tolist() for x, _ in plot.values()] == [[640, 1280], [960]]


def test_smoothing_keeps_a_straight_line_and_both_ends():
    line = np.linspace(3.0, -1.0, 101)
    np.testing.assert_allclose(report._smooth(line, reach=4), line, atol=1e-12)
    noise = np.random.default_rng(0).standard_normal(50)
    smooth = report._smooth(noise, reach=3)
    assert smooth[0] == pytest.approx(noise[0]) and smooth[-1] == pytest.approx(noise[-1])
    assert smooth[20] == pytest.approx(noise[17:24].mean())


ODD = {
    "constant": [(s, 3.0) for s in range(5)],
    "zero": [(s, 0.0) for s in range(60)],
    "single": [(7, 1.5)],
    "null": [(s, float("nan")) for s in range(3)],
    "gaps": [(s, float("nan") if s % 2 else s) for s in range(9)],
    "huge": [(1, 1e299), (2, -1e299), (3, 1e308)],
    "tiny": [(1, 1e-310), (2, 5.0)],
    "close": [(s, 1 + s * 1e-16) for s in range(9)],
    "text": [(1, "words")],
    "bool": [(1, True), (2, False)],
    "decades": [(s, 10.0**s) for s in range(9)],
    "negative": [(1, -4), (2, -8.0)],
    "many": [(s, s % 7) for s in range(5000)],
}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("name", ["train/loss", "a/very/d€ep <name>/../x"])
def test_an_odd_metric_does_not_cost_the_page(tmp_path, kind, name):
    run = run_of(tmp_path, *((step, {name: value}) for step, value in ODD[kind]))
    text = report.write_report(run).read_text()
    drawn = kind not in ("null", "text")
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(svg)
    files = list((run / "plots").glob("*.png"))
    assert len(files) == text.count("<svg") == drawn
    for file in files:
        assert file.parent == run / "plots"
        assert np.asarray(Image.open(file).convert("L")).std() > 1  # something is drawn


def test_an_empty_or_damaged_run_still_has_a_page(tmp_path):
    run = tmp_path / "empty"
    run.mkdir()
    assert "<h1>empty</h1>" in report.write_report(run).read_text()
    (run / "metrics.jsonl").write_text("rubbish\n")
    (run / "environment.json").write_text("{")
    (run / "config.yaml").write_text("")
    (run / "samples.md").write_bytes(b"\xff## step\n")
    assert "line 1: not a JSON object" in report.write_report(run).read_text()


def test_a_reward_model_shows_its_calibration(tmp_path):
    sure = lambda right, share: {"expected": 0.55, "right": right, "share": share}
    bins = {"0.55": sure(0.65, 0.25), "0.95": {"expected": 0.95, "right": 0.93, "share": 0.75}}
    named = lambda bins: {
        f"val/calibration/{name}/{measure}": value
        for name, measures in bins.items()
        for measure, value in measures.items()
    }
    early = named({"0.75": sure(0.1, 1.0)})
    run = run_of(tmp_path, (0, {"val/loss": 0.7} | early), (9, {"val/loss": 0.5} | named(bins)))
    page = Page(report.write_report(run))
    assert page.texts["h2"] == ["Curves", "Calibration of the reward"]
    # 0.25 * |0.65 - 0.55| + 0.75 * |0.93 - 0.95|
    assert page.texts["figcaption"][-1] == "Expected calibration error 0.040"
    assert sorted(path.name for path in (run / "plots").iterdir()) == [
        "loss.png",
        "reliability.png",
    ]
