"""Writes docs/measured.md, tpu.md, papers.md and models.md from their rows, from the docstrings
and from the tables of jaxgpt/convert.

python docs/tables.py            # writes them
python docs/tables.py --check    # exit status 1 if one of them is out of date
"""

import ast
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import yaml

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent))
PACKAGE = DOCS.parent / "jaxgpt"
ARXIV = re.compile(r"\b(\d{4}\.\d{5})\b|arXiv:(\d{4}\.\d{4,5})")


def table(rows: list[dict[str, Any]]) -> str:
    """Rows with the same keys as a Markdown table."""
    names = list(rows[0])
    lines = [names, ["---"] * len(names), *([row[name] for name in names] for row in rows)]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def filled(page: str, parts: dict[str, str]) -> str:
    """The page, with what stands between <!-- name --> and <!-- /name --> replaced."""
    for name, content in parts.items():
        mark = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not mark.search(page):
            raise SystemExit(f"docs/tables.py: a page has no <!-- {name} --> … <!-- /{name} -->")
        page = mark.sub(lambda found, new=content: f"{found[1]}{new}\n{found[2]}", page)
    return page


def citations() -> dict[str, list[str]]:
    """Places of the package that cite a paper, by its arXiv number."""
    found: defaultdict[str, list[str]] = defaultdict(list)
    for file in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts)
        for number in sorted({a or b for a, b in ARXIV.findall(file.read_text())}):
            found[number] += _places(file, module.removesuffix(".__init__"), number)
    return found


def _places(file: Path, module: str, number: str) -> list[str]:
    """The functions and classes whose docstrings cite the paper; else the module itself."""
    tree = ast.parse(file.read_text())
    kinds = (ast.FunctionDef, ast.ClassDef)
    named = [node for node in ast.walk(tree) if isinstance(node, kinds)]
    citing = [node.name for node in named if number in (ast.get_docstring(node) or "")]
    return [f"`{module}.{name}`" for name in citing] or [f"`{module}`"]


def papers() -> str:
    titles = yaml.safe_load((DOCS / "papers.yaml").read_text())
    missing = sorted(set(citations()) - set(titles))
    if missing:
        raise SystemExit(f"docs/papers.yaml: has no title for {', '.join(missing)}")
    return table(
        [
            {
                "paper": f"[{titles[number]}](https://arxiv.org/abs/{number})",
                "where": ", ".join(places),
            }
            for number, places in sorted(citations().items())
        ]
    )


def models() -> dict[str, str]:
    """What docs/models.md says, by the tables of the families and what was measured."""
    from jaxgpt.convert import gguf, hf

    data = yaml.safe_load((DOCS / "models.yaml").read_text())
    told, measured = data["families"], list(data["measured"].values())
    families = {family.model_type: family for family in hf.FAMILIES}
    if told.keys() != families.keys() or data["composite"].keys() != hf.COMPOSITE.keys():
        odd = sorted(told.keys() ^ families.keys()) + sorted(
            data["composite"].keys() ^ hf.COMPOSITE
        )
        raise SystemExit(f"docs/models.yaml: lacks or has too much of {', '.join(odd)}")
    rows = []
    for name, family in families.items():
        own = [found for found in measured if found["type"] == name]
        if not own:
            raise SystemExit(f"docs/models.yaml: run python benchmarks/models.py {name}")
        others = sorted({found["written"] for found in own} - {name})
        # Of some architectures a tiny model has no form: theirs are tested by themselves.
        formats = {found["gguf"] for found in own} | {told[name].get("gguf")}
        rows.append(
            {
                "model_type": f"`{name}`",
                "models": told[name]["models"],
                "read and trained": "yes",
                "written": family.architecture + (f"; or as {', '.join(others)}" if others else ""),
                "GGUF": ", ".join(sorted(formats - {None})) or "no",
                "settings": len(own),
                "logits": f"{max(found['logits'] for found in own):.0e}",
                "missing": told[name].get("missing", ""),
            }
        )
    whole = [
        {
            "model_type": f"`{name}`",
            "models": data["composite"][name],
            "language model": f"`{text}`",
        }
        for name, text in hf.COMPOSITE.items()
    ]
    return {
        "families": table(rows),
        "composite": table(whole),
        "gguf": ", ".join(f"`{name}`" for name in gguf.ARCHITECTURES),
    }


def pages() -> dict[Path, str]:
    """Every generated page as it should be."""
    data = yaml.safe_load((DOCS / "measured.yaml").read_text())
    machines = "\n".join(f"- **{name}**: {text}" for name, text in data["machines"].items())
    parts = {
        "measured.md": {
            "machines": machines,
            "measured": table(data["measured"]),
            "learned": table(data["learned"]),
        },
        "tpu.md": {
            "training": table(data["tpu_training"]),
            "decoding": table(data["tpu_decoding"]),
        },
        "papers.md": {"papers": papers()},
        "models.md": models(),
    }
    return {DOCS / name: filled((DOCS / name).read_text(), part) for name, part in parts.items()}


def main() -> None:
    stale = [file for file, text in pages().items() if file.read_text() != text]
    if "--check" in sys.argv[1:]:
        if stale:
            names = ", ".join(file.name for file in stale)
            raise SystemExit(f"out of date: {names}; run python docs/tables.py")
        return
    for file, text in pages().items():
        file.write_text(text)


if __name__ == "__main__":
    main()
