"""Let a model write: continue prompts, or answer them with --chat."""

import sys
from functools import partial

from jaxgpt import config


def main() -> None:
    cfg = config.parse(
        config.WriteConfig, __doc__, config.join_lists(sys.argv[1:], "--prompt", "--stop")
    )
    from jaxgpt import hardware, language_model
    from jaxgpt.sampling.sample import Sampling

    settings = Sampling(
        cfg.max_new_tokens, cfg.temperature, cfg.top_p, cfg.top_k, cfg.min_p, cfg.repetition_penalty
    )

    hardware.use_compilation_cache()
    lm = language_model.load(cfg.checkpoint, cfg.dtype, quantize=cfg.quantize)
    prompts = cfg.prompt or [sys.stdin.read().rstrip("\n")]
    if cfg.chat:
        ids = [lm.encode_chat([{"role": "user", "content": prompt}]) for prompt in prompts]
    else:
        ids = [lm.encode(prompt) or [lm.tokenizer.eos_id] for prompt in prompts]
    shown = ["" if cfg.chat else prompt for prompt in prompts]
    write = partial(print, end="", flush=True)
    if len(prompts) == 1:
        write(shown[0])
        lm.complete(ids, settings, cfg.seed, cfg.stop, on_text=language_model.streamed(write))
        write("\n")
        return
    for before, text in zip(shown, lm.complete(ids, settings, cfg.seed, cfg.stop), strict=True):
        write(f"{before}{text}\n\n")


if __name__ == "__main__":
    config.exit_cleanly(main)
