"""The package stays small: every room has a budget of code lines."""

import ast
import io
import tokenize
from collections import Counter
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "jaxgpt"

# Lines that hold code (no blanks, comments or docstrings), by folder or file of jaxgpt/.
# A room that outgrows its line gives lines back elsewhere, or says in its commit why not.
BUDGET = {
    "__init__.py": 25, "checkpoint.py": 235, "config": 750, "convert": 1880, "data": 2110,
    "episodes.py": 130, "evals": 840, "files.py": 20, "hardware.py": 145, "heap.py": 45,
    "kernels": 1470, "language_model.py": 270, "losses.py": 65, "metrics.py": 205, "model": 520,
    "optim.py": 60, "peft.py": 160, "plan": 730, "policy_losses.py": 90, "processes.py": 120,
    "report.py": 305, "rollouts.py": 220, "rundir.py": 135, "runlog.py": 95, "sampling": 455,
    "scoring.py": 170, "sharding.py": 140, "stages": 1085, "tasks": 280, "train.py": 290,
    "tree.py": 35, "types.py": 20, "weights.py": 145,
}  # fmt: skip
TOTAL = 13_200  # of the rooms above
# Rooms that came later bring their own budgets.
NEW: dict[str, int] = {}

_NO_CODE = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
    tokenize.ENDMARKER,
}  # fmt: skip


def code_lines(source: str) -> int:
    """How many lines hold something that is neither a comment nor a docstring."""
    held: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _NO_CODE:
            held |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Expr(value=ast.Constant(value=str())):
                held -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(held)


def by_room() -> Counter[str]:
    """Code lines of every folder and file of the package."""
    found: Counter[str] = Counter()
    for file in PACKAGE.rglob("*.py"):
        found[file.relative_to(PACKAGE).parts[0]] += code_lines(file.read_text())
    return found


def test_every_room_has_a_budget_and_keeps_it():
    budget = BUDGET | NEW
    over = {room: (lines, budget.get(room)) for room, lines in by_room().items()
            if lines > budget.get(room, 0)}  # fmt: skip
    assert not over, "(code lines, budget) of rooms that are too large"


def test_no_budget_is_left_of_a_room_that_is_gone():
    assert not (BUDGET | NEW).keys() - by_room().keys()


def test_the_package_keeps_its_budget():
    lines = by_room()
    assert sum(lines[room] for room in BUDGET) <= TOTAL


def test_only_code_is_counted():
    source = """
\"\"\"First of two lines.

Second.\"\"\"

# a reason
x = [  # another
    1,
]
"""
    assert code_lines(source) == 3
