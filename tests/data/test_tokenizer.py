"""Tokenizers: round trips, equality of tiktoken's and `tokenizers`' ids, special tokens."""

import json
import shutil
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgpt.data import tokenizer
from jaxgpt.data.engines import GPT2_PATTERN, Bpe, HuggingFace, byte_chars, byte_level

SHARED = Path(__file__).parents[2] / "../shared/data"
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="../shared/data is missing")

WORDS = "The 12 cats don't sit on 2024 mats;\n\n    if x == 10:\n\treturn 'ça va — über'  \n"
# Any text that Python can hold, except the halves of surrogate pairs.
TEXTS = st.text(st.characters(exclude_categories=["Cs"])) | st.text("a1 '\n\t.é\u3000st")


@pytest.fixture(scope="module")
def own() -> Bpe:
    return tokenizer.train_bpe([WORDS * 3, Path(__file__).read_text()], 400)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    # tiktoken deletes what it takes for damaged, so it gets a copy.
    for file in (SHARED / "tiktoken_cache").iterdir():
        shutil.copyfile(file, tmp_path / file.name)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    return tmp_path


@settings(max_examples=200, deadline=None)
@given(text=TEXTS)
def test_any_text_survives_the_round_trip(own, text):
    for each in (own, byte_level()):
        assert each.decode(each.encode(text)) == text
        assert each.decode_bytes(each.encode(text)) == text.encode()


@settings(max_examples=200, deadline=None)
@given(text=TEXTS)
def test_tiktoken_and_tokenizers_give_the_same_ids(own, tmp_path_factory, text):
    file = tmp_path_factory.getbasetemp() / "own.json"
    if not file.exists():
        own.save(file)
    other = tokenizers.Tokenizer.from_file(str(file))
    other.encode_special_tokens = True
    assert other.encode(text).ids == own.encode(text)


def test_the_saved_merges_are_those_that_were_learned(own, tmp_path):
    learner = tokenizers.Tokenizer(tokenizers.models.BPE())
    own.save(tmp_path / "own.json")
    saved = json.loads((tmp_path / "own.json").read_text())
    learner.pre_tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "own.json")).pre_tokenizer
    learner.train_from_iterator(
        [WORDS * 3, Path(__file__).read_text()],
        tokenizers.trainers.BpeTrainer(
            vocab_size=396, show_progress=False,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        ),
    )  # fmt: skip
    assert saved["model"]["merges"] == json.loads(learner.to_str())["model"]["merges"]


def test_digits_stand_alone(own):
    ids = own.encode("in 2024, 12345")
    assert [own.decode([i]) for i in ids if any(c.isdigit() for c in own.decode([i]))] == list(
        "202412345"
    )


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_special_tokens_in_text_are_text_unless_allowed(own, kind):
    each = byte_level() if kind == "byte" else own
    text = "a<|endoftext|>b<|im_end|>"
    plain, special = each.encode(text), each.encode(text, allow_special=True)
    assert not set(plain) & set(each.special.values())
    assert special.count(each.eos_id) == 1 and each.special["<|im_end|>"] in special
    assert each.decode(plain) == each.decode(special) == text


def test_byte_ids_are_the_bytes_of_utf8():
    assert byte_level().encode("né") == [110, 195, 169]
    assert (byte_level().vocab_size, byte_level().eos_id) == (260, 256)


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_saving_and_loading_gives_the_same_tokenizer(own, tmp_path, kind):
    each = byte_level() if kind == "byte" else own
    each.save(tmp_path / "tokenizer.json")
    for name in (tmp_path, tmp_path / "tokenizer.json"):
        again = tokenizer.load(name)
        assert type(again) is type(each) and again.fingerprint == each.fingerprint
        assert again.encode(WORDS) == each.encode(WORDS) and again.special == each.special


def test_other_tokenizers_have_other_fingerprints(own):
    other = tokenizer.train_bpe([WORDS * 3, Path(__file__).read_text()], 401)
    assert len({own.fingerprint, other.fingerprint, byte_level().fingerprint}) == 3


def test_batches_equal_single_texts_even_with_endless_blanks(own):
    texts = [WORDS, "", "x" + " " * 1_000_000 + "y", "z"]
    assert own.encode_batch(texts) == [own.encode(text) for text in texts]
    assert own.decode(own.encode(texts[2])) == texts[2]


def test_unknown_ids_decode_to_the_replacement_character(own):
    assert own.decode([*own.encode("a"), 10**6]) == byte_level().decode([97, 999]) == "a\ufffd"


def test_half_a_surrogate_pair_is_refused(own):
    for each in (own, byte_level()):
        with pytest.raises(ValueError, match=r"surrogate.*character 2"):
            each.encode("ab\ud800")


def test_a_foreign_tokenizer_json_runs_in_tokenizers(tmp_path):
    engine = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    engine.normalizer = tokenizers.normalizers.NFC()
    engine.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<unk>", "</s>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    engine.train_from_iterator([WORDS], trainer)
    engine.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "</s>"}}')
    found = tokenizer.load(tmp_path)
    assert isinstance(found, HuggingFace) and found.eos_id == engine.token_to_id("</s>")
    assert found.decode_bytes(found.encode("naïve 漢</s>")) == "naïve 漢</s>".encode()
    assert found.eos_id not in found.encode("</s>")
    assert found.encode("</s>", allow_special=True) == [found.eos_id]
    assert found.encode_batch(["a b", "c"]) == [found.encode("a b"), found.encode("c")]
    found.save(tmp_path / "again.json")
    assert tokenizer.load(tmp_path / "again.json").fingerprint == found.fingerprint


@needs_shared
def test_gpt2_has_its_published_ids(cache):
    gpt2 = tokenizer.load("gpt2")
    assert gpt2.encode("Hello world!<|endoftext|>", allow_special=True) == [15496, 995, 0, 50256]
    assert (gpt2.vocab_size, gpt2.eos_id) == (50257, 50256)


@needs_shared
def test_gpt2_from_its_two_files_is_gpt2(cache, tmp_path):
    named = tokenizer.load("gpt2")
    for file in cache.iterdir():
        start = file.read_bytes()[:9]
        if start.startswith((b"{", b"#version")):
            file.rename(tmp_path / ("merges.txt" if start.startswith(b"#") else "vocab.json"))
    files = tokenizer.load(tmp_path)
    assert isinstance(files, Bpe) and files.fingerprint == named.fingerprint
    assert files.encode(WORDS) == named.encode(WORDS) and files.eos_id == 50256


@needs_shared
@pytest.mark.slow
def test_a_named_encoding_with_gaps_survives_saving(cache, tmp_path):
    named = tokenizer.load("cl100k_base")
    named.save(tmp_path / "tokenizer.json")
    saved = tokenizer.load(tmp_path)
    assert saved.fingerprint == named.fingerprint and saved.vocab_size == named.vocab_size
    text = (SHARED / "text/wikitext2_valid.txt").read_text()
    assert saved.encode(text) == named.encode(text) and saved.eos_id == named.eos_id


@needs_shared
@pytest.mark.slow
def test_real_books_give_the_same_ids_in_both_engines(tmp_path):
    texts = [file.read_text() for file in sorted((SHARED / "text/gutenberg").iterdir())]
    own = tokenizer.train_bpe(texts[:6], 4096)
    own.save(tmp_path / "own.json")
    other = tokenizers.Tokenizer.from_file(str(tmp_path / "own.json"))
    for text in texts:
        assert other.encode(text).ids == own.encode(text)


def test_without_network_and_cache_one_line_says_what_to_do(tmp_path, monkeypatch):
    import tiktoken

    def fail(name):
        raise ConnectionError("no network")

    monkeypatch.setattr(tiktoken, "get_encoding", fail)
    with pytest.raises(ValueError, match=r"TIKTOKEN_CACHE_DIR.*train_tokenizer\.py"):
        tokenizer.load("gpt2")


def test_a_network_that_never_answers_is_given_up(monkeypatch):
    import time

    import tiktoken

    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: time.sleep(5))
    monkeypatch.setattr(tokenizer, "DOWNLOAD_SECONDS", 0.05)
    with pytest.raises(ValueError, match="cannot be downloaded"):
        tokenizer.load("gpt2")


@pytest.mark.parametrize(
    ("content", "message"),
    [("not json", "not JSON"), ('{"a": 1}', "no model"), ('{"model": {}}', "reads")],
)
def test_a_bad_tokenizer_file_is_refused(tmp_path, content, message):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        tokenizer.load(tmp_path)


def test_a_vocabulary_smaller_than_the_bytes_is_refused():
    with pytest.raises(ValueError, match="vocab_size=259: must be at least 260"):
        tokenizer.train_bpe([WORDS], 259)


def test_byte_chars_are_gpt2s():
    assert set(byte_chars().values()) == set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    assert byte_chars()[32] == "Ġ" and byte_chars()[10] == "Ċ" and " " in GPT2_PATTERN
