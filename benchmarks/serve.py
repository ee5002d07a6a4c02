"""Throughput, time to the first token and memory of the server, beside peers' on the same model.

    python benchmarks/serve.py --checkpoint SmolLM2.gguf --peer transformers llama.cpp --seconds 20

All get the same streamed completions, from 1, 8 and 32 clients in turn, each for --seconds. The
servers run one after the other, never beside each other. A peer that cannot be started is named
and left out. Peers: `transformers` is `transformers serve` (pip install fastapi), which answers one
request at a time; `transformers-batching` the same with its continuous batching; `llama.cpp` is
its own `llama-server` (apt and brew: llama.cpp; --llama_server), which needs the GGUF file.
"""

import argparse
import importlib.util
import itertools
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

ROOT = Path(__file__).parents[1]
PROMPT = "The history of the town begins with a mill beside the river, and with the people who "
PEERS = ("transformers", "transformers-batching", "llama.cpp")


def command(name: str, cfg: argparse.Namespace, port: int, folder: Path) -> list[str]:
    """How a server is started on a port; `folder` holds the model as transformers reads it."""
    python, slots = sys.executable, str(cfg.slots)
    if name == "jaxgpt":
        own = [python, str(ROOT / "scripts/serve.py"), "--checkpoint", cfg.checkpoint]
        own += ["--slots", slots, "--context", str(cfg.context), "--port", str(port)]
        return own + (["--quantize", cfg.quantize] if cfg.quantize else [])
    if name == "llama.cpp":
        file = cfg.gguf or cfg.checkpoint
        return llama_server(cfg.llama_server, file, port, cfg.slots, cfg.context)
    program = str(Path(python).with_name("transformers"))
    batching = ["--continuous-batching"] if name.endswith("batching") else []
    dtype = ["--dtype", "float32", "--device", "cpu"]
    return [program, "serve", str(folder), "--port", str(port), *dtype, *batching]


def llama_server(program: str, file: str, port: int, slots: int, context: int) -> list[str]:
    """llama.cpp's own server: `context` tokens for each of its slots."""
    memory = ["--parallel", str(slots), "--ctx-size", str(slots * context)]
    return [program, "--model", file, "--port", str(port), *memory, "--no-kv-unified"]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def running(command: list[str], port: int, seconds: float) -> Iterator[psutil.Process]:
    """A server that answers, and is gone afterwards."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile("w+") as log:
        try:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        except OSError as error:
            raise RuntimeError(f"{command[0]} cannot be started: {error.strerror}") from None
        try:
            end = time.monotonic() + seconds
            while not _answers(port):
                if process.poll() is not None or time.monotonic() > end:
                    log.seek(0)
                    last = " ".join(log.read()[-400:].split())
                    raise RuntimeError(f"it did not start: {last}")
                time.sleep(0.1)
            yield psutil.Process(process.pid)
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(20)


def _answers(port: int) -> bool:
    """Whether it listens, and does not say that it still loads."""
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health", timeout=60).status_code != 503
    except httpx.HTTPError:
        return False


def ask(client: httpx.Client, model: str, number: int, tokens: int) -> tuple[float, float, int]:
    """Seconds to the first text and to the end of one stream, and its tokens."""
    body: dict[str, Any] = {"prompt": f"{PROMPT}{number}", "max_tokens": tokens, "temperature": 0}
    body |= {"model": model, "stream": True}
    if model == "jaxgpt":  # the others send it unasked, or count a part for every token
        body = {**body, "stream_options": {"include_usage": True}}
        del body["model"]
    began, first, parts, counted = time.perf_counter(), 0.0, 0, 0
    with client.stream("POST", "/v1/completions", json=body) as stream:
        stream.raise_for_status()
        for line in stream.iter_lines():
            if not line.startswith("data: {"):
                continue
            part = json.loads(line.removeprefix("data: "))
            if "error" in part:
                raise RuntimeError(f"{part['error']}")
            if part.get("usage"):
                counted = part["usage"]["completion_tokens"]
            if any(choice.get("text") for choice in part["choices"]):
                first, parts = first or time.perf_counter() - began, parts + 1
    return first, time.perf_counter() - began, counted or parts


def measure(url: str, model: str, clients: int, cfg: argparse.Namespace) -> dict[str, float]:
    """What so many clients get, each of whom asks again and again."""
    found: list[tuple[float, float, int]] = []
    failures: list[str] = []
    numbers, began = itertools.count(), time.perf_counter()

    def work() -> None:
        try:
            alone = httpx.Limits(max_keepalive_connections=0)  # llama.cpp ends each connection
            with httpx.Client(base_url=url, timeout=600, limits=alone) as client:
                while time.perf_counter() - began < cfg.seconds:
                    found.append(ask(client, model, next(numbers), cfg.tokens))
        except (httpx.HTTPError, RuntimeError, KeyError) as error:
            failures.append(repr(error))

    threads = [threading.Thread(target=work) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - began
    if failures:
        raise RuntimeError(f"{len(failures)} of {clients} clients failed: {failures[0]}")
    firsts = [first for first, _, _ in found]
    streams = [(count - 1) / (end - first) for first, end, count in found if count > 1]
    return {
        "requests": len(found),
        "tokens_per_second": sum(count for _, _, count in found) / seconds,
        "stream_tokens_per_second": float(np.median(streams)),
        "first_token_p50": float(np.percentile(firsts, 50)),
        "first_token_p99": float(np.percentile(firsts, 99)),
    }


def serve(name: str, cfg: argparse.Namespace, folder: Path) -> dict[str, float]:
    """All measures of one server, by name@clients."""
    port = free_port()
    model = {"jaxgpt": "jaxgpt", "llama.cpp": "local"}.get(name, str(folder))
    began, url = time.perf_counter(), f"http://127.0.0.1:{port}"
    with running(command(name, cfg, port, folder), port, cfg.start_seconds) as process:
        with httpx.Client(base_url=url, timeout=cfg.start_seconds) as client:
            ask(client, model, 0, 2)  # what a peer compiles or loads at its first request
        results = {"start_seconds": time.perf_counter() - began}
        for clients in cfg.clients:
            found = measure(url, model, clients, cfg)
            results |= {f"{key}@{clients}": value for key, value in found.items()}
            shown = ", ".join(f"{key} {value:.3g}" for key, value in found.items())
            print(f"{name}, {clients} clients: {shown}", file=sys.stderr, flush=True)
        family = [process, *process.children(recursive=True)]
        results["memory_MB"] = sum(member.memory_info().rss for member in family) / 1e6
    return results


def table(results: dict[str, dict[str, float]]) -> str:
    """A row for each measure, a column for each server."""
    names = list(results)
    measures = list(dict.fromkeys(key for found in results.values() for key in found))
    rows = [["", *names]] + [
        [key, *(f"{results[name][key]:.4g}" if key in results[name] else "-" for name in names)]
        for key in measures
    ]
    widths = [max(len(row[place]) for row in rows) for place in range(len(names) + 1)]
    line = lambda row: "  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True))
    return "\n".join(map(line, rows))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, help="Hugging Face directory, run or GGUF")
    parser.add_argument("--peer", nargs="*", choices=PEERS, default=[])
    parser.add_argument("--gguf", default="", help="the same model for llama.cpp; the checkpoint")
    parser.add_argument("--llama_server", default="llama-server", help="program of llama.cpp")
    parser.add_argument("--quantize", choices=("int8", "stored"), help="of our server")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--seconds", type=float, default=20, help="for each number of clients")
    parser.add_argument("--start_seconds", type=float, default=600)
    parser.add_argument("--json", action="store_true", help="print one JSON object and no table")
    cfg = parser.parse_args()
    if min(*cfg.clients, cfg.slots, cfg.tokens) < 1 or cfg.seconds <= 0:
        raise SystemExit("error: clients, slots, tokens and seconds must be positive")
    if "llama.cpp" in cfg.peer and not (cfg.gguf or cfg.checkpoint).endswith(".gguf"):
        raise SystemExit("error: llama.cpp needs the model as a GGUF file: --gguf")
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(cfg.checkpoint)
        if not (folder / "config.json").exists() and any("trans" in peer for peer in cfg.peer):
            folder = Path(temporary) / "model"
            save = "import sys, jaxgpt; jaxgpt.load(sys.argv[1]).save(sys.argv[2])"
            subprocess.run(
                [sys.executable, "-c", save, cfg.checkpoint, folder], check=True,
                env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=sys.stderr,
            )  # fmt: skip
        for name in ["jaxgpt", *cfg.peer]:
            try:
                if name.startswith("transformers") and importlib.util.find_spec("fastapi") is None:
                    raise RuntimeError("fastapi is not installed")
                results[name] = serve(name, cfg, folder)
            except (RuntimeError, httpx.HTTPError) as error:
                print(f"warning: {name} is left out: {error}", file=sys.stderr)
                if name == "jaxgpt":
                    raise SystemExit(1) from None
    if not cfg.json:
        print(table(results))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
