"""A run's directory: its config, its tokenizer, its newest weights.

config.yaml      the resolved settings, which run again
tokenizer.json   in Hugging Face's format
checkpoints/     see checkpoint.py; of a run with --peft.kind only what it adds to its base
base.json        path and hash of that base
fit.json         what fit=auto chose, and for which devices
metrics.jsonl, samples.md, report.html, plots/, environment.json
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import yaml

from jaxgpt import files, tree
from jaxgpt.checkpoint import Checkpoints, content, read_arrays, verify
from jaxgpt.config import ModelConfig, PeftConfig, RopeScaling, RunConfig, to_yaml
from jaxgpt.types import Params

# Settings that change what is watched, kept or where it is computed, but no number of the run.
FREE = ("run", "log", "sample", "mesh", "checkpoint", "fit")
FREE_TOO = ("data/cache",)  # of the other sections
# What fit=auto decides: the same numbers but for rounding.
FITTED = ("train/micro_batches", "model/remat")
# What a run that starts from other weights decides itself; the rest of its model is theirs.
OWN = ("model/dtype", "model/remat", "model/dropout")


def enter(cfg: RunConfig) -> Path:
    """Makes the run's directory, or checks that it belongs to the same config.

    Raises:
        ValueError: another config made it (naming the differing keys), it holds other files, or
            it cannot be written.
    """
    path = files.path(cfg.run)
    if path.exists() and not path.is_dir():
        raise ValueError(f"run={path}: is a file; choose a directory")
    file = path / "config.yaml"
    log = path / "metrics.jsonl"
    if log.exists() and log.stat().st_size:  # else nothing was trained: mistakes may be mended
        old = _filled(yaml.safe_load(file.read_text()), dataclasses.asdict(type(cfg)(run=cfg.run)))
        if old["train"]["steps"] != cfg.train.steps:
            _require_more(path, old, cfg)
            for section, name in (("train", "steps"), ("optim", "decay_steps")):
                old[section][name] = getattr(getattr(cfg, section), name)
        _require_same(path, old, dataclasses.asdict(cfg))
    elif (
        path.is_dir()
        and not file.is_file()
        and not all(files.is_partial(entry) for entry in path.iterdir())
    ):
        raise ValueError(f"run={path}: holds files that are no run of jaxgpt; choose another")
    try:
        files.make_folder(path)
        write_config(cfg)
    except OSError as error:
        raise ValueError(
            f"run={path}: cannot be written ({error.strerror}); choose another directory"
        ) from None
    return path


def write_config(cfg: RunConfig) -> None:
    """config.yaml, also where several processes write it at a time."""
    files.write(files.path(cfg.run) / "config.yaml", to_yaml(cfg))


def config_hash(path: str | Path) -> str:
    """sha256 of the settings that decide a run's numbers, whatever the order and spelling."""
    settings = yaml.safe_load((files.path(path) / "config.yaml").read_text())
    kept = {name: value for name, value in settings.items() if name not in FREE}
    kept.get("data", {}).pop("cache", None)
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def read_fit(path: str | Path, devices: dict[str, Any]) -> dict[str, Any] | None:
    """What fit=auto chose for these devices when the run began; None if that is to be done."""
    file = files.path(path) / "fit.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    return found["chosen"] if found.get("devices") == devices else None


def write_fit(path: str | Path, devices: dict[str, Any], chosen: dict[str, Any]) -> None:
    """Remembers a choice, so that the same run on the same devices makes it again."""
    content = json.dumps({"devices": devices, "chosen": chosen}, indent=1)
    files.write(files.path(path) / "fit.json", content)


def is_run(path: str | Path) -> bool:
    """Whether `path` is the directory of a run."""
    return (files.path(path) / "config.yaml").is_file()


def untuned(setting: str, path: str | Path) -> list[str]:
    """A warning where a run is to chat that has read no conversation.

    A vocabulary of ours has tokens for chat, so that such a run has a template all the same.
    """
    if not is_run(path) or (files.path(path) / "chat_template.jinja").exists():
        return []
    return [f"{setting}={path}: was never tuned to chat; run scripts/sft.py --init {path} first"]


def model_config(path: str | Path) -> ModelConfig:
    """The network of a run."""
    settings = yaml.safe_load((files.path(path) / "config.yaml").read_text())["model"]
    scaling = settings.pop("rope_scaling", None)
    return ModelConfig(**settings, rope_scaling=scaling and RopeScaling(**scaling))


def newest(path: str | Path) -> Path:
    """The directory of a run's newest intact checkpoint.

    Raises:
        ValueError: there is none.
    """
    checkpoints = Checkpoints(files.path(path) / "checkpoints")
    step = checkpoints.latest_valid()
    if step is None:
        raise ValueError(f"{path}: has no intact checkpoint; train it first")
    return checkpoints.directory / str(step)


def read_params(path: str | Path, network: str = "policy") -> Params:
    """The newest intact weights of one network, averaged (optim.ema) if the run did so.

    Raises:
        ValueError: no intact checkpoint.
    """
    directory = newest(path)
    try:
        prefix = f"ema/{network}/"
        arrays = read_arrays(directory, prefix)
    except ValueError:
        prefix = f"params/{network}/"
        arrays = read_arrays(directory, prefix)
    return tree.nest({name.removeprefix(prefix): array for name, array in arrays.items()})


def fingerprint(path: str | Path) -> str:
    """sha256 of the files that hold a model's weights: a run's newest, safetensors, or one file.

    Raises:
        ValueError: there are none.
    """
    path = files.path(path)
    if is_run(path):
        sources = [newest(path) / "manifest.json", path / "base.json"]
    else:
        sources = sorted(path.glob("*.safetensors"), key=str) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in sources:
        if file.exists():
            digest.update(bytes.fromhex(files.sha256(file)))
    return digest.hexdigest()


def weights(path: str | Path, step: int | None = None) -> dict[str, Any]:
    """What identifies a model's weights: their sha256, and of a run the step.

    Args:
        step: of a run; None: the newest intact one.

    Raises:
        ValueError: there are none, or (naming the file) they are damaged.
    """
    if not is_run(path):
        return {"sha256": fingerprint(path)}
    if step is None:
        directory = newest(path)
    else:
        directory = files.path(path) / "checkpoints" / str(step)
        if not (directory / "manifest.json").is_file():
            raise ValueError(f"{directory}: is gone")
        verify(directory)
    return {"step": int(directory.name), "sha256": content(directory) or fingerprint(path)}


def write_base(cfg: RunConfig) -> None:
    """Notes on which weights the run builds, since its checkpoints do not hold them.

    Raises:
        ValueError: the run began on other weights.
    """
    file = files.path(cfg.run) / "base.json"
    found = {"path": files.absolute(cfg.init), "sha256": fingerprint(cfg.init)}
    if file.exists() and json.loads(file.read_text())["sha256"] != found["sha256"]:
        raise ValueError(f"init={cfg.init}: has changed since {cfg.run} began; use another --run")
    files.write(file, json.dumps(found, indent=1))


def read_base(path: str | Path) -> tuple[str, PeftConfig] | None:
    """Where the base of a run is and how the run builds on it; None if the run is whole.

    Raises:
        ValueError: the base is gone or has changed.
    """
    file = files.path(path) / "base.json"
    if not file.exists():
        return None
    base = json.loads(file.read_text())
    if not files.path(base["path"]).exists():
        raise ValueError(f"{path}: builds on {base['path']}, which is gone; name it in {file}")
    if fingerprint(base["path"]) != base["sha256"]:
        raise ValueError(f"{path}: builds on {base['path']}, which has changed since")
    settings = yaml.safe_load((files.path(path) / "config.yaml").read_text())["peft"]
    return base["path"], PeftConfig(**settings)


def _filled(old: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """A run's settings, with those that its version of jaxgpt did not have yet."""
    return defaults | {
        name: _filled(value, defaults[name])
        if isinstance(value, dict) and isinstance(defaults.get(name), dict)
        else value
        for name, value in old.items()
    }


def _require_more(path: Path, old: dict[str, Any], cfg: RunConfig) -> None:
    """Raises ValueError unless a run can go on to another train.steps.

    A constant rate goes on, wsd goes on from where its decay began, and a cosine must be told what
    happens to it by optim.decay_steps.
    """
    from jaxgpt import optim  # here: who only reads a run needs no optax

    steps, done = cfg.train.steps, max(Checkpoints(path / "checkpoints").steps(), default=0)
    if steps < done:
        raise ValueError(f"train.steps={steps}: {done} steps are done; give more, or another --run")
    ends = old["optim"]["decay_steps"] or old["train"]["steps"]
    before = (old["train"]["steps"], old["optim"]["decay_steps"])
    told = cfg.optim.schedule != "cosine" or cfg.optim.decay_steps is not None
    if not told and not optim.goes_on(cfg.optim, steps, before, done):
        raise ValueError(
            f"train.steps={steps}: the cosine of {path} ends at step {ends}; give "
            f"--optim.decay_steps {ends} to go on at its last rate, --optim.decay_steps {steps} to "
            f"stretch it (the rate rises again first), or another --run with --init {path}"
        )


def _require_same(path: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    before, after = tree.flatten(old), tree.flatten(new)
    if not after["model/vocab_size"]:  # resolved from the tokenizer, then as now
        after["model/vocab_size"] = before.get("model/vocab_size")
    brought = new["init"] or new.get("layers")  # by other weights, as those of a teacher's layers
    given = lambda name: brought and name.startswith("model/") and name not in OWN
    differing = [
        f"{name.replace('/', '.')}: {before.get(name)} -> {after.get(name)}"
        for name in {**before, **after}
        if before.get(name) != after.get(name)
        and name.split("/")[0] not in FREE
        and name not in FREE_TOO
        and not given(name)
        and not (new["fit"] == "auto" and name in FITTED)
    ]
    if differing:
        raise ValueError(
            f"run={path}: was made with another config ({'; '.join(differing)}); use its settings, "
            "or another --run"
        )
