"""Episodes as rows, and rules that misbehave; nothing here runs a network."""

import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxgpt import episodes, rollouts
from jaxgpt.config import GrpoConfig, ModelConfig, PpoConfig, RolloutConfig, TrainConfig
from jaxgpt.data import chat
from jaxgpt.data import tokenizer as tokenizers
from jaxgpt.episodes import Episode, Writer
from jaxgpt.rollouts import Rollouts
from jaxgpt.sampling.sample import Completion, Sampling
from jaxgpt.tasks.environment import Question, Turn

MODEL = ModelConfig(vocab_size=260, context_length=256)
TOKENIZER = tokenizers.load("byte")
FORM = chat.find_format("", None, TOKENIZER)
WRITER = Writer(MODEL, FORM, (FORM.end_of_turn,))
ASKED = [{"role": "user", "content": "What is 6 * 7?"}]


class Rule:
    """Judges every text by one function."""

    def __init__(self, judge) -> None:
        self.judge = judge

    def reset(self):
        return ASKED

    def step(self, text: str) -> Turn:
        return Turn(None, self.judge(text), True)


def scripted(monkeypatch: pytest.MonkeyPatch, *turns: list[str]) -> list[list[int]]:
    """Lets the policy write these texts, a list a turn; returns the contexts it was given.

    A text that ends in … is cut off there.
    """
    left, contexts = list(turns), []

    def generate(cfg, params, prompts, how, **options):
        contexts.extend(list(prompt) for prompt in prompts)
        written = []
        for text in left.pop(0):
            tokens = TOKENIZER.encode(text.removesuffix("…"))
            end = None if text.endswith("…") else (FORM.end_of_turn, -0.25)
            written.append(Completion(tokens, [-0.5] * len(tokens), end is not None, end))
        return [*written, *[written[-1]] * (len(prompts) - len(written))]

    monkeypatch.setattr(episodes, "generate", generate)
    return contexts


def play(environments) -> list[Episode]:
    how, rng = Sampling(64, 1.0, top_p=1.0), jax.random.key(0)
    return episodes.play(WRITER, {}, environments, how, rng, seconds=5.0)[0]


def test_an_episode_with_a_tool_is_the_conversation_that_sft_would_see(monkeypatch):
    contexts = scripted(monkeypatch, ["calculator(6 * 7)"], ["6 * 7 = 42"])
    [episode] = play([Question(ASKED, lambda text: float("42" in text), ["calculator"])])
    said = [
        *ASKED,
        {"role": "assistant", "content": "calculator(6 * 7)"},
        {"role": "tool", "content": "42"},
        {"role": "assistant", "content": "6 * 7 = 42"},
    ]
    (whole,) = chat.encode(FORM, said)
    length = len(episode.tokens)
    np.testing.assert_array_equal(episode.tokens, whole.tokens_T[:length])
    # The policy's own words and its ends of turn are learned; what the tool says is not.
    np.testing.assert_array_equal(np.array(episode.mask) > 0, whole.target_T[:length])
    assert whole.tokens_T[length:].tolist() == TOKENIZER.encode("\n")
    assert (episode.reward, episode.turns, episode.stopped) == (1.0, 2, True)
    assert contexts[1] == episode.tokens[: len(contexts[1])]
    assert episodes.transcript(episode).splitlines() == [
        "user: What is 6 * 7?", "assistant: calculator(6 * 7)", "  → 42",
        "assistant: 6 * 7 = 42", "[reward 1]",
    ]  # fmt: skip


def test_rows_keep_the_stop_token_and_its_log_probability(monkeypatch):
    scripted(monkeypatch, ["42", "I think it is 4…"])
    played = play([Rule(len), Rule(len)])
    rows = rollouts.lay_out(played, MODEL.context_length)
    assert rows["tokens"].shape[1] % rollouts.WIDTH == 0
    for row, (text, stopped) in enumerate([("42", True), ("I think it is 4", False)]):
        own = rows["mask"][row] > 0
        drawn = TOKENIZER.encode(text) + [FORM.end_of_turn] * stopped
        assert rows["targets"][row][own].tolist() == drawn
        expected = [-0.5] * len(text) + [-0.25] * stopped
        assert rows["sampler"][row][own].tolist() == expected
        # Place t predicts token t + 1.
        np.testing.assert_array_equal(rows["tokens"][row][1:][own[:-1]], drawn)
        assert rows["segments"][row].sum() == len(played[row].tokens)
        assert rows["stopped"][row] == stopped
    assert rows["mask"].dtype == rows["sampler"].dtype == np.float32


def test_a_turn_that_is_cut_off_ends_the_episode_though_it_calls_a_tool(monkeypatch):
    scripted(monkeypatch, ["calculator(6 * 7)…"])
    [episode] = play([Question(ASKED, lambda text: 1.0, ["calculator"])])
    assert (episode.turns, episode.reward, episode.stopped) == (1, 0.0, False)
    assert "cut off" in episodes.transcript(episode)


def test_an_observation_that_does_not_fit_the_context_ends_the_episode(monkeypatch):
    class Talks:
        reset = lambda self: ASKED
        step = lambda self, text: Turn("x" * 300, 0.5, False)

    scripted(monkeypatch, ["go"])
    [episode] = play([Talks()])
    assert (episode.turns, episode.reward) == (1, 0.5)
    assert len(episode.tokens) < MODEL.context_length


def test_a_reward_that_raises_names_the_text():
    def fails(text):
        raise KeyError("no such unit")

    with pytest.raises(ValueError, match=r"judging 'b' failed, KeyError: 'no such unit'"):
        episodes.judge([Rule(lambda text: 1.0), Rule(fails)], ["a", "b"], 5.0)


@pytest.mark.parametrize("reward", [float("nan"), float("inf"), None, "1"])
def test_a_reward_that_is_no_finite_number_is_refused(reward):
    with pytest.raises(ValueError, match=r"reward of 'b' is .*not a finite number"):
        episodes.judge([Rule(len), Rule(lambda text: reward)], ["a", "b"], 5.0)


def test_a_reward_that_hangs_is_given_up():
    began = time.perf_counter()
    with pytest.raises(ValueError, match=r"rollout.judge_seconds=0.2: judging 'b' took longer"):
        episodes.judge([Rule(len), Rule(lambda text: time.sleep(30) or 1.0)], ["a", "b"], 0.2)
    assert time.perf_counter() - began < 10


def episodes_of(*rewards: float) -> list[Episode]:
    return [Episode([], [], [], reward=reward) for reward in rewards]


def test_uninformative_groups_give_way_to_informative_ones_only():
    source = SimpleNamespace(settings=RolloutConfig(samples=2))
    source._groups = lambda episodes: Rollouts._groups(source, episodes)  # type: ignore[arg-type]
    old = episodes_of(0, 1, 1, 1, 0, 0)
    new = episodes_of(0, 0, 1, 0, 1, 1)
    made = Rollouts._replace(source, old, new)  # type: ignore[arg-type]
    assert made == [*old[:2], *new[2:4], *old[4:]]


@pytest.mark.parametrize(("length", "cost"), [(10, 0.0), (16, 0.0), (18, 0.5), (20, 1.0)])
def test_overlong_answers_cost_by_how_far_they_are_in_the_buffer(length, cost):
    source = SimpleNamespace(settings=RolloutConfig(max_new_tokens=20, overlong_buffer=4))
    episode = Episode([], [], [], reward=1.0, last_turn=length)
    assert Rollouts._worth(source, episode) == 1.0 - cost  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: GrpoConfig(rollout=RolloutConfig(samples=6)), "rollout.samples=6"),
        (lambda: GrpoConfig(rollout=RolloutConfig(samples=1)), "rollout.samples=1"),
        (lambda: RolloutConfig(updates=3, epochs=2), "rollout.updates=3"),
        (lambda: RolloutConfig(temperature=0.0), "rollout.temperature=0.0"),
        (lambda: GrpoConfig(train=TrainConfig(batch_size=2)), "train.batch_size=2"),
        (lambda: GrpoConfig(clip_low=1.5), "clip_low=1.5"),
        (lambda: PpoConfig(rule_weight=0.0), "rule_weight=0.0"),
        (lambda: PpoConfig(kl=0.0, kl_target=1.0), "kl=0.0"),
        (lambda: PpoConfig(lam=1.5), "lam=1.5"),
    ],
)
def test_settings_that_do_not_go_together_are_named(make, named):
    with pytest.raises(ValueError, match=named):
        make()
