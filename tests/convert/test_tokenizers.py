"""Where a model meets its tokenizer: ids, begin and end tokens, sentencepiece's files."""

import base64
import io
import json
import os
import random

import numpy as np
import pytest
import tiktoken
import tokenizers

from jaxgpt import tree
from jaxgpt.config import ModelConfig
from jaxgpt.convert import byte_pairs, hf, spm, table, tensors, tokenizer_files, words
from jaxgpt.convert.load import load
from jaxgpt.data import engines
from jaxgpt.data import tokenizer as readers

LLAMA = ModelConfig(
    vocab_size=32, context_length=16, num_layers=1, model_dim=16, num_heads=2, mlp_dim=24,
    mlp="gated", activation="silu", norm="rmsnorm", position="rope",
)  # fmt: skip
WORDS = ["<unk>", "<s>", "</s>", "▁", "a", "b", "▁a", "<", "/", "s", ">", "/s", "<|im_end|>"]
UNIGRAM = {
    "type": "Unigram", "unk_id": 0, "byte_fallback": False,
    "vocab": [[word, -float(i)] for i, word in enumerate(WORDS)],
}  # fmt: skip
LEVEL = {
    "type": "WordLevel", "unk_token": "<unk>", "vocab": {word: i for i, word in enumerate(WORDS)},
}  # fmt: skip
SPACES = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}


def definition(model=UNIGRAM, special=("<s>", "</s>", "<|im_end|>"), before=(), after=()):
    """A tokenizer.json whose texts get the tokens `before` and `after` them."""
    made = tokenizers.Tokenizer.from_str(json.dumps({"version": "1.0", "model": model}))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    made.decoder = tokenizers.decoders.Metaspace(prepend_scheme="first", split=False)
    made.add_special_tokens([token for token in special])
    if before or after:
        ids = [(token, made.token_to_id(token)) for token in {*before, *after}]
        single = " ".join([*before, "$A", *after])
        made.post_processor = tokenizers.processors.TemplateProcessing(single, None, ids)
    return made.to_str().encode()


def write(path, files, cfg=LLAMA):
    shapes = table.parameter_shapes(cfg).items()
    hf.save(
        path, cfg, tree.nest({name: np.ones(shape, np.float32) for name, shape in shapes}),
        tokenizer_files=files,
    )  # fmt: skip
    return path


def settings(**told):
    return {"tokenizer_config.json": json.dumps(told).encode()}


def generation(**told):
    return {"generation_config.json": json.dumps(told).encode()}


@pytest.mark.parametrize("vocab_size", [12, 13, 14, 64])
def test_ids_beyond_the_embedding_are_refused_when_loading(tmp_path, vocab_size):
    cfg = ModelConfig(**{**vars(LLAMA), "vocab_size": vocab_size})
    files = {"tokenizer.json": definition()} | settings(eos_token="</s>")
    write(tmp_path / "model", files, cfg)
    if vocab_size >= len(WORDS):
        assert load(tmp_path / "model").tokenizer.vocab_size == len(WORDS)
        return
    with pytest.raises(
        ValueError, match=r"model: model.vocab_size=12: .*up to 12 \('<.im_end.>'\)"
    ):
        load(tmp_path / "model")


def test_an_end_token_beyond_the_embedding_is_refused(tmp_path):
    files = {"tokenizer.json": definition()} | generation(eos_token_id=[2, 32])
    with pytest.raises(ValueError, match=r"eos_token_id=\[2, 32\]: must lie below the 32 rows"):
        load(write(tmp_path / "model", files | settings(eos_token="</s>")))


@pytest.mark.parametrize(
    ("files", "stops"),
    [
        (settings(eos_token="<|im_end|>") | generation(eos_token_id=2), (2, 12)),
        (
            settings(eos_token={"content": "<|im_end|>"}) | generation(eos_token_id=[2, 1]),
            (1, 2, 12),
        ),
        (settings(eos_token="</s>") | generation(pad_token_id=0), (2,)),
        (
            {"special_tokens_map.json": b'{"eos_token": "</s>"}'} | generation(eos_token_id=12),
            (2, 12),
        ),
        (settings(eos_token="s") | generation(eos_token_id=2), (2, 9)),  # a piece, not added
    ],
)
def test_end_tokens_are_the_unions(tmp_path, files, stops):
    files = {"tokenizer.json": definition()} | files
    assert load(write(tmp_path / "model", files)).stop_ids == stops


def test_an_end_token_without_an_id_is_refused(tmp_path):
    files = {"tokenizer.json": definition()} | settings(eos_token="<eot>")
    with pytest.raises(ValueError, match="eos_token='<eot>' is not in the vocabulary"):
        load(write(tmp_path / "model", files))


@pytest.mark.parametrize(
    ("before", "after", "told", "begin"),
    [
        ((), ("</s>",), {}, ()),
        (("<s>",), ("</s>",), {}, (1,)),
        (("<s>", "<|im_end|>"), (), {}, (1, 12)),
        ((), (), {}, ()),
        (("<s>",), (), {"add_bos_token": False}, (1,)),
        (("<s>",), (), {"add_eos_token": True, "bos_token": "<s>"}, (1,)),
    ],
)
def test_a_text_begins_as_in_transformers(tmp_path, before, after, told, begin):
    transformers = pytest.importorskip("transformers")
    told = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"} | told
    files = {"tokenizer.json": definition(before=before, after=after)} | settings(**told)
    write(tmp_path / "model", files)
    assert load(tmp_path / "model").begin_ids == begin
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")("ab").input_ids
    assert tuple(ids[: len(begin)]) == begin and ids[len(begin)] not in (1, 2, 12)


def test_a_made_tokenizer_begins_texts_in_transformers_too(tmp_path):
    transformers = pytest.importorskip("transformers")
    files = tokenizer_files.sentencepiece(WORDS, [-float(i) for i in range(13)], [0, 1, 2, 12], 0)
    named = {"bos_token": "<s>", "eos_token": "</s>"}
    for begins in (True, False):
        made = tokenizer_files.with_settings(files, **named, add_bos_token=begins)
        path = write(tmp_path / str(begins), made)
        ids = transformers.AutoTokenizer.from_pretrained(path)("aba").input_ids
        loaded = load(path)
        assert ids == [*loaded.begin_ids, *loaded.tokenizer.encode("aba")]
        assert loaded.begin_ids == ((1,) if begins else ())


@pytest.mark.parametrize("model", [UNIGRAM, LEVEL])
def test_special_tokens_in_plain_text_stay_text(model):
    reader = readers.from_files({"tokenizer.json": definition(model)}, "here")
    for text in ("</s>", "a</s>", "<s>", "a<|im_end|>b"):
        assert not {1, 2, 12} & set(reader.encode(text)), text
        assert not {1, 2, 12} & set(reader.encode_batch([text])[0]), text
        assert {1, 2, 12} & set(reader.encode(text, allow_special=True)), text
    assert reader.encode("aba") == reader.encode("aba", allow_special=True)


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_exported_files_have_the_usual_mode(tmp_path, mask):
    before = os.umask(mask)
    try:
        write(tmp_path / "model", {"tokenizer.json": definition()})
        modes = {file.stat().st_mode & 0o777 for file in (tmp_path / "model").iterdir()}
        tensors.save_file(tmp_path / "one.safetensors", {"a": np.ones(2, np.float32)})
        modes.add((tmp_path / "one.safetensors").stat().st_mode & 0o777)
    finally:
        os.umask(before)
    assert modes == {0o666 & ~mask}


TEXT = [
    "".join(random.Random(i).choices("abcde fgh  ij. klm, n\u00e9\u4e16", k=60)) for i in range(400)
]


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity",
         "remove_extra_whitespaces": False},
        {"model_type": "bpe", "add_dummy_prefix": False},
        {"model_type": "unigram"},
        {"model_type": "unigram", "byte_fallback": True, "normalization_rule_name": "nmt_nfkc_cf"},
    ],
)  # fmt: skip
def test_tokenizer_model_gives_sentencepieces_ids(options, tmp_path):
    library = pytest.importorskip("sentencepiece")
    made = io.BytesIO()
    library.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT), model_writer=made, vocab_size=290, minloglevel=2,
        character_coverage=0.98, hard_vocab_limit=False, **options,
    )  # fmt: skip
    theirs = library.SentencePieceProcessor(model_proto=made.getvalue())
    cfg = ModelConfig(**{**vars(LLAMA), "vocab_size": 320})
    found = load(write(tmp_path / "model", {"tokenizer.model": made.getvalue()}, cfg))
    assert found.stop_ids == (theirs.eos_id(),)
    for text in [*TEXT[:40], "x</s>", " two  blanks ", "", "\u00c9 \uff21", "q\u4e17 zz"]:
        ids = found.tokenizer.encode(text)
        assert ids == theirs.encode(text), text
        if theirs.unk_id() not in ids:  # which it writes as " ⁇ "
            assert found.tokenizer.decode(ids) == theirs.decode(ids), text


@pytest.mark.parametrize(
    "content", [b"", b"\x0a", b"\x0a\xff\xff\xff\xff\xff", b"hello there", b"\x08" * 90]
)
def test_a_damaged_tokenizer_model_is_refused(content, tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer\.model: "):
        spm.complete({"tokenizer.model": content})


def test_a_directory_without_a_vocabulary_is_named(tmp_path):
    write(tmp_path / "model", settings(eos_token="</s>"))
    with pytest.raises(ValueError, match=rf"{tmp_path}/model: .*holds no tokenizer.json"):
        load(tmp_path / "model")
    assert tokenizer_files.special_tokens(settings(eos_token="</s>")) == {"eos_token": "</s>"}


TEXTS = (
    "def add(a, b):\n    return a + b  # 12345\n\n\n  x", "Der Zug fährt um 7.45 Uhr ab, isn't it?",
    "日本語のテキスト、한국어, ça va ? ÉTÉ", "  \t leading and trailing  ", "a" * 40 + "!!!???...",
    "The theatre THEATRE TheTheatre iPhone's", "e\u0301 \U0001f600\U0001f468\u200d\U0001f469",
)  # fmt: skip


@pytest.fixture(scope="module")
def learned():
    """A byte-level vocabulary: bytes by rank."""
    return readers.train_bpe(TEXTS * 3, 600).ranks


def tekken(ranks, special):
    bytes_first = sorted(ranks, key=lambda token: token if len(token) == 1 else b"")
    order = sorted(bytes_first, key=lambda token: ranks[token] if len(token) > 1 else -1)
    vocab = [
        {"rank": i, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
        for i, token in enumerate(order)
    ]
    settings = {
        "pattern": words.TEKKEN, "num_vocab_tokens": len(vocab),
        "version": "v11" if special else "v3",
        "default_num_special_tokens": 40, "default_vocab_size": 40 + len(vocab) - 7,
    }  # fmt: skip
    told = {"config": settings, "vocab": vocab}
    return told | ({"special_tokens": special} if special else {})


NAMED = [{"rank": i, "token_str": text, "is_control": True}
         for i, text in enumerate(("<unk>", "<s>", "</s>", "[THINK]"))]  # fmt: skip


@pytest.mark.parametrize("special", [None, NAMED])
def test_tekken_is_ranks_behind_special_tokens(learned, special):
    told = tekken(learned, special)
    held = [base64.b64decode(entry["token_bytes"]) for entry in told["vocab"][:-7]]
    reference = tiktoken.Encoding(
        "", pat_str=words.TEKKEN, mergeable_ranks={t: i for i, t in enumerate(held)},
        special_tokens={},
    )  # fmt: skip
    files = byte_pairs.complete({"tekken.json": json.dumps(told).encode()})
    ours = readers.from_files(files, "x")
    for text in TEXTS:
        assert ours.encode(text) == [40 + i for i in reference.encode_ordinary(text)]
        assert ours.decode(ours.encode(text)) == text
    assert ours.engine.encode("").ids == [1]  # <s>


@pytest.mark.parametrize("special", [None, NAMED])
def test_tekken_gives_the_ids_of_mistrals_own_library(learned, special, tmp_path):
    theirs = pytest.importorskip("mistral_common.tokens.tokenizers.tekken")
    file = tmp_path / "tekken.json"
    file.write_text(json.dumps(tekken(learned, special)))
    reference = theirs.Tekkenizer.from_file(file)
    files = byte_pairs.complete(tokenizer_files.read(tmp_path))
    ours = readers.from_files(files, "x")
    assert ours.vocab_size == reference.n_words
    for text in TEXTS:
        ids = reference.encode(text, bos=False, eos=False)
        assert ours.encode(text) == ids
        assert ours.decode(ids) == text
    assert tokenizer_files.own_ids(files)["bos_token_id"] == reference.bos_id
    assert tokenizer_files.own_ids(files)["eos_token_id"] == reference.eos_id
    assert ours.engine.encode("a").ids == reference.encode("a", bos=True, eos=False)
    assert "tekken.json" not in files


def test_a_damaged_tekken_is_refused(learned):
    whole = tekken(learned, None)
    for change, message in (
        ({"vocab": 3}, "tekken.json: is damaged"), ({"config": {}}, "tekken.json: is damaged"),
        ({"config": whole["config"] | {"pattern": "a"}}, "config.pattern: cuts words in another"),
        ({"special_tokens": [{"rank": 99, "token_str": "a"}]}, "tekken.json: is damaged"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            byte_pairs.complete({"tekken.json": json.dumps(whole | change).encode()})


def pairs(ranks):
    """vocab.json and merges.txt."""
    letters = engines.byte_chars()
    vocab = {"".join(letters[b] for b in token): i for token, i in ranks.items()}
    merges = [" ".join(pair) for pair in engines.merges_of(ranks)]
    return vocab, "#version: 0.2\n" + "\n".join(merges) + "\n"


def test_vocab_and_merges_are_cut_as_their_class_does(learned, tmp_path):
    transformers = pytest.importorskip("transformers")
    vocab, merges = pairs(learned)
    end = len(vocab)
    decoder = {
        str(end + i): {"content": text, "special": special, "lstrip": False, "rstrip": False,
                       "normalized": False, "single_word": False}
        for i, (text, special) in enumerate(
            {"<|endoftext|>": True, "<|im_end|>": True, "<tool_call>": False}.items())
    }  # fmt: skip
    told = {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": decoder,
            "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": None}  # fmt: skip
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text(merges)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(told))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    files = byte_pairs.complete(tokenizer_files.read(tmp_path))
    ours = readers.from_files(files, "x")
    for text in (*TEXTS, "a<tool_call>b"):
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False), text
    assert tokenizer_files.own_ids(files) == {"eos_token_id": end + 1, "pad_token_id": end}
    # A class of which we know no way to cut is no GPT-2.
    other = files | {"tokenizer_config.json": b'{"tokenizer_class": "OtherTokenizer"}'}
    del other["tokenizer.json"]
    with pytest.raises(ValueError, match="tokenizer_class='OtherTokenizer': how it cuts words"):
        byte_pairs.complete(other)
    plain = {name: files[name] for name in ("vocab.json", "merges.txt")}
    assert byte_pairs.complete(plain) == plain  # GPT-2's own way
