"""Greedy decoding of a GGUF file, 32 -> 128 tokens, against llama.cpp on this CPU.

python benchmarks/gguf_blocks.py SmolLM2.gguf                # 1 and 8 streams, both sides in turn
python benchmarks/gguf_blocks.py SmolLM2.gguf --llama_python /other/venv/bin/python
python benchmarks/gguf_blocks.py SmolLM2.gguf --against float32   # ours, decoded as it was read
python benchmarks/gguf_blocks.py SmolLM2.gguf --text book.txt     # perplexity: blocks, decoded

The other side needs llama-cpp-python (pip install "jaxgpt[llamacpp]"), here or in another venv.
"""

import argparse
import sys
from functools import partial
from typing import Any

import paired

PROMPT, NEW = 32, 128
HELD = {"stored": "stored", "int8": "int8", "float32": None}  # how we hold the weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("file")
    parser.add_argument("--streams", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--held", nargs="+", choices=HELD, default=["stored"], help="our weights")
    parser.add_argument("--against", choices=HELD, help="us, and not llama.cpp")
    parser.add_argument("--threads", nargs="*", type=int, default=[2], help="of llama.cpp")
    parser.add_argument("--llama_python", default=sys.executable, help="that has llama_cpp")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--text", help="whose perplexity is compared in place of the speed")
    parser.add_argument("--side", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.text:
        compare_perplexity(args.file, args.text, args.held)
        return
    if args.side:
        who, how = args.side
        {"jaxgpt": our_side, "llama.cpp": their_side}[who](args.file, how, args.streams[0])
        return
    for streams in args.streams:
        start = lambda python, *side, n=streams: partial(
            paired.Side, __file__, args.file, "--streams", str(n), "--side", *side, python=python
        )
        ours = [start(sys.executable, "jaxgpt", how) for how in args.held]
        peers = [start(args.llama_python, "llama.cpp", str(n)) for n in args.threads]
        if args.against:
            peers = [start(sys.executable, "jaxgpt", args.against)]
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


def their_side(file: str, threads: str, streams: int) -> None:
    """llama.cpp's own functions, so that no Python of its binding is timed."""
    import llama_cpp as llama  # pyright: ignore[reportMissingImports] -- built from source by those who want it
    import numpy as np

    llama.llama_backend_init()
    model: Any = llama.llama_model_load_from_file(file.encode(), llama.llama_model_default_params())
    how = llama.llama_context_default_params()
    how.n_ctx, how.n_batch, how.n_seq_max = streams * 512, 512, streams
    how.n_threads = how.n_threads_batch = int(threads)
    ctx: Any = llama.llama_init_from_model(model, how)
    vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))  # type: ignore[arg-type]
    tokens = prompts(streams, vocab)
    batch = llama.llama_batch_init(512, 0, 1)

    def step(rows: list[list[int]], start: int) -> list[int]:
        batch.n_tokens, wanted = 0, []
        for stream, row in enumerate(rows):
            for place, token in enumerate(row):
                i, last = batch.n_tokens, place + 1 == len(row)
                batch.token[i], batch.pos[i], batch.logits[i] = token, start + place, last
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, stream
                wanted += [i] * last
                batch.n_tokens += 1
        assert llama.llama_decode(ctx, batch) == 0
        scores = (llama.llama_get_logits_ith(ctx, i) for i in wanted)
        return [int(np.ctypeslib.as_array(s, (vocab,)).argmax()) for s in scores]

    def run() -> None:
        llama.llama_memory_clear(llama.llama_get_memory(ctx), True)
        new = step(tokens, 0)
        for n in range(NEW - 1):
            new = step([[token] for token in new], PROMPT + n)

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
