"""Where a model comes from: lineage.json of every run, down to the texts that it has read.

    command, stage, seed, config, code, environment    what was run, and with what
    data        every source with the sha256 of its files, or of the problems that it generates
    parents     the weights taken: their role (init, teacher, reward_model), place and sha256; of
                the Hub the place holds the commit, and `asked` is the name that was given
    sessions    one for every time that the command ran: steps, seconds and tokens by kind
    result      the weights after the last step; it is there once the run is complete

It is written before the first step. An export carries its run's tree along, and a model card.
"""

import dataclasses
import datetime
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxgpt import files, hub, machine, rundir
from jaxgpt.config import RunConfig, own
from jaxgpt.data import documents, synthetic
from jaxgpt.data.rows import names

NAME = "lineage.json"
ROLES = ("init", "teacher", "reward_model")  # settings that name other weights
SOURCES = ("path", "val_path", "text_path", "task", "tokenizer")  # settings that name data
LIBRARY = "Python's standard library"
MOST_FILES = 4096  # of a folder, whose hashes are kept one by one

Node = dict[str, Any]  # lineage.json, and under "parents" those of the weights that it took


@dataclass
class Session:
    """One time that the command of a run ran."""

    begun: str
    start: int  # step
    stop: int
    seconds: dict[str, float] = field(default_factory=dict)  # by kind
    tokens: dict[str, int] = field(default_factory=dict)  # by kind
    peak_bytes: int | None = None

    def count(self, kind: str, tokens: int) -> None:
        self.tokens[kind] = self.tokens.get(kind, 0) + int(tokens)


def now() -> str:
    """The time as ISO 8601 has it, in UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def pinned(cfg: Any) -> Any:
    """The settings with the commit of every model that is on the Hub: the one that the run began
    with, if it was asked for by the same name.

    Raises:
        ValueError: the Hub does not have the model, or is out of reach.
    """
    asked = {role: name for role in ROLES if hub.is_asked(name := getattr(cfg, role, ""))}
    parents = (read(cfg.run) or {}).get("parents", []) if asked else []
    known = {(p["role"], name): p["path"] for p in parents for name in p.get("asked", [])}
    find = lambda role, name: known.get((role, name)) or hub.find(role, name)
    return dataclasses.replace(cfg, **{role: find(role, name) for role, name in asked.items()})


def begin(stage: str, cfg: RunConfig, given: RunConfig) -> None:
    """Writes lineage.json before the first step; a resumed run keeps its sessions.

    Data that has changed since the run began is named on stderr.

    Args:
        given: the settings before `pinned`.
    """
    run = files.path(cfg.run)
    before = read(run) or {}
    known_as = {parent["path"]: parent.get("asked", []) for parent in before.get("parents", [])}
    found: Node = {
        "stage": stage,
        "command": machine.command(),
        "begun": before.get("begun", now()),
        "seed": cfg.seed,
        "config": {"sha256": rundir.config_hash(run)},
        "tokenizer": {"sha256": files.sha256(run / "tokenizer.json")},
        "data": [source(name, path) for name, path in _sources(stage, cfg)],
        "parents": [_parent(run, role, path, getattr(given, role), known_as) for role in ROLES
                    if (path := getattr(cfg, role, ""))],
        "code": {"commit": machine.environment()["git_commit"],
                 "changes": machine.uncommitted()},
        "environment": machine.environment(),
        "sessions": before.get("sessions", []),
    }  # fmt: skip
    if before.get("result", {}).get("step") == cfg.train.steps:  # nothing is left to be done
        found |= {name: before[name] for name in ("result", "ended")}
    known = {(entry["setting"], entry["path"]): entry["sha256"] for entry in before.get("data", [])}
    for entry in found["data"]:
        if known.get((entry["setting"], entry["path"]), entry["sha256"]) != entry["sha256"]:
            print(
                f"warning: {entry['setting']}={entry['path']}: has changed since {run} began",
                file=sys.stderr,
            )
    _write(run, found)


def note(run: Path, session: Session) -> None:
    """Keeps what a session has spent so far; nothing to do where no lineage was begun."""
    if not (found := read(run)):
        return
    session.peak_bytes = machine.peak_memory()
    others = [entry for entry in found["sessions"] if entry["begun"] != session.begun]
    _write(run, found | {"sessions": [*others, dataclasses.asdict(session)]})


def complete(cfg: RunConfig) -> None:
    """Adds the weights that came out."""
    found = read(cfg.run)
    if found and "result" not in found and (files.path(cfg.run) / "checkpoints").is_dir():
        result = rundir.weights(cfg.run)
        if result["step"] == cfg.train.steps:  # else it was stopped, and goes on some other time
            _write(files.path(cfg.run), found | {"result": result, "ended": now()})


def read(path: str | Path) -> Node | None:
    """The lineage of a run or an export; None if it has none.

    Raises:
        ValueError: it is damaged.
    """
    file = files.path(path) / NAME
    try:
        return json.loads(file.read_text()) if file.is_file() else None
    except ValueError as error:
        raise ValueError(f"{file}: is damaged ({error})") from None


def require_writer(setting: str, path: str | Path) -> None:
    """Raises ValueError where a setting that asks for a model that writes names a reward model."""
    if files.path(path).is_dir() and (read(path) or {}).get("stage") == "reward":
        raise ValueError(
            f"{setting}={path}: is a reward model, which gives answers a number and writes none; "
            "give the model that it was trained from"
        )


def tree(path: str | Path) -> Node:
    """A lineage in which every parent is whole, as far as the parents are here or were noted.

    Raises:
        ValueError: no lineage.
    """
    found = read(path)
    if found is None:
        raise ValueError(f"{path}: holds no {NAME}; give a run, or an export of one")
    parents = []
    for parent in found.get("parents", []):
        place = where(path, parent)
        known = tree(place) if place and read(place) else parent.get("lineage", {})
        parents.append(parent | {"lineage": known})
    return found | {"parents": parents}


def where(run: str | Path, parent: Mapping[str, Any]) -> Path | None:
    """Where a parent is now: as seen from the run, so that a folder of runs may move, or as it was
    named; None if it is not here."""
    if parent["path"].startswith(hub.SCHEME):
        return hub.cached(parent["path"])
    scheme, mark, place = f"{run}/{parent['relative']}".rpartition("://")
    beside = files.path(scheme + mark + os.path.normpath(place))
    places = (beside, files.path(parent["path"]))
    return next((place for place in places if place.exists()), None)


def show(path: str | Path) -> str:
    """The tree as text, the run first and the texts at its ends.

    Raises:
        ValueError: no lineage.
    """
    return "\n".join([str(path), *_branches(tree(path))])


def check(path: str | Path, seen: set[str] | None = None) -> Iterator[tuple[str, str]]:
    """(what was looked at, what differs from the record, or "") down to the texts.

    An export's ancestors need not be here; a run's must.

    Args:
        seen: runs that were looked at already; several children may share one.
    """
    found, path, seen = read(path), files.path(path), set() if seen is None else seen
    assert found is not None
    seen.add(str(path.resolve()))
    for name, digest in found.get("files", {}).items():  # an export's own
        yield _compare(path / name, digest)
    for entry in found["data"]:
        yield from _check_source(path, entry)
    for manifest in path.glob("data/**/manifest.json"):
        for shard in json.loads(manifest.read_text())["shards"]:
            yield _compare(manifest.parent / shard["file"], shard["sha256"])
    if "files" not in found:
        yield _compare(path / "tokenizer.json", found["tokenizer"]["sha256"])
        same = rundir.config_hash(path) == found["config"]["sha256"]
        yield f"{path}/config.yaml", "" if same else "its settings are not those that ran"
        if "result" in found:
            yield _check_weights(path, found["result"])
    for parent in found["parents"]:
        place = where(path, parent)
        if place is None:
            elsewhere = "files" in found or parent["path"].startswith(hub.SCHEME)
            missing = "" if elsewhere else f"{parent['role']}: is gone"
            yield f"{parent['path']}{' (not here)' if not missing else ''}", missing
            continue
        yield _check_weights(place, parent["weights"])
        if read(place) and str(place.resolve()) not in seen:
            yield from check(place, seen)


def carry(source: str | Path, target: str | Path, description: str) -> None:
    """Gives an export its lineage and a model card (README.md), if its source has a lineage.

    Args:
        description: one line that says what the model is.
    """
    found, target = _of_source(source), files.path(target)
    if not found:
        return
    files.write(target / "README.md", card(target.name, description, found))
    own = sorted(p for p in target.rglob("*") if p.is_file() and p.name not in (NAME, "README.md"))
    hashes = {file.relative_to(target).as_posix(): files.sha256(file) for file in own}
    _write(target, found | {"files": hashes, "exported": now()})


def card_of(source: str | Path, name: str, description: str) -> str:
    """The model card of an export, which is short where its source has no lineage."""
    if found := _of_source(source):
        return card(name, description, found)
    return (
        f"---\nlibrary_name: jaxgpt\n---\n# {name}\n\n{description}\n\nWritten from `{source}`.\n"
    )


def spent(found: Node, kind: str) -> dict[str, float]:
    """Seconds or tokens by kind, over all sessions."""
    total: dict[str, float] = {}
    for session in found.get("sessions", []):
        for name, value in session[kind].items():
            total[name] = total.get(name, 0) + value
    return total


def results(run: str | Path) -> list[dict[str, Any]]:
    """The summaries of the evaluations that were made of a run (scripts/evaluate.py)."""
    return [
        json.loads(file.read_text())
        for file in sorted(files.path(run).glob("evals/*.json"), key=str)
    ]


def card(name: str, description: str, found: Node) -> str:
    """A model card in Markdown: on what, by which steps, with which measured results."""
    steps = "\n".join(f"{n}. {line}" for n, line in enumerate(_steps(found), 1))
    sources = dict.fromkeys(_all_sources(found))
    lines = [
        "---", "library_name: jaxgpt", "---", f"# {name}", "", description, "",
        "## How it was made", "", steps, "",
        "## What it was trained on", "", *(f"- {source}" for source in sources), "",
    ]  # fmt: skip
    measured = found.get("results", [])
    if measured:
        rows = [
            f"| {result['task']} | {result['data']} | {measure} | {value:.4f} ± {error:.4f} "
            f"| {result['count']} |"
            for result in measured
            for measure, value, error in measures(result)
        ]
        head = ["| task | data | measure | value ± standard error | items |", "|" + " --- |" * 5]
        lines += ["## Measured", "", *head, *rows, ""]
    lines += [f"`python scripts/lineage.py {name}` prints all of {NAME} and hashes it again.", ""]
    return "\n".join(lines)


def measures(result: Mapping[str, Any]) -> Iterator[tuple[str, float, float]]:
    """(name, value, standard error) of an evaluation's summary."""
    for name, value in result.items():
        if isinstance(value, float) and f"{name}_stderr" in result:
            yield name, value, result[f"{name}_stderr"] or 0.0


def source(setting: str, path: str) -> dict[str, Any]:
    """What a data setting names, with its hash: files, an embedded task, Python's library, a data
    set of the Hub (whose revision is its hash)."""
    entry: dict[str, Any] = {"setting": setting, "path": path or LIBRARY}
    if path.startswith(own.IN_PYTHON):
        return entry | {"kind": "python", "sha256": path.partition("@")[2]}
    file = files.path(path)
    if not file.exists() and files.is_local(file):
        file = Path(path.rpartition(":")[0] or path)  # tasks.py:name
    if path and file.exists():
        return entry | {"kind": "files", "path": str(file.absolute())} | _hashes(file)
    task = path.removeprefix("embedded:")
    if task in (*synthetic.DIALOGUES, *synthetic.PREFERENCES):
        return entry | {"kind": "embedded", "sha256": _embedded(task)}
    if not path:
        return entry | {"kind": "library", "sha256": documents.Corpus(()).describe()["sha256"]}
    return entry | {"kind": "hub", "sha256": ""}


def _of_source(source: str | Path) -> Node:
    """What an export tells of the model that it was made from; {} if that has no lineage."""
    if not (source and files.path(source).is_dir() and read(source)):
        return {}
    found = tree(source)
    more = {"results": results(source), "exported_from": str(source)}
    return found if "files" in found else found | more


def _sources(stage: str, cfg: Any) -> Iterator[tuple[str, str]]:
    """(setting, path) of all that a run reads."""
    data = getattr(cfg, "data", None)
    share, mixture = getattr(data, "text_share", 0), getattr(data, "mixture", {})
    for path in mixture:
        yield "data.mixture", str(path)
    for name, path in ((key, path) for key in SOURCES for path in _paths(data, key)):
        if name == "path" and not mixture and share < 1 and not getattr(data, "task", ""):
            yield "data.path", path or _default(stage)
        elif name == "text_path" and share > 0:
            yield "data.text_path", path or ""
        elif path and (name == "val_path" or name == "task" or files.path(path).is_file()):
            yield f"data.{name}", path
    yield from ((name, path) for name, path in own.of_run(cfg) if name != "data.task")


def _paths(data: Any, name: str) -> list[str]:
    """The paths of a setting, globs opened; one empty path where there is none."""
    found = names(getattr(data, name, None) or "")
    opened = [[*map(str, files.find(p))] if not files.path(p).exists() else [p] for p in found]
    return [
        path for given, paths in zip(found, opened, strict=True) for path in paths or [given]
    ] or [""]


def _default(stage: str) -> str:
    """What a stage reads where data.path is empty."""
    if stage == "pretrain":
        return ""
    return next(iter(synthetic.PREFERENCES if stage in ("dpo", "reward") else synthetic.DIALOGUES))


def _embedded(task: str) -> str:
    """sha256 of everything that a task generates."""
    digest = hashlib.sha256()
    make = synthetic.preferences if task in synthetic.PREFERENCES else synthetic.dialogues
    for held_out in (False, True):
        for row in make(task, held_out):
            digest.update(f"{row}\n".encode())
    return digest.hexdigest()


def _hashes(path: Path) -> dict[str, Any]:
    """sha256 and bytes of a file, or of all files of a folder."""
    if path.is_file():
        return {"sha256": files.sha256(path), "bytes": path.stat().st_size}
    inside = (p for p in path.rglob("*") if p.is_file() and not files.is_partial(p))
    found = sorted(inside, key=lambda p: p.parts)
    hashes = {p.relative_to(path).as_posix(): files.sha256(p) for p in found}
    lines = "".join(f"{name} {digest}\n" for name, digest in hashes.items())
    entry = {
        "sha256": hashlib.sha256(lines.encode()).hexdigest(),
        "bytes": sum(p.stat().st_size for p in found),
    }
    return entry | ({"files": hashes} if len(hashes) <= MOST_FILES else {})


def _parent(
    run: Path, role: str, path: str, asked: str, known_as: Mapping[str, list[str]]
) -> dict[str, Any]:
    if path.startswith(hub.SCHEME):
        names = sorted({*known_as.get(path, []), asked})
        place = {"path": path, "relative": path, "asked": names}
        return {"role": role, **place, "weights": rundir.weights(path)}
    place, here = str(files.path(path).absolute()), str(run.absolute())
    same = place.partition("://")[0] == here.partition("://")[0] or ("://" not in place + here)
    return {
        "role": role, "path": place, "relative": os.path.relpath(place, here) if same else place,
        "weights": rundir.weights(path),
    }  # fmt: skip


def _check_source(run: Path, entry: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """A source, file by file where their hashes are known."""
    name = f"{run}: {entry['setting']}={entry['path']}"
    if entry["kind"] == "hub":
        yield f"{name} (of the Hub, not here)", ""
    elif entry["kind"] == "files" and not files.path(entry["path"]).exists():
        yield name, "is gone"
    elif entry["kind"] == "files" and "files" in entry:
        for file, digest in entry["files"].items():
            yield _compare(files.path(entry["path"]) / file, digest)
    else:
        path = "" if entry["kind"] == "library" else entry["path"]
        same = source(entry["setting"], path)["sha256"] == entry["sha256"]
        yield name, "" if same else "its sha256 is another"


def _check_weights(path: Path, wanted: Mapping[str, Any]) -> tuple[str, str]:
    name = f"{path}/checkpoints/{wanted['step']}" if "step" in wanted else str(path)
    try:
        found = rundir.weights(path, wanted.get("step"))
    except ValueError as error:
        return name, str(error)
    return name, "" if found["sha256"] == wanted["sha256"] else "its weights are others"


def _compare(file: Path, digest: str) -> tuple[str, str]:
    if not file.is_file():
        return str(file), "is gone"
    return str(file), "" if files.sha256(file) == digest else "its sha256 is another"


def _branches(found: Node) -> Iterator[str]:
    """A node's lines: itself, what it read, and each parent with its own lines under it."""
    seconds, tokens = (sum(spent(found, kind).values()) for kind in ("seconds", "tokens"))
    result, code = found.get("result"), found["code"]
    done = f"step {result['step']}, weights {result['sha256'][:12]}" if result else "not complete"
    changed = f" + changes {code['changes'][:12]}" if code["changes"] else ""
    yield f"  {found['stage']}, seed {found['seed']}: {done}"
    yield f"  {found['command']}"
    yield (
        f"  {found['begun']}, {seconds:,.0f} s, {tokens:,} tokens, {found['environment']['device']}"
        f", jax {found['environment']['jax']}, commit {code['commit']}{changed}"
    )
    ends = [
        (f"{entry['setting']}: {entry['path']} ({entry['kind']}, sha256 {entry['sha256'][:12]})",
         []) for entry in found["data"]
    ] + [
        (f"{parent['role']}: {parent['path']} (weights {parent['weights']['sha256'][:12]})",
         list(_branches(parent["lineage"])) if parent["lineage"] else [])
        for parent in found["parents"]
    ]  # fmt: skip
    for number, (line, below) in enumerate(ends, 1):
        last = number == len(ends)
        yield f"  {'└─' if last else '├─'} {line}"
        yield from (f"  {' ' if last else '│'} {part}" for part in below)


def _steps(found: Node) -> Iterator[str]:
    """One line for every run on the way, oldest first."""
    for parent in found["parents"]:
        if parent.get("lineage"):
            yield from _steps(parent["lineage"])
        else:
            yield f"`{parent['path']}`, weights {parent['weights']['sha256'][:12]}"
    step = found.get("result", {}).get("step", "?")
    yield f"{found['stage']}, {step} steps, seed {found['seed']}: `{found['command']}`"


def _all_sources(found: Node) -> Iterator[str]:
    for parent in found["parents"]:
        if parent.get("lineage"):
            yield from _all_sources(parent["lineage"])
    for entry in found["data"]:
        yield f"{entry['path']} ({entry['kind']}, sha256 {entry['sha256'][:12]})"


def _write(path: Path, found: Node) -> None:
    files.write(path / NAME, json.dumps(found, indent=1, ensure_ascii=False))
