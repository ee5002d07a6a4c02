"""The notes' builder; the chapters themselves are slow."""

import importlib
import json
from pathlib import Path

import pytest

pytest.importorskip("markdown_it")  # the extra `notes`
pytest.importorskip("latex2mathml")

from jaxgpt.notes import chapter, site  # after importorskip: both need the extra

ROOT = Path(__file__).parents[2]
CHAPTERS = sorted((ROOT / "notes").glob("[0-9]*.md"))
TEXT = """# 1 A title

Some $x^2$ and a [paper](https://arxiv.org/abs/1706.03762).

```python
a = 6
print("printed")
a * 7
```

```source jaxgpt.losses.dpo
```

::: exercise
Why?

::: answer
```python
assert a == 6
```
:::
:::
"""


def written(tmp_path: Path, text: str) -> chapter.Chapter:
    path = tmp_path / "01-title.md"
    path.write_text(text)
    return chapter.read(path)


def test_blocks_share_names_and_show_what_they_print(tmp_path: Path) -> None:
    done = chapter.run(written(tmp_path, TEXT))
    assert done.blocks[0].output == "printed\n42\n"
    assert done.title == "1 A title"


def test_quotes_are_the_code_of_today(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = chapter.run(written(tmp_path, TEXT))
    assert done.blocks[1].code.startswith("def dpo(")
    monkeypatch.delattr("jaxgpt.losses.dpo")
    with pytest.raises(ValueError, match=r"01-title.md, line 11: source jaxgpt.losses.dpo"):
        chapter.run(written(tmp_path, TEXT))


@pytest.mark.parametrize(
    ("code", "line", "why"),
    [("x = 1\nassert x == 2", 5, "AssertionError"), ("\n\n1 / 0", 6, "ZeroDivisionError")],
)
def test_failing_block_names_its_line(tmp_path: Path, code: str, line: int, why: str) -> None:
    with pytest.raises(ValueError, match=rf"01-title.md, line {line}: {why}"):
        chapter.run(written(tmp_path, f"# 1 A title\n\n```python\n{code}\n```\n"))


def test_block_that_should_raise_must(tmp_path: Path) -> None:
    text = "# 1 A title\n\n```python raises\n{}\n```\n"
    done = chapter.run(written(tmp_path, text.format("1 / 0")))
    assert done.blocks[0].output == "ZeroDivisionError: division by zero\n"
    with pytest.raises(ValueError, match="nothing was raised"):
        chapter.run(written(tmp_path, text.format("1 / 1")))


def test_unknown_flag_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="line 3: 'python hiden'"):
        written(tmp_path, "# 1 A title\n\n```python hiden\n1\n```\n")


FIGURE = "# 1 A\n\n```python figure\nimport matplotlib.pyplot as p\np.plot([1, 3, 2])\n```\n"


def test_pages_are_self_contained_and_the_same_bytes_twice(tmp_path: Path) -> None:
    built = []
    for name in ("one", "two"):
        done = chapter.run(written(tmp_path, TEXT + FIGURE.partition("\n\n")[2]))
        site.build([done], tmp_path / name)
        built.append({f.name: f.read_bytes() for f in sorted((tmp_path / name).iterdir())})
    assert built[0] == built[1]
    page = built[0]["01-title.html"].decode()
    for shown in ("<math", "<svg", "currentColor", "42", "<details", "as it is in the package"):
        assert shown in page
    assert 'src="http' not in page and "url(http" not in built[0]["style.css"].decode()


def test_notebook_holds_prose_and_code(tmp_path: Path) -> None:
    book = json.loads(site.notebook(chapter.run(written(tmp_path, TEXT))))
    kinds = [cell["cell_type"] for cell in book["cells"]]
    assert kinds == ["markdown", "code", "markdown", "markdown", "code"]
    assert "def dpo(" in book["cells"][2]["source"] and ":::" not in str(book)


def test_broken_links_are_found(tmp_path: Path) -> None:
    one = written(tmp_path, "# 1 A\n\n[a](02-none.html) [b](01-title.html) [c](../README.md)\n")
    assert [found.split(": ")[1] for found in site.broken_links([one], ROOT)] == ["02-none.html"]


@pytest.mark.slow
@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_chapter_holds(path: Path) -> None:
    chapter.run(chapter.read(path))


def test_links_and_quotes_of_all_chapters() -> None:
    every = [chapter.read(path) for path in CHAPTERS]
    assert not site.broken_links(every, ROOT)
    for one in every:
        for block in one.blocks:
            if block.kind == "source":
                assert chapter.source(block.flags[0], one.name)


def test_importing_the_package_does_not_need_the_extra() -> None:
    assert importlib.import_module("jaxgpt.notes")
