"""A batch as text: what the model sees and what it is to predict."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxgpt.data.chat import ROLES
from jaxgpt.data.tokenizer import Tokenizer


def describe(batch: Mapping[str, Any], tokenizer: Tokenizer) -> str:
    """Every token with its segment, position and role, and the target if it has one."""
    arrays = {name: np.asarray(array) for name, array in batch.items()}
    shape = arrays["tokens"].shape
    defaults = {
        "segments": np.ones(shape, np.int32),
        "positions": np.broadcast_to(np.arange(shape[-1]), shape),
        "roles": np.zeros(shape, np.int8),
    }
    arrays = defaults | arrays
    lines = []
    for row in np.ndindex(shape[:-1]):
        lines.append(f"row {', '.join(map(str, row))}{_numbers(arrays, row[0])}")
        lines.append("  segment position role       token                 target (mask 1)")
        columns = [arrays[n][row] for n in ("segments", "positions", "roles", "tokens")]
        columns += [arrays["targets"][row], arrays["mask"][row]]
        lines += [_line(tokenizer, *values) for values in zip(*columns, strict=True)]
        lines.append("")
    return "\n".join(lines)


def _line(
    tokenizer: Tokenizer, segment: int, position: int, role: int, token: int, target: int,
    mask: float,
) -> str:  # fmt: skip
    name = lambda token: f"{token} {tokenizer.decode([int(token)])!r}"
    if segment == 0:
        return "  padding"
    goal = name(target) if mask else ""
    return f"  {segment:7} {position:8} {ROLES[role] or '-':10} {name(token):21} {goal}".rstrip()


def _numbers(arrays: Mapping[str, np.ndarray], row: int) -> str:
    """What else is known of a row, such as a pair's margin."""
    return "".join(f"  {n}={array[row]:g}" for n, array in arrays.items() if array.ndim == 1)
