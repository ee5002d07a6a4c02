"""Greedy decoding of a GGUF file, 32 -> 128 tokens, against llama.cpp on this CPU.

python benchmarks/gguf_blocks.py SmolLM2.gguf                # 1 and 8 streams, both sides in turn
python benchmarks/gguf_blocks.py SmolLM2.gguf --llama_server /elsewhere/llama-server
python benchmarks/gguf_blocks.py SmolLM2.gguf --against float32   # ours, decoded as it was read
python benchmarks/gguf_blocks.py SmolLM2.gguf --text book.txt     # perplexity: blocks, decoded

The other side is llama.cpp's own program `llama-server` (apt and brew: llama.cpp), which is asked
over HTTP for as many completions at once as there are streams.
"""

import argparse
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import paired
import serve

PROMPT, NEW = 32, 128
HELD = {"stored": "stored", "int8": "int8", "float32": None}  # how we hold the weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("file")
    parser.add_argument("--streams", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--held", nargs="+", choices=HELD, default=["stored"], help="our weights")
    parser.add_argument("--against", choices=HELD, help="us, and not llama.cpp")
    parser.add_argument("--threads", nargs="*", type=int, default=[2], help="of llama.cpp")
    parser.add_argument("--llama_server", default="llama-server", help="program of llama.cpp")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--text", help="whose perplexity is compared in place of the speed")
    parser.add_argument("--side", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if missing := [name for name in (args.file, args.text) if name and not Path(name).is_file()]:
        raise SystemExit(f"error: {missing[0]}: no such file")
    if not (args.text or args.against or shutil.which(args.llama_server)):
        raise SystemExit(
            f"error: llama_server={args.llama_server}: no such program; install llama.cpp, or "
            "compare with ourselves: --against float32"
        )
    if args.text:
        compare_perplexity(args.file, args.text, args.held)
        return
    if args.side:
        who, how = args.side
        if who == "jaxgpt":
            our_side(args.file, how, args.streams[0])
        else:
            their_side(args.llama_server, args.file, how, args.streams[0])
        return
    for streams in args.streams:
        start = lambda *side, n=streams: partial(
            paired.Side, __file__, args.file, "--streams", str(n), "--llama_server",
            args.llama_server, "--side", *side,
        )  # fmt: skip
        ours = [start("jaxgpt", how) for how in args.held]
        peers = [start("llama.cpp", str(n)) for n in args.threads]
        if args.against:
            peers = [start("jaxgpt", args.against)]
        title = f"{args.file.rpartition('/')[2]}, {streams} streams"
        paired.compare(title, ours, peers, streams * NEW, "tokens", args.pairs)


def prompts(streams: int, vocab: int) -> list[list[int]]:
    import numpy as np

    return np.random.default_rng(0).integers(100, vocab, (streams, PROMPT)).tolist()


def our_side(file: str, how: str, streams: int) -> None:
    from jaxgpt import language_model, machine
    from jaxgpt.sampling import sample

    machine.use_compilation_cache()
    lm = language_model.load(file, quantize=HELD[how])  # type: ignore[arg-type]
    params = sample.for_decoding(lm.config, lm.params, streams)
    tokens = prompts(streams, lm.config.vocab_size)
    settings = sample.Sampling(max_new_tokens=NEW, temperature=0.0, top_p=1.0)

    def run() -> None:
        written = sample.generate(lm.config, params, tokens, settings)
        assert all(len(completion.tokens) == NEW for completion in written)

    paired.serve(f"jaxgpt {how}", lambda: paired.timed(run, 1))


def their_side(program: str, file: str, threads: str, streams: int) -> None:
    import httpx

    port = serve.free_port()
    command = serve.llama_server(program, file, port, streams, PROMPT + NEW)
    address = f"http://127.0.0.1:{port}"
    same = {"n_predict": NEW, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
    with (
        serve.running([*command, "--threads", threads], port, 60),
        httpx.Client(base_url=address, timeout=600) as client,
        ThreadPoolExecutor(streams) as pool,
    ):
        vocab = client.get("/v1/models").json()["data"][0]["meta"]["n_vocab"]

        def ask(prompt: list[int]) -> int:
            answer = client.post("/completion", json={"prompt": prompt, **same})
            return answer.raise_for_status().json()["tokens_predicted"]

        def run() -> None:
            assert all(n == NEW for n in pool.map(ask, prompts(streams, vocab)))

        paired.serve(f"llama.cpp, {threads} threads", lambda: paired.timed(run, 1))


def compare_perplexity(file: str, text: str, held: list[str]) -> None:
    from jaxgpt import language_model

    with open(text, encoding="utf-8") as opened:
        piece = opened.read()
    found = {
        how: language_model.load(file, quantize=HELD[how]).perplexity(piece, 512, 512)  # type: ignore[arg-type]
        for how in dict.fromkeys(["float32", *held])
    }
    for how, value in found.items():
        print(f"{how}: {value:.4f} ({value / found['float32'] - 1:+.4%})")


if __name__ == "__main__":
    sys.exit(main())
