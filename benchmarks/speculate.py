"""Writing with a draft and without, on text that repeats its prompt and text that does not.

python benchmarks/speculate.py SmolLM2.gguf                        # the text itself proposes
python benchmarks/speculate.py SmolLM2.gguf --held float32 --draft SmolLM2.gguf --rows 4
"""

import argparse
import sys
from functools import partial

import paired

CODE = """\
def mean(numbers):
    total = 0.0
    for number in numbers:
        total = total + number
    return total / len(numbers)

def spread(numbers):
    middle = mean(numbers)
    total = 0.0
    for number in numbers:
        total = total + (number - middle) ** 2
    return (total / len(numbers)) ** 0.5
"""
ASKED = {
    "edit": f"Rewrite this code with a docstring in every function:\n\n```python\n{CODE}```",
    "copy": f"Repeat this code, word for word:\n\n```python\n{CODE}```",
    "story": "Write a story about a lighthouse keeper who finds a strange letter.",
    "advice": "What should a beginner know before growing tomatoes?",
}
HELD = {"stored": "stored", "int8": "int8", "float32": None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("checkpoint", help="a model that chats")
    parser.add_argument("--draft", default="prompt", help="prompt, or a model")
    parser.add_argument("--held", choices=HELD, default="stored", help="the weights")
    parser.add_argument("--ask", nargs="+", choices=ASKED, default=list(ASKED))
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--new", type=int, default=128, help="tokens")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--side", choices=("drafted", "plain"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        run_side(args)
        return
    for name in args.ask:
        given = [*sys.argv[1:], "--ask", name, "--side"]
        start = lambda side, given=given: partial(paired.Side, __file__, *given, side)
        amount = args.rows * args.new
        paired.compare(name, [start("drafted")], [start("plain")], amount, "tokens", args.pairs)


def run_side(args: argparse.Namespace) -> None:
    """Always all tokens: nothing ends a text."""
    import jax

    from jaxgpt import language_model, machine
    from jaxgpt.sampling import sample, speculate

    machine.use_compilation_cache()
    open_ = partial(language_model.load, quantize=HELD[args.held])
    lm = open_(args.checkpoint)
    params = sample.for_decoding(lm.config, lm.params, args.rows)
    write = sample.generate
    if args.side == "drafted":
        draft = None
        if args.draft != "prompt":
            other = open_(args.draft)
            layout = sample.for_decoding(other.config, other.params, args.rows)
            draft = speculate.Draft(other.config, layout)
        write = partial(speculate.generate, draft=draft)
    prompt = lm.encode_chat([{"role": "user", "content": ASKED[args.ask[0]]}])
    settings = sample.Sampling(args.new, args.temperature)
    given = (lm.config, params, [prompt] * args.rows, settings)
    paired.serve(args.side, lambda: paired.timed(lambda: write(*given, rng=jax.random.key(0)), 1))


if __name__ == "__main__":
    sys.exit(main())
