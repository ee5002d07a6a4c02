"""Rows at lengths and settings of their own: bits that do not depend on who is beside."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import peft
from jaxgpt.config import ModelConfig, PeftConfig
from jaxgpt.model import gpt
from jaxgpt.sampling import slots
from jaxgpt.sampling.sample import Sampling, for_decoding, generate
from jaxgpt.sampling.truncation import truncate, truncate_rows

DENSE = ModelConfig(
    vocab_size=61, context_length=256, num_layers=2, model_dim=24, num_heads=4, num_kv_heads=2,
    mlp_dim=40, bias="all",
)  # fmt: skip
MODELS = {
    "dense": DENSE,
    "window": dataclasses.replace(DENSE, position="rope", sliding_window=9),
    "pattern": dataclasses.replace(
        DENSE, position="rope", sliding_window=9, layer_pattern="LG", num_layers=3,
        attention_softcap=5.0, logit_softcap=6.0,
    ),
    "bfloat16": dataclasses.replace(DENSE, dtype="bfloat16"),
    "mixture": ModelConfig(
        vocab_size=61, context_length=256, num_layers=2, model_dim=24, num_heads=3, mlp_dim=20,
        mlp="gated", norm="rmsnorm", position="rope", num_experts=5, tie_embeddings=False,
    ),
}  # fmt: skip
NAMES = ["dense", *(pytest.param(n, marks=pytest.mark.slow) for n in list(MODELS)[1:])]
SHORT, LONG = [5, 60, 3], [int(i) for i in np.random.default_rng(1).integers(0, 61, 150)]
B, CHUNK = 3, 16


def random_params(cfg: ModelConfig) -> dict:
    random = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(random.normal(0, 0.4, leaf.shape), jnp.float32)
    return jax.tree.map(draw, jax.eval_shape(partial(gpt.init, cfg), jax.random.key(0)))


PARAMS = {name: random_params(cfg) for name, cfg in MODELS.items()}


class Rows:
    """A batch, driven as the engine drives it."""

    def __init__(self, cfg: ModelConfig, params: dict) -> None:
        self.cfg, self.params = cfg, for_decoding(cfg, params, B)
        self.state = slots.init_state(cfg, B, cfg.context_length)
        self.settings = slots.default_settings(B)

    def read(self, row: int, prompt: list[int], **settings) -> slots.Read:
        padded = np.full(self.cfg.context_length, -1, np.int32)
        padded[: len(prompt)] = prompt
        none = np.full(slots.MOST_BIASES, -1, np.int32)
        self.state = slots.admit(
            self.state, np.int32(row), none, np.zeros(len(none), np.float32), padded
        )
        for start in range(0, len(prompt), CHUNK):
            part = prompt[start : start + CHUNK]
            targets = prompt[start + 1 : start + 1 + CHUNK]
            fill = lambda ids: np.array([*ids, *[0] * (CHUNK - len(ids))], np.int32)
            self.state, read = slots.read(
                self.cfg, self.params, self.state, np.int32(row),
                np.int32(settings.get("adapter_B", 0)), fill(part), np.int32(len(part)),
                fill(targets), np.bool_(True),
            )  # fmt: skip
        for name, value in {"active_B": True, **settings}.items():
            getattr(self.settings, name)[row] = value
        return read

    def write(self, steps: int) -> slots.Written:
        allowed = np.full((B, -(-self.cfg.vocab_size // 32)), -1, np.int32)
        self.state, written = slots.write(
            self.cfg, self.params, self.state, self.settings, allowed, np.int32(steps)
        )
        return jax.tree.map(lambda x: np.asarray(x)[:, :steps], written)


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_unequal_length_write_what_generate_writes(name):
    cfg = MODELS[name]
    expected = generate(
        cfg, for_decoding(cfg, PARAMS[name], 2), [SHORT, LONG],
        Sampling(20, temperature=0.0), rng=jax.random.key(0),
    )  # fmt: skip
    rows = Rows(cfg, PARAMS[name])
    rows.read(2, SHORT)
    first = rows.write(4).tokens_BN[2].tolist()
    rows.read(0, LONG)  # joins while the other is being written
    then = rows.write(16).tokens_BN
    assert first + then[2].tolist() == expected[0].tokens
    assert then[0].tolist() == expected[1].tokens[:16]


@pytest.mark.parametrize("name", NAMES)
def test_a_row_alone_and_in_company_agree_to_the_bit(name):
    how = {"temperature_B": 1.3, "top_k_B": 40, "top_p_B": 0.9, "seed_B2": [1, 7], "tops_B": True}
    alone = Rows(MODELS[name], PARAMS[name])
    read = alone.read(0, SHORT, **how)
    expected = [alone.write(3), alone.write(16)]
    rows = Rows(MODELS[name], PARAMS[name])
    rows.read(0, LONG, min_p_B=0.1, temperature_B=0.7, repetition_B=1.4)
    rows.write(1)
    again = rows.read(2, SHORT, **how)
    rows.read(1, LONG[:40], presence_B=1.0, frequency_B=0.5)
    written = [rows.write(16), rows.write(3)]
    for field in slots.Written._fields:
        before, after = (
            np.concatenate([getattr(part, field)[row] for part in parts])
            for row, parts in ((0, expected), (2, written))
        )
        np.testing.assert_array_equal(before, after, err_msg=field)
    jax.tree.map(np.testing.assert_array_equal, read, again)


def test_a_copied_beginning_is_the_beginning_read_again_to_the_bit():
    rows = Rows(DENSE, PARAMS["dense"])
    rows.read(0, LONG)
    expected = rows.write(16)
    chunk = slots.save(rows.state, np.int32(0), np.int32(0), 128)
    rows = Rows(DENSE, PARAMS["dense"])
    rows.read(1, SHORT)
    rows.write(2)
    rows.state = slots.put(rows.state, np.int32(2), np.int32(0), chunk)
    rest = LONG[128:]
    for start in range(0, len(rest), CHUNK):
        part = [*rest[start : start + CHUNK], *[0] * CHUNK][:CHUNK]
        rows.state, _ = slots.read(
            DENSE, rows.params, rows.state, np.int32(2), np.int32(0), np.array(part, np.int32),
            np.int32(min(CHUNK, len(rest) - start)), np.zeros(CHUNK, np.int32), np.bool_(False),
        )  # fmt: skip
    rows.settings.active_B[2] = True
    written = rows.write(16)
    np.testing.assert_array_equal(written.tokens_BN[2], expected.tokens_BN[0])
    np.testing.assert_array_equal(written.logprobs_BN[2], expected.logprobs_BN[0])


def test_random_rows_are_those_of_generate():
    how = Sampling(16, temperature=1.2, top_k=20, top_p=0.9)
    expected = generate(
        DENSE, for_decoding(DENSE, PARAMS["dense"], 2), [SHORT, SHORT], how,
        rng=jax.random.key(5), rows=[0, 3],
    )  # fmt: skip
    rows = Rows(DENSE, PARAMS["dense"])
    for row, number in ((1, 0), (0, 3)):
        rows.read(
            row, SHORT, temperature_B=1.2, top_k_B=20, top_p_B=0.9, seed_B2=[0, 5], number_B=number
        )
    written = rows.write(16).tokens_BN
    assert written[1].tolist() == expected[0].tokens != expected[1].tokens == written[0].tolist()


def test_the_scores_of_a_prompt_are_those_of_one_pass():
    rows = Rows(DENSE, PARAMS["dense"])
    read = rows.read(1, SHORT)
    output = gpt.apply(DENSE, PARAMS["dense"], jnp.array([SHORT]))
    logprobs_TV = jax.nn.log_softmax(gpt.logits(DENSE, PARAMS["dense"], output.hidden_BTD)[0])
    expected = [logprobs_TV[0, SHORT[1]], logprobs_TV[1, SHORT[2]]]
    np.testing.assert_allclose(read.logprobs_C[:2], expected, rtol=1e-5)
    order = np.argsort(-np.asarray(logprobs_TV[1]))[: slots.NUM_TOP]
    assert read.top_ids_CJ[1].tolist() == order.tolist()
    np.testing.assert_allclose(
        read.hidden_2D, [output.hidden_BTD[0].sum(0), output.hidden_BTD[0, -1]], rtol=1e-4,
        atol=1e-5,
    )  # fmt: skip


def test_biases_penalties_and_masks_reach_their_row_only():
    rows = Rows(DENSE, PARAMS["dense"])
    for row in range(B):
        rows.read(row, SHORT)
    plain = rows.write(8).tokens_BN
    assert (plain[0] == plain[1]).all()
    rows = Rows(DENSE, PARAMS["dense"])
    rows.read(0, SHORT, presence_B=100.0)
    rows.read(1, SHORT, masked_B=True)
    rows.read(2, SHORT)
    ids = np.array([11, *[-1] * (slots.MOST_BIASES - 1)], np.int32)
    rows.state = rows.state._replace(bias_BV=rows.state.bias_BV.at[2, 11].set(1e4))
    allowed = np.full((B, 2), -1, np.int32)
    allowed[1] = [1 << 9, 0]
    rows.state, written = slots.write(
        DENSE, rows.params, rows.state, rows.settings, allowed, np.int32(8)
    )
    written = np.asarray(written.tokens_BN)[:, :8]
    assert len(set(written[0].tolist())) == 8  # nothing twice
    assert (written[1] == 9).all() and (written[2] == ids[0]).all()


def test_each_row_has_its_own_adapter():
    base = PARAMS["dense"]
    adapted = peft.add(PeftConfig(kind="lora", rank=2, dropout=0.0), base, jax.random.key(1))
    random = np.random.default_rng(3)
    leaves = lambda leaf: jnp.asarray(random.normal(0, 0.3, leaf.shape), jnp.float32)
    adapted = jax.tree.map_with_path(
        lambda path, leaf: leaves(leaf) if path[-1] == jax.tree_util.GetAttrKey("b") else leaf,
        adapted,
    )
    expected = [
        generate(DENSE, for_decoding(DENSE, net, 2), [SHORT], Sampling(16, temperature=0.0))[0]
        for net in (base, adapted)
    ]
    rows = Rows(DENSE, peft.for_rows([base, adapted], [0, 1]))
    rows.read(0, SHORT, adapter_B=1)
    rows.read(2, SHORT, adapter_B=0)
    written = rows.write(16).tokens_BN
    assert written[0].tolist() == expected[1].tokens != expected[0].tokens
    assert written[2].tolist() == expected[0].tokens


def test_truncation_by_row_is_truncation():
    logits_BV = jnp.asarray(np.random.default_rng(0).normal(0, 3, (4, 61)), jnp.float32)
    rows = [(0.7, 5, 1.0, 0.0), (1.0, 0, 0.8, 0.0), (2.0, 30, 0.9, 0.1), (1.0, 0, 1.0, 0.0)]
    columns = (jnp.array(x, jnp.int32 if n == 1 else jnp.float32) for n, x in enumerate(zip(*rows)))  # noqa: B905
    found = truncate_rows(logits_BV, *columns)
    for row, settings in enumerate(rows):
        np.testing.assert_array_equal(found[row], truncate(logits_BV[row : row + 1], *settings)[0])
