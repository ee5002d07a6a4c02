"""What peft adds to a network, and how it comes off again."""

import dataclasses
import os
import re
import shutil
import subprocess
import sys
import time
import zlib
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import peft, sharding, tree, weights
from jaxgpt.checkpoint import read_arrays
from jaxgpt.config import MeshConfig, ModelConfig, PeftConfig
from jaxgpt.convert.load import load
from jaxgpt.model import gpt
from jaxgpt.sampling.sample import Sampling, generate

ROOT = Path(__file__).parents[1]
LORA = PeftConfig(kind="lora", rank=3, alpha=12.0)
# With remat the layers stay rolled, which compiles in half the time.
CFG = ModelConfig(
    vocab_size=62, context_length=32, num_layers=2, model_dim=64, num_heads=4, num_kv_heads=2,
    mlp_dim=96, mlp="gated", norm="rmsnorm", position="rope", remat="full",
)  # fmt: skip
UNROLLED = dataclasses.replace(CFG, remat="none")
MOE = dataclasses.replace(CFG, num_experts=4)


def init(cfg):
    """Random weights by NumPy; the network's own initialisation takes long to compile."""
    shapes = jax.eval_shape(partial(gpt.init, cfg), jax.random.key(0))
    rng = np.random.default_rng(0)

    def draw(name, leaf):
        noise = rng.standard_normal(leaf.shape, np.float32)
        return jnp.asarray(1 + 0.1 * noise if name.endswith("scale") else noise / 50)

    return tree.map_named(draw, shapes)


@pytest.fixture(scope="module")
def base():
    return init(CFG)


def tokens(rows: int = 2) -> jax.Array:
    return jax.random.randint(jax.random.key(1), (rows, 16), 0, CFG.vocab_size)


@partial(jax.jit, static_argnums=0)
def logits(cfg, params, tokens_BT):
    return gpt.logits(cfg, params, gpt.apply(cfg, params, tokens_BT).hidden_BTD)


def trained(params, seed: int = 2):
    """The same with random numbers where something is trained."""
    found = peft.trainable(LORA, "")
    part, rest = tree.partition(params, found)
    noise = lambda name, leaf: (
        leaf
        + 0.1
        * jax.random.normal(
            jax.random.fold_in(jax.random.key(seed), np.uint32(zlib.crc32(name.encode()))),
            leaf.shape,
        )
    )
    return tree.combine(tree.map_named(noise, part), rest)


@pytest.mark.parametrize("settings", [{}, {"dora": True}, {"targets": "mlp", "rslora": True}])
def test_fresh_adapter_changes_no_logit_bit(base, settings):
    adapted = peft.add(dataclasses.replace(LORA, **settings), base, jax.random.key(3))
    assert tree.count(adapted) > tree.count(base)
    np.testing.assert_array_equal(logits(CFG, adapted, tokens()), logits(CFG, base, tokens()))


def test_fresh_bottleneck_changes_no_logit_bit(base):
    for parallel in (False, True):
        cfg = peft.model_config(PeftConfig(kind="adapter", adapter_parallel=parallel), CFG)
        drawn = tree.flatten(jax.jit(partial(gpt.init, cfg))(jax.random.key(0)))
        params = tree.nest({**drawn, **tree.flatten(base)})
        assert any("mlp_adapter" in name for name in tree.flatten(params))
        np.testing.assert_array_equal(logits(cfg, params, tokens()), logits(CFG, base, tokens()))


@pytest.mark.parametrize("dora", [False, True])
def test_merged_equals_unmerged(base, dora):
    cfg = dataclasses.replace(LORA, dora=dora)
    adapted = trained(peft.add(cfg, base, jax.random.key(3)))
    merged = peft.merge(adapted)
    assert jax.tree.structure(merged) == jax.tree.structure(base)
    got = logits(CFG, merged, tokens())
    assert not np.allclose(got, logits(CFG, base, tokens()), atol=1e-2)
    np.testing.assert_allclose(got, logits(CFG, adapted, tokens()), atol=1e-5)


def test_scale_of_the_change():
    assert peft.strength(LORA) == 4.0
    assert peft.strength(dataclasses.replace(LORA, rank=16, rslora=True)) == 3.0


def test_a_is_drawn_as_peft_does(base):
    for name, kernel in peft.leaves(peft.add(LORA, base, jax.random.key(3))).items():
        if isinstance(kernel, weights.Lora):
            bound = 1 / np.sqrt(kernel.a.shape[-2])
            assert 0.95 * bound < np.abs(kernel.a).max() <= bound, name
            assert not kernel.b.any()


@pytest.mark.parametrize(
    ("targets", "count"),
    [("attention", 4), ("mlp", 3), ("all-linear", 7), (r"attention/(query|value)/", 2)],
)
def test_targets(base, targets, count):
    adapted = peft.add(dataclasses.replace(LORA, targets=targets), base, jax.random.key(3))
    found = [k for k in peft.leaves(adapted).values() if isinstance(k, weights.Lora)]
    assert len(found) == count


@pytest.mark.parametrize(
    ("settings", "model", "message"),
    [
        ({"targets": "nothing"}, CFG, "peft.targets=nothing: matches no kernel"),
        ({"dora": True, "targets": "moe/up"}, MOE, "peft.dora=True: not for blocks/moe/"),
        ({"dropout": 0.1, "targets": "moe/up"}, MOE, "peft.dropout=0.1: not for blocks/moe/"),
        ({"targets": "router"}, MOE, "blocks/moe/router/kernel is no kernel that LoRA may change"),
    ],
)
def test_what_cannot_be_is_refused(settings, model, message):
    params = jax.eval_shape(partial(gpt.init, model), jax.random.key(0))
    with pytest.raises(ValueError, match=message):
        peft.add(dataclasses.replace(LORA, **settings), params, jax.random.key(3))


def test_only_the_additions_are_trained(base):
    adapted = {"policy": peft.add(LORA, base, jax.random.key(3)), "value": {"score": base}}
    chosen, _ = tree.partition(adapted, peft.trainable(LORA, "^policy/"))
    names = list(tree.flatten(chosen))
    assert len(names) == 14 and all(name.endswith(("/a", "/b")) for name in names)
    chosen, _ = tree.partition(adapted, peft.trainable(LORA, "^(policy|value)/"))
    assert any(name.startswith("value/score/") for name in tree.flatten(chosen))


def loss(params, batch, rng_B, cfg=CFG):
    scores_BTV = logits(cfg, params, batch)
    return -jax.nn.log_softmax(scores_BTV)[..., 0].sum(), rng_B.shape[0], {}


def test_no_gradient_of_a_frozen_kernel_is_computed(base):
    """By the compiled step's own count: three products of a frozen kernel become two."""
    part, frozen = tree.partition(peft.add(LORA, base, jax.random.key(3)), peft.trainable(LORA, ""))

    def lora(part):
        return loss(tree.combine(part, frozen), tokens(), jnp.zeros(2), UNROLLED)[0]

    def full(base):
        return loss(base, tokens(), jnp.zeros(2), UNROLLED)[0]

    flops = lambda fn, x: jax.jit(jax.grad(fn)).lower(x).compile().cost_analysis()["flops"]
    kernels = sum(v.size for k, v in tree.flatten(base["blocks"]).items() if k.endswith("kernel"))
    low = sum(leaf.size for leaf in jax.tree.leaves(part))
    products = 2 * tokens().size  # flops of one product per parameter
    saved = flops(full, base) - flops(lora, part)
    # The embedding's gradient goes too, but for the additions' three products.
    assert saved > 0.9 * products * (kernels - 3 * low)


def test_dropout_differs_by_row_layer_and_kernel_but_not_by_micro_batch(base):
    cfg = dataclasses.replace(LORA, dropout=0.3)
    adapted = trained(peft.add(cfg, base, jax.random.key(3)))
    dropped = jax.jit(lambda *args: peft.with_dropout(cfg, loss)(*args)[0])
    keys_B = jax.random.split(jax.random.key(5), 4)
    whole = dropped(adapted, tokens(4), keys_B)
    assert abs(whole - loss(adapted, tokens(4), keys_B)[0]) > 1e-3
    parts = [dropped(adapted, tokens(4)[i::2], keys_B[i::2]) for i in (0, 1)]
    np.testing.assert_allclose(whole, sum(parts), rtol=1e-6)


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
@pytest.mark.parametrize("model", [CFG, pytest.param(MOE, marks=pytest.mark.slow)])
def test_quantised_base_computes_what_its_codes_say(model, quantize):
    params = init(model)
    cfg = PeftConfig(kind="qlora", quantize=quantize)
    place = peft.place(cfg)
    quantized = tree.map_named(place, params)
    assert weights.is_quantized(quantized["blocks"]["attention"])
    assert not weights.is_quantized([quantized["embed"], quantized["final_norm"]])
    plain = peft.merge(quantized)
    got = logits(model, quantized, tokens())
    np.testing.assert_allclose(got, logits(model, plain, tokens()), atol=1e-5)
    assert not np.allclose(got, logits(model, params, tokens()), atol=1e-6)


def test_nf4_refuses_kernels_that_64_does_not_divide():
    with pytest.raises(
        ValueError, match=r"peft\.quantize=nf4: blocks/mlp/up/kernel is \[2, 5, 6\]"
    ):
        peft.place(PeftConfig(kind="qlora"))("blocks/mlp/up/kernel", jnp.ones((2, 5, 6)))


@pytest.mark.parametrize("tie", [True, False])
def test_int8_for_decoding_covers_the_head(tie):
    cfg = dataclasses.replace(CFG, tie_embeddings=tie)
    params = init(cfg)
    int8 = peft.quantize_int8(params)
    assert isinstance(int8["head"]["kernel"], weights.Int8Rows)  # a CPU's form
    assert int8["embed"]["embedding"] is params["embed"]["embedding"]
    got, expected = logits(cfg, int8, tokens()), logits(cfg, params, tokens())
    assert 0 < np.abs(got - expected).max() < 0.05 * np.abs(expected).max()  # x is rounded too


@pytest.mark.slow
def test_int8_writes_what_it_scores_highest_for_one_row_or_several():
    """The cached pass rounds a token's activations as the pass over the whole text does."""
    int8 = peft.quantize_int8(init(CFG))
    prompts, settings = [[1, 2, 3], [4, 5]], Sampling(6, temperature=0.0)
    together = generate(CFG, int8, prompts, settings)
    for prompt, written in zip(prompts, together, strict=True):
        for count, token in enumerate(written.tokens):
            text = jnp.asarray([prompt + written.tokens[:count]])
            assert token == int(logits(CFG, int8, text)[0, -1].argmax())
        assert generate(CFG, int8, [prompt], settings)[0].tokens == written.tokens


def test_restoring_inverts_partition(base):
    cfg = dataclasses.replace(LORA, dora=True)
    adapted = trained(peft.add(cfg, base, jax.random.key(3)))
    kept, _ = tree.partition(adapted, peft.trainable(cfg, ""))
    again = peft.restore(cfg, base, tree.flatten(kept))
    jax.tree.map(np.testing.assert_array_equal, again, adapted)
    jax.tree.map(np.testing.assert_array_equal, peft.without(again), base)


def test_every_request_has_its_own_adapter(base):
    one = trained(peft.add(LORA, base, jax.random.key(3)), seed=4)
    narrow = dataclasses.replace(LORA, rank=2, targets="mlp")
    two = trained(peft.add(narrow, base, jax.random.key(5)), seed=6)
    networks, choice = [base, one, two], [2, 0, 1, 1]
    mixed = logits(CFG, peft.for_rows(networks, choice), tokens(4))
    for row, index in enumerate(choice):
        alone = logits(CFG, networks[index], tokens(4)[row : row + 1])
        np.testing.assert_allclose(mixed[row], alone[0], atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("model", [CFG, MOE])
@pytest.mark.parametrize("kind", ["lora", "qlora", "int8"])
def test_meshes_agree(model, kind):
    cfg = dataclasses.replace(LORA, kind=kind.replace("int8", "qlora"))
    cfg = dataclasses.replace(cfg, quantize="int8" if kind == "int8" else "nf4", rank=4)
    params = init(model)
    place = peft.place(cfg)
    params = tree.map_named(place, params) if place else params
    params = trained(peft.add(cfg, params, jax.random.key(3)))
    expected = logits(model, params, tokens(4))
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, sharding.shardings(mesh, params))
        np.testing.assert_allclose(logits(model, placed, tokens(4)), expected, atol=1e-5)


def command(*args: str) -> subprocess.Popen:
    """scripts/pretrain.py on one device, beginning."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    fixed = ["--train.batch_size=2", "--eval.batches=1", "--sample.max_new_tokens=4"]
    return subprocess.Popen(
        [sys.executable, str(ROOT / "scripts/pretrain.py"), *fixed, *args], env=env,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(*args: str) -> None:
    process = command(*args)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "qlora", "adapter"])
def test_a_killed_run_ends_as_an_unbroken_one_and_holds_only_the_additions(kind, tmp_path):
    (tmp_path / "text.txt").write_text("".join(f"{n} times 3 is {3 * n}. " for n in range(3000)))
    data = f"--data.path={tmp_path / 'text.txt'}"
    base = tmp_path / "base"
    shape = ["--model.context_length=16", "--model.num_layers=2", "--model.model_dim=64"]
    finish(data, "--data.tokenizer=byte", f"--run={base}", "--train.steps=3", *shape)

    settings = [data, f"--init={base}", f"--peft.kind={kind}", "--peft.rank=2",
                "--peft.adapter_dim=8", "--train.steps=400", "--checkpoint.every=40"]  # fmt: skip
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = command(*settings, f"--run={killed}")
    while not (killed / "checkpoints" / "40").exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert not (killed / "checkpoints" / "400").exists()
    finish(*settings, f"--run={killed}")
    finish(*settings, f"--run={whole}")

    arrays = [read_arrays(run / "checkpoints" / "400") for run in (killed, whole)]
    jax.tree.map(np.testing.assert_array_equal, *arrays)
    added = [name for name in arrays[0] if name.startswith("params/")]
    own = "_adapter/" if kind == "adapter" else r"kernel/(a|b)$"
    assert added and all(re.search(own, name) for name in added)

    beside, merged, plain = load(whole), load(whole, merged=True), load(base)
    assert weights.is_quantized(beside.params) == (kind == "qlora")
    tokens_BT = tokens() % 16
    got = logits(beside.config, beside.params, tokens_BT)
    np.testing.assert_allclose(got, logits(merged.config, merged.params, tokens_BT), atol=1e-5)
    assert not np.allclose(got, logits(plain.config, plain.params, tokens_BT), atol=1e-2)
    shutil.rmtree(base / "checkpoints")
    with pytest.raises(ValueError, match="no intact checkpoint"):
        load(whole)


def test_norms_are_trained_beside_adapters_where_asked():
    find = lambda **asked: re.compile(
        peft.trainable(PeftConfig(kind="adapter", **asked), "^policy/")
    )
    norm, kernel = "policy/blocks/attention_norm/scale", "policy/blocks/mlp/up/kernel"
    assert find(train_norms=True).search(norm) and not find().search(norm)
    assert not find(train_norms=True).search(kernel)
