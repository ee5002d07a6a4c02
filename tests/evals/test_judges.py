"""A reward model as a judge: of pairs, and of samples."""

import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest
from byte_model import LLAMA, byte_model

from jaxgpt import evals
from jaxgpt.checkpoint import Checkpoints
from jaxgpt.config import EvaluateConfig
from jaxgpt.data import synthetic
from jaxgpt.evals import exact_match, judges
from jaxgpt.judge import Judge
from jaxgpt.language_model import LanguageModel, load
from jaxgpt.model import gpt


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random body and head, as scripts/reward.py leaves them."""
    folder = tmp_path_factory.mktemp("reward")
    lm = byte_model(folder)
    lm.save(folder / "run", "jaxgpt")
    hidden_BTD = np.zeros((1, 1, LLAMA.model_dim), np.float32)
    head = gpt.ScalarHead(LLAMA).init(jax.random.key(2), hidden_BTD)["params"]
    checkpoints = Checkpoints(folder / "run" / "checkpoints")
    checkpoints.save(1, {"params": {"policy": lm.params, "reward": head}}, meta={})
    checkpoints.wait()
    return folder / "run"


@pytest.fixture(scope="module")
def lm(run: Path) -> LanguageModel:
    return load(run)


def reward(run: Path, prompt: str, answer: str) -> float:
    """The head's product with the hidden state behind the end of turn, one row without padding."""
    judge = Judge(str(run), "checkpoint")
    text = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>"
    tokens = load(run).tokenizer.encode(text, allow_special=True)[-LLAMA.context_length :]
    padded = np.array([tokens + [0] * (LLAMA.context_length - len(tokens))])
    hidden_BTD = np.asarray(gpt.apply(LLAMA, judge.body, padded).hidden_BTD)
    kernel = np.asarray(judge.head["score"]["kernel"])
    return float(hidden_BTD[0, len(tokens) - 1] @ kernel[:, 0])


PAIRS = [
    {"prompt": "Hi", "chosen": "Hello!", "rejected": "No."},
    {"prompt": "One and one?", "chosen": "2", "rejected": "Three, of course, what else?"},
    {"prompt": "Long? " * 30, "chosen": "Yes.", "rejected": "It is."},
]


def config(run: Path, data: object, **settings) -> EvaluateConfig:
    return EvaluateConfig(checkpoint=str(run), task="reward", data=str(data), **settings)


def test_pairs_are_judged_at_the_end_of_their_answers(run, lm, tmp_path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, PAIRS)))
    found = evals.evaluate(lm, config(run, path, batch_tokens=200))
    margins = [
        reward(run, pair["prompt"], pair["chosen"]) - reward(run, pair["prompt"], pair["rejected"])
        for pair in PAIRS
    ]
    assert found["margin"] == pytest.approx(np.mean(margins), abs=1e-4)
    assert found["accuracy"] == pytest.approx(np.mean(np.array(margins) > 0))
    assert (found["count"], found["truncated"]) == (3, 1)
    low, high = found["accuracy_interval"]
    assert 0 <= low < found["accuracy"] < high <= 1 or found["accuracy"] in (0, 1)


def test_an_embedded_task_gives_its_held_out_pairs(run, lm) -> None:
    cfg = config(run, "arithmetic-correct", limit=4)
    items = judges.read(lm, cfg, Path(cfg.data))
    assert items == synthetic.preferences("arithmetic-correct", True)
    assert evals.evaluate(lm, cfg)["count"] == 4


def test_equal_rewards_count_half(run) -> None:
    rows = [{"chosen": 1.0, "rejected": r, "truncated": False} for r in (1.0, 0.0, 2.0, 0.5)]
    found = judges.summarize(rows)
    assert found["accuracy"] == 0.625
    assert found["accuracy_stderr"] == pytest.approx(np.std([0.5, 1, 0, 1], ddof=1) / 2)


def test_the_best_of_several_samples_is_the_judges_choice(run, lm, tmp_path) -> None:
    answers = {0: ["1", "2", "3", "4"], 1: ["5", "6", "7", "8"]}
    rewards = [[reward(run, f"{n}?", text) for text in answers[n]] for n in answers]
    best = [answers[n][int(np.argmax(rewards[n]))] for n in answers]

    class Scripted:
        def __getattr__(self, name):
            return getattr(lm, name)

        def complete(self, prompts, settings, seed, stop, rows):
            return [answers[row // 4][row % 4] for row in rows]

    path = tmp_path / "rows.jsonl"
    rows = [
        {"question": "0?", "answer": f"#### {best[0]}"},
        {"question": "1?", "answer": "#### 99"},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    cfg = EvaluateConfig(
        checkpoint="x", task="gsm8k", data=str(path), samples=4, temperature=1.0, chat=True,
        reward_model=str(run), max_new_tokens=8,
    )  # fmt: skip
    found = evals.evaluate(Scripted(), cfg)  # type: ignore[arg-type]
    assert found["best@4"] == 0.5 and found["flexible_match"] == 1 / 8
    assert not math.isnan(found["best@4_stderr"])
    first = dict(exact_match.score(Scripted(), cfg, {0: exact_match.Item("0?", best[0])}))[0]  # type: ignore[arg-type]
    assert first["rewards"] == pytest.approx(rewards[0], abs=1e-4)


def test_another_run_is_no_judge(lm, tmp_path) -> None:
    with pytest.raises(ValueError, match="is no run of scripts/reward"):
        Judge(str(tmp_path), "reward_model")
    lm.save(tmp_path / "plain", "jaxgpt")
    with pytest.raises(ValueError, match="plain: is no run of scripts/reward"):
        Judge(str(tmp_path / "plain"), "checkpoint")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "gsm8k", "reward_model": "x"}, "reward_model=x: chooses between several"),
        ({"task": "arc", "tools": ["calculator"]}, "tools=.*: are for gsm8k and arithmetic"),
        ({"task": "gsm8k", "tools": ["calculator"]}, "tools=.*: are for gsm8k and arithmetic"),
    ],
)
def test_settings_that_do_not_fit(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        EvaluateConfig(checkpoint="x", data="x", **settings)


def test_the_library_scores_as_the_judge_does(run, lm) -> None:
    said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    expected = reward(run, "Hi", "Hello!")
    assert lm.score(said) == pytest.approx(expected, abs=1e-4)
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>"
    assert lm.score(text) == pytest.approx(expected, abs=1e-4)


def test_what_the_library_cannot_score_is_refused(lm, tmp_path) -> None:
    for text, message in (
        ("", "is empty"), ("x" * 500, "longer than the context"),
        ([{"role": "user", "content": "Hi"}], "no answer"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            lm.score(text)
    lm.save(tmp_path / "plain", "jaxgpt")
    with pytest.raises(ValueError, match="is no run of scripts/reward"):
        load(tmp_path / "plain").score("x")
