"""Every axis letter is explained: in the legend of types.py, or at the top of the file it is in."""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "jaxgpt"
FILES = sorted(PACKAGE.rglob("*.py"))
SUFFIX = re.compile(r"[a-z0-9]_([A-Z1-9]*[A-Z][A-Z1-9]*)$")
EINSUM = re.compile(r"[A-Z.]+(,[A-Z.]+)*->[A-Z.]*")


def legend() -> set[str]:
    text = ast.get_docstring(ast.parse((PACKAGE / "types.py").read_text())) or ""
    table = text.split("A file that needs")[0].split("\n\n")[-2]
    return set(re.findall(r"\b([A-Z])  \S", table))


def own_letters(source: str) -> set[str]:
    """The letters that a file's docstring explains, in the paragraph "Axes of this file: …"."""
    text = ast.get_docstring(ast.parse(source)) or ""
    found = re.search(r"Axes of this file: (.*?)(\n\n|$)", text, re.DOTALL)
    return set(re.findall(r"\b[A-Z]\b", found[1])) if found else set()


def used_letters(source: str) -> dict[str, str]:
    """{letter: a name or einsum in which it is used}."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Name(id=name) | ast.arg(arg=name) | ast.Attribute(attr=name):
                if not name.isupper() and (found := SUFFIX.search(name)):
                    names |= {(letter, name) for letter in found[1] if letter.isalpha()}
            case ast.Constant(value=str(text)) if EINSUM.fullmatch(text):
                names |= {(letter, text) for letter in text if letter.isalpha()}
    return dict(names)


def test_the_legend_has_the_letters_of_the_model():
    assert set("BTSDNKGHFVLE") <= legend()


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_every_letter_is_explained(file):
    source = file.read_text()
    known = legend() | own_letters(source)
    assert not {k: v for k, v in used_letters(source).items() if k not in known}


def test_an_unknown_letter_is_seen():
    source = '"""Axes of this file: X devices.\n\nMore."""\nrows_XQ = jnp.einsum("XA,QY->X", x_A)'
    assert own_letters(source) == {"X"}
    assert set(used_letters(source)) == {"X", "Q", "A", "Y"}
