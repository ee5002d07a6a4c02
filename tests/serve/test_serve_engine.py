"""The engine's laws: what a request gets depends on nothing but the request."""

import threading
import time
from contextlib import suppress

import jax
import numpy as np
import pytest

from jaxgpt.language_model import load
from jaxgpt.sampling.sample import Sampling, for_decoding, generate
from jaxgpt.serve.engine import CHUNK, Busy, Engine, Failed, Job

GREEDY = Sampling(20, temperature=0.0, top_p=1.0)
RANDOM = Sampling(20, temperature=1.1, top_k=50, top_p=0.9)
PROMPTS = [list(b"A fox"), list(b"The quick brown fox jumps over"), [7]]
LONG = [int(i) for i in np.random.default_rng(0).integers(0, 256, 2 * CHUNK + 30)]


class Notes:
    """A receiver that keeps what it is told."""

    def __init__(self, after=None):
        self.tokens, self.reason, self.cached, self.scores = [], None, None, []
        self.ended, self.begun, self.after = threading.Event(), threading.Event(), after

    def prompt_read(self, tokens, hidden_2D, cached):
        self.scores, self.hidden_2D, self.cached = tokens, hidden_2D, cached

    def token(self, token):
        self.tokens.append((token.id, token.logprob))
        self.begun.set()
        return self.after is not None and self.after(self)

    def end(self, reason, stop=None):
        self.reason, self.stop = reason, stop
        self.ended.set()


@pytest.fixture(scope="module")
def lm(checkpoint):
    return load(checkpoint)


def new_engine(lm, **how):
    params = for_decoding(lm.config, lm.params, 3)
    engine = Engine(lm.config, params, 3, 512, **how)
    engine.compile(lambda _: None)
    engine.start()
    return engine


@pytest.fixture(scope="module")
def engine(lm):
    engine = new_engine(lm, most_waiting=20)
    yield engine
    engine.stop()
    assert not engine._thread.is_alive()


def ask(engine, prompt, how=GREEDY, after=None, **more):
    notes = Notes(after)
    job = Job(prompt, how, notes, **more)
    engine.submit([job])
    return job, notes


def answer(engine, prompt, how=GREEDY, **more):
    _, notes = ask(engine, prompt, how, **more)
    assert notes.ended.wait(60)
    return notes


def test_greedy_answers_are_those_of_generate(engine, lm):
    params = for_decoding(lm.config, lm.params, 3)
    expected = generate(lm.config, params, PROMPTS, GREEDY)
    for prompt, wanted in zip(PROMPTS, expected, strict=True):
        found = answer(engine, prompt)
        assert [token for token, _ in found.tokens] == wanted.tokens
        np.testing.assert_allclose([p for _, p in found.tokens], wanted.logprobs, rtol=1e-4)
        assert found.reason == "length"


def test_company_a_slot_and_a_kept_prefix_change_no_bit(engine):
    engine.prefixes.clear()
    alone = [answer(engine, p, RANDOM, seed=5).tokens for p in (*PROMPTS, LONG)]
    engine.prefixes.clear()
    for turn in range(3):
        crowd = [
            ask(
                engine, LONG[turn : CHUNK + 9 * n], RANDOM if n % 2 else GREEDY, seed=n, tops=n == 4
            )
            for n in range(1, 6)
        ]
        found = [ask(engine, p, RANDOM, seed=5, hasty=bool(turn % 2)) for p in (*PROMPTS, LONG)]
        for (_, notes), expected in zip(found, alone, strict=True):
            assert notes.ended.wait(60)
            assert notes.tokens == expected
        assert all(notes.ended.wait(60) for _, notes in crowd)
        assert found[-1][1].cached == 2 * CHUNK or turn == 0


def test_the_seed_and_the_number_decide_the_draws(engine):
    ask_for = lambda **more: answer(engine, PROMPTS[0], RANDOM, **more).tokens
    assert ask_for(seed=1) == ask_for(seed=1) != ask_for(seed=2)
    assert ask_for(seed=1, number=1) != ask_for(seed=1)
    assert ask_for(seed=1 << 40) != ask_for(seed=0)


def test_a_cancelled_job_frees_its_row_and_writes_no_more(engine):
    endless = Sampling(400, temperature=0.0, top_p=1.0)
    job, notes = ask(engine, PROMPTS[0], endless)
    assert notes.begun.wait(30)
    engine.cancel(job)
    assert notes.ended.wait(30) and notes.reason == "cancelled"
    written = len(notes.tokens)
    assert engine.rows.count(None) == 3 and written < 400
    late, waiting = ask(engine, PROMPTS[0], endless, deadline=time.monotonic() - 1)
    assert waiting.ended.wait(30) and waiting.reason == "timeout" and not late.cancelled


def test_the_receiver_ends_its_answer(engine):
    found = answer(engine, PROMPTS[0], after=lambda notes: len(notes.tokens) == 3)
    assert found.reason == "stop" and len(found.tokens) == 3


def test_more_than_may_wait_are_refused(engine):
    hold = threading.Event()
    engine.call(lambda: hold.wait(30))
    jobs = [ask(engine, [7], Sampling(1, temperature=0.0)) for _ in range(23)]
    with pytest.raises(Busy):
        ask(engine, [7])
    hold.set()
    assert all(notes.ended.wait(30) for _, notes in jobs)


def test_a_function_has_the_device_between_two_steps(engine):
    assert engine.call(lambda: threading.current_thread().name).result(30) == "engine"
    with pytest.raises(ZeroDivisionError):
        engine.call(lambda: 1 // 0).result(30)
    assert engine.alive


def test_prompts_that_do_not_fit_are_refused_and_never_cut(lm):
    job = lambda prompt, count=1: Job(prompt, Sampling(count), Notes())
    for prompt, word in (([], "empty"), ([0] * 1024, "1,024"), ([260], "260")):
        with pytest.raises(ValueError, match=word):
            job(prompt).check(lm.config, 1024)
    job([0] * 1024, 0).check(lm.config, 1024)
    job([0] * 1023).check(lm.config, 1024)


def test_nothing_was_compiled_since_the_start(engine):
    biased = answer(engine, PROMPTS[0], bias={11: 100.0}, presence_penalty=1.0, tops=True)
    scored = answer(engine, LONG, scored=True)
    assert biased.tokens[0][0] == 11 and len(scored.scores) == len(LONG) - 1
    assert engine.counts.compiled == 0
    assert engine.call(lambda: jax.jit(lambda x: x * 3)(1.0)).result(30) == 3
    assert engine.counts.compiled > 0  # so the counter counts


def test_a_failure_ends_every_job_and_refuses_new_ones(lm):
    engine = new_engine(lm)
    _, first = ask(engine, PROMPTS[0], Sampling(400, temperature=0.0))
    assert first.begun.wait(30)

    def broken(*_):
        raise RuntimeError("the device is gone")

    engine._write = broken
    began, others = time.monotonic(), []
    with pytest.raises(Failed):
        while time.monotonic() < began + 5:
            with suppress(Busy):
                others.append(ask(engine, PROMPTS[0])[1])
    assert all(notes.ended.wait(5) for notes in (first, *others))
    assert {notes.reason for notes in (first, *others)} == {"error"}
    assert not engine.alive and "gone" in str(engine.failure)
    with pytest.raises(Failed):
        engine.call(lambda: 1)
