import io
import json
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import metrics
from jaxgpt.config import LogConfig, ModelConfig


class Clock:
    """Time that passes when told to."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def written(path, *records):
    log = metrics.MetricsLog(path)
    for step, values in records:
        log(step, values)


def test_lines_are_valid_json_whatever_the_values(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    values = {
        "nan": float("nan"), "inf": -np.inf, "jax": jnp.float32(0.1), "bf16": jnp.bfloat16(2),
        "count": 3, "text": "a\nb", "none": None,
    }  # fmt: skip
    written(path, (1, values), (2, {}))
    strict = lambda constant: pytest.fail(f"{constant} is not JSON")
    first, second = (
        json.loads(line, parse_constant=strict) for line in path.read_text().splitlines()
    )
    assert np.float32(first.pop("jax")) == np.float32(0.1)  # exactly
    assert first == {
        "step": 1, "nan": None, "inf": None, "bf16": 2.0, "count": 3, "text": "a\nb", "none": None
    }  # fmt: skip
    assert second == {"step": 2}
    assert metrics.read_jsonl(path)[1] == second


def test_resuming_drops_what_comes_after_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    written(path, *((step, {"train/loss": 1 / (step + 1)}) for step in range(6)))
    log = metrics.MetricsLog(path, resume_step=3)
    log(4, {"train/loss": 9.0})
    assert [line["step"] for line in metrics.read_jsonl(path)] == [0, 1, 2, 3, 4]
    assert metrics.read_jsonl(path)[-1]["train/loss"] == 9.0
    metrics.MetricsLog(path, resume_step=0)  # there was no checkpoint: step 0 is repeated too
    assert metrics.read_jsonl(path) == []


def test_a_half_line_at_the_end_is_ignored_and_then_overwritten(tmp_path):
    path = tmp_path / "metrics.jsonl"
    written(path, (1, {"a": 1}), (2, {"a": 2}))
    path.write_text(path.read_text() + '{"step": 3, "a"')
    assert [line["step"] for line in metrics.read_jsonl(path)] == [1, 2]
    metrics.MetricsLog(path, resume_step=5)(3, {"a": 3})
    assert [line["a"] for line in metrics.read_jsonl(path)] == [1, 2, 3]


def test_a_line_is_on_disk_as_soon_as_it_is_written(tmp_path):
    log = metrics.MetricsLog(tmp_path / "metrics.jsonl")
    log(1, {"a": 1})
    assert metrics.read_jsonl(tmp_path / "metrics.jsonl") == [{"step": 1, "a": 1}]


@pytest.mark.parametrize("line", ["rubbish", "[1]", '{"loss": 1}', '{"step": "one"}'])
def test_a_damaged_line_is_named(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
    with pytest.raises(ValueError, match=r"line 2: not a JSON object with a step: "):
        metrics.read_jsonl(tmp_path / "metrics.jsonl")
    assert metrics.read_jsonl(tmp_path / "absent.jsonl") == []


def test_samples_come_back_as_they_were_written(tmp_path):
    path = tmp_path / "samples.md"
    texts = ["one", "", "\n", "a\n```text\nb\n```\n````` c", "## step 9\r\nd\u2028é\t", "`" * 9]
    metrics.append_samples(path, 0, ["first"])
    metrics.append_samples(path, 5, texts)
    assert metrics.read_samples(path) == [(0, ["first"]), (5, texts)]
    assert metrics.read_samples(tmp_path / "absent.md") == []


def test_a_resumed_run_replaces_its_later_samples(tmp_path):
    path = tmp_path / "samples.md"
    for step, text in [(0, "a"), (5, "b"), (10, "c"), (5, "d")]:
        metrics.append_samples(path, step, [text])
    assert metrics.read_samples(path) == [(0, ["a"]), (5, ["d"])]


def test_throughput_leaves_out_compilation_and_pauses():
    clock = Clock()
    throughput = metrics.Throughput(flops_per_token=6.0, peak_flops=1200.0, clock=clock)
    clock.now += 50  # compilation
    throughput.lap(10)
    assert throughput.measures() == {}
    clock.now += 1
    with throughput.paused():
        clock.now += 30  # evaluation
    clock.now += 1
    throughput.lap(100)
    assert throughput.measures() == {"speed/tokens_per_second": 50.0, "speed/mfu": 0.25}


def test_a_lap_may_end_within_a_pause():
    clock = Clock()
    throughput = metrics.Throughput(clock=clock)
    throughput.lap(10)
    clock.now += 1
    with throughput.paused():
        clock.now += 3  # waiting for the lap's steps, before the evaluation
        throughput.lap(100)
        clock.now += 30
    clock.now += 6
    throughput.lap(100)
    assert throughput.measures() == {"speed/tokens_per_second": 20.0}


def test_throughput_forgets_laps_outside_the_window():
    clock = Clock()
    throughput = metrics.Throughput(laps=2, clock=clock)
    for seconds in (1, 1, 4, 6):
        clock.now += seconds
        throughput.lap(20)
    assert throughput.measures() == {"speed/tokens_per_second": 4.0}


def test_flops_per_token_of_gpt2_are_those_of_the_paper():
    # 6 * (12 layers * 12 * 768^2 + 768 * 50257) + 12 * 12 layers * 768 * 1024, by hand
    gpt2 = ModelConfig(vocab_size=50257, num_layers=12, model_dim=768, num_heads=12)
    assert metrics.flops_per_token(gpt2, 1024) == 6 * (84_934_656 + 38_597_376) + 113_246_208


def test_flops_count_grouped_heads_gates_and_only_active_experts():
    cfg = ModelConfig(
        vocab_size=10, num_layers=3, model_dim=8, num_heads=4, num_kv_heads=2, head_dim=6,
        mlp="gated", mlp_dim=16, num_experts=7, experts_per_token=2, adapter_dim=5,
    )  # fmt: skip
    attention = 8 * 24 + 8 * 12 + 8 * 12 + 24 * 8
    experts = 2 * (3 * 8 * 16) + 8 * 7
    adapters = 2 * (8 * 5 + 5 * 8)
    weights = 3 * (attention + experts + adapters) + 8 * 10
    assert metrics.flops_per_token(cfg, 9) == 6 * weights + 12 * 3 * 24 * 9


MEASURED = {
    "train/loss": jnp.float32(2.31449), "speed/tokens_per_second": 12345.0, "speed/mfu": 0.3121
}  # fmt: skip


def test_progress_without_a_terminal_is_one_plain_line_per_update():
    stream = io.StringIO()
    progress = metrics.Progress(200, stream=stream)
    progress(1, {"val/loss": 2.4})
    progress(100, MEASURED)
    progress.write("sample")
    progress.close()
    first, second, third = stream.getvalue().splitlines()
    assert first == "step   1/200  val 2.4"
    start = "step 100/200  loss 2.314  val 2.4  12.3k tokens/s  MFU 31.2%  left 0:0"
    assert second.startswith(start)
    assert third == "sample"


def test_time_left_is_a_clock_reading(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(metrics.time, "perf_counter", clock)
    stream = io.StringIO()
    progress = metrics.Progress(1001, stream=stream)
    progress(1, {})
    clock.now += 10
    progress(11, {})
    clock.now += 990
    progress(101, {})
    progress(1001, {})
    left = [line.partition("left ")[2] for line in stream.getvalue().splitlines()]
    assert left == ["", "16:30", "2:30:00", "0:00"]


def test_progress_on_a_terminal_is_a_bar():
    stream = Terminal()
    progress = metrics.Progress(200, start=50, stream=stream)
    progress(100, MEASURED)
    progress.write("sample")
    progress.close()
    assert "50/200" in stream.getvalue().partition("loss")[0]  # where a resumed run begins
    assert "50% |" in stream.getvalue() and "100/200" in stream.getvalue()
    assert "loss 2.314" in stream.getvalue() and "sample" in stream.getvalue()


def test_a_progress_update_without_values_says_only_where_it_is():
    stream = io.StringIO()
    metrics.Progress(9, stream=stream)(3, {"train/loss": None})
    assert stream.getvalue().split() == ["step", "3/9"]


def test_no_sink_is_opened_unasked(tmp_path):
    assert metrics.open_sinks(LogConfig(), tmp_path, {}) == []
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("cfg", "package"),
    [(LogConfig(tensorboard=True), "tensorboard"), (LogConfig(wandb="mine"), "wandb")],
)
def test_a_missing_package_is_named_with_its_installation(tmp_path, monkeypatch, cfg, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf'{package}: pip install "jaxgpt\[log\]"'):
        metrics.open_sinks(cfg, tmp_path, {})


def test_tensorboard_events_hold_the_metrics(tmp_path):
    pytest.importorskip("tensorboard", reason="the extra `log` is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (sink,) = metrics.open_sinks(LogConfig(tensorboard=True), tmp_path, {})
    sink(3, {"train/loss": jnp.float32(1.5), "note": "text", "nan": float("nan")})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["tensors"] == ["train/loss"]
    (event,) = events.Tensors("train/loss")
    assert (event.step, event.tensor_proto.float_val[0]) == (3, 1.5)


def test_wandb_without_a_key_is_one_line(tmp_path, monkeypatch):
    """Its own error is of a class of its own, and ended in a page of its frames."""

    def init(**_):
        raise RuntimeError("No API key configured.\nUse `wandb login` to log in.")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    with pytest.raises(ValueError) as caught:
        metrics.open_sinks(LogConfig(wandb="mine"), tmp_path, {})
    line = str(caught.value)
    assert line.startswith("log.wandb=mine: No API key configured. Use `wandb login` to log in;")
    assert "WANDB_MODE=offline" in line and "\n" not in line


def test_wandb_resumes_the_run_of_the_same_directory(tmp_path, monkeypatch):
    calls = []
    run = types.SimpleNamespace(log=lambda values, step: calls.append((step, values)))
    fake = types.SimpleNamespace(init=lambda **options: calls.append(options) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for directory in ("a", "a", "b"):
        (sink,) = metrics.open_sinks(LogConfig(wandb="mine"), tmp_path / directory, {"seed": 3})
    first, second, third = calls
    assert first == second and first["id"] != third["id"]
    assert first["project"] == "mine" and first["config"] == {"seed": 3}
    sink(7, {"train/loss": jnp.float32(0.5)})
    assert calls[-1] == (7, {"train/loss": 0.5})
