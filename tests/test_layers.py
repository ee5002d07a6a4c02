"""Imports go one way: every import statement is read, those inside functions too."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "jaxgpt"

# A module may import from layers above its own in this list, and within its own package.
LAYERS = (
    {"types", "store", "shapes", "tree", "hub"},
    {"files"},
    {"config"},
    {"sharding"},
    {"kernels"},
    {"machine"},
    {"weights", "losses", "policy_losses", "optim", "metrics", "checkpoint", "data"},
    {"model", "peft", "rundir", "tasks"},
    {"lineage"},
    {"runlog", "report"},
    {"sampling", "convert", "train", "scoring"},
    {"episodes", "inspect", "judge"},
    {"language_model", "rollouts", "plan"},
    # jaxgpt is the front door, jaxgpt/__init__.py
    {"stages", "evals", "serve"},
    {"run", "notes", "life"},
    {"launching"},
    {"jaxgpt"},
    {"commands"},
    {"scripts", "__main__"},
)
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}
# What only some rooms may know of, by the start of an import's name.
CONFINED = {
    "flax": {"model"},
    "orbax": {"checkpoint"},
    "jsonargparse": {"config"},
    "torch": set(),
}


def files() -> list[Path]:
    return sorted([*PACKAGE.rglob("*.py"), *(ROOT / "scripts").glob("*.py")])


def module_of(file: Path) -> str:
    """`jaxgpt.model.gpt`, `jaxgpt.model` for its __init__, `scripts.pretrain`."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(module: str) -> str:
    """The name by which a module stands in LAYERS."""
    first, *rest = module.split(".")
    return first if first == "scripts" or not rest else rest[0]


def imports(source: str) -> set[str]:
    """Dotted names that a file imports; `from a import b` counts as a.b if that is a module."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where a name comes from"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                path = ROOT.joinpath(*name.split("."))
                is_module = path.is_dir() or path.with_suffix(".py").is_file()
                found.add(name if is_module else node.module)
    return found


def violations(module: str, imported: set[str]) -> list[str]:
    """What a module imports and may not."""
    wrong, own = [], room(module)
    for name in sorted(imported):
        top = name.split(".")[0]
        if top in CONFINED and own not in CONFINED[top]:
            wrong.append(f"{module} imports {name}: only {CONFINED[top] or 'tests'} may")
        if top not in ("jaxgpt", "scripts"):
            continue
        inside = own == room(name) and own not in ("jaxgpt", "scripts")
        if not inside and LAYER[room(name)] >= LAYER[own]:
            wrong.append(f"{module} (layer {LAYER[own]}) imports {name} ({LAYER[room(name)]})")
        if own == "stages" and module != "jaxgpt.stages" and room(name) == "stages":
            wrong.append(f"{module} imports another stage, {name}")
    return wrong


@pytest.mark.parametrize("file", files(), ids=module_of)
def test_imports_only_from_layers_above(file):
    module = module_of(file)
    assert room(module) in LAYER, f"{module} has no place in LAYERS"
    assert not violations(module, imports(file.read_text()))


def test_model_sees_no_mesh_optimizer_tokenizer_or_run_config():
    forbidden = {"sharding", "optim", "data", "train", "checkpoint", "metrics"}
    for file in (PACKAGE / "model").glob("*.py"):
        source = file.read_text()
        assert not {room(name) for name in imports(source) if "jaxgpt" in name} & forbidden, file
        assert not re.search(r"\b(Mesh|PartitionSpec|RunConfig|optax)\b", source), file


def test_the_kernels_know_only_arrays():
    for file in (PACKAGE / "kernels").glob("*.py"):
        known = {name for name in imports(file.read_text()) if name.startswith("jaxgpt")}
        assert all(re.match(r"jaxgpt\.(kernels|sharding|tree|types)\b", name) for name in known), (
            file
        )


def test_no_file_has_a_name_that_says_nothing():
    empty = {"utils", "util", "common", "helpers", "base", "misc"}
    assert not [file for file in files() if file.stem in empty]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("jaxgpt.model.gpt", "from jaxgpt import sharding, tree, train"),
        ("jaxgpt.tree", "def f():\n    from jaxgpt.model.gpt import GPT"),
        ("jaxgpt.train", "import jaxgpt.sampling.sample"),
        ("jaxgpt.stages.sft", "from jaxgpt.stages import pretrain"),
        ("jaxgpt.train", "from flax import linen"),
        ("jaxgpt.evals.perplexity", "from jaxgpt.stages.pretrain import evaluate"),
    ],
)
def test_a_violation_is_seen(module, source):
    assert violations(module, imports(source))
