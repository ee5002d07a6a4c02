"""Functions of the user's own in settings: rewards, tasks, tools, environments, optimizers, losses.

On the command line and in config.yaml they are names, my.py:reward or package.module:reward. Given
to `jaxgpt.launch` as objects, they are written down by such a name, too, so that the command line
can go on with the run; one that no file defines, as in a notebook, by python:NAME@HASH of its
source, with which only Python goes on.
"""

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Self

IN_PYTHON = "python:"


class Own(str):
    """The name of an object, which comes along where it was given as one."""

    value: Any

    def __new__(cls, value: Any) -> Self:
        made = super().__new__(cls, name_of(value))
        made.value = value
        return made

    def __deepcopy__(self, memo: Any) -> str:
        return str(self)  # dataclasses.asdict, and so config.yaml, take the name


def name_of(value: Any) -> str:
    """The name by which an object is written into config.yaml: FILE.py:NAME or python:NAME@HASH."""
    name = getattr(value, "__qualname__", "") or type(value).__name__
    module = sys.modules.get(getattr(value, "__module__", "") or "")
    file = getattr(module, "__file__", None)
    if module is not None and file and module.__name__ != "__main__":
        place = module.__name__ if "." in module.__name__ else file
        if getattr(module, name, None) is value:
            return f"{place}:{name}"
    try:
        source = hashlib.sha256(inspect.getsource(value).encode()).hexdigest()[:8]
    except (OSError, TypeError):  # no function, or typed into an interpreter
        source = ""
    return f"{IN_PYTHON}{name}" + (f"@{source}" if source else "")


def called(name: str) -> str:
    """The name by which a tool is called: the part behind the colon."""
    value = getattr(name, "value", None)
    return getattr(value, "__name__", "") or name.rpartition(":")[2].partition("@")[0]


def is_named(name: str) -> bool:
    """Whether a setting names an object of the user's own."""
    return bool(name) and (isinstance(name, Own) or ":" in name)


def of_run(cfg: Any) -> Iterator[tuple[str, str]]:
    """Yields (setting, name) for every function or object of the user in a run's config."""
    data = getattr(cfg, "data", None)
    for setting, names in (
        *((f"data.{key}", [getattr(data, key, "")]) for key in ("task", "reward", "environment")),
        ("data.tools", getattr(data, "tools", [])),
        ("optim.custom", [cfg.optim.custom]),
        ("train.loss", [cfg.train.loss]),
    ):
        tools = setting == "data.tools"  # of which some are ours, and have no colon
        yield from ((setting, name) for name in names if name and (is_named(name) or not tools))


def find(setting: str, name: str) -> Any:
    """The object of that name.

    Raises:
        ValueError: naming the setting: there is no such file or name, or the file's code fails.
    """
    if isinstance(name, Own):
        return name.value
    if name.startswith(IN_PYTHON):
        raise ValueError(f"{setting}={name}: was given in Python; go on with jaxgpt.launch there")
    place, colon, attribute = name.rpartition(":")
    if not (colon and place and attribute.isidentifier()):
        raise ValueError(f"{setting}={name}: must be FILE.py:NAME, such as my.py:reward")
    try:
        module = _of_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except FileNotFoundError:
        raise ValueError(f"{setting}={name}: there is no file {place}") from None
    except Exception as error:  # of code that we did not write
        kind = type(error).__name__
        raise ValueError(
            f"{setting}={name}: {place} cannot be imported, {kind}: {error}"
        ) from error
    if not hasattr(module, attribute):
        known = [n for n in vars(module) if not n.startswith("_")]
        near = difflib.get_close_matches(attribute, known, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{setting}={name}: {place} has no {attribute}{hint}")
    return getattr(module, attribute)


def function(setting: str, name: str) -> Callable[..., Any]:
    """`find`, for settings that need a function.

    Raises:
        ValueError: as `find`, or if the object cannot be called.
    """
    found = find(setting, name)
    if not callable(found):
        raise ValueError(f"{setting}={name}: is {type(found).__name__}, not a function")
    return found


def _of_file(file: Path) -> ModuleType:
    """The module of a file, which runs once however many settings name it."""
    path = file.resolve(strict=True)
    digest = hashlib.sha256(str(path).encode()).hexdigest()[:8]
    name = f"{path.stem}_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.append(str(path.parent))  # so that it may import its neighbours
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        sys.path.remove(str(path.parent))
    return module
