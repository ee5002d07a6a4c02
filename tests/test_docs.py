"""The documents hold what the code and the data files say."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def test_generated_tables_are_up_to_date() -> None:
    made = subprocess.run(
        [sys.executable, "docs/tables.py", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 200


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
    broken = [
        link for link in links if "://" not in link and not (page.parent / link).resolve().exists()
    ]
    assert not broken, broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_exist(page: Path) -> None:
    """Paths of this repository that a page names, such as configs/sft/alpaca.yaml."""
    named = re.findall(
        r"(?<![\w/.-])((?:jaxgpt|scripts|configs|tests|benchmarks|docs)/[\w./-]*\.\w+)",
        page.read_text(),
    )
    missing = sorted({name for name in named if not (ROOT / name).exists()})
    assert not missing, missing


def test_answers_name_functions_that_exist() -> None:
    named = re.findall(r"`(jaxgpt(?:\.\w+)+)`", (ROOT / "docs" / "questions.md").read_text())
    assert len(named) > 10
    for name in named:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name
