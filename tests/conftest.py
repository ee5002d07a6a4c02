"""Eight virtual CPU devices, strict shapes, warnings as errors."""

import importlib.util
import os
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import jax
import pytest

from jaxgpt import config, kernels, machine
from jaxgpt.config import ModelConfig
from jaxgpt.machine import memory

machine.keep_collectives_in_order()
memory.give_back = lambda: None  # the heap of all tests so far would be searched at every save

jax.config.update("jax_numpy_rank_promotion", "raise")

ROOT = Path(__file__).parents[1]
CACHE = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)


# Compiling takes most of the time. What these compare is mostly within a tolerance, and is compiled
# without most optimisations; their few laws to the bit hold for such programs, too. Serving,
# sampling, resuming, meshes and plans are compiled as for users.
IN_HASTE = {
    "convert", "evals", "kernels", "life", "model", "stages", "test_idle.py", "test_launching.py",
    "test_peft.py", "test_scripts.py", "test_train.py", "test_weights.py",
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def in_haste(request):
    """Less optimisation for the modules and folders of IN_HASTE."""
    room = Path(request.module.__file__).relative_to(ROOT / "tests").parts[0]
    if room not in IN_HASTE:
        yield
        return
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()  # of functions that other modules call, too


@pytest.fixture
def tiny() -> ModelConfig:
    """Two layers with grouped queries: small, but no axis has the length of another."""
    return ModelConfig(
        vocab_size=61, context_length=32, num_layers=2, model_dim=24, num_heads=4, num_kv_heads=2,
        mlp_dim=40,
    )  # fmt: skip


@pytest.fixture(params=["fast", "plain"])
def each_way(request):
    """The test runs twice: with this platform's programs, and with the equations alone."""
    with kernels.use(request.param):
        yield request.param


@pytest.fixture
def rng() -> jax.Array:
    return jax.random.key(0)


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Runs a script's main in this process: (exit status, standard output, standard error)."""
    before = {name: getattr(jax.config, name) for name in CACHE}
    monkeypatch.chdir(tmp_path)

    def call(script: str, *args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [script, *args])
        file = importlib.util.spec_from_file_location("script", ROOT / "scripts" / script)
        module = importlib.util.module_from_spec(file)
        file.loader.exec_module(module)
        code = 0
        try:
            config.exit_cleanly(module.main)
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    jax.config.update(CACHE[0], str(tmp_path / "cache"))
    yield call
    for name, value in before.items():
        jax.config.update(name, value)
