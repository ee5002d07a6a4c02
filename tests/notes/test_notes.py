"""The notes' builder; the chapters themselves are slow."""

import ast
import importlib
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.data import chat

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


THREADED = ("losses", "policy_losses", "optim", "weights", "model", "sampling")


def documented(name: str) -> list[tuple[str, str]]:
    """Public functions and classes of a file or folder, with their docstrings and the module's."""
    place = ROOT / "jaxgpt" / name
    found = []
    for file in sorted(place.glob("*.py")) if place.is_dir() else [place.with_suffix(".py")]:
        tree = ast.parse(file.read_text())
        for node in tree.body:
            public = isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != "_"
            if public:
                text = f"{ast.get_docstring(node)}\n{ast.get_docstring(tree)}"
                found.append((f"{file.stem}.{node.name}", text))
    return found


@pytest.mark.parametrize("name", THREADED)
def test_every_public_function_names_its_chapter(name: str) -> None:
    numbers = {path.name[:2] for path in CHAPTERS}
    for function, text in documented(name):
        named = re.findall(r"Notes: chapters? ([\d, and to]+)", text)
        assert named, f"{function} names no chapter of the notes, nor does its module"
        assert {n.zfill(2) for n in re.findall(r"\d+", " ".join(named))} <= numbers, function


def test_there_is_a_chapter_for_every_building_block() -> None:
    assert [path.name[:2] for path in CHAPTERS] == [f"{n:02}" for n in range(1, 23)]
    for path in CHAPTERS:
        text = path.read_text()
        assert "$" in text, path.name
        assert "```python figure" in text and "assert" in text, path.name
        assert text.count("::: exercise") == 3 and "## Sources" in text, path.name
        assert re.search(r"## .*([Ww]hat goes wrong|What breaks)|wrong", text), path.name


def see_all(q_BTNH, k_BTKH, v_BTKH, *_args, **_kwargs):
    """Attention that forgot its causal mask."""
    groups = q_BTNH.shape[2] // k_BTKH.shape[2]
    k_BSNH, v_BSNH = (jnp.repeat(x, groups, axis=2) for x in (k_BTKH, v_BTKH))
    scores_BNTS = jnp.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BSNH) / q_BTNH.shape[-1] ** 0.5
    return jnp.einsum("BNTS,BSNH->BTNH", jax.nn.softmax(scores_BNTS), v_BSNH)


def learn_all(form, messages, **kwargs):
    """A conversation whose every token is a target."""
    made = ENCODE(form, messages, **kwargs)
    return [example._replace(target_T=np.ones_like(example.target_T)) for example in made]


ENCODE = chat.encode
BROKEN = {
    "03": ("jaxgpt.kernels.attention", see_all),
    "07": ("jaxgpt.optim.learning_rate", lambda cfg, step, num_steps: cfg.learning_rate + 0 * step),
    "10": ("jaxgpt.sampling.truncation._keep", lambda probs_BV, threshold_B: probs_BV),
    "13": ("jaxgpt.data.chat.encode", learn_all),
    "15": (
        "jaxgpt.policy_losses.gae",
        lambda rewards, values, mask, gamma, lam: jnp.asarray(rewards) - jnp.asarray(values),
    ),
    "16": ("jaxgpt.losses.dpo", lambda margin_B, beta, smoothing=0.0: -beta * margin_B),
}


@pytest.mark.slow
@pytest.mark.parametrize("number", BROKEN)
def test_chapter_fails_when_the_code_it_explains_is_broken(
    number: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path,) = (path for path in CHAPTERS if path.name.startswith(number))
    monkeypatch.setattr(*BROKEN[number])
    with pytest.raises(ValueError, match=rf"{path.name}, line \d+: AssertionError"):
        chapter.run(chapter.read(path))
