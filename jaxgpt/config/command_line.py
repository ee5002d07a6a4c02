"""From YAML and the command line to a config, and a config's mistakes to one line."""

import argparse
import dataclasses
import difflib
import errno
import importlib.metadata
import importlib.util
import json
import os
import re
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from jaxgpt import files
from jaxgpt.config import named

C = TypeVar("C")


def parse(kind: type[C], description: str | None, args: Sequence[str] | None = None) -> C:
    """The config that `--config FILE` and dotted overrides describe.

    Raises:
        ValueError: an unknown key, a wrong type or a value that a config refuses.
    """
    import jsonargparse  # here: only commands parse, and the library imports quickly without it

    class Help(jsonargparse.DefaultHelpFormatter):
        def _expand_help(self, action: Any) -> str:  # Annotated[int, 1 or more] is for Python
            inside = r"Annotated\[(\w+), ((?:[\[(][^\])]*[\])]|[^\]])*)\]"
            plain = lambda found: found[2] if found[1] == "str" else f"{found[1]}, {found[2]}"
            return re.sub(inside, plain, super()._expand_help(action))

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        prog=Path(sys.argv[0]).name, description=description, exit_on_error=False,
        allow_abbrev=False, formatter_class=Help,
    )  # fmt: skip
    parser.add_argument(
        "--config", action="config", help="YAML file that states what differs from the defaults"
    )
    parser.add_class_arguments(kind, sub_configs=True)
    if _completes():
        _offer_values(parser, kind)
    own = sys.argv[1:] if args is None else args
    given = _with_files(kind, _bare_flags(kind, _several_paths(own)))
    try:
        parsed = parser.parse_args(given)
        for name in _sections(kind):
            if not isinstance(parsed[name], jsonargparse.Namespace):
                raise ValueError(f"{name}={parsed[name]}: must be a mapping of settings")
        fields = parser.instantiate(parsed)
    except jsonargparse.ArgumentError as error:
        raise ValueError(_reworded(str(error), list(_keys(kind)))) from error
    return kind(**{f.name: fields[f.name] for f in dataclasses.fields(kind)})  # type: ignore[arg-type]


def as_args(kind: type, settings: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Settings as the command line has them: {"train": {"steps": 3}} is --train.steps=3."""
    given, sections = [], _sections(kind)
    for name, value in settings.items():
        if isinstance(value, Mapping) and name in sections:
            given += as_args(sections[name], value, f"{prefix}{name}.")
        elif isinstance(value, str | Path):
            given.append(f"--{prefix}{name}={value}")
        else:
            text = json.dumps(value, default=lambda x: x.item() if hasattr(x, "item") else str(x))
            given.append(f"--{prefix}{name}={text}")
    return given


def _sections(kind: type, optional: bool = False) -> dict[str, Any]:
    """The settings that are dataclasses themselves, or may be one."""
    hints = typing.get_type_hints(kind).items()
    kinds = lambda hint: typing.get_args(hint) if optional else (hint,)
    return {
        name: part for name, hint in hints for part in kinds(hint) if dataclasses.is_dataclass(part)
    }


def _keys(kind: type, prefix: str = "") -> dict[str, Any]:
    """Every setting by its dotted name, with its type."""
    found = {prefix + name: hint for name, hint in typing.get_type_hints(kind).items()}
    for name, part in (_sections(kind) | _sections(kind, optional=True)).items():
        found |= _keys(part, f"{prefix}{name}.")
    return found


def _with_files(kind: type, args: Sequence[str]) -> list[str]:
    """The arguments, with the paths of config files for their names (config/named.py).

    Raises:
        ValueError: a file of --config is not there, is empty or is in a bucket. A setting that is
            missing in it would have its default, but an empty file is a mistake.
    """
    sections, given, before = {f"--{name}" for name in _sections(kind)}, [], ""
    for arg in args:
        flag, equals, value = arg.partition("=") if arg.startswith("--") else (before, "", arg)
        start = f"{flag}=" if equals else ""
        if flag in sections and named.ours(value):
            arg = f"{start}{named.ours(value)}"
        elif flag == "--config" and (equals or not arg.startswith("--")):
            files.require_local("config", value)
            path = named.find("config", value)
            if not Path(path).read_bytes().strip():
                raise ValueError(f"config={path}: is empty; name settings, or drop --config")
            arg = f"{start}{path}"
        before = arg if arg.startswith("--") else ""
        given.append(arg)
    return given


def _reworded(message: str, keys: Sequence[str]) -> str:
    """The parser's message as one line of ours: the setting, its value and the fix."""
    message = " ".join(message.split())
    option = re.match(r"[Uu]nrecognized arguments: (\S+)", message)
    if option and not option[1].startswith("--"):
        return f"{option[1]}: is no option, and no text in quotes that belongs to one"
    key = re.search(r'Parser key "([^"]+)"', message)
    inside = re.search(r"Group '(\S+)' does not accept option '(\S+?)'", message)
    alone = re.search(r"Option '(\S+?)' is not accepted", message)
    if option:
        name = option[1].partition("=")[0]
        return f"{name}: unknown setting; {_meant(name.lstrip('-'), keys, '--')}"
    if inside or alone:
        own = f"{inside[1]}.{inside[2]}" if inside else alone[1] if alone else ""
        name = f"{key[1]}.{own}" if key else own
        return f"{name}: unknown setting; {_meant(name, keys, '')}"
    unread = re.search(r"Unable to load config ['\"](.*?)['\"]", message)
    if key and unread:
        return f"{key[1]}={unread[1]}: is neither a mapping of settings nor a YAML file of them"
    if message.startswith("Unexpected config"):
        return "config: must be a mapping of settings, such as train: {steps: 100}"
    value = re.search(r".*(?:Got|Given) value: (.*)$", message)
    kinds = re.findall(
        r"Expected an? (?:typing\.Literal\[(.*?)\]|<class '(\w+)'>|(dot import path))", message
    )
    if not (key and value and kinds):
        return message
    called = {"NoneType": "null", "dot import path": "a mapping", "dict": "a mapping"}
    names = [called.get(name, name) for name in map("".join, kinds)]
    return f"{key[1]}={value[1]}: must be {' or '.join(names)}"


def _several_paths(args: Sequence[str]) -> list[str]:
    """`--data.path a b`, as a shell makes of `--data.path *.jsonl`, as a list; one path stays, and
    so does a list in brackets. Tools are a list also if there is one."""
    given = {arg.partition("=")[0] for arg in args}
    flags = [flag for flag in ("--data.path", "--data.val_path", "--data.tools") if flag in given]
    joined = []
    for arg in join_lists(args, *flags):
        name, _, value = arg.partition("=")
        if name in flags:
            paths = json.loads(value)
            alone = len(paths) == 1 and (name != "--data.tools" or paths[0].startswith("["))
            arg = f"{name}={paths[0]}" if alone else arg if paths else name
        joined.append(arg)
    return joined


def _meant(name: str, keys: Sequence[str], dashes: str) -> str:
    """The settings that an unknown name is most like, as a whole or by its last word."""
    name = name.replace("-", "_")
    near = difflib.get_close_matches(name, keys, 1, 0.8)
    if not near:
        last = {key: key.rpartition(".")[2] for key in keys}
        words = difflib.get_close_matches(name.rpartition(".")[2], set(last.values()), 1, 0.75)
        near = [key for key in keys if last[key] in words]
    if not near or len(near) > 4:
        return "--help lists all"
    return f"did you mean {' or '.join(dashes + key for key in near)}?"


def _bare_flags(kind: type, args: Sequence[str]) -> list[str]:
    """`--chat` alone means `--chat=true`, which is all that the parser takes.

    Raises:
        ValueError: another setting stands without a value.
    """
    keys, given = {"config": str} | _keys(kind), []
    for arg, after in zip(args, [*args, "--"][1:], strict=True):
        alone = arg.startswith("--") and "=" not in arg and after.startswith("--")
        if alone and keys.get(arg[2:], bool) is not bool:
            raise ValueError(f"{arg}: needs a value")
        bare = alone and arg not in ("--help", "--print_config")
        given.append(f"{arg}=true" if bare else arg)
    return given


def join_lists(args: Sequence[str], *flags: str) -> list[str]:
    """Command-line arguments in which `--flag a b` and `--flag a --flag b` are one YAML list.

    jsonargparse itself takes a list only as `--flag '[a, b]'` or `--flag+ a --flag+ b`.
    """
    rest: list[str] = []
    values: dict[str, list[str]] = {}
    flag = ""
    for arg in args:
        name, equals, value = arg.partition("=")
        if arg.startswith("--"):
            flag = name if name in flags else ""
        if not flag:
            rest.append(arg)
        elif arg.startswith("--"):
            values.setdefault(flag, []).extend([value] if equals else [])
        else:
            values.setdefault(flag, []).append(arg)
    return rest + [f"{name}={json.dumps(found)}" for name, found in values.items()]


def complete(parser: argparse.ArgumentParser) -> None:
    """Answers a shell that asks what may follow, if it does; `parse` does so by itself."""
    if _completes():
        import argcomplete

        argcomplete.autocomplete(parser)


def to_yaml(cfg: Any) -> str:
    """The whole config as YAML that `--config` reads back."""
    import yaml

    return yaml.safe_dump(dataclasses.asdict(cfg), sort_keys=False)


def said(error: Exception) -> str:
    """An error's message; one of the system without its number, and with what to do."""
    if not isinstance(error, OSError) or not error.strerror:
        return str(error)
    fix = "; make room, then the same command goes on" if error.errno == errno.ENOSPC else ""
    return f"{error.filename or 'a file'}: {error.strerror}{fix}"


def _offer_values(parser: Any, kind: type) -> None:
    """What a shell may offer as a setting's value: a Literal's words, true and false, or files.

    jsonargparse itself raises where it has nothing to offer.
    """
    from argcomplete.completers import FilesCompleter

    hints, paths = _keys(kind), FilesCompleter()
    for action in parser._actions:
        hint = hints.get(action.dest)
        words = ["true", "false"] if hint is bool else [
            str(word) for part in (hint, *typing.get_args(hint))
            for word in typing.get_args(part) if typing.get_origin(part) is typing.Literal
        ]  # fmt: skip
        text = hint is str or str in typing.get_args(hint)
        if hint is not None:
            action.completer = paths if text else lambda prefix, words=words, **_: words


def _completes() -> bool:
    """Whether a shell asks what may follow, and the extra `completion` is there to answer."""
    return "_ARGCOMPLETE" in os.environ and bool(importlib.util.find_spec("argcomplete"))


def extras() -> dict[str, list[str]]:
    """The packages of every extra of jaxgpt; empty in a checkout that is not installed."""
    found: dict[str, list[str]] = {}
    try:
        lines = importlib.metadata.requires("jaxgpt") or []
    except importlib.metadata.PackageNotFoundError:
        lines = []
    for line in lines:
        package, extra = re.match(r"[\w.-]+", line), re.search(r"extra == ['\"](\w+)", line)
        if package and extra:
            found.setdefault(extra[1], []).append(package[0])
    return found


def _extra(module: str) -> str | None:
    """The extra that brings a module; None if no extra does, as far as their names tell."""
    name = module.partition(".")[0].replace("_", "-")
    brings = lambda package: package == name or package.startswith(f"{name}-")
    return next((extra for extra, some in extras().items() if any(map(brings, some))), None)


def exit_cleanly(main: Callable[[], None]) -> None:
    """Runs a command; a failure becomes one line on stderr.

    The exit status is 2 for a user's mistake, 1 for a run that diverged.
    """
    try:
        main()
    except ModuleNotFoundError as error:
        if (extra := _extra(error.name or "")) is None:
            raise
        print(f'error: {error.name}: is not installed; pip install "jaxgpt[{extra}]"',
              file=sys.stderr)  # fmt: skip
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except Exception as error:
        if not isinstance(error, ValueError | OSError | FloatingPointError):
            from jaxgpt import store

            if not store.is_cloud_error(error):
                raise
        print(f"error: {' '.join(said(error).split())}", file=sys.stderr)
        raise SystemExit(1 if isinstance(error, FloatingPointError) else 2) from None
