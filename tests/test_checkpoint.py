import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxgpt import checkpoint, tree
from jaxgpt.checkpoint import Checkpoints, read_arrays


def mesh(**axes: int) -> jax.sharding.Mesh:
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def place(array, axes: dict[str, int], *spec: str | None) -> jax.Array:
    return jax.device_put(array, NamedSharding(mesh(**axes), PartitionSpec(*spec)))


def some_state(seed: int = 0) -> dict:
    """One leaf of every dtype; sharded, replicated, on one device, and NumPy."""
    draw = np.random.default_rng(seed)
    normal = lambda *shape: draw.standard_normal(shape, np.float32)
    axes = {"data": 2, "fsdp": 4}
    return {
        "params": {
            "policy": {
                "kernel": place(normal(8, 16), axes, "data", "fsdp"),
                "bias": place(normal(16), axes),
                "half": place(jnp.asarray(normal(4, 6), jnp.bfloat16), axes, "fsdp"),
            },
            "value": {"kernel": jnp.asarray(normal(5, 3))},
        },
        "moments": [None, (jnp.asarray(draw.integers(-9, 9, (3,)), jnp.int32), np.int32(seed))],
        "codes": draw.integers(0, 255, (7,)).astype(np.uint8),
        "int8": jnp.asarray(draw.integers(-128, 127, (7, 2)), jnp.int8),
        "step": jnp.int32(41),
    }


def assert_same(actual, expected) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for name, leaf in tree.flatten(expected).items():
        found = tree.flatten(actual)[name]
        assert found.dtype == leaf.dtype, name
        assert np.asarray(found).tobytes() == np.asarray(leaf).tobytes(), name


def saved(directory: Path, steps=(1,), **options) -> Checkpoints:
    checkpoints = Checkpoints(directory, **options)
    for step in steps:
        checkpoints.save(step, some_state(step), {"loss": step / 2})
    checkpoints.wait()
    return checkpoints


def small(step: int) -> dict:
    return {"w": np.arange(6, dtype=np.float32) + step, "b": np.full(2, step, np.int32)}


def files(directory: Path) -> list[Path]:
    return sorted(p for p in directory.rglob("*") if p.is_file())


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    """Two small checkpoints, to be copied by the tests that damage the later one."""
    checkpoints = Checkpoints(tmp_path_factory.mktemp("pair"))
    for step in (1, 2):
        checkpoints.save(step, small(step), {})
    checkpoints.wait()
    return checkpoints.directory


def test_a_round_trip_is_bit_exact(tmp_path):
    state = some_state(1)
    checkpoints = saved(tmp_path)
    restored = checkpoints.restore(1, state)
    assert_same(restored, state)
    for name, leaf in tree.flatten(restored).items():
        wanted = tree.flatten(state)[name]
        assert isinstance(leaf, (type(wanted), np.ndarray)), name
        assert getattr(leaf, "sharding", None) == getattr(wanted, "sharding", None), name
    assert checkpoints.meta(1) == {"loss": 0.5}


def test_another_mesh_restores_the_same_values(tmp_path):
    state = some_state(1)
    checkpoints = saved(tmp_path)
    new = NamedSharding(mesh(fsdp=8), PartitionSpec("fsdp"))
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)
    like["params"]["policy"]["kernel"] = jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=new)
    one_device = jax.sharding.SingleDeviceSharding(jax.devices()[5])
    like["int8"] = jax.ShapeDtypeStruct((7, 2), jnp.int8, sharding=one_device)
    restored = checkpoints.restore(1, like)
    assert_same(restored, state)
    assert restored["params"]["policy"]["kernel"].sharding == new
    assert restored["int8"].devices() == {jax.devices()[5]}


def test_restored_arrays_can_be_donated(tmp_path):
    state = {
        name: place(np.ones((64, 64), np.float32), {"data": 8}, *spec)
        for name, spec in {"a": (), "b": (), "c": ("data",)}.items()
    }
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state, {})
    restored = checkpoints.restore(1, state)
    add = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    result = add(add(restored))
    assert all(leaf.is_deleted() for leaf in restored.values())
    for leaf in result.values():
        for shard in leaf.addressable_shards:
            np.testing.assert_array_equal(shard.data, 3.0)


def test_changing_an_array_after_save_does_not_change_the_checkpoint(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    host = np.zeros((256, 256), np.float32)
    device = place(host.copy(), {"data": 8})
    checkpoints.save(1, {"host": host, "device": device}, {})
    host += 7
    jax.jit(lambda x: x + 7, donate_argnums=0)(device).block_until_ready()
    checkpoints.wait()
    arrays = read_arrays(tmp_path / "1")
    assert not arrays["host"].any() and not arrays["device"].any()


def test_any_flipped_byte_is_found(pair, tmp_path):
    expected = small(1)
    names = [file.relative_to(pair / "2") for file in files(pair / "2")]
    assert len(names) > 5
    for name in names:
        copy = tmp_path / str(name).replace("/", "-")
        shutil.copytree(pair, copy)
        content = bytearray((copy / "2" / name).read_bytes())
        content[len(content) // 2] ^= 1
        (copy / "2" / name).write_bytes(content)
        checkpoints = Checkpoints(copy)
        assert checkpoints.latest_valid() == 1, name
        assert_same(checkpoints.restore(1, expected), expected)
        with pytest.raises(ValueError, match=r"2 (is damaged|has no readable manifest)"):
            checkpoints.restore(2, expected)


@pytest.mark.parametrize("name", ["manifest.json", "meta.json", "index.json"])
@pytest.mark.parametrize("harm", ["missing", "empty", "truncated"])
def test_an_incomplete_checkpoint_is_skipped(pair, tmp_path, capfd, name, harm):
    copy = tmp_path / "copy"
    shutil.copytree(pair, copy)
    file = copy / "2" / name
    content = file.read_bytes()
    file.unlink()
    if harm != "missing":
        file.write_bytes(content[: -1 if harm == "truncated" else 0])
    assert Checkpoints(copy).latest_valid() == 1
    (warning,) = capfd.readouterr().err.splitlines()
    assert str(copy / "2") in warning and name in warning


def test_truncated_array_data_is_skipped(pair, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(pair, copy)
    largest = max(files(copy / "2" / "arrays"), key=lambda file: file.stat().st_size)
    os.truncate(largest, largest.stat().st_size - 1)
    assert Checkpoints(copy).latest_valid() == 1
    with pytest.raises(ValueError, match="is damaged"):
        read_arrays(copy / "2")


def test_a_damaged_checkpoint_is_written_again(pair, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(pair, copy)
    (copy / "2" / "index.json").unlink()
    checkpoints = Checkpoints(copy, keep=1)
    assert checkpoints.latest_valid() == 1
    checkpoints.save(2, small(2), {})
    assert checkpoints.latest_valid() == 2
    assert checkpoints.steps() == [2]


def test_a_run_resumed_before_a_damaged_checkpoint_keeps_what_it_writes(pair, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(pair, copy)
    (copy / "2").rename(copy / "9")
    (copy / "9" / "index.json").unlink()
    checkpoints = Checkpoints(copy, keep=1)
    checkpoints.save(3, small(3), {})
    assert checkpoints.latest_valid() == 3
    assert checkpoints.steps() == [3]


def test_retention_keeps_the_last_and_the_best(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step, value in enumerate([3.0, 1.0, 2.0, float("nan"), None, 1.5]):
        checkpoints.save(step, small(step), {}, best_value=value)
    checkpoints.wait()
    assert checkpoints.steps() == [1, 4, 5]
    assert checkpoints.best() == 1
    assert checkpoints.latest_valid() == 5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "4", "5"]


def test_an_empty_directory_has_no_checkpoint(tmp_path):
    checkpoints = Checkpoints(tmp_path / "absent")
    assert checkpoints.latest_valid() is None and checkpoints.best() is None
    assert not (tmp_path / "absent").exists()


def test_mismatched_parameters_are_named(pair):
    checkpoints = Checkpoints(pair)
    like = small(0)
    wrong = {
        r"no scale,": {**like, "scale": np.zeros(1)},
        r"holds b,": {"w": like["w"]},
        r"w is float32\[6\] there.*float32\[7\]": {**like, "w": np.zeros(7, np.float32)},
        r"w is float32\[6\] there.*bfloat16\[6\]": {**like, "w": jnp.zeros(6, jnp.bfloat16)},
    }
    for message, tree_like in wrong.items():
        with pytest.raises(ValueError, match=message) as caught:
            checkpoints.restore(2, tree_like)
        assert "\n" not in str(caught.value)


def test_reading_by_prefix_gives_only_those_arrays(tmp_path):
    saved(tmp_path)
    state = some_state(1)
    arrays = read_arrays(tmp_path / "1", "params/policy/")
    assert sorted(arrays) == [f"params/policy/{name}" for name in ("bias", "half", "kernel")]
    for name, array in arrays.items():
        assert isinstance(array, np.ndarray)
        np.testing.assert_array_equal(array, tree.flatten(state)[name])
    with pytest.raises(ValueError, match="params/reference"):
        read_arrays(tmp_path / "1", "params/reference/")


def test_a_file_in_the_directorys_place_is_one_clear_line(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(OSError, match="run") as caught:
        Checkpoints(tmp_path / "run" / "checkpoints").save(1, small(1), {})
    assert "\n" not in str(caught.value)


def test_a_failed_write_is_reported_by_the_next_call(pair, tmp_path, monkeypatch, capfd):
    copy = tmp_path / "copy"
    shutil.copytree(pair, copy)
    checkpoints = Checkpoints(copy)
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "_commit", lambda *_: (_ for _ in ()).throw(OSError("x\ny")))
        checkpoints.save(3, small(3), {})
        with pytest.raises(OSError, match=r"cannot write .*3: x; checkpoint 2 is intact"):
            checkpoints.save(4, small(4), {})
    assert checkpoints.steps() == [1, 2] and not list(copy.glob("*.tmp"))
    checkpoints.save(4, small(4), {})
    assert checkpoints.latest_valid() == 4
    assert capfd.readouterr().err == ""


def test_a_full_disk_loses_nothing_earlier(tmp_path, caplog):
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(tmp_path)], capture_output=True
    )
    if mounted.returncode != 0:
        pytest.skip("mounting a small tmpfs is not permitted here")
    try:
        checkpoints = Checkpoints(tmp_path / "checkpoints")
        checkpoints.save(1, small(1), {})
        checkpoints.wait()
        noise = np.random.default_rng(0).standard_normal(200_000).astype(np.float32)
        with pytest.raises(OSError, match=r"No space left on device; checkpoint 1 is") as caught:
            checkpoints.save(2, {"w": noise}, {})
            checkpoints.wait()
        assert "\n" not in str(caught.value)
        assert checkpoints.latest_valid() == 1
        assert_same(checkpoints.restore(1, small(1)), small(1))
        checkpoints.save(3, small(3), {})
        assert checkpoints.latest_valid() == 3
        assert not caplog.records  # Orbax's page-long trace stays out of the terminal
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_what_a_full_disk_leaves_in_other_threads_is_not_shown(monkeypatch):
    """tensorstore's writes under way report as uncaught, or as unraisable, in a page each."""
    shown = []
    monkeypatch.setattr(sys, "excepthook", lambda *args: shown.append(str(args[1])))
    monkeypatch.setattr(sys, "unraisablehook", lambda found: shown.append(str(found.exc_value)))
    checkpoint._orbax.__wrapped__()
    for error in (RuntimeError("Event loop is closed"), RuntimeError("another"), None):
        sys.unraisablehook(SimpleNamespace(exc_value=error))
    for error in (RuntimeError("Event loop is closed"), ValueError("one more")):
        sys.excepthook(type(error), error, None)
    assert shown == ["another", "None", "one more"]


KILLED = """
import sys, numpy as np
from jaxgpt.checkpoint import Checkpoints
checkpoints = Checkpoints(sys.argv[1])
state = lambda step: {str(i): np.full((500, 1000), step, np.float32) for i in range(8)}
checkpoints.save(1, state(1), {})
checkpoints.wait()
print("saved", flush=True)
for step in range(2, 1000):
    checkpoints.save(step, state(step), {})
"""


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, 0.03, 0.1, 0.3, 0.6])
def test_kill_9_during_a_save_leaves_an_intact_checkpoint(tmp_path, delay):
    child = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE)
    assert child.stdout is not None and child.stdout.readline() == b"saved\n"
    time.sleep(delay)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    checkpoints = Checkpoints(tmp_path)
    step = checkpoints.latest_valid()
    assert step is not None
    assert step == checkpoints.steps()[-1]  # what is visible is complete
    for array in read_arrays(tmp_path / str(step)).values():
        np.testing.assert_array_equal(array, np.float32(step))
    checkpoints.save(step + 1, small(0), {})
    assert checkpoints.latest_valid() == step + 1
    assert not list(tmp_path.glob("*.tmp"))


DISTRIBUTED = """
import sys, jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
port, rank, directory = sys.argv[1:]
jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(rank))
from jaxgpt.checkpoint import Checkpoints
mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
whole = np.arange(32, dtype=np.float32).reshape(8, 4)
def place(array, *spec):
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
state = {"rows": place(whole, "data"), "all": place(whole), "local": np.int32(3)}
checkpoints = Checkpoints(directory, keep=1)
add = jax.jit(lambda s: {**s, "rows": s["rows"] + 1, "all": s["all"] + 1}, donate_argnums=0)
for step in range(1, 4):
    checkpoints.save(step, state, {}, best_value=float(step == 1))
    state = add(state)
assert checkpoints.latest_valid() == 3
columns = place(whole, None, "data")
restored = checkpoints.restore(3, {**state, "rows": columns})
assert restored["rows"].sharding == columns.sharding
for name in ("rows", "all"):
    for shard in restored[name].addressable_shards:
        np.testing.assert_array_equal(shard.data, whole[shard.index] + 2)
print("ok")
"""


@pytest.mark.slow
def test_two_processes_write_one_checkpoint(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    children = [
        subprocess.Popen(
            [sys.executable, "-c", DISTRIBUTED, port, rank, str(tmp_path)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env, text=True,
        )
        for rank in "01"
    ]  # fmt: skip
    for child in children:
        out, err = child.communicate(timeout=120)
        assert child.returncode == 0 and out.endswith("ok\n"), err
    arrays = read_arrays(tmp_path / "3")  # in one process, from two processes' shards
    whole = np.arange(32, dtype=np.float32).reshape(8, 4)
    np.testing.assert_array_equal(arrays["rows"], whole + 2)
    np.testing.assert_array_equal(arrays["all"], whole + 2)
    assert json.loads((tmp_path / "3" / "index.json").read_text())["step"] == 3
