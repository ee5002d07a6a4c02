"""Config files by name: those that come with jaxgpt are found from any folder.

pretrain/shakespeare-char-cpu, and also configs/pretrain/shakespeare-char-cpu.yaml, is one of ours
unless there is such a file where the command runs.
"""

import difflib
from collections.abc import Sequence
from pathlib import Path

# In the repository a link to configs/; in an installed package a folder.
CONFIGS = (Path(__file__).parents[1] / "configs").resolve()


def find(setting: str, name: str) -> str:
    """The file that a setting names: a path, or one of ours.

    Raises:
        ValueError: there is none.
    """
    if found := ours(name):
        return found
    if Path(name).is_file():
        return name
    if Path(name).exists():
        raise ValueError(f"{setting}={name}: is a folder; name a file in it")
    near = _nearest(name.removeprefix("configs/").removesuffix(".yaml"))
    known = f"did you mean {' or '.join(near)}?" if near else f"those of jaxgpt are in {CONFIGS}"
    raise ValueError(f"{setting}={name}: there is no such file; {known}")


def ours(name: str) -> str | None:
    """The path of a config that comes with jaxgpt, unless the name is a file's here."""
    if not name or Path(name).is_absolute() or Path(name).is_file():
        return None
    within = name.removeprefix("configs/")
    for file in (CONFIGS / within, CONFIGS / f"{within}.yaml"):
        if file.is_file() and CONFIGS in file.resolve().parents:
            return str(file)
    return None


def _nearest(name: str) -> list[str]:
    """Up to three of our configs that a wrong name may mean, the likeliest first."""
    known = sorted(
        str(file.relative_to(CONFIGS).with_suffix("")) for file in CONFIGS.glob("*/*.yaml")
    )
    near = difflib.get_close_matches(name, known, 3, 0.6)
    last = {key: key.rpartition("/")[2] for key in known}
    words = difflib.get_close_matches(name.rpartition("/")[2], set(last.values()), 3, 0.6)
    return list(dict.fromkeys([*near, *(key for key in known if last[key] in words)]))[:3]


def with_recipe(stage: str, args: Sequence[str]) -> list[str]:
    """Pretraining begins with our recipe, configs/pretrain/default.yaml.

    Not with --config, with the preset of a --model, with --init, which brings a model, or with
    another optimizer, for which its learning rate is too high: what these leave out has the
    default of its setting.
    """
    named = {arg.partition("=")[0] for arg in args}
    if stage != "pretrain" or named & {
        "--config",
        "--init",
        "--model",
        "--optim.name",
        "--optim.custom",
    }:
        return list(args)
    return ["--config", "pretrain/default", *args]
