"""The reading path of README.md: few files, few lines, and no way out of it but by the doors."""

import ast
import re
from pathlib import Path

import pytest
from test_layers import imports
from test_size import code_lines

ROOT = Path(__file__).parents[1]
MOST_FILES, MOST_LINES = 12, 2200

# What a file of the path may import beside the others, without being read on first reading:
# each is used by a name that says what it does.
DOORS = {
    "config": "settings, as frozen dataclasses",
    "types": "names of types, and the legend of the axes",
    "tree": "parameters by their names",
    "weights": "what a kernel may be: plain, LoRA, int8, NF4",
    "losses": "the maths of stages",
    "sharding": "where arrays lie on the devices",
    "machine": "chips, memory, processes",
    "checkpoint": "saving and restoring",
    "runlog": "metrics.jsonl and the progress bar",
    "shapes": "lengths rounded up, rows padded",
    "store": "files in a bucket",
    "files": "writing a file whole or not at all",
    "platform": "for which device a program is written, and what that changes",
    "data": "token files, packing, rows of conversations",
    "convert": "models of other programs",
    "peft": "low-rank adapters",
    "moe": "mixture of experts",
    "mlp": "feed-forward layers",
    "latent": "attention whose keys and values are made of one narrow vector",
    "slots": "a cache whose rows have lengths of their own",
}


def path() -> list[str]:
    """The files between the two marks of README.md."""
    text = (ROOT / "README.md").read_text()
    listed = text.split("<!-- reading path -->")[1].split("<!-- /reading path -->")[0]
    return re.findall(r"^\d+\. `(jaxgpt/[\w/]+\.py)`: \w", listed, re.MULTILINE)


def test_the_path_is_short():
    assert 8 <= len(path()) <= MOST_FILES
    assert len(set(path())) == len(path())
    assert sum(code_lines((ROOT / file).read_text()) for file in path()) <= MOST_LINES


def module(file: str) -> str:
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


@pytest.mark.parametrize("file", path())
def test_a_file_imports_only_the_path_and_its_doors(file):
    known = {module(other) for other in path()}
    source = (ROOT / file).read_text()
    assert ast.get_docstring(ast.parse(source)), "says what it is"
    own = file.split("/")[1] == "kernels"  # the door itself opens into its room
    strange = {
        name for name in imports(source)
        if name.startswith("jaxgpt.") and name not in known
        and not DOORS.keys() & set(name.split("."))
        and not (own and name.startswith("jaxgpt.kernels."))
    }  # fmt: skip
    assert not strange


def test_the_equations_are_on_the_path():
    assert "jaxgpt/kernels/__init__.py" in path()
