"""GGUF files that we write: read back by us, by the `gguf` library, and by llama.cpp."""

import dataclasses
import json
import signal
import subprocess
import sys

import gguf as library
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import regex
import tokenizers
from gguf import quants

import jaxgpt
from jaxgpt import peft, tree
from jaxgpt.config import ModelConfig, PeftConfig, RopeScaling
from jaxgpt.convert import gguf, gguf_file, gguf_write, table, tokenizer_files, words
from jaxgpt.convert.family import resolve
from jaxgpt.convert.load import load
from jaxgpt.data import tokenizer
from jaxgpt.kernels import compiled

LLAMA = ModelConfig(
    vocab_size=300, context_length=64, num_layers=2, model_dim=64, num_heads=4, num_kv_heads=2,
    head_dim=16, mlp_dim=96, mlp="gated", activation="silu", norm="rmsnorm", norm_eps=1e-5,
    position="rope", rope_base=5000.0,
)  # fmt: skip
MIXTURE = {"num_experts": 4, "experts_per_token": 2, "mlp_dim": 32}
GEMMA = {"activation": "gelu_tanh", "norm_offset": 1.0, "embedding_scale": 8.0}
MODELS = {
    "llama": {},
    "llama-untied": {"tie_embeddings": False, "num_kv_heads": None},
    "llama-3": {"rope_scaling": RopeScaling(factor=32.0), "rope_base": 500_000.0},
    "llama-linear": {"rope_scaling": RopeScaling(kind="linear", factor=3.0)},
    "phi3": {"rope_share": 0.5},
    "mixtral": MIXTURE,
    "qwen2": {"bias": "qkv"},
    "qwen2-yarn": {"bias": "qkv", "rope_scaling": RopeScaling(
        kind="yarn", factor=4.0, original_context=16, attention_factor=1.7, beta_fast=20.0,
    )},
    "qwen2moe": MIXTURE | {"bias": "qkv", "normalize_expert_weights": False, "shared_mlp_dim": 48,
                          "tie_embeddings": False},
    "qwen3": {"qk_norm": True, "head_dim": 32},
    "qwen3moe": MIXTURE | {"qk_norm": True},
    "granite": {
        "embedding_scale": 3.0, "residual_scale": 0.25, "logit_divisor": 2.5,
        "attention_scale": 0.125,
    },
    "smollm3": {"num_layers": 5, "rope_skip": 4},
    "olmo2": {"norm_place": "after", "qk_norm": True, "qk_norm_over": "width",
              "tie_embeddings": False},
    "phi3-long": {"context_length": 64, "rope_scaling": RopeScaling(
        kind="longrope", factor=2.0, original_context=32, attention_factor=1.25,
        short_factors=(1.0, 1.5) * 4, long_factors=(2.0, 4.5) * 4,
    )},
    "gemma": GEMMA,
    "gemma2": GEMMA | {
        "norm_place": "both", "layer_pattern": "LG", "sliding_window": 7,
        "attention_softcap": 50.0, "logit_softcap": 30.0, "num_layers": 3,
    },
    "gemma3": GEMMA | {
        "norm_place": "both", "layer_pattern": "LLLLLG", "sliding_window": 7, "num_layers": 7,
        "rope_base": 1e6, "rope_local_base": 1e4, "qk_norm": True,
        "rope_scaling": RopeScaling(kind="linear", factor=8.0),
    },
    "gpt2": {
        "mlp": "plain", "activation": "gelu_tanh", "norm": "layernorm", "position": "learned",
        "bias": "all", "num_kv_heads": None, "head_dim": None,
    },
}  # fmt: skip
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


def random_params(cfg):
    random = np.random.default_rng(0)
    shapes = table.parameter_shapes(cfg).items()
    return tree.nest({n: random.normal(0, 0.2, s).astype(np.float32) for n, s in shapes})


@pytest.fixture(scope="module")
def files():
    own = tokenizer.train_bpe(["the cat sat on the mat, and 12 dogs ran 34 miles"] * 3, 280)
    definition = json.loads(json.dumps(_saved(own)))
    return tokenizer_files.with_settings(
        {"tokenizer.json": json.dumps(definition).encode()},
        eos_token="<|endoftext|>", pad_token="<|pad|>", chat_template=TEMPLATE,
    )  # fmt: skip


def _saved(own):
    from jaxgpt.data import engines

    merges = engines.merges_of(own.ranks)
    return engines.build(own.pattern, own.ranks, own.special, merges)


@pytest.mark.parametrize("name", MODELS)
def test_every_architecture_is_read_back_whole(name, files, tmp_path, capsys):
    cfg = dataclasses.replace(LLAMA, **MODELS[name])
    params = random_params(cfg)
    gguf_write.save(tmp_path / "model.gguf", cfg, params, files, "f32", ends=(0, 2))
    found, again, told = gguf.load(tmp_path / "model.gguf")
    near = dataclasses.replace(found, rope_scaling=cfg.rope_scaling)
    assert resolve(near) == resolve(cfg)
    if cfg.rope_scaling is not None:
        ours, theirs = map(dataclasses.asdict, (cfg.rope_scaling, found.rope_scaling))
        for key, value in ours.items():
            assert theirs[key] == (pytest.approx(value) if isinstance(value, float) else value)
    for key, leaf in tree.flatten(params).items():
        # GGUF holds Gemma's norms as 1 + scale, which rounds.
        rounds = cfg.norm_offset and "norm" in key
        np.testing.assert_allclose(
            tree.flatten(again)[key], leaf, rtol=0, atol=1.2e-7 if rounds else 0, err_msg=key
        )
    assert told["tokenizer.json"] == files["tokenizer.json"]
    assert tokenizer_files.chat_template(told) == TEMPLATE
    reader = library.GGUFReader(tmp_path / "model.gguf")  # the library's own reader opens it
    architecture = reader.fields["general.architecture"].contents()
    assert architecture == {"mixtral": "llama"}.get(name, name.partition("-")[0])


@pytest.mark.parametrize("kind", gguf_write.TYPES)
def test_every_type_is_what_the_library_quantises(kind, files, tmp_path):
    params = random_params(LLAMA)
    path = tmp_path / "model.gguf"
    gguf_write.save(path, LLAMA, params, files, kind)
    rows = gguf.ARCHITECTURES["llama"][0]
    plain = dict(table.write(rows, LLAMA, params))
    found = {t.name: t for t in library.GGUFReader(path).tensors}
    assert found.keys() == plain.keys()
    types = {name: tensor.tensor_type.name for name, tensor in found.items()}
    assert types["blk.0.attn_norm.weight"] == "F32"
    assert types["blk.1.ffn_up.weight"] == kind.upper()
    assert types["token_embd.weight"] == (kind.upper() if kind[0] != "q" else "Q8_0")
    for name, tensor in found.items():
        expected = quants.quantize(plain[name], tensor.tensor_type)
        assert np.array_equal(tensor.data.view(np.uint8).ravel(), expected.view(np.uint8).ravel())
    # Writing what was read changes nothing more.
    cfg, again, told = gguf.load(path)
    gguf_write.save(tmp_path / "again.gguf", cfg, again, told, kind)
    source, copy = (gguf_file.open_file(p)[1] for p in (path, tmp_path / "again.gguf"))
    for name in source.shapes:
        assert source.kind(name) == copy.kind(name)
        if kind[:2] in ("f3", "f1", "bf", "q8"):
            assert np.array_equal(source.read(name), copy.read(name)), name


def test_rows_that_fill_no_block_are_stored_in_16_bits(files, tmp_path):
    cfg = dataclasses.replace(LLAMA, mlp_dim=40)
    gguf_write.save(tmp_path / "model.gguf", cfg, random_params(cfg), files, "q8_0")
    source = gguf_file.open_file(tmp_path / "model.gguf")[1]
    assert source.kind("blk.0.ffn_down.weight") == "F16"
    assert source.kind("blk.0.ffn_up.weight") == "Q8_0"


SENTENCEPIECE = [
    "<unk>",
    "<s>",
    "</s>",
    *(f"<0x{b:02X}>" for b in range(256)),
    "▁",
    "a",
    "b",
    "▁a",
    "ab",
]


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepieces_bpe_is_read_back(prefix, tmp_path):
    scores = [0.0] * 259 + [-float(i) for i in range(5)]
    made = tokenizer_files.sentencepiece(SENTENCEPIECE, scores, [0, 1, 2], 0, space_prefix=prefix)
    made = tokenizer_files.with_settings(
        made, bos_token="<s>", eos_token="</s>", add_bos_token=True
    )
    gguf_write.save(tmp_path / "model.gguf", LLAMA, random_params(LLAMA), made)
    metadata = gguf_file.open_file(tmp_path / "model.gguf")[0]
    kinds = metadata["tokenizer.ggml.token_type"]
    assert kinds[:5] == [2, 3, 3, 6, 6] and kinds[-1] == 5 and kinds[260] == 1
    assert metadata["tokenizer.ggml.tokens"][299] == "[PAD299]"
    assert metadata["tokenizer.ggml.add_bos_token"] is True
    del metadata[gguf.HUGGING_FACE]  # as other programs read it
    without = tokenizer.from_files(gguf._tokenizer(metadata), "here")
    for text in ("ab a", " aab ba", "a\u00e9\u4e16", "</s>"):
        assert without.encode(text) == tokenizer.from_files(made, "here").encode(text), text
    assert load(tmp_path / "model.gguf").begin_ids == (1,)


@pytest.mark.parametrize("name", ["gpt-2", "smollm", "qwen2", "llama-bpe", "smaug-bpe", "tekken"])
def test_the_cut_into_words_keeps_its_name(name, tmp_path):
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    made = tokenizer_files.byte_level(["<|end|>", *letters, "ab"], ["a b"], [0], name)
    definition = json.loads(made["tokenizer.json"])
    assert words.KINDS[words.name_of(definition)] == words.KINDS[name]
    definition["pre_tokenizer"]["pretokenizers"][-1]["trim_offsets"] = False
    assert words.KINDS[words.name_of(definition)] == words.KINDS[name]


def test_our_own_tokenizers_have_no_name_but_a_warning(files, tmp_path, capsys):
    gguf_write.save(tmp_path / "model.gguf", LLAMA, random_params(LLAMA), files)
    assert "llama.cpp has no name for" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "path", "kind", "message"),
    [
        ({}, "model.bin", "f16", r"output=.*model.bin: give the name of a file that ends in .gguf"),
        ({}, "model.gguf", "q4_k_m", "type=q4_k_m: must be one of f32.*llama-quantize"),
        ({}, "other.gguf", "f16", "is not a file that jaxgpt wrote"),
        ({"adapter_dim": 4}, "model.gguf", "f16", "no architecture"),
        ({"sliding_window": 8}, "model.gguf", "f16", "model.sliding_window=8: no architecture"),
        ({"rope_scaling": RopeScaling("dynamic")}, "model.gguf", "f16", "model.rope_scaling="),
        (MIXTURE | {"bias": "qkv"}, "model.gguf", "f16", "model.bias=qkv: no architecture"),
    ],
)
def test_what_cannot_be_written_is_refused_by_name(model, path, kind, message, files, tmp_path):
    cfg = dataclasses.replace(LLAMA, **model)
    library.GGUFWriter(tmp_path / "other.gguf", "llama").close()
    writer = library.GGUFWriter(tmp_path / "other.gguf", "llama")
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.close()
    with pytest.raises(ValueError, match=message):
        gguf_write.save(tmp_path / path, cfg, random_params(cfg), files, kind)
    assert [file.name for file in tmp_path.iterdir()] == ["other.gguf"]


def test_a_unigram_tokenizer_is_refused(tmp_path):
    made = tokenizer_files.sentencepiece(["<unk>", "a"], [0.0, -1.0], [0], 0, unigram=True)
    with pytest.raises(ValueError, match=r"tokenizer.json: model 'Unigram'"):
        gguf_write.save(tmp_path / "model.gguf", LLAMA, random_params(LLAMA), made)
    assert not list(tmp_path.iterdir())


# tiktoken's own expressions (tiktoken_ext/openai_public.py).
CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|"
    r"\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
O200K = "|".join(
    [
        r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
        r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
        r"""\p{N}{1,3}""",
        r""" ?[^\s\p{L}\p{N}]+[\r\n/]*""",
        r"""\s*[\r\n]+""",
        r"""\s+(?!\S)""",
        r"""\s+""",
    ]
)
TEXTS = (
    "It's 12345 o'clock, I'LL say: \u4e16\u754c \u3072\u3089! \n\n  def f(x):\n\treturn x+10 # nai",
    "MixedCase HTTPServer don'T https://a.b/c?d=1//\n /* x */   \r\n  1 22 333 4444 \u00bd\u0663 x",
    "  \n \n\n   two\t\ttabs 'sdf 'S've\u2019s \u0130stanbul \u0391\u03b8\u03ae\u03bd\u03b1 ",
    "i\u0308ve \U0001f600\U0001f1e9 end  ",
)


@pytest.mark.parametrize(("name", "pattern"), [("gpt-4o", O200K), ("dbrx", CL100K)])
def test_words_are_cut_as_tiktoken_cuts_them(name, pattern):
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    entry = {"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}
    entry["pre_tokenizer"] = words.pre_tokenizer(words.KINDS[name])
    made = tokenizers.Tokenizer.from_str(json.dumps(entry))
    for text in TEXTS:
        found = [text[a:b] for _, (a, b) in made.pre_tokenizer.pre_tokenize_str(text)]
        expected = regex.findall(pattern, text)
        if name == "dbrx":  # the blanks before a line's end are apart in OpenAI's, not in Llama's
            found, expected = ([w for w in part if w.strip()] for part in (found, expected))
        assert found == expected


# In a process of its own, which may die. The token that is written is one of a letter, whatever
# the model finds: of a token without whole letters no probabilities would be told.
NEXT = """
import json, sys, urllib.request
import xllamacpp
how = xllamacpp.CommonParams()
how.model.path, how.n_ctx, how.cpuparams.n_threads, how.verbosity = sys.argv[1], 64, 1, -1
how.cache_type_k = how.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
server = xllamacpp.Server(how)
same = {"n_predict": 1, "n_probs": 280, "logit_bias": [[int(sys.argv[3]), 1000]]}
for prompt in json.loads(sys.argv[2]):
    body = json.dumps({"prompt": prompt, **same}).encode()
    request = urllib.request.Request(f"{server.listening_address}/completion", body)
    (step,) = json.load(urllib.request.urlopen(request))["completion_probabilities"]
    print(json.dumps({token["id"]: token["logprob"] for token in step["top_logprobs"]}))
"""


# It multiplies with q8_0 in as few bits as that has; of the standard deviation of scores:
NEAR = {"f16": 0.01, "f32": 0.01, "q8_0": 0.15}


@pytest.mark.parametrize(
    "kind", ["f16", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("f32", "q8_0"))]
)
@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_finds_the_same_probabilities(name, kind, files, tmp_path):
    pytest.importorskip("xllamacpp", reason="the llamacpp extra is not installed")
    tied = name != "llama-untied"  # also what llama.cpp opens only with a head of its own
    settings = MODELS[name] | {"vocab_size": 280, "tie_embeddings": tied}
    cfg = dataclasses.replace(LLAMA, **settings)
    path = str(tmp_path / "model.gguf")
    gguf_write.save(path, cfg, random_params(cfg), files, kind)
    lm = jaxgpt.load(path)
    draw, (letter,) = np.random.default_rng(0), lm.tokenizer.encode("a")
    # It turns a long model's positions by the long factors in short texts too.
    lengths = (40, 60) if name == "phi3-long" else (1, 6, 17, 40, 60)
    prompts = [draw.integers(0, 270, length).tolist() for length in lengths]
    command = [sys.executable, "-c", NEXT, path, json.dumps(prompts), str(letter)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode == -signal.SIGILL:
        pytest.skip("llama.cpp was built for instructions that this machine does not have")
    assert done.returncode == 0, done.stderr[-2000:]
    for prompt, line in zip(prompts, done.stdout.splitlines()[-len(prompts) :], strict=True):
        scores_V = np.asarray(lm.logits([prompt]))[0, -1]
        told = {int(id): logprob for id, logprob in json.loads(line).items()}
        told_V = np.array([told[id] for id in range(280)])
        found_V = np.asarray(jax.nn.log_softmax(scores_V))
        np.testing.assert_allclose(found_V, told_V, rtol=0, atol=NEAR[kind] * scores_V.std())


@pytest.mark.parametrize("kind", ["q4_1", "q5_0"])
def test_a_model_kept_in_its_blocks_computes_what_the_decoded_one_does(kind, files, tmp_path):
    cfg = dataclasses.replace(LLAMA, dtype="float32")
    path = tmp_path / "model.gguf"
    gguf_write.save(path, cfg, random_params(cfg), files, kind)
    plain, kept = jaxgpt.load(path), jaxgpt.load(path, quantize="stored")
    held = tree.flatten(kept.params)
    if kind != "q5_0" and compiled.load():  # which no program reads: plain arrays, the table apart
        assert held["blocks/attention/query/kernel/tiles"].dtype == np.uint8
    tokens = [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]]
    np.testing.assert_allclose(kept.logits(tokens), plain.logits(tokens), atol=2e-4)
    same = {"max_new_tokens": 8, "stop": "\0"}
    prompts = ["the cat", "12 dogs", "on"]
    assert kept.generate(prompts, **same) == plain.generate(prompts, **same)
    merged = peft.merge(kept.params)
    for name, leaf in tree.flatten(plain.params).items():
        np.testing.assert_allclose(tree.flatten(merged)[name], leaf, atol=1e-6, err_msg=name)


def test_low_rank_changes_are_an_adapter_on_the_files_own_rows(tmp_path):
    """base + alpha / rank * b @ a is the merged model's file, heads in their order included."""
    settings, rows = PeftConfig(kind="lora", rank=3, alpha=12.0), gguf.ARCHITECTURES["llama"][0]
    params = jax.tree.map(jnp.asarray, random_params(LLAMA))
    adapted = peft.add(settings, params, jax.random.key(0))
    part, rest = tree.partition(adapted, peft.trainable(settings, ""))
    adapted = tree.combine(jax.tree.map(lambda leaf: leaf + 0.1, part), rest)
    gguf_write.save_adapter(tmp_path / "adapter.gguf", LLAMA, adapted)
    reader = library.GGUFReader(tmp_path / "adapter.gguf")
    value = lambda key: reader.fields[key].contents()
    assert (value("general.type"), value("adapter.type")) == ("adapter", "lora")
    found = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    merged = dict(table.write(rows, LLAMA, peft.merge(adapted)))
    for name, plain in table.write(rows, LLAMA, params):
        if (a_RD := found.pop(f"{name}.lora_a", None)) is not None:
            b_FR = found.pop(f"{name}.lora_b")
            plain = plain + value("adapter.lora.alpha") / len(a_RD) * b_FR @ a_RD
        np.testing.assert_allclose(plain, merged[name], atol=1e-6)
    assert not found
    with pytest.raises(ValueError, match=r"ends in \.gguf"):
        gguf_write.save_adapter(tmp_path / "adapter", LLAMA, adapted)
