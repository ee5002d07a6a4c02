"""Files that are written whole or not at all."""

import os

import pytest

from jaxgpt import files


@pytest.mark.parametrize("content", ["Grüße\n", b"\xff\x00"])
def test_a_file_is_replaced_and_nothing_else_stays(tmp_path, content):
    file = tmp_path / "a.txt"
    file.write_text("old")
    assert files.write(file, content) == file
    assert file.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert list(tmp_path.iterdir()) == [file]


def test_what_fails_leaves_the_old_file_and_names_it(tmp_path, monkeypatch):
    file = tmp_path / "a.txt"
    file.write_text("old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*/a\.txt'"):
        files.write(file, "new")
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]
