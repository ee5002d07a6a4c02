"""A model with tools: its calls are answered in the conversation, until it answers itself."""

import json
import sys
from pathlib import Path

import jax
import pytest

from jaxgpt import config, episodes
from jaxgpt.config import EvaluateConfig, ModelConfig
from jaxgpt.convert.load import Loaded, own_files
from jaxgpt.data import tokenizer as tokenizers
from jaxgpt.evals import evaluate
from jaxgpt.language_model import LanguageModel
from jaxgpt.model import gpt
from jaxgpt.sampling.sample import Completion
from jaxgpt.tasks.environment import MAX_CALLS

ROOT = Path(__file__).parents[1]
ASKED = [{"role": "user", "content": "What is 47 * 38?"}]


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    cfg = ModelConfig(vocab_size=260, context_length=256, num_layers=1, model_dim=8, num_heads=2)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizers.load("byte").save(path)
    files = own_files({"tokenizer.json": path.read_bytes()})
    template = json.loads(files["tokenizer_config.json"])["chat_template"]
    tokenizer = tokenizers.load(path)
    stops = (tokenizer.eos_id, tokenizer.special["<|im_end|>"])
    params = gpt.init(cfg, jax.random.key(1))
    return LanguageModel(Loaded(cfg, params, tokenizer, template, (), stops, files), "tiny")


class Script:
    """In the place of `generate`: writes what the test says, and remembers what it read."""

    def __init__(self, tokenizer, *turns: str) -> None:
        self.tokenizer, self.turns, self.read, self.rows = tokenizer, list(turns), [], []

    def __call__(self, cfg, params, prompts, settings, *, rows, **options) -> list[Completion]:
        self.read += [self.tokenizer.decode(prompt) for prompt in prompts]
        self.rows.append(list(rows))
        text = self.turns.pop(0) if len(self.turns) > 1 else self.turns[0]
        tokens = self.tokenizer.encode(text)
        end = (self.tokenizer.special["<|im_end|>"], -0.1)
        return [Completion(tokens, [-0.1] * len(tokens), True, end) for _ in prompts]


def script(monkeypatch: pytest.MonkeyPatch, lm: LanguageModel, *turns: str) -> Script:
    made = Script(lm.tokenizer, *turns)
    monkeypatch.setattr(episodes, "generate", made)
    return made


def test_the_result_of_a_call_is_read_before_the_answer(lm, monkeypatch) -> None:
    written = script(monkeypatch, lm, "calculator(47 * 38)", "It is 1786.")
    assert lm.chat(ASKED, tools=["calculator"]) == "It is 1786."
    told = [*ASKED, {"role": "assistant", "content": "calculator(47 * 38)"}]
    told.append({"role": "tool", "content": "1786"})
    assert written.read == [lm.render(ASKED), lm.render(told)]


def test_what_was_said_on_the_way(lm, monkeypatch) -> None:
    script(monkeypatch, lm, "calculator(1/0)", "none STOP x")
    said = lm.play_chat(ASKED, ["calculator"], stop=" STOP")
    assert [(m["role"], m["content"]) for m in said] == [
        ("assistant", "calculator(1/0)"),
        ("tool", "error: division by zero"),
        ("assistant", "none"),
    ]  # fmt: skip


def test_endless_calls_end(lm, monkeypatch) -> None:
    written = script(monkeypatch, lm, "calculator(1)")
    assert lm.chat(ASKED[:1], tools=["calculator"]) == "calculator(1)"
    assert len(written.read) <= MAX_CALLS + 1


def test_without_tools_a_call_is_text(lm, monkeypatch) -> None:
    assert lm.chat(ASKED, max_new_tokens=4) == lm.chat(ASKED, tools=(), max_new_tokens=4)


def test_an_unknown_tool_is_refused(lm) -> None:
    with pytest.raises(ValueError, match="tools=shell: must be one of calculator"):
        lm.chat(ASKED, tools=["shell"])


def test_a_model_that_cannot_chat_is_refused(lm) -> None:
    parts = Loaded(lm.config, lm.params, lm.tokenizer, None, (), lm.stop_ids, lm.loaded.files)
    with pytest.raises(ValueError, match="no chat template"):
        LanguageModel(parts, "mute").chat(ASKED, tools=["calculator"])


def test_evaluation_with_tools(lm, monkeypatch) -> None:
    from jaxgpt.data import synthetic

    problem = next(synthetic.PROBLEMS["products"](True))
    cfg = EvaluateConfig(
        checkpoint="tiny", task="arithmetic", data="products", limit=2, chat=True,
        tools=["calculator"], max_new_tokens=40, samples=2, temperature=1.0,
    )  # fmt: skip
    written = script(monkeypatch, lm, f"calculator({problem})", str(problem.answer))
    found = evaluate(lm, cfg)
    assert found["flexible_match"] == 0.5  # the script gives the first problem's answer to both
    assert found["count"] == 2 and found["maj@2"] == 0.5
    assert sorted(written.rows[0]) == [0, 1, 2, 3]  # a number of its own for every sample


def run(monkeypatch, capsys, *args) -> tuple[int, str]:
    monkeypatch.syspath_prepend(str(ROOT))
    from scripts import sample

    monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, args)])
    monkeypatch.setattr("jaxgpt.machine.use_compilation_cache", lambda: None)
    try:
        config.exit_cleanly(sample.main)
    except SystemExit as exit:
        return int(str(exit.code)), capsys.readouterr().err
    return 0, capsys.readouterr().out


def test_the_command_shows_calls_and_results(lm, monkeypatch, capsys, tmp_path) -> None:
    lm.save(tmp_path / "run", "jaxgpt")
    script(monkeypatch, lm, "calculator(47 * 38)", "It is 1786.")
    given = ("--checkpoint", tmp_path / "run", "--prompt", "What is 47 * 38?", "--chat")
    code, printed = run(monkeypatch, capsys, *given, "--tools", "calculator")
    assert (code, printed) == (0, "calculator(47 * 38)\n→ 1786\nIt is 1786.\n")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--tools", "calculator"), "tools=calculator: are for --chat"),
        (("--system", "Be short."), "system=Be short.: is for --chat"),
        (("--tools", "shell", "--chat"), "tools=shell: must be one of calculator"),
    ],
)
def test_a_mistake_is_one_line(args, message, monkeypatch, capsys) -> None:
    code, printed = run(monkeypatch, capsys, "--checkpoint", "/nowhere", "--prompt", "x", *args)
    assert code == 2 and message in printed and printed.count("\n") == 1
