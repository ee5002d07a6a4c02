"""A chapter: Markdown whose Python blocks run, one after the other, in one namespace.

Fenced blocks, by their info string:

    python             shown and run; what it prints and the last expression's value stand below
    python hidden      run, not shown
    python figure      shown and run; the open Matplotlib figures become SVG
    python raises      shown and run; it must raise, and the error stands below
    source NAME        not run: the source code of jaxgpt's function or class NAME as it is today

`::: exercise` and `::: answer` … `:::` hold exercises and their folded answers, which run too.
"""

import contextlib
import importlib
import inspect
import io
import re
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

INK = "#010203"  # stands for the page's text colour, which differs between light and dark


@dataclass
class Block:
    """One fenced block and what came of it."""

    kind: str  # python, source, or another language that is only shown
    flags: tuple[str, ...]
    code: str
    line: int
    output: str = ""
    figures: list[str] = field(default_factory=list)  # SVG


@dataclass
class Chapter:
    """A file of notes/, read and, after `run`, executed."""

    path: Path
    text: str
    blocks: list[Block]
    seconds: float = 0.0

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def title(self) -> str:
        return self.text.lstrip("# ").split("\n", 1)[0].strip()


def read(path: Path) -> Chapter:
    """The chapter and its blocks, in order; nothing runs yet.

    Raises:
        ValueError: the file does not begin with a title, or a block has an unknown flag.
    """
    text = path.read_text()
    if not text.startswith("# "):
        raise ValueError(f"{path}: must begin with a title such as '# 3 Attention'")
    blocks = []
    for token in parser().parse(text):
        if token.type != "fence":
            continue
        kind, *flags = token.info.split() or [""]
        line = (token.map or [0])[0] + 1
        known = {"hidden", "figure", "raises"}
        if kind == "python" and not set(flags) <= known:
            raise ValueError(f"{path}, line {line}: {token.info!r}: knows {', '.join(known)}")
        blocks.append(Block(kind, tuple(flags), token.content, line))
    return Chapter(path, text, blocks)


def run(chapter: Chapter) -> Chapter:
    """Executes the Python blocks and looks the quoted names up.

    Raises:
        ValueError: a block failed, `raises` did not raise, or a quoted name does not exist; the
            message names the file and the line.
    """
    start = time.perf_counter()
    module = ModuleType(chapter.name.replace("-", "_"))
    module.__dict__["__file__"] = str(chapter.path)
    with _deterministic_figures():
        for block in chapter.blocks:
            place = f"{chapter.path}, line {block.line}"
            if block.kind == "source":
                block.code = source(block.flags[0] if block.flags else "", place)
            elif block.kind == "python":
                block.output, block.figures = _execute(block, module.__dict__, place)
    chapter.seconds = time.perf_counter() - start
    return chapter


def source(name: str, place: str) -> str:
    """The source code of jaxgpt.module.Name, without what surrounds it.

    Raises:
        ValueError: no such name.
    """
    parts = name.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        with contextlib.suppress(ImportError):
            found: Any = importlib.import_module(".".join(parts[:cut]))
            for part in parts[cut:]:
                found = getattr(found, part, None)
            if found is not None:
                return inspect.getsource(inspect.unwrap(getattr(found, "__wrapped__", found)))
            break
    raise ValueError(f"{place}: source {name or '(nothing)'}: no such function or class")


def _execute(block: Block, names: dict[str, Any], place: str) -> tuple[str, list[str]]:
    """Runs a block; returns what it printed and the figures that it drew."""
    printed, error = io.StringIO(), None
    # Line numbers of a traceback are then those of the chapter's file.
    padded = "\n" * block.line + block.code
    try:
        with contextlib.redirect_stdout(printed):
            _run_statements(padded, names, place, show="figure" not in block.flags)
    except Exception as raised:
        error = raised
    if "raises" in block.flags:
        if error is None:
            raise ValueError(f"{place}: the block is marked 'raises', but nothing was raised")
        return f"{printed.getvalue()}{type(error).__name__}: {error}\n", []
    if error is not None:
        last = traceback.extract_tb(error.__traceback__)
        where = next((f for f in reversed(last) if f.filename == place), None)
        line = f"{place.rpartition(',')[0]}, line {where.lineno}" if where else place
        said = f" (printed before: {printed.getvalue().strip()[-300:]})" if printed.tell() else ""
        raise ValueError(f"{line}: {type(error).__name__}: {error}{said}") from error
    return printed.getvalue(), _figures() if "figure" in block.flags else []


def _run_statements(code: str, names: dict[str, Any], place: str, show: bool) -> None:
    """Like a notebook's cell: the value of a last expression is shown."""
    import ast

    tree = ast.parse(code, place)
    last = tree.body[-1] if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    body = ast.Module(tree.body[:-1] if last else tree.body, [])
    exec(compile(body, place, "exec"), names)
    if last is not None:
        value = eval(compile(ast.Expression(last.value), place, "eval"), names)
        if show and value is not None:
            print(repr(value))


@contextlib.contextmanager
def _deterministic_figures() -> Iterator[None]:
    """The same block draws the same bytes: no dates, no random ids, no fonts of this machine."""
    import matplotlib

    matplotlib.use("Agg")
    colours = dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK
    )
    look: Any = {
        "svg.hashsalt": "jaxgpt", "svg.fonttype": "none", "figure.facecolor": "none",
        "axes.facecolor": "none", "savefig.facecolor": "none", "figure.figsize": (6.4, 3.4),
        "axes.spines.top": False, "axes.spines.right": False, "font.size": 10,
        "legend.frameon": False, "legend.labelcolor": INK, "figure.constrained_layout.use": True,
    }  # fmt: skip
    with matplotlib.rc_context({**look, **colours}):
        yield


def _figures() -> list[str]:
    """The open figures as SVG text; closes them."""
    import matplotlib.pyplot as plt

    drawn = []
    for number in plt.get_fignums():
        content = io.StringIO()
        plt.figure(number).savefig(content, format="svg", metadata={"Date": None, "Creator": None})
        svg = content.getvalue()
        svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
        # Ids must be unlike in the figures of one page, which share their id space.
        drawn.append(re.sub(r"(id=\"|url\(#|href=\"#)", rf"\1f{number}-", svg))
    plt.close("all")
    return drawn


def parser() -> Any:
    """CommonMark with tables, $maths$ and the containers of exercises; raw HTML stays text."""
    from markdown_it import MarkdownIt
    from mdit_py_plugins.container import container_plugin
    from mdit_py_plugins.dollarmath import dollarmath_plugin

    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
    markdown.use(dollarmath_plugin, double_inline=True)
    for name in ("exercise", "answer"):
        markdown.use(container_plugin, name)
    return markdown
