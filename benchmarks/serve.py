"""Throughput, time to the first token and memory of the server, beside a peer's on the same model.

    python benchmarks/serve.py --checkpoint DIR                         # ours
    python benchmarks/serve.py --checkpoint DIR --peer transformers     # and `transformers serve`
    python benchmarks/serve.py --checkpoint DIR --gguf FILE --peer llama.cpp

Both get the same streamed completions, from 1, 8 and 32 clients in turn. A peer runs after ours,
never beside it. The last line is one JSON object.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import psutil

ROOT = Path(__file__).parents[1]
PROMPT = "The history of the town begins with a mill beside the river, and with the people who "


def commands(cfg: argparse.Namespace, port: int) -> dict[str, list[str]]:
    """How each server is started on a port."""
    model, slots, python = cfg.checkpoint, str(cfg.slots), sys.executable
    ours = [python, str(ROOT / "scripts/serve.py"), "--checkpoint", model, "--slots", slots]
    ours += ["--context", str(cfg.context), "--port", str(port)]
    ours += ["--quantize", cfg.quantize] if cfg.quantize else []
    llama = [python, "-m", "llama_cpp.server", "--model", cfg.gguf, "--port", str(port)]
    return {
        "jaxgpt": ours,
        "transformers": ["transformers", "serve", "--port", str(port), "--force-model", model],
        "llama.cpp": [*llama, "--n_ctx", str(cfg.context)],
    }


@contextmanager
def running(command: list[str], port: int, seconds: float) -> Iterator[psutil.Process]:
    """A server that answers, and is gone afterwards."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    try:
        end = time.monotonic() + seconds
        while time.monotonic() < end and process.poll() is None:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.2)
        if process.poll() is not None:
            raise SystemExit(f"error: {' '.join(command)}: ended with {process.returncode}")
        yield psutil.Process(process.pid)
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


def ask(url: str, model: str | None, number: int, tokens: int) -> tuple[float, float, int]:
    """Seconds to the first text and to the end of one stream, and how many parts it had."""
    body = {"prompt": f"{PROMPT}{number}", "max_tokens": tokens, "temperature": 0, "stream": True}
    body |= {"model": model} if model else {}
    began, first, parts = time.perf_counter(), 0.0, 0
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=600) as stream:
        stream.raise_for_status()
        for line in stream.iter_lines():
            if line.startswith("data: {"):
                first = first or time.perf_counter() - began
                parts += 1
    return first, time.perf_counter() - began, parts


def measure(url: str, model: str | None, clients: int, cfg: argparse.Namespace) -> dict[str, float]:
    """What `clients` at a time get, each of whom asks `cfg.rounds` times."""
    found: list[tuple[float, float, int]] = []

    def client(number: int) -> None:
        for turn in range(cfg.rounds):
            found.append(ask(url, model, number * cfg.rounds + turn, cfg.tokens))

    threads = [threading.Thread(target=client, args=(n,)) for n in range(clients)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - began
    if len(found) != clients * cfg.rounds:
        raise SystemExit(f"error: {clients * cfg.rounds - len(found)} requests failed")
    firsts = [first for first, _, _ in found]
    return {
        "tokens_per_second": clients * cfg.rounds * cfg.tokens / seconds,
        "first_token_p50": float(np.percentile(firsts, 50)),
        "first_token_p99": float(np.percentile(firsts, 99)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True, help="Hugging Face directory, run or GGUF")
    parser.add_argument("--peer", choices=("transformers", "llama.cpp"), help="server to compare")
    parser.add_argument("--gguf", default="", help="the same model for llama.cpp")
    parser.add_argument("--quantize", choices=("int8",), help="of our server")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--rounds", type=int, default=3, help="requests of each client")
    parser.add_argument("--start_seconds", type=float, default=600)
    cfg = parser.parse_args()
    if min(*cfg.clients, cfg.slots, cfg.tokens, cfg.rounds) < 1:
        raise SystemExit("error: clients, slots, tokens and rounds must be at least 1")
    if cfg.peer == "llama.cpp" and not Path(cfg.gguf).is_file():
        raise SystemExit(f"error: gguf={cfg.gguf}: llama.cpp needs the model as a GGUF file")
    results = {}
    for name in ["jaxgpt", *([cfg.peer] if cfg.peer else [])]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        began = time.perf_counter()
        with running(commands(cfg, port)[name], port, cfg.start_seconds) as process:
            url, model = f"http://127.0.0.1:{port}", cfg.checkpoint if name != "jaxgpt" else None
            results[name] = {"start_seconds": time.perf_counter() - began}
            ask(url, model, 0, cfg.tokens)  # what a peer compiles or loads at its first request
            for clients in cfg.clients:
                found = measure(url, model, clients, cfg)
                results[name] |= {f"{key}@{clients}": value for key, value in found.items()}
                shown = ", ".join(f"{key} {value:.3g}" for key, value in found.items())
                print(f"{name}, {clients} clients: {shown}", flush=True)
            results[name]["memory_MB"] = process.memory_info().rss / 1e6
    print(json.dumps(results))


if __name__ == "__main__":
    main()
