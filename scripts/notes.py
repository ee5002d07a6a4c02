"""The notes: build them, check that all they say is true, or read them in a browser.

    python scripts/notes.py build [CHAPTER …] [--output notes/_site] [--notebooks]
    python scripts/notes.py check [CHAPTER …]
    python scripts/notes.py serve [--output notes/_site] [--port 8000]
    python scripts/notes.py notebook FILE.md …

A chapter is named by its number, its file's name or a part of it. `build` and `check` run every
block of code; a failing one stops with its file and line, and exit status 2. `check` takes other
Markdown files too, such as docs/python.md, and `notebook` writes a .ipynb beside each one.
"""

import argparse
import functools
import http.server
import os
from pathlib import Path

from jaxgpt import config, files

ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "action", choices=("build", "check", "serve", "notebook"), help="what to do with the notes"
    )
    parser.add_argument("chapter", nargs="*", help="chapters, by number or name; none: all")
    parser.add_argument(
        "--output",
        default=str(ROOT / "notes" / "_site"),
        help="folder of the built pages; default: notes/_site",
    )
    parser.add_argument(
        "--notebooks", action="store_true", help="with build: write a .ipynb of each chapter too"
    )
    parser.add_argument(
        "--port", type=int, default=8000, help="with serve: port on 127.0.0.1; default: 8000"
    )
    args = parser.parse_args()
    files.require_local("output", args.output)
    output = Path(args.output)
    if args.action == "serve":
        return serve(output, args.port)
    # Before JAX looks for devices: the chapter on many devices cuts arrays over eight of them.
    eight = "--xla_force_host_platform_device_count=8"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {eight}"
    from jaxgpt import machine
    from jaxgpt.notes import chapter, site

    if args.action == "notebook":
        if not args.chapter:
            raise ValueError("notebook: name Markdown files, such as docs/python.md")
        for path in map(Path, args.chapter):
            made = site.notebook(chapter.read(path))
            print(files.write(path.with_suffix(".ipynb"), made))
        return
    machine.use_compilation_cache()
    every = [chapter.read(path) for path in sorted((ROOT / "notes").glob("[0-9]*.md"))]
    broken = site.broken_links(every, ROOT)
    if broken:
        raise ValueError(f"links that lead nowhere: {'; '.join(broken)}")
    pages = [n for n in args.chapter if args.action == "check" and Path(n).is_file()]
    names = [name for name in args.chapter if name not in pages]
    wanted = [chapter.read(Path(page)) for page in pages]
    wanted += chosen(every, names) if names or not pages else []
    for one in wanted:
        chapter.run(one)
        print(f"{one.seconds:6.1f} s  {one.name}", flush=True)
    if args.action == "build":
        site.build(wanted, output)
        if args.notebooks:
            for one in wanted:
                (output / f"{one.name}.ipynb").write_text(site.notebook(one))
        print(f"{output / 'index.html'}: open it in a browser")


def chosen(every: list, names: list[str]) -> list:
    """The chapters whose number or name is asked for; all, if none is named."""
    found = {
        name: [c for c in every if c.name.partition("-")[0] == name.zfill(2) or name in c.name]
        for name in names
    }
    for name, matching in found.items():
        if not matching:
            raise ValueError(f"chapter={name}: none of {', '.join(c.name for c in every)}")
    return [c for c in every if any(c in f for f in found.values())] if names else every


def serve(output: Path, port: int) -> None:
    """The built pages on this machine, until Ctrl-C."""
    if not (output / "index.html").exists():
        raise ValueError(f"output={output}: holds no pages; run python scripts/notes.py build")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(output))
    print(f"http://127.0.0.1:{port}/")
    http.server.ThreadingHTTPServer(("127.0.0.1", port), handler).serve_forever()


if __name__ == "__main__":
    config.exit_cleanly(main)
