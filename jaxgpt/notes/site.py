"""Chapters as one folder of static HTML, and as notebooks."""

import html
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxgpt import files
from jaxgpt.notes.chapter import Block, Chapter, parser

HERE = Path(__file__).parent


def build(chapters: Sequence[Chapter], output: Path) -> None:
    """Writes index.html, a page for each chapter, the style sheet and the search index.

    The folder needs no network: mathematics is MathML, figures are SVG inside the pages.
    """
    output.mkdir(parents=True, exist_ok=True)
    frame = (HERE / "page.html").read_text()
    contents = "".join(
        f'<li><a href="{c.name}.html">{html.escape(c.title)}</a></li>' for c in chapters
    )
    for number, chapter in enumerate(chapters):
        body = render(chapter)
        around = [
            f'<a rel="{rel}" href="{chapters[n].name}.html">{html.escape(chapters[n].title)}</a>'
            if 0 <= n < len(chapters)
            else "<span></span>"
            for rel, n in (("prev", number - 1), ("next", number + 1))
        ]
        page = _fill(
            frame, title=chapter.title, contents=contents, body=body, around="".join(around)
        )
        files.write(output / f"{chapter.name}.html", page.encode())
    welcome = (HERE / "welcome.html").read_text()
    files.write(
        output / "index.html",
        _fill(
            frame,
            title="Notes",
            contents=contents,
            around="",
            body=welcome + f'<ol class="plain">{contents}</ol>',
        ).encode(),
    )
    files.write(output / "style.css", ((HERE / "style.css").read_text() + _code_colours()).encode())
    files.write(
        output / "search.js", (_search_index(chapters) + (HERE / "search.js").read_text()).encode()
    )


def render(chapter: Chapter) -> str:
    """The chapter's HTML, with outputs, figures and quotes in place."""
    import latex2mathml.converter

    markdown = parser()
    blocks = iter(chapter.blocks)

    def fence(*_: Any) -> str:
        return _block(next(blocks))

    def container(self: Any, tokens: Any, index: int, *_: Any) -> str:
        token = tokens[index]
        kind = token.info.strip()
        if token.nesting == 1:
            return (
                '<details class="answer"><summary>Answer</summary>\n'
                if kind == "answer"
                else f'<section class="{kind}">\n'
            )
        return "</details>\n" if token.type.startswith("container_answer") else "</section>\n"

    def maths(display: str) -> Any:
        return lambda self, tokens, index, *_: latex2mathml.converter.convert(
            tokens[index].content.strip(), display=display
        )

    rules = markdown.renderer.rules
    rules["fence"] = fence
    for kind in ("exercise", "answer"):
        for end in ("open", "close"):
            markdown.add_render_rule(f"container_{kind}_{end}", container)
    markdown.add_render_rule("math_inline", maths("inline"))
    markdown.add_render_rule("math_inline_double", maths("block"))
    markdown.add_render_rule("math_block", maths("block"))
    made = markdown.render(chapter.text)
    return re.sub(r"(<table>.*?</table>)", r'<div class="wide">\1</div>', made, flags=re.DOTALL)


def notebook(chapter: Chapter) -> str:
    """The chapter as a Jupyter notebook without outputs: prose cells and code cells."""
    cells: list[dict[str, Any]] = []
    lines, done = chapter.text.split("\n"), 0

    def prose(text: str) -> None:
        text = re.sub(r"^:::.*$", "", text, flags=re.MULTILINE).strip()
        if text:
            cells.append({"cell_type": "markdown", "metadata": {}, "source": text})

    for block in chapter.blocks:
        start = block.line - 1
        stop = start + next(
            n for n, line in enumerate(lines[start + 1 :], 2) if line.startswith("```")
        )
        if block.kind == "python":
            prose("\n".join(lines[done:start]))
            tags = {"tags": ["raises-exception"]} if "raises" in block.flags else {}
            cells.append(
                {
                    "cell_type": "code",
                    "metadata": tags,
                    "execution_count": None,
                    "outputs": [],
                    "source": block.code.rstrip(),
                }
            )
        else:
            shown = "\n".join([*lines[done:start], "```python", block.code.rstrip(), "```"])
            prose(shown)
        done = stop
    prose("\n".join(lines[done:]))
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    book = {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(book, ensure_ascii=False, indent=1) + "\n"


def broken_links(chapters: Sequence[Chapter], root: Path) -> list[str]:
    """Relative links of the chapters that lead nowhere: to a chapter's page or a file of `root`."""
    pages = {f"{chapter.name}.html" for chapter in chapters}
    wrong = []
    for chapter in chapters:
        for link in re.findall(r"\]\(([^)\s]+)\)", chapter.text):
            target = link.partition("#")[0]
            if "://" in link or not target or target in pages:
                continue
            if not (root / target.removeprefix("../")).exists():
                wrong.append(f"{chapter.path}: {link}")
    return wrong


def _block(block: Block) -> str:
    if "hidden" in block.flags:
        return ""
    label = ""
    if block.kind == "source":
        name = html.escape(block.flags[0])
        label = f'<figcaption class="quoted">{name}, as it is in the package</figcaption>'
    shown = _highlight(block.code, "python" if block.kind in ("python", "source") else block.kind)
    output = f'<pre class="output">{html.escape(block.output)}</pre>' if block.output else ""
    figures = "".join(f'<figure class="drawn">{svg}</figure>' for svg in block.figures)
    return f'<figure class="code">{label}{shown}{output}</figure>{figures}\n'


def _highlight(code: str, language: str) -> str:
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import get_lexer_by_name
    from pygments.util import ClassNotFound

    try:
        lexer = get_lexer_by_name(language or "text")
    except ClassNotFound:
        lexer = get_lexer_by_name("text")
    return highlight(code, lexer, HtmlFormatter(cssclass="highlight"))


def _code_colours() -> str:
    """Pygments' colours for light pages, and for dark ones."""
    from pygments.formatters import HtmlFormatter

    light = HtmlFormatter(style="friendly").get_style_defs(".highlight")
    dark = HtmlFormatter(style="github-dark").get_style_defs(".highlight")
    plain = ".highlight, .highlight pre { background: none !important }\n"
    return f"\n{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}\n{plain}"


def _search_index(chapters: Sequence[Chapter]) -> str:
    """Each section's words, for a search in the page without a server."""
    sections = []
    for chapter in chapters:
        for part in re.split(r"^## ", chapter.text, flags=re.MULTILINE):
            title, _, text = part.partition("\n")
            words = re.sub(r"```.*?```|[#*`$\\{}_]", " ", text, flags=re.DOTALL)
            sections.append(
                [f"{chapter.name}.html", chapter.title, title.lstrip("# "), " ".join(words.split())]
            )
    return f"const SECTIONS = {json.dumps(sections, ensure_ascii=False)};\n"


def _fill(frame: str, **parts: str) -> str:
    for name, content in parts.items():
        shown = html.escape(content) if name == "title" else content
        frame = frame.replace("{{" + name + "}}", shown)
    return frame
