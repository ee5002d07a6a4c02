"""Checkpoints whose matrices have fewer bits (quantization_config), as the numbers that they stand
for.

    fp8                 float8 by a scale for each block of weight_block_size: weight_scale_inv
    compressed-tensors  float8 or int8 by a scale for all, a row or a block: weight_scale
    mxfp4               four bits by a scale for 32 numbers: _blocks and _scales (mxfp4.py)
    bitsandbytes        nf4 and fp4 by a scale for 64 numbers, or int8 by one for a row: SCB

What rounds activations on a GPU, such as input_scale, is left out, as transformers does on a CPU.
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxgpt.convert import mxfp4
from jaxgpt.convert.rope import refuse
from jaxgpt.convert.tensors import Tensors

# What may be stated, with the values that mean what is computed here; None: any.
KNOWN: dict[str, dict[str, tuple[Any, ...] | None]] = {
    "fp8": {
        "activation_scheme": None, "fmt": ("e4m3",), "weight_block_size": None,
        "modules_to_not_convert": None, "ignored_layers": None, "modules_to_convert": None,
        "dequantize": None, "scale_fmt": ("float", "ue8m0"), "expert_dtype": ("fp8",),
    },
    "compressed-tensors": {
        "config_groups": None, "ignore": None, "kv_cache_scheme": (), "quantization_status": None,
        "format": ("float-quantized", "int-quantized", "naive-quantized"), "version": None,
        "global_compression_ratio": None, "sparsity_config": ({},), "transform_config": ({},),
    },
    "mxfp4": {"modules_to_not_convert": None, "dequantize": None},
}  # fmt: skip
BNB = ("load_in_", "_load_in_", "bnb_4bit_", "llm_int8_")  # begin the names of bitsandbytes' own
# Beside a weight: the scales, of which the first that is there counts, and what is left out.
SCALES = ("_scale_inv", "_scale")
BESIDE = (
    "input_scale", "activation_scale", "weight_scale_inv", "weight_scale", "SCB", "weight_format",
)  # fmt: skip
STATE = "quant_state.bitsandbytes__"
STORED = ("F8_E4M3", "F8_E8M0", "U8", "I8")  # safetensors' types that mean little without a scale


def check(told: Any) -> None:
    """Raises ValueError, naming the setting, where the numbers would be others than those here."""
    at = "quantization_config"
    if not isinstance(told, dict):
        refuse(at, told, "must be a table of settings")
    method = told.get("quant_method", "bitsandbytes" if "load_in_4bit" in told else None)
    if method == "bitsandbytes":
        for key in told:
            if key != "quant_method" and not key.startswith(BNB):
                refuse(f"{at}.{key}", told[key], "is no setting of bitsandbytes")
        return
    if method not in KNOWN:
        refuse(f"{at}.quant_method", method, f"must be bitsandbytes or {' or '.join(KNOWN)}")
    known = KNOWN[method] | {"quant_method": None}
    for key, value in told.items():
        fine = known.get(key, ())
        if fine is not None and value is not None and value not in fine:
            refuse(f"{at}.{key}", value, f"must be {' or '.join(map(str, fine)) or 'absent'}")
    for name, group in (told.get("config_groups") or {}).items():
        weights = group.get("weights") or {}
        for key, fine in (("num_bits", (8,)), ("type", ("float", "int")), ("symmetric", (True,))):
            if weights.get(key) not in fine:
                where = f"{at}.config_groups.{name}.weights.{key}"
                refuse(where, weights.get(key), f"must be {' or '.join(map(str, fine))}")


class Decoded:
    """A `table.Source`: the tensors of a checkpoint, with their scales multiplied in."""

    def __init__(self, files: Tensors, told: Mapping[str, Any]):
        self._files, self._block = files, told.get("weight_block_size")
        names = set(files.shapes)
        self.shapes = {}
        for name, shape in files.shapes.items():
            whole = name.removesuffix("_blocks").removesuffix("_scales")
            if whole != name:
                scales = files.shapes.get(f"{whole}_scales", ())
                if files.shapes.get(f"{whole}_blocks", ())[:-1] != scales or len(scales) != 3:
                    raise ValueError(f"{whole}: its blocks and scales are missing or do not fit")
                self.shapes[whole] = mxfp4.shape(files.shapes[f"{whole}_blocks"])
                continue
            owner, _, last = name.rpartition(".")
            beside = last in BESIDE and f"{owner}.weight" in names
            of = name[: name.find(".weight.")] + ".weight" if ".weight." in name else ""
            if beside or of in names or _scaled(name) in names:
                continue
            state = self._state(name)
            self.shapes[name] = tuple(state["shape"]) if state else shape
            if files.kinds[name] in STORED and not (state or self._scale(name)):
                raise ValueError(f"{name}: is {files.kinds[name]} without a scale beside it")

    def read(self, name: str) -> np.ndarray:
        if name not in self._files.shapes:
            return mxfp4.decode(*(self._files.read(name + end) for end in ("_blocks", "_scales")))
        stored, state, scale = self._files.read(name), self._state(name), self._scale(name)
        if state:
            try:
                return self._nibbles(name, stored, state)
            except (KeyError, IndexError, TypeError, ValueError) as error:
                raise ValueError(
                    f"{name}: its four bits and their scales disagree ({error})"
                ) from None
        if not scale:
            return stored
        scales = self._files.read(scale)
        if scale.endswith("SCB"):  # bitsandbytes' largest magnitude of a row
            scales = scales / np.float32(127)
        elif scales.dtype == np.uint8:  # exponents of two
            scales = np.exp2(scales.astype(np.float32) - 127)
        scales = _spread(name, scales.astype(np.float32), stored.shape, self._block)
        return stored.astype(np.float32) * scales

    def _scale(self, name: str) -> str:
        owner = name.removesuffix("weight")
        names = [*(name + end for end in SCALES), f"{owner}SCB"]
        return next((found for found in names if found in self._files.shapes), "")

    def _state(self, name: str) -> dict[str, Any]:
        """What bitsandbytes notes of a matrix in four bits; {} of others."""
        for kind in ("nf4", "fp4"):
            if f"{name}.{STATE}{kind}" in self._files.shapes:
                return json.loads(self._files.read(f"{name}.{STATE}{kind}").tobytes())
        return {}

    def _nibbles(self, name: str, stored: np.ndarray, state: Mapping[str, Any]) -> np.ndarray:
        beside = lambda part: self._files.read(f"{name}.{part}")
        scales = beside("absmax")
        if "nested_offset" in state:  # the scales have scales
            scales = beside("nested_quant_map")[scales]
            scales = _times(scales, beside("nested_absmax"), state["nested_blocksize"])
            scales = scales + np.float32(state["nested_offset"])
        codes = np.stack([stored.ravel() >> 4, stored.ravel() & 15], axis=-1).ravel()
        numbers = beside("quant_map")[codes[: np.prod(state["shape"])]]
        return _times(numbers, scales, state["blocksize"]).reshape(state["shape"])


def _scaled(name: str) -> str:
    """The tensor whose scale this is by its name, or ""."""
    return next((name.removesuffix(end) for end in SCALES if name.endswith(end)), "")


def _times(numbers: np.ndarray, scales: np.ndarray, block: int) -> np.ndarray:
    """Each `block` of numbers by its scale; the last may be short."""
    return numbers * np.repeat(scales.astype(np.float32), block)[: len(numbers)]


def _spread(name: str, scales: np.ndarray, shape: tuple[int, ...], block: Any) -> np.ndarray:
    """Scales for all, by row or by block, as they stand beside a matrix (or one of each expert)."""
    if scales.size == 1:
        return scales.reshape(())
    rows, columns = shape[-2:]
    if scales.ndim == 1:
        scales = scales[:, None]
    down, across = scales.shape[-2:]
    # A last block may be short, where the size of blocks is told.
    tall, wide = block or (-(-rows // down), -(-columns // across))
    if (down, across) == (rows, 1):
        tall, wide = 1, columns
    if (-(-rows // tall), -(-columns // wide)) != (down, across):
        raise ValueError(f"{name}: {scales.shape} scales do not fit a matrix of {shape}")
    full = scales.repeat(tall, axis=-2).repeat(wide, axis=-1)
    return full[..., :rows, :columns]
