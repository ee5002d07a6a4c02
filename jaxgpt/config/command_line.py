"""From YAML and the command line to a config, and a config's mistakes to one line."""

import dataclasses
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

C = TypeVar("C")


def parse(kind: type[C], description: str | None, args: Sequence[str] | None = None) -> C:
    """The config that `--config FILE` and dotted overrides describe.

    Raises:
        ValueError: an unknown key, a wrong type or a value that a config refuses.
    """
    import jsonargparse  # here: only commands parse, and the library imports quickly without it

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        prog=Path(sys.argv[0]).name, description=description, exit_on_error=False,
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument(
        "--config", action="config", help="YAML file that states what differs from the defaults"
    )
    parser.add_class_arguments(kind, sub_configs=True)
    try:
        given = _bare_flags(sys.argv[1:] if args is None else args)
        fields = parser.instantiate(parser.parse_args(given))
    except jsonargparse.ArgumentError as error:
        raise ValueError(_reworded(str(error))) from error
    return kind(**{f.name: fields[f.name] for f in dataclasses.fields(kind)})  # type: ignore[arg-type]


def _reworded(message: str) -> str:
    """The parser's `Expected a …` for every member of a union as `key=value: must be … or …`."""
    message = " ".join(message.split())
    key = re.search(r'Parser key "([^"]+)"', message)
    value = re.search(r"(?:Got|Given) value: (.*)$", message)
    kinds = re.findall(
        r"Expected an? (?:typing\.Literal\[(.*?)\]|<class '(\w+)'>|(dot import path))", message
    )
    if not (key and value and kinds):
        return message
    called = {"NoneType": "null", "dot import path": "a mapping"}
    names = [called.get(name, name) for name in map("".join, kinds)]
    return f"{key[1]}={value[1]}: must be {' or '.join(names)}"


def _bare_flags(args: Sequence[str]) -> list[str]:
    """`--chat` alone means `--chat=true`, which is all that the parser takes."""
    own = ("--help", "--print_config")
    alone = [
        arg.startswith("--") and "=" not in arg and arg not in own
        and (n + 1 == len(args) or args[n + 1].startswith("--"))
        for n, arg in enumerate(args)
    ]  # fmt: skip
    return [f"{arg}=true" if bare else arg for arg, bare in zip(args, alone, strict=True)]


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


def to_yaml(cfg: Any) -> str:
    """The whole config as YAML that `--config` reads back."""
    import yaml

    return yaml.safe_dump(dataclasses.asdict(cfg), sort_keys=False)


def exit_cleanly(main: Callable[[], None]) -> None:
    """Runs a command; a failure becomes one line on stderr.

    The exit status is 2 for a user's mistake, 1 for a run that diverged.
    """
    try:
        main()
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(1 if isinstance(error, FloatingPointError) else 2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
