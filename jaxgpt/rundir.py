"""A run's directory: its config, its tokenizer, its newest weights.

config.yaml      the resolved settings, which run again
tokenizer.json   in Hugging Face's format
checkpoints/     see checkpoint.py
metrics.jsonl, samples.md, report.html, plots/, environment.json
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from jaxgpt import tree
from jaxgpt.checkpoint import Checkpoints, read_arrays
from jaxgpt.config import ModelConfig, RopeScaling, RunConfig, to_yaml
from jaxgpt.types import Params

# Settings that change what is watched, kept or where it is computed, but no number of the run.
FREE = ("run", "log", "sample", "mesh", "checkpoint")


def enter(cfg: RunConfig) -> Path:
    """Makes the run's directory, or checks that it belongs to the same config.

    Raises:
        ValueError: another config made it (naming the differing keys), or it holds other files.
        OSError: it cannot be written.
    """
    path = Path(cfg.run)
    if path.exists() and not path.is_dir():
        raise ValueError(f"run={path}: is a file; choose a directory")
    file = path / "config.yaml"
    if file.is_file():
        _require_same(path, yaml.safe_load(file.read_text()), dataclasses.asdict(cfg))
    elif path.is_dir() and any(path.iterdir()):
        raise ValueError(f"run={path}: holds files that are no run of jaxgpt; choose another")
    path.mkdir(parents=True, exist_ok=True)
    write_config(cfg)
    return path


def write_config(cfg: RunConfig) -> None:
    """config.yaml, whole or not at all."""
    partial = Path(cfg.run) / "config.yaml.tmp"
    partial.write_text(to_yaml(cfg))
    partial.replace(partial.with_suffix(""))


def is_run(path: str | Path) -> bool:
    """Whether `path` is the directory of a run."""
    return (Path(path) / "config.yaml").is_file()


def model_config(path: str | Path) -> ModelConfig:
    """The network of a run."""
    settings = yaml.safe_load((Path(path) / "config.yaml").read_text())["model"]
    scaling = settings.pop("rope_scaling", None)
    return ModelConfig(**settings, rope_scaling=scaling and RopeScaling(**scaling))


def read_params(path: str | Path, network: str = "policy") -> Params:
    """The newest intact weights of one network, averaged (optim.ema) if the run did so.

    Raises:
        ValueError: no intact checkpoint.
    """
    checkpoints = Checkpoints(Path(path) / "checkpoints")
    step = checkpoints.latest_valid()
    if step is None:
        raise ValueError(f"{path}: has no intact checkpoint; train it first")
    directory = checkpoints.directory / str(step)
    try:
        prefix = f"ema/{network}/"
        arrays = read_arrays(directory, prefix)
    except ValueError:
        prefix = f"params/{network}/"
        arrays = read_arrays(directory, prefix)
    return nest({name.removeprefix(prefix): array for name, array in arrays.items()})


def nest(leaves: dict[str, np.ndarray]) -> Params:
    """{"a/b": x} -> {"a": {"b": x}}."""
    root: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *parents, last = name.split("/")
        node = root
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return root


def _require_same(path: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    before, after = tree.flatten(old), tree.flatten(new)
    if not after["model/vocab_size"]:  # resolved from the tokenizer, then as now
        after["model/vocab_size"] = before.get("model/vocab_size")
    differing = [
        f"{name.replace('/', '.')}: {before.get(name)} -> {after.get(name)}"
        for name in {**before, **after}
        if before.get(name) != after.get(name) and name.split("/")[0] not in FREE
    ]
    if differing:
        raise ValueError(
            f"run={path}: was made with another config ({'; '.join(differing)}); use its settings, "
            "or another --run"
        )
