"""The one reader of rows: files, folders, globs and packed files, and what is wrong with them."""

import bz2
import gzip
import json
import lzma
from pathlib import Path

import pytest

from jaxgpt.data import rows

TABLE = [{"n": n, "text": f"row {n}\u2028é"} for n in range(3)]


def write(path: Path, table: list) -> Path:
    """In the format that the name says."""
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in table)
    if ".json" in path.suffixes:
        content = json.dumps(table, indent=1)
    if ".parquet" in path.suffixes:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(table), path.with_suffix(".plain"))
        raw = path.with_suffix(".plain").read_bytes()
        path.with_suffix(".plain").unlink()
    else:
        raw = content.encode()
    if path.suffix == ".zst":
        import pyarrow as pa

        with pa.CompressedOutputStream(pa.OSFile(str(path), "wb"), "zstd") as file:
            file.write(raw)
        return path
    pack = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
    path.write_bytes(pack.get(path.suffix, bytes)(raw))
    return path


def values(*paths: Path | str, **options) -> list:
    return [row for row, _ in rows.read([str(path) for path in paths], **options)]


@pytest.mark.parametrize("packed", ["", ".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".ndjson", ".parquet"])
def test_every_format_packed_or_not_holds_the_same_rows(kind, packed, tmp_path):
    assert values(write(tmp_path / f"a{kind}{packed}", TABLE)) == TABLE


def test_a_folder_a_glob_and_several_files_are_read_in_order(tmp_path):
    (tmp_path / "in").mkdir()
    for number, name in enumerate(["b.json", "a.jsonl.gz", "in/c.parquet"]):
        write(tmp_path / name, [{"n": number}])
    (tmp_path / "README.md").write_text("no rows")
    (tmp_path / ".hidden.json").write_text("{")
    assert values(tmp_path) == [{"n": 1}, {"n": 0}, {"n": 2}]
    assert values(tmp_path / "*.json*") == [{"n": 1}, {"n": 0}]
    assert values(tmp_path / "**" / "*.parquet") == [{"n": 2}]
    assert values(tmp_path / "in" / "c.parquet", tmp_path / "b.json") == [{"n": 2}, {"n": 0}]


def test_a_name_with_brackets_that_is_a_file_is_that_file(tmp_path):
    assert values(write(tmp_path / "a[1].jsonl", TABLE)) == TABLE


@pytest.mark.parametrize(
    "text",
    [
        '{"a": 1}', '\n\n{"a": 1}\n', '[{"a": 1}]', '{\n "a": 1\n}', '[\n{"a": 1}\n]\n',
        '{"data": [{"a": 1}]}', '{"train": [{"a": 1}]}', '{\n"rows": [\n{"a": 1}]}',
        '\ufeff{"a": 1}\r\n',
    ],
)  # fmt: skip
def test_json_is_read_however_it_is_laid_out(text, tmp_path):
    (tmp_path / "a.json").write_text(text, newline="")
    assert values(tmp_path / "a.json") == [{"a": 1}]


def test_objects_over_several_lines_may_follow_each_other(tmp_path):
    (tmp_path / "a.json").write_text("".join(json.dumps(row, indent=2) for row in TABLE))
    found = list(rows.read(str(tmp_path / "a.json")))
    assert [row for row, _ in found] == TABLE
    assert [place.rpartition(" ")[2] for _, place in found] == ["1", "4", "7"]


def test_a_row_of_messages_called_data_is_one_row(tmp_path):
    row = {"data": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}
    (tmp_path / "a.json").write_text(json.dumps(row))
    assert values(tmp_path / "a.json") == [row]


def test_what_stands_beside_the_rows_is_named(tmp_path, capsys):
    both = {"version": 2, "train": [{"a": 1}], "test": [{"a": 2}]}
    (tmp_path / "a.json").write_text(json.dumps(both))
    assert values(tmp_path / "a.json") == [{"a": 1}]
    assert "read from 'train'; it also holds version, test" in capsys.readouterr().err
    assert values(tmp_path / "a.json", split="test") == [{"a": 2}]


def test_arrow_s_nulls_are_dropped_at_any_depth(tmp_path):
    calls = [{"name": "a", "arguments": {"x": 1}}, {"name": "b", "arguments": {"y": [{"z": 2}]}}]
    table = [
        {"messages": [{"role": "assistant", "content": None, "tool_calls": [call]}]}
        for call in calls
    ]
    write(tmp_path / "a.parquet", table)
    assert values(tmp_path / "a.parquet") == table


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}\n{"a": 2', "a.jsonl, line 2: not JSON .*is it cut short"),
        (b'{"a": 1}\n{"a": "2', "a.jsonl, line 2: not JSON .*is it cut short"),
        (b'{"a": 1}\n{oops}\n{"a": 3}\n', "a.jsonl, line 2: not JSON .*column 2"),
        (b'[{"a": 1},\n{"a": 2},', "a.jsonl, line 2: not JSON .*is it cut short"),
        (b'[{"a": 1},\n{"a" 2}]', "a.jsonl, line 2: not JSON .*column 6"),
        (b"Gr\xfc\xdfe", "byte 2 is not UTF-8 .*iconv -f LATIN1"),
        (b"name,text\n", "a.jsonl, line 1: not JSON"),
        (b"\n \n", "a.jsonl: holds no rows"),
        (b"[]", "a.jsonl: holds no rows"),
        (b"7", "a.jsonl: must hold objects or a list of them, not 7"),
        (b"[" * 100_000, "a.jsonl, line 1: not JSON"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "a.jsonl, line 1: not JSON"),
        (b'{"a": "\\ud83d"}', "a.jsonl, line 1: holds half a surrogate pair"),
        (b"\x1f\x8b", "is not UTF-8"),
        (b"", "a.jsonl: the file is empty"),
    ],
)
def test_what_is_no_rows_is_one_line_with_file_and_line(content, message, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        values(tmp_path / "a.jsonl")


@pytest.mark.parametrize("packed", [".gz", ".bz2", ".xz", ".zst"])
def test_a_cut_archive_is_named(packed, tmp_path):
    file = write(tmp_path / f"a.jsonl{packed}", TABLE * 99)
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ValueError, match=rf"a.jsonl{packed}: damaged archive"):
        values(file)


@pytest.mark.parametrize("cut", [4, 100, 200])
def test_a_cut_parquet_file_is_named(cut, tmp_path):
    file = write(tmp_path / "a.parquet", TABLE)
    file.write_bytes(file.read_bytes()[:-cut])
    with pytest.raises(ValueError, match=r"a.parquet: not a Parquet file, or cut short"):
        values(file)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.jsonl", "nowhere.jsonl: no such file or folder"),
        ("*.jsonl", "no file has such a name"),
        ("memory://bucket/a.jsonl", "no such file or folder"),
        ("", None),
    ],
)
def test_what_is_not_there_is_named(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if message is None:
        assert values(name) == []
        return
    with pytest.raises(ValueError, match=message):
        values(name)


def test_a_folder_without_rows_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match=r"holds no file that ends in \.json, "):
        values(tmp_path)
