"""llama2.c's files: the real stories260K, and damaged ones."""

import itertools
import struct
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from jaxgpt import tree
from jaxgpt.convert import hf, llama2c, table, tokenizer_files
from jaxgpt.sampling import sample

FOLDER = Path(__file__).parents[2] / "../shared/data/models/stories260K"
needs_stories = pytest.mark.skipif(not FOLDER.exists(), reason="../shared/data is not here")

# The first lines of its README's sample at temperature 0.
STORY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
    "One day, she saw a big, red ball. She wanted to play with it, but it was too high.\n"
    "Lily's mom said, \"Lily, let's go to the park.\" Lily was sad and didn't know what to do. "
    'She said, "I want to play with your ball, but I can\'t find it."'
)


@pytest.fixture(scope="module")
def stories():
    return llama2c.load(FOLDER / "stories260K.bin")


@needs_stories
def test_the_known_story_is_told(stories):
    cfg, params, files = stories
    engine = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
    ids = tokenizer_files.special_ids(files)
    settings = sample.Sampling(max_new_tokens=160, temperature=0)
    (found,) = sample.generate(
        cfg, params, [[ids["bos_token_id"]]], settings, stop_ids=[ids["eos_token_id"]]
    )
    assert engine.decode(found.tokens).startswith(STORY)


@needs_stories
def test_the_text_is_cut_as_sentencepiece_cuts_it(stories):
    engine = tokenizers.Tokenizer.from_str(stories[2]["tokenizer.json"].decode())
    plain = lambda text: engine.encode(text, add_special_tokens=False).ids
    # By run.c's own encoder: the best-scoring pair merges first, unknown characters are bytes.
    assert plain(STORY) == run_c_encode(STORY)
    odd = "naïve  «two spaces», 日本 and\ttabs"
    assert plain(odd) == run_c_encode(odd)
    assert engine.decode(plain(odd)) == odd
    assert engine.encode(odd).ids == [1, *plain(odd)]  # a text begins with <s>


@needs_stories
def test_the_story_teller_survives_the_way_through_hugging_face(stories, tmp_path):
    cfg, params, files = stories
    hf.save(tmp_path / "hf", cfg, params, tokenizer_files=files)
    cfg_again, params_again = hf.load(tmp_path / "hf")
    assert (cfg_again.rope_base, cfg_again.kv_heads) == (cfg.rope_base, 4)
    expected = tree.flatten(params)
    for name, leaf in tree.flatten(params_again).items():
        assert np.array_equal(leaf, expected[name]), name
    assert tokenizer_files.read(tmp_path / "hf")["tokenizer.json"] == files["tokenizer.json"]


def test_an_untied_head_is_read(tmp_path):
    cfg, arrays = write_model(tmp_path / "model.bin", tied=False)
    write_vocabulary(tmp_path / "tok.bin", 20)
    found, params, _ = llama2c.load(tmp_path / "model.bin")
    assert found == cfg
    assert np.array_equal(params["head"]["kernel"].T, arrays["classifier"])
    # RoPE's neighbours 2i and 2i + 1 have become i and i + H/2.
    query_DNH = np.asarray(params["blocks"]["attention"]["query"]["kernel"][1]).reshape(8, 2, 4)
    stored_NHD = arrays["wq.1"].reshape(2, 4, 8)
    for i in range(2):
        assert np.array_equal(query_DNH[:, :, i].T, stored_NHD[:, 2 * i])
        assert np.array_equal(query_DNH[:, :, i + 2].T, stored_NHD[:, 2 * i + 1])


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ((8, 12, 2, 2, 1, 20, -5), "not positive"),
        ((8, 12, 2**31 - 1, 2, 1, 20, 16), "where its header asks for"),
        (
            (2**31 - 2, 2**31 - 1, 2**31 - 1, 1, 1, 2**31 - 1, 2**31 - 1),
            "where its header asks for",
        ),
        ((8, 12, 2, 3, 1, 20, 16), "num_heads=3"),
    ],
)
def test_headers_that_lie_are_refused(tmp_path, header, message):
    write_model(tmp_path / "model.bin", tied=True)
    content = (tmp_path / "model.bin").read_bytes()
    (tmp_path / "model.bin").write_bytes(llama2c.HEADER.pack(*header) + content[28:])
    with pytest.raises(ValueError, match=message):
        llama2c.load(tmp_path / "model.bin")


@pytest.mark.parametrize("cut", [0, 20, 100, -1])
def test_truncated_models_are_refused(tmp_path, cut):
    write_model(tmp_path / "model.bin", tied=True)
    (tmp_path / "model.bin").write_bytes((tmp_path / "model.bin").read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"model\.bin"):
        llama2c.load(tmp_path / "model.bin")


@pytest.mark.parametrize("size", [-1, 2**31 - 1])
def test_a_vocabulary_that_lies_is_refused(tmp_path, size):
    write_vocabulary(tmp_path / "tok.bin", 20)
    content = bytearray((tmp_path / "tok.bin").read_bytes())
    content[8:12] = struct.pack("<i", size)
    (tmp_path / "tok.bin").write_bytes(content)
    with pytest.raises(ValueError, match=r"not a llama2\.c vocabulary of 20"):
        llama2c.read_tokenizer(tmp_path / "tok.bin", 20)


def write_model(path, tied):
    """A random model of two layers as llama2.c's export.py lays it out."""
    header = (8, 12, 2, 2, 1, 20 if tied else -20, 16)
    path.write_bytes(llama2c.HEADER.pack(*header))
    cfg = llama2c._config(path)
    random, arrays = np.random.default_rng(0), {}
    for row in llama2c.TABLE:
        if tied and row[1] == "classifier":
            continue
        for name, _ in table.pieces(row, cfg):
            shape = table.their_shape(row[2], table.sizes(cfg))
            arrays[name] = random.normal(size=shape).astype(np.float32)
    path.write_bytes(path.read_bytes() + b"".join(a.tobytes() for a in arrays.values()))
    return cfg, arrays


def write_vocabulary(path, count):
    pieces = ["<unk>", "\n<s>\n", "\n</s>\n", *"abcdefghijklmnopqrstuvwxyz"][:count]
    entries = (struct.pack("<fi", -i, len(p.encode())) + p.encode() for i, p in enumerate(pieces))
    path.write_bytes(struct.pack("<i", 7) + b"".join(entries))


def run_c_encode(text):
    """The algorithm of llama2.c's run.c, which merges the best-scoring pair until none is left."""
    content, pieces, offset = (FOLDER / "tok512.bin").read_bytes(), [], 4
    while offset < len(content):
        score, size = struct.unpack_from("<fi", content, offset)
        pieces.append((content[offset + 8 : offset + 8 + size], score))
        offset += 8 + size
    id_of = {piece: i for i, (piece, _) in enumerate(pieces)}
    ids = []
    for char in " " + text:
        known = id_of.get(char.encode())
        ids += [known] if known is not None else [byte + 3 for byte in char.encode()]
    while True:
        joined = [id_of.get(pieces[a][0] + pieces[b][0]) for a, b in itertools.pairwise(ids)]
        found = [(-pieces[i][1], place) for place, i in enumerate(joined) if i is not None]
        if not found:
            return ids
        place = min(found)[1]
        ids[place : place + 2] = [joined[place]]
