"""Adapters in the format of Hugging Face's PEFT: adapter_config.json, adapter_model.safetensors.

A module of theirs is a kernel of ours in one layer: lora_A [R, D] is a transposed, lora_B [F, R]
is b transposed. GPT-2's c_attn holds query, key and value: read, they share its lora_A; written,
theirs stand side by side, with a block-diagonal lora_B.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from jaxgpt import files, hub, peft, tree, weights
from jaxgpt.config import ModelConfig
from jaxgpt.convert import hf, table
from jaxgpt.convert.table import Row
from jaxgpt.convert.tensors import read_json, save_file
from jaxgpt.types import Params
from jaxgpt.weights import Kernel, Lora

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# Settings under which the tensors mean something else, with the values that they may have.
NOTHING = (None, False, [], {}, "", 0)
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    # The others change the base, or what a and b mean.
    "init_lora_weights": (None, True, False, "gaussian", "orthogonal", "eva"),
    "layer_replication": NOTHING,
    "lora_bias": NOTHING,
    "target_parameters": NOTHING,
    "use_qalora": NOTHING,
    "use_bdlora": NOTHING,
    "alora_invocation_tokens": NOTHING,
    "arrow_config": NOTHING,
    "kasa_config": NOTHING,
    "monteclora_config": NOTHING,
    "ensure_weight_tying": NOTHING,
}
# Settings that are read here, or that only training reads.
KNOWN = """
    r lora_alpha rank_pattern alpha_pattern use_rslora use_dora target_modules exclude_modules
    layers_to_transform layers_pattern base_model_name_or_path fan_in_fan_out bias modules_to_save
    trainable_token_indices auto_mapping corda_config eva_config inference_mode loftq_config
    lora_dropout lora_ga_config megatron_config megatron_core peft_version qalora_group_size
    revision runtime_config task_type velora_config
"""
MERGE = (
    "merge in PEFT first: PeftModel.from_pretrained(base, adapter).merge_and_unload()"
    ".save_pretrained(directory), and give that directory"
)


def is_adapter(path: str | Path) -> bool:
    """Whether `path` is a directory that PEFT wrote."""
    return (files.path(path) / CONFIG).is_file()


def base_of(path: str | Path) -> str | Path:
    """The model that an adapter was trained on: a path, or the exact form of a name on the Hub.

    Raises:
        ValueError: it is not on this machine, nor on the Hub.
    """
    told = read_json(files.path(path) / CONFIG)
    name, revision = told.get("base_model_name_or_path"), told.get("revision")
    if isinstance(name, str) and hub.is_asked(name):
        if isinstance(revision, str):
            name = f"{name}@{revision}"
        return hub.find(f"{path}/{CONFIG}: base_model_name_or_path", name)
    if not isinstance(name, str) or not name or not files.path(name).exists():
        raise ValueError(
            f"{path}/{CONFIG}: base_model_name_or_path={name!r:.80}: is not here; write the path "
            "of the base"
        )
    return files.path(name)


def load(path: str | Path, cfg: ModelConfig, base: Params) -> Params:
    """The base with the adapter of a directory beside its kernels.

    Raises:
        ValueError: settings that ours cannot have, or tensors that fit nowhere.
    """
    path = Path(path)
    settings = read_json(path / CONFIG)
    for name, value in settings.items():
        if name in NEUTRAL:
            fine = value in NEUTRAL[name]
        else:
            fine = value in NOTHING or name in KNOWN.split()
        if not fine:
            raise ValueError(f"{path / CONFIG}: {name}={value!r:.80}: jaxgpt has not that; {MERGE}")
    found = _read(path / WEIGHTS)
    try:
        kernels = _with_whole(found, settings, cfg, peft.leaves(base))
        for row in _rows(cfg):
            names = table.parameters(row)
            modules = [_module(theirs) for theirs, _ in table.pieces(row, cfg)]
            layers = [_take(found, settings, module) for module in modules]
            if any(layers):
                axes = table.sizes(cfg, len(names))
                of_layers = [layer and _apart(layer, row, axes) for layer in layers]
                for part, name in enumerate(names):
                    own = [layer and layer[part] for layer in of_layers]
                    kernels[name] = _stack(kernels[name], own)
        if found:
            odd = ", ".join(sorted(found)[:4])
            raise ValueError(f"holds tensors that fit nowhere: {odd}; {MERGE}")
    except ValueError as error:
        raise ValueError(f"{path / WEIGHTS}: {error}") from None
    return tree.nest(kernels)


def save(path: str | Path, cfg: ModelConfig, params: Params, base: str = "") -> None:
    """Writes the low-rank changes of a network so that PEFT's `from_pretrained` opens them.

    Args:
        base: what PEFT loads when it is not given the base; a path or a name on the Hub.

    Raises:
        ValueError: there are none, or PEFT has no place for one of them.
    """
    found = list(changes(_rows(cfg), cfg, params))
    lengths = {change.length is not None for change in found}
    if len(lengths) > 1:
        raise ValueError("PEFT has no adapter that is DoRA for some kernels only")
    tensors: dict[str, np.ndarray] = {}
    scales: dict[str, tuple[int, float]] = {}
    for change in found:
        module = PREFIX + _module(change.theirs)
        target = change.row[1].split("{layer}.")[-1].removesuffix(".weight")
        scales[target] = len(change.a_RD), change.strength
        tensors[f"{module}.lora_A.weight"] = change.a_RD
        tensors[f"{module}.lora_B.weight"] = change.b_FR
        if change.length is not None:
            tensors[f"{module}.lora_magnitude_vector"] = change.length
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path}: holds something already; give another directory")
    path.mkdir(parents=True, exist_ok=True)
    settings = _settings(scales, True in lengths, base, _conv1d(cfg))
    (path / CONFIG).write_text(json.dumps(settings, indent=2) + "\n")
    save_file(path / WEIGHTS, tensors)


class Change(NamedTuple):
    """What a low-rank change makes of one tensor of theirs: + strength * b @ a."""

    row: Row
    theirs: str  # the tensor's name
    a_RD: np.ndarray
    b_FR: np.ndarray
    length: np.ndarray | None  # [F], DoRA's
    strength: float


def changes(rows: list[Row], cfg: ModelConfig, params: Params) -> Iterator[Change]:
    """The low-rank changes of a network, by the tensors of these rows.

    Raises:
        ValueError: there are none, or no row holds one of them.
    """
    kernels = peft.leaves(params)
    left = {name for name, kernel in kernels.items() if isinstance(kernel, Lora)}
    if not left:
        raise ValueError("the network has no low-rank changes to export; see --peft.kind lora")
    for row in rows:
        names = table.parameters(row)
        if not left & set(names):
            continue
        left -= set(names)
        a, b, magnitude, strength = _join([kernels[name] for name in names])
        axes = table.sizes(cfg, len(names)) | {"rank": a.shape[-1]}
        ends = np.cumsum([peft.shape_of(kernels[name])[-1] for name in names])[:-1]

        def outward(array: np.ndarray, more: str = "") -> np.ndarray:
            of_row = (row[0], row[1], _outward(row, more))  # noqa: B023
            return np.ascontiguousarray(table.join(np.split(array, ends), of_row, axes))  # noqa: B023

        for theirs, index in table.pieces(row, cfg):
            length = None if magnitude is None else outward(magnitude[index])
            a_RD = np.ascontiguousarray(a[index].T)
            yield Change(row, theirs, a_RD, outward(b[index].T, " rank"), length, strength)
    if left:
        raise ValueError(f"there is no place for the change of {', '.join(sorted(left)[:4])}")


def _rows(cfg: ModelConfig) -> list[Row]:
    """The table's rows of single kernels; PEFT wraps modules, and experts are none.

    Beside experts it takes the projections of a dense or shared MLP for theirs, by their names.
    """
    family = _family(cfg)
    kernels = [name for name in table.parameter_shapes(cfg) if name.endswith("kernel")]
    rows = table.select(family.table, dict.fromkeys(kernels))
    without = re.compile("moe/|dense_blocks/mlp/").search
    return [row for row in rows if not without("".join(table.parameters(row)))]


def _family(cfg: ModelConfig) -> Any:
    kind = hf.config_to_hf(cfg)["model_type"]
    return next(family for family in hf.FAMILIES if family.model_type == kind)


def _conv1d(cfg: ModelConfig) -> bool:
    """Whether their modules keep weights as [in, out], which PEFT wants to be told."""
    return _family(cfg).model_type == "gpt2"


def _module(theirs: str) -> str:
    return theirs.removesuffix(".weight")


def _read(file: Path) -> dict[str, np.ndarray]:
    if not file.is_file():
        raise ValueError(f"{file}: no such file (pickled adapters are not read)")
    try:
        return safetensors.numpy.load_file(file)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file}: not a whole safetensors file ({error})") from None


def _with_whole(
    found: dict[str, np.ndarray],
    settings: Mapping[str, Any],
    cfg: ModelConfig,
    kernels: dict[str, Kernel],
) -> dict[str, Kernel]:
    """The kernels with whatever the adapter holds whole, or in place of rows of the embedding.

    That is modules_to_save, biases, new embeddings, and the weights under an adapted head.
    """
    kernels = dict(kernels)
    for row in table.select(_family(cfg).table, table.parameter_shapes(cfg)):
        names, axes = table.parameters(row), table.sizes(cfg, len(table.parameters(row)))
        changed: dict[str, np.ndarray] = {}
        for theirs, index in table.pieces(row, cfg):
            old = lambda: _their_tensor([kernels[n] for n in names], row, index, axes)  # noqa: B023
            new = _whole(found, settings, theirs, old)
            if new is None:
                continue
            if new.shape != table.their_shape(row[2], axes):
                wanted = list(table.their_shape(row[2], axes))
                raise ValueError(f"{theirs} is {list(new.shape)} instead of {wanted}; {MERGE}")
            for name, part in zip(names, table.split(new, row, axes), strict=True):
                changed.setdefault(name, np.array(weights.dense(kernels[name])))[index] = part
        for name, array in changed.items():
            same = np.array_equal(array, weights.dense(kernels[name]))
            rows_alone = bool(settings.get("trainable_token_indices"))
            if name == "embed/embedding" and cfg.tie_embeddings and not same and not rows_alone:
                raise ValueError(
                    f"a new embedding, but not a new head, which jaxgpt holds as one; {MERGE}"
                )
            kernels[name] = kernels[name] if same else jnp.asarray(array)
    return kernels


def _their_tensor(
    kernels: list[Kernel], row: Row, index: tuple[int, ...], axes: Mapping[str, int]
) -> np.ndarray:
    block = [np.asarray(weights.dense(kernel))[index] for kernel in kernels]
    return table.join(block, row, axes)


def _whole(
    found: dict[str, np.ndarray],
    settings: Mapping[str, Any],
    theirs: str,
    old: Callable[[], np.ndarray],
) -> np.ndarray | None:
    """What the adapter makes of one tensor of the base; None: it stays."""
    module, _, leaf = theirs.rpartition(".")
    new = None
    for name in (theirs, f"{module}.base_layer.{leaf}"):
        new = found.pop(PREFIX + name, new)
    rows = found.pop(f"{PREFIX}{module}.token_adapter.trainable_tokens_delta", None)
    if rows is not None and leaf == "weight":
        new = np.array(old() if new is None else new)
        told = settings.get("trainable_token_indices") or ()
        indices = told.get(module.rpartition(".")[2], ()) if isinstance(told, dict) else told
        if len(indices) != len(rows) or max(indices) >= len(new):
            raise ValueError(f"{module}: {len(rows)} rows for trainable_token_indices={indices}")
        new[indices] = rows
    a_RV = found.pop(f"{PREFIX}{module}.lora_embedding_A", None)
    if a_RV is not None:
        b_DR = found.pop(f"{PREFIX}{module}.lora_embedding_B")
        change_VD = (b_DR @ a_RV).T * _strength(settings, module, len(a_RV))
        new = (old() if new is None else new) + change_VD
    return new


def _take(
    found: dict[str, np.ndarray], settings: Mapping[str, Any], module: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None] | None:
    """A [R, D], B [F, R] times its strength, and the magnitude of one module, taken out."""
    name = PREFIX + module
    if f"{name}.lora_A.weight" not in found:
        return None
    if not _is_target(settings, module):
        raise ValueError(f"holds a change of {module}, which {CONFIG} does not target")
    a_RD = found.pop(f"{name}.lora_A.weight").astype(np.float32)
    b_FR = found.pop(f"{name}.lora_B.weight", np.zeros((0, 0))).astype(np.float32)
    if a_RD.ndim != 2 or b_FR.ndim != 2 or b_FR.shape[1] != len(a_RD):
        raise ValueError(f"{name}: lora_A {a_RD.shape} and lora_B {b_FR.shape} do not fit")
    magnitude = found.pop(f"{name}.lora_magnitude_vector", None)
    if magnitude is None:
        magnitude = found.pop(f"{name}.lora_magnitude_vector.weight", None)
    if bool(settings.get("use_dora")) != (magnitude is not None):
        raise ValueError(f"{name}: use_dora={settings.get('use_dora')}, unlike the tensors")
    return a_RD, b_FR * _strength(settings, module, len(a_RD)), magnitude


def _outward(row: Row, more: str = "") -> str:
    """The pattern of a kernel's outputs alone, such as of its bias.

    Args:
        more: an axis behind them, such as " rank".
    """
    left, _, right = row[2].partition(" -> ")
    groups = lambda side: re.findall(r"\(.*?\)|\w+", side)
    *part, inward, outward = groups(right or left)
    (theirs,) = (group for group in groups(left) if group != inward)
    return f"{theirs}{more} -> {' '.join([*part, outward])}{more}"


def _apart(
    change: tuple[np.ndarray, np.ndarray, np.ndarray | None], row: Row, axes: Mapping[str, int]
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray | None]]:
    """The changes of our kernels from that of the module that holds them."""
    a_RD, b_FR, length = change
    vector, matrix = ((row[0], row[1], _outward(row, more)) for more in ("", " rank"))
    if (len(b_FR),) != table.their_shape(vector[2], axes):
        raise ValueError(f"lora_A {a_RD.shape} and lora_B {b_FR.shape} do not fit {row[1]}")
    parts = table.split(b_FR, matrix, {**axes, "rank": len(a_RD)})
    lengths = [None] * len(parts) if length is None else table.split(length, vector, axes)
    return [(a_RD, b, own) for b, own in zip(parts, lengths, strict=True)]


def _strength(settings: Mapping[str, Any], module: str, rank: int) -> float:
    """What the low-rank change of a module is multiplied by; its first pattern decides."""

    def setting(name: str, patterns: str) -> Any:
        for pattern, value in (settings.get(patterns) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        return settings.get(name, 8)

    if setting("r", "rank_pattern") != rank:
        told = setting("r", "rank_pattern")
        raise ValueError(f"{module}: has rank {rank}, where {CONFIG} states {told}")
    alpha = setting("lora_alpha", "alpha_pattern")
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _is_target(settings: Mapping[str, Any], module: str) -> bool:
    """Whether PEFT adapts this module (its check_target_module_exists)."""

    def named(told: Any) -> bool:
        if isinstance(told, str):
            return told == "all-linear" or re.fullmatch(told, module) is not None
        return any(module == name or module.endswith(f".{name}") for name in told or ())

    if named(settings.get("exclude_modules")) or not named(settings.get("target_modules")):
        return False
    layers = settings.get("layers_to_transform")
    if layers in (None, []) or isinstance(settings["target_modules"], str):
        return True
    layer = re.match(r".*?\.[^.]*\.(\d+)\.", module)
    return layer is not None and int(layer[1]) in (layers if isinstance(layers, list) else [layers])


def _stack(kernel: Kernel, layers: list[Any]) -> Lora:
    """One leaf from the modules of all layers; layers without one, and short ranks, get zeros."""
    *stack, D, F = peft.shape_of(kernel)
    if isinstance(kernel, Lora):
        raise ValueError("the base has low-rank changes already; merge them first")
    rank = max(len(layer[0]) for layer in layers if layer)
    a = np.zeros((len(layers), D, rank), np.float32)
    b = np.zeros((len(layers), rank, F), np.float32)
    norm = None
    magnitude = None
    if any(layer and layer[2] is not None for layer in layers):
        norm = peft.column_norms(kernel)
        magnitude = np.array(norm).reshape(len(layers), F)
    for index, layer in enumerate(layers):
        if layer is None:
            continue
        a_RD, b_FR, length = layer
        if a_RD.shape[1] != D or len(b_FR) != F:
            raise ValueError(f"lora_A {a_RD.shape} and lora_B {b_FR.shape} do not fit [{D}, {F}]")
        a[index, :, : len(a_RD)] = a_RD.T
        b[index, : len(a_RD)] = b_FR.T
        if magnitude is not None and length is not None:
            magnitude[index] = length
    shaped = lambda x: jnp.asarray(x.reshape(*stack, *x.shape[1:]))
    return Lora(
        kernel, shaped(a), shaped(b), None if magnitude is None else shaped(magnitude), norm
    )


def _join(kernels: list[Kernel]) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, float]:
    """a, b and magnitude of a module that holds several kernels side by side."""
    changes = [kernel for kernel in kernels if isinstance(kernel, Lora)]
    strength = changes[0].strength
    if len(kernels) == 1:
        change = changes[0]
        magnitude = None if change.magnitude is None else np.asarray(change.magnitude)
        return np.asarray(change.a), np.asarray(change.b), magnitude, strength
    a = np.concatenate([np.asarray(change.a) for change in changes], axis=-1)
    lead, widths = a.shape[:-2], [peft.shape_of(kernel)[-1] for kernel in kernels]
    b = np.zeros((*lead, a.shape[-1], sum(widths)), np.float32)
    row = column = 0
    for kernel, width in zip(kernels, widths, strict=True):
        if isinstance(kernel, Lora):
            rank = kernel.b.shape[-2]
            block = np.asarray(kernel.b) * (kernel.strength / strength)
            b[..., row : row + rank, column : column + width] = block
            row += rank
        column += width
    if changes[0].magnitude is None:
        return a, b, None, strength
    lengths = [k.magnitude if isinstance(k, Lora) else peft.column_norms(k) for k in kernels]
    return a, b, np.concatenate([np.asarray(x) for x in lengths], axis=-1), strength


def _settings(
    scales: dict[str, tuple[int, float]], dora: bool, base: str, conv1d: bool
) -> dict[str, Any]:
    """adapter_config.json; what is not of the commonest rank or strength stands in a pattern."""
    whole = lambda x: int(x) if float(x).is_integer() else x
    (rank, strength), _ = Counter(scales.values()).most_common(1)[0]
    others = {name: scale for name, scale in scales.items() if scale != (rank, strength)}
    asked = hub.NAME.fullmatch(base)
    commit = {}
    if asked and asked["scheme"] and not asked["file"]:  # as transformers and PEFT name it
        base, commit = asked["repo"], {"revision": asked["revision"]}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        **commit,
        "r": rank,
        "lora_alpha": whole(rank * strength),
        "rank_pattern": {name: r for name, (r, _) in others.items()},
        "alpha_pattern": {name: whole(r * s) for name, (r, s) in others.items()},
        "target_modules": sorted(scales),
        "use_dora": dora,
        "use_rslora": False,  # lora_alpha says the same
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": conv1d,
        "inference_mode": True,
    }
