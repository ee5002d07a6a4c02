"""Reading text: encodings, archives, tables, held-out documents."""

import bz2
import gzip
import itertools
import json

import pytest

from jaxgpt.data import documents, rows, token_files
from jaxgpt.data.documents import Corpus
from jaxgpt.data.rows import read_text


def texts(*inputs, held_out=None, **options):
    """Whole documents of one split (or both)."""
    found, text = [], ""
    for piece in Corpus(tuple(map(str, inputs)), **options).pieces():
        if held_out is None or piece.held_out == held_out:
            text += piece.text
            if piece.ends:
                found.append(text)
                text = ""
    return found + [text] * bool(text)


def jsonl(path, table):
    path.write_text("".join(json.dumps(row) + "\n" for row in table))
    return path


def test_byte_order_mark_and_line_ends_are_normalised(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffé\r\nb\rc\n".encode())
    assert read_text(tmp_path / "a.txt") == "é\nb\nc\n"


@pytest.mark.parametrize("before", [b"", "é".encode(), b"x" * rows.BLOCK, b"x" * 1048575])
def test_invalid_utf8_is_reported_with_its_place(tmp_path, before):
    (tmp_path / "a.txt").write_bytes(before + b"\xc3(more")
    with pytest.raises(ValueError, match=rf"a\.txt: byte {len(before)} is not UTF-8.*iconv"):
        read_text(tmp_path / "a.txt")
    assert read_text(tmp_path / "a.txt", "replace") == before.decode() + "\ufffd(more"


def test_a_truncated_character_at_the_end_is_reported(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"abc\xe6\xbc")
    with pytest.raises(ValueError, match="byte 3 is not UTF-8"):
        read_text(tmp_path / "a.txt")


def test_binary_files_are_refused_whatever_the_policy(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"ab\0c")
    with pytest.raises(ValueError, match="byte 2 is NUL"):
        read_text(tmp_path / "a.txt", "replace")


@pytest.mark.parametrize("name", ["missing.txt", "folder", "empty.txt", "some/where.txt"])
def test_nothing_to_read_is_an_error_with_the_name(tmp_path, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match=name):
        texts(tmp_path / name)


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".bz2", bz2.compress)])
def test_archives_are_opened(tmp_path, suffix, pack):
    (tmp_path / f"a.txt{suffix}").write_bytes(pack(b"hello world"))
    assert "".join(texts(tmp_path / f"a.txt{suffix}")) == "hello world"
    (tmp_path / f"b.txt{suffix}").write_bytes(pack(b"hello world" * 99)[:-9])
    with pytest.raises(ValueError, match="damaged archive"):
        texts(tmp_path / f"b.txt{suffix}")


def test_one_text_file_is_cut_like_nanogpts(tmp_path):
    text = "".join(f"line {n} é\n" for n in range(1000))
    (tmp_path / "a.txt").write_text(text)
    assert texts(tmp_path / "a.txt", held_out=False) == [text[: int(len(text) * 0.9)]]
    assert texts(tmp_path / "a.txt", held_out=True) == [text[int(len(text) * 0.9) :]]


def test_of_few_files_the_end_of_each_is_held_out(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name * 9 + "z")
    assert texts(tmp_path, held_out=False) == ["a" * 9, "b" * 9]
    assert texts(tmp_path, held_out=True) == ["z", "z"]


def test_of_many_documents_every_tenth_is_held_out(tmp_path):
    jsonl(tmp_path / "a.jsonl", [{"text": f"row {n}"} for n in range(35)])
    assert texts(tmp_path / "a.jsonl", held_out=True) == ["row 9", "row 19", "row 29"]
    assert len(texts(tmp_path / "a.jsonl", held_out=False)) == 32


@pytest.mark.parametrize(("fraction", "count"), [(0.29, 29), (0.07, 7), (0.5, 50), (0.0, 0)])
def test_the_share_of_held_out_documents_is_exact(tmp_path, fraction, count):
    # 100 * 0.29 is 28.999999999999996 in floating point.
    file = jsonl(tmp_path / "a.jsonl", [{"text": "row"}] * 100)
    assert len(texts(file, held_out=True, val_fraction=fraction)) == count


def test_tables_give_the_same_documents_in_every_format(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    table = [{"id": n, "body": f"text\r\n{n} é\u2028x"} for n in range(12)]
    jsonl(tmp_path / "a.jsonl", table)
    (tmp_path / "a.json").write_text(json.dumps(table))
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "a.parquet")
    found = [texts(tmp_path / f"a.{kind}", column="body") for kind in ("jsonl", "json", "parquet")]
    assert found == [[row["body"] for row in table]] * 3
    for kind in ("jsonl", "json", "parquet"):
        with pytest.raises(
            ValueError, match=r" 1: needs text in column 'text'.*id, body.*--column"
        ):
            texts(tmp_path / f"a.{kind}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n\n{oops\n', "line 3: not JSON"),
        ('{"text": 5}\n', "line 1: needs text in column 'text', not 5"),
        ('{"text": "a\\ud83d"}\n', "line 1: holds half a surrogate"),
        ('"text"\n"text"\n', "line 1: must be an object, not str"),
    ],
)
def test_bad_rows_are_named(tmp_path, content, message):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        texts(tmp_path / "a.jsonl")


def test_long_files_are_cut_where_tokenizers_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "BLOCK", 100)
    text = "Some words, 12 3!\nmore\n\n   words;\n" * 100
    (tmp_path / "a.txt").write_text(text)
    pieces = [p.text for p in Corpus((str(tmp_path / "a.txt"),)).pieces() if not p.held_out]
    assert "".join(pieces) == text[: int(len(text) * 0.9)] and len(pieces) > 20
    assert all(a[-1].isalpha() and b[0] in " \n" for a, b in itertools.pairwise(pieces))


def test_text_without_line_breaks_stays_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "BLOCK", 100)
    monkeypatch.setattr(documents, "LONGEST_BLOCK", 500)
    (tmp_path / "a.txt").write_text("x" * 9000)
    assert max(map(len, texts(tmp_path / "a.txt"))) == 9000
    pieces = list(Corpus((str(tmp_path / "a.txt"),)).pieces())
    assert max(len(p.text) for p in pieces) <= 600


def test_the_standard_library_is_over_ten_megabytes_without_tests():
    files = documents.python_files()
    names = [str(file) for file in files]
    assert sum(file.stat().st_size for file in files) > 10e6
    assert names == sorted(names) and any(name.endswith("textwrap.py") for name in names)
    assert not any("/test/" in name or "site-packages" in name for name in names)


def test_a_source_file_that_is_not_utf8_is_read_by_its_cookie(tmp_path):
    (tmp_path / "a.py").write_bytes(b"# coding: latin-1\nx = '\xe9'\n")
    (tmp_path / "b.py").write_bytes(b"x = '\xe9'\n")
    assert documents._python_text(tmp_path / "a.py").endswith("x = 'é'\n")
    assert documents._python_text(tmp_path / "b.py") == ""


def test_the_description_changes_with_the_text(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    corpus = Corpus((str(tmp_path / "a.txt"),))
    first = corpus.describe()
    assert first == corpus.describe() and first["bytes"] == 3
    (tmp_path / "a.txt").write_text("two")
    assert corpus.describe()["sha256"] != first["sha256"]


def test_a_hub_name_without_network_is_one_clear_error(monkeypatch):
    hub = pytest.importorskip("huggingface_hub")

    def fail(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr(hub.HfApi, "dataset_info", fail)
    with pytest.raises(ValueError, match="someone/something: no such file or folder, and the Hub"):
        Corpus(("someone/something",)).describe()


def test_rows_without_text_are_counted_and_columns_named(tmp_path, capsys):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    table = [{"id": 1, "text": "a"}, {"id": 2, "text": None}, {"id": 3, "text": ""}]
    jsonl(tmp_path / "a.jsonl", table)
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        corpus = Corpus((str(tmp_path / name),), val_fraction=0.0)
        assert [piece.text for piece in corpus.pieces()] == ["a"]
        corpus.found.report("text")
        assert capsys.readouterr().err == (
            "3 rows, 2 dropped without text; columns read: text; not read: id\n"
        )


def test_the_advice_is_the_command_s_own(tmp_path):
    (tmp_path / "a.txt").write_bytes("Grüße".encode("latin-1"))
    jsonl(tmp_path / "a.jsonl", [{"body": "a"}])
    for name, options, training in [
        ("a.txt", "--errors replace", "scripts/prepare_data.py --errors replace"),
        ("a.jsonl", "--column", "--data.columns"),
    ]:
        with pytest.raises(ValueError, match=options) as error:
            texts(tmp_path / name)
        assert "scripts" not in str(error.value) and "--data" not in str(error.value)
        with pytest.raises(ValueError, match=training):
            token_files.prepare(tmp_path / name, tmp_path / "out", "byte")
    out = token_files.prepare(
        tmp_path / "a.jsonl", tmp_path / "ours", "byte", column="body", val_fraction=0
    )
    assert (out / "manifest.json").is_file()
