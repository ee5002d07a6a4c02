"""Training from Python, with rewards, tools, environments, optimizers, losses of one's own."""

import json
import threading

import jax.numpy as jnp
import optax
import pytest
import yaml

import jaxgpt
from jaxgpt import config, scoring
from jaxgpt.config import own
from jaxgpt.tasks import Task, tools
from jaxgpt.tasks.environment import Turn

ROWS = [{"prompt": f"{n}?", "completion": f"{n}."} for n in range(60)]
TINY = {
    "data": ROWS,
    "model": {"context_length": 64, "num_layers": 1, "model_dim": 16, "num_heads": 2},
    "train": {"steps": 2, "batch_size": 16},
    "eval": {"every": 0, "batches": 1},
    "sample": {"every": 0, "prompts": []},
    "log": {"every": 1},
    "optim": {"warmup_steps": 0},
}
# A random network draws the one token that ends a turn about once in 260.
PRACTICE = {
    "train": {"steps": 2, "batch_size": 16},
    "rollout": {"updates": 2, "samples": 4, "max_new_tokens": 24},
    "checkpoint": {"every": 2},
    "eval": {"every": 0, "batches": 1},
    "log": {"every": 1},
}
CELL = """
def reward(problem, answer):
    seen.append((problem, answer))
    return float(len(answer) % 3)
"""
FILE = '''
from jaxgpt import tasks

def lookup(city):
    """The weather in a city."""
    return {"city": city, "degrees": len(city)}

def task():
    return tasks.Task(lambda held_out: range(5), ask, worth, ("calculator",))

def ask(n):
    return tasks.asks(f"{n}?")

def worth(problem, answer):
    return len(answer) % 2

number = 7
'''


@pytest.fixture(scope="module", autouse=True)
def rows_of_tests(tmp_path_factory):
    """Rows are written into a folder of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxgpt.launching.ROWS", tmp_path_factory.mktemp("rows"))
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny network of two steps."""
    return jaxgpt.launch("sft", run=tmp_path_factory.mktemp("base") / "run", **TINY)


def recorded(run) -> dict:
    return yaml.safe_load((run.path / "config.yaml").read_text())


def test_a_run_is_given_back_with_its_measures(base):
    assert not base.running and base.wait() is base
    assert list(base.series("train/loss")) == [1, 2] and list(base.series("val/loss")) == [0, 2]
    assert "step=2" in repr(base) and base._repr_html_().startswith("<iframe")
    assert isinstance(base.load().generate("a", max_new_tokens=2), list)


def test_the_settings_are_those_of_the_command_line(tmp_path):
    from jaxgpt.launching import parsed

    kind = config.SftConfig
    typed = ["--train.steps=3", '--data.columns={"prompt": "q"}', '--sample.prompts=["a"]']
    given = {"train": {"steps": 3}, "data": {"columns": {"prompt": "q"}}, "sample.prompts": ["a"]}
    assert parsed("sft", given) == config.parse(kind, "", typed)
    assert parsed("pretrain", {}).optim.name == "muon"  # the recipe
    assert parsed("sft", {"config": "sft/arithmetic", "seed": 4}) == config.parse(
        kind, "", ["--config", "sft/arithmetic", "--seed=4"]
    )


@pytest.mark.parametrize(
    ("stage", "settings", "said"),
    [
        ("stf", {}, "stage=stf: must be one of .*did you mean 'sft'"),
        ("sft", {"train": {"step": 3}}, "train.step: unknown setting; did you mean"),
        ("sft", {"train.steps": "many"}, "train.steps=many: must be int"),
        ("sft", {"reward": len}, "data.reward: unknown setting"),
        ("grpo", {"reward": "nowhere.py:f"}, "data.reward=nowhere.py:f: there is no file"),
        ("grpo", {"reward": "python:f@1"}, "was given in Python"),
        ("grpo", {"tools": ["shell"]}, "tools=shell: must be one of calculator, or FILE.py:NAME"),
        ("grpo", {"environment": len, "reward": len}, "an environment gives its own rewards"),
        ("sft", {"optimizer": optax.adam(1e-3), "data": "arithmetic"}, "not a function"),
        ("pretrain", {"data": []}, "data=.*holds no rows"),
    ],
)  # fmt: skip
def test_refusals_are_one_line(base, tmp_path, stage, settings, said):
    init = {} if stage == "pretrain" else {"init": base.path}
    with pytest.raises(ValueError, match=said) as error:
        jaxgpt.launch(stage, run=tmp_path / "run", **{**init, **settings})
    assert "\n" not in str(error.value)


def test_a_reward_of_a_notebooks_cell(base, tmp_path, monkeypatch, capsys):
    seen: list = []
    cell: dict = {"__name__": "__main__", "seen": seen}
    exec(CELL, cell)  # no file defines it
    given = {"init": base.path, "run": tmp_path / "run", **PRACTICE}
    run = jaxgpt.launch("grpo", reward=cell["reward"], **given)
    assert recorded(run)["data"]["reward"] == "python:reward"
    assert {len(answer) % 3 for _, answer in seen} and seen[0][0] is not None
    (first, *_) = run.series("rollout/reward").values()
    drawn = [float(len(answer) % 3) for _, answer in seen]
    assert any(  # the evaluation before the first step is judged, too
        first == pytest.approx(sum(drawn[n : n + 32]) / 32) for n in range(len(drawn) - 31)
    )
    monkeypatch.setattr("sys.argv", ["grpo.py", "--config", str(run.path / "config.yaml")])
    with pytest.raises(ValueError, match=r"data\.reward=python:reward: was given in Python"):
        config_of = config.parse(config.GrpoConfig, "")
        own.find("data.reward", config_of.data.reward)


def test_an_environment_answers_turn_by_turn(base, tmp_path):
    class Guess:
        asked, turns = 0, 0

        def __init__(self, problem):
            type(self).asked += 1

        def reset(self):
            return [{"role": "user", "content": "Guess."}]

        def step(self, text):
            type(self).turns += 1
            return Turn(None, float(len(text) % 2), True)

    task = Task(lambda held_out: [1, 2, 3], lambda n: [], lambda n, text: 0.0)
    run = jaxgpt.launch(
        "grpo", task=task, environment=Guess, init=base.path, run=tmp_path / "run", **PRACTICE
    )
    assert Guess.asked == Guess.turns >= 32 and run.series("rollout/reward")
    assert recorded(run)["data"]["environment"].startswith("python:")


def test_an_optimizer_of_ones_own(base, tmp_path, command):
    """One that never moves leaves the measure as it was; one of a package has a name for it."""
    given = {"init": base.path, **{k: v for k, v in TINY.items() if k != "model"}}
    still = jaxgpt.launch("sft", optimizer=lambda rate: optax.sgd(0.0), run=tmp_path / "a", **given)
    before, after = still.series("val/loss").values()
    assert before == after
    moved = jaxgpt.launch("sft", optimizer=optax.lion, run=tmp_path / "b", **given)
    before, after = moved.series("val/loss").values()
    assert before != after
    name = recorded(moved)["optim"]["custom"]
    assert name.endswith(":lion") and not name.startswith("python:")
    code, _, err = command("sft.py", "--config", str(moved.path / "config.yaml"))
    assert code == 0, err  # the command line finds the run complete, by the same config


def test_a_loss_of_ones_own(base, tmp_path):
    def double(cfg, params, batch, rng_B):
        total, weight, metrics = scoring.next_token(cfg)(params, batch, rng_B)
        return 2 * total, weight, metrics | {"doubled": (2 * total, weight)}

    given = {"init": base.path, **{k: v for k, v in TINY.items() if k != "model"}}
    one = jaxgpt.launch("sft", run=tmp_path / "one", **given)
    two = jaxgpt.launch("sft", loss=double, run=tmp_path / "two", **given)
    assert two.series("train/loss")[1] == pytest.approx(2 * one.series("train/loss")[1], rel=1e-5)
    assert two.series("train/doubled")[1] == two.series("train/loss")[1]
    assert two.series("val/loss")[0] == one.series("val/loss")[0]


@pytest.mark.slow
def test_a_callback_that_says_false_ends_the_run_saved(tmp_path):
    settings = {**TINY, "train": {"steps": 6, "batch_size": 16}, "run": tmp_path / "run"}
    stopped = jaxgpt.launch("sft", callbacks=lambda step, measures: step < 3, **settings)
    last = max(stopped.series("train/loss"))
    assert 3 <= last < 6 and (stopped.path / "checkpoints" / str(last)).is_dir()
    whole = jaxgpt.launch("sft", **settings)
    straight = jaxgpt.launch("sft", **{**settings, "run": tmp_path / "straight"})
    assert whole.series("train/loss") == straight.series("train/loss")


def test_a_run_in_a_thread_can_be_asked_to_stop(tmp_path):
    begun = threading.Event()
    settings = {**TINY, "train": {"steps": 10**6, "batch_size": 16}, "run": tmp_path / "run"}
    run = jaxgpt.launch(
        "sft",
        background=True,
        callbacks=[lambda step, _: begun.set() if step > 1 else None],
        **settings,
    )
    assert begun.wait(120) and run.running
    with pytest.raises(ValueError, match="trains here"):  # one run, one writer
        jaxgpt.launch("sft", **settings)
    run.stop()
    assert not run.wait().running
    last = max(run.series("train/loss"))
    assert (run.path / "checkpoints" / str(last)).is_dir()
    failed = jaxgpt.launch("sft", background=True, **{**settings, "seed": 9})
    with pytest.raises(ValueError, match="seed: 0 -> 9"):
        failed.wait()


def test_rows_are_data(tmp_path):
    run = jaxgpt.launch("sft", run=tmp_path / "run", **TINY)
    path = recorded(run)["data"]["path"]
    with open(path) as file:
        assert [json.loads(line) for line in file] == ROWS


# ---- by name


@pytest.fixture
def mine(tmp_path):
    (tmp_path / "my.py").write_text(FILE)
    return tmp_path / "my.py"


def test_the_command_line_names_functions(base, mine, command):
    args = [
        f"--{key}.{name}={value}" for key, part in PRACTICE.items() for name, value in part.items()
    ]
    code, _, err = command(
        "grpo.py", "--init", str(base.path), "--run", "run", *args,
        "--data.task", "my.py:task", "--data.tools", "[my.py:lookup]",
    )  # fmt: skip
    assert code == 0, err
    run = mine.parent / "run"
    found = yaml.safe_load((run / "config.yaml").read_text())["data"]
    assert (found["task"], found["tools"]) == ("my.py:task", ["my.py:lookup"])
    sources = json.loads((run / "lineage.json").read_text())["data"]
    assert {entry["setting"] for entry in sources} == {"data.task", "data.tools"}
    assert all(len(entry["sha256"]) == 64 for entry in sources)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("my.py:tusk", "has no tusk; did you mean 'task'"),
        ("absent.py:task", "there is no file absent.py"),
        ("broken.py:task", "broken.py cannot be imported, ZeroDivisionError"),
        ("my.py", "must be FILE.py:NAME"),
        ("no.such.module:task", "cannot be imported"),
    ],
)
def test_a_wrong_name_of_a_function_is_one_line(mine, monkeypatch, name, said):
    monkeypatch.chdir(mine.parent)
    (mine.parent / "broken.py").write_text("1 / 0\n")
    with pytest.raises(ValueError, match=said) as error:
        own.find("data.task", name)
    assert "\n" not in str(error.value)


def test_what_is_no_function_is_refused(mine):
    with pytest.raises(ValueError, match="number: is int, not a function"):
        own.function("tools", f"{mine}:number")


@pytest.mark.parametrize(
    ("turn", "given"),
    [
        ('I look. lookup({"city": "Oslo"})', {"city": "Oslo", "degrees": 4}),
        ("lookup(Rome!)", {"city": "Rome!", "degrees": 5}),
        (
            '<think>Oslo?</think>\n<tool_call>\n{"name": "lookup", "arguments": {"city": "Ulm"}}\n'
            "</tool_call>",
            {"city": "Ulm", "degrees": 3},
        ),
        ("It is calculator(2*3)", 6),
        ('<tool_call>{"name": "calculator", "arguments": {"expression": "2*3"}}</tool_call>', 6),
        ('<tool_call>{"name": "other", "arguments": {}}</tool_call>', None),
        ("look_lookup(a)", None),
        ("It is 7.", None),
    ],
)
def test_calls_are_understood_as_models_write_them(mine, turn, given):
    names = tools.check([f"{mine}:lookup", "calculator"])
    found = tools.observe(turn, names)
    assert (None if found is None else json.loads(found)) == given


def test_a_models_mistake_is_told_to_the_model(mine):
    names = tools.check([own.Own(jnp.sqrt), f"{mine}:lookup"])
    assert "unexpected keyword" in (tools.observe('lookup({"town": "Oslo"})', names) or "")
    assert own.called(names[0]) == "sqrt" and own.called(names[1]) == "lookup"


@pytest.mark.parametrize(
    ("typed", "tools"),
    [
        (["--data.tools", "calculator"], ["calculator"]),
        (["--data.tools=my.py:lookup"], ["my.py:lookup"]),
        (["--data.tools", "my.py:lookup", "calculator"], ["my.py:lookup", "calculator"]),
        (["--data.tools", "[calculator]"], ["calculator"]),
    ],
)
def test_one_tool_is_typed_as_several_are(typed, tools):
    assert config.parse(config.GrpoConfig, "", ["--init=x", *typed]).data.tools == tools


def test_a_name_without_a_file_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"optim\.custom=plain: must be FILE\.py:NAME"):
        jaxgpt.launch("sft", run=tmp_path / "run", **{"optim.custom": "plain"})
    assert not (tmp_path / "run").exists()
