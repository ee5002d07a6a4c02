"""Let a model write: continue prompts, or answer them with --chat."""

import sys
from functools import partial

from jaxgpt import config, files
from jaxgpt.config import idle


def main() -> None:
    cfg = config.parse(
        config.WriteConfig,
        __doc__,
        config.join_lists(sys.argv[1:], "--prompt", "--stop", "--tools", "--adapter"),
    )
    for line in idle.of_writing(cfg):
        print(f"warning: {line}", file=sys.stderr)
    from jaxgpt import kernels

    with kernels.use(cfg.kernels):
        write(cfg)


def write(cfg: config.WriteConfig) -> None:
    from jaxgpt import hub, language_model, lineage, machine, rundir
    from jaxgpt.tasks import tools

    settings = config.sampling(cfg)
    lineage.require_writer("checkpoint", cfg.checkpoint)
    draft = cfg.draft or None
    if draft not in (None, "prompt"):
        draft = str(hub.find("draft", draft))
        if not files.path(draft).exists():
            raise ValueError(f"draft={draft}: does not exist; give prompt, or a smaller model")
        lineage.require_writer("draft", draft)
    tools.check(cfg.tools)
    if cfg.chat and not cfg.adapter:
        for line in rundir.untuned("checkpoint", cfg.checkpoint):
            print(f"warning: {line}", file=sys.stderr)
    machine.use_compilation_cache()
    chosen = [None if path == "none" else path for path in cfg.adapter]
    lm = language_model.load(
        cfg.checkpoint,
        cfg.dtype,
        adapters={path: path for path in chosen if path},
        quantize=cfg.quantize,
    )
    if draft not in (None, "prompt"):
        draft = language_model.load(draft, cfg.dtype, quantize=cfg.quantize)
    adapter = chosen[0] if len(chosen) == 1 else chosen or None
    prompts = cfg.prompt or [sys.stdin.read().rstrip("\n")]
    system = [] if cfg.system is None else [{"role": "system", "content": cfg.system}]
    asked = [[*system, {"role": "user", "content": prompt}] for prompt in prompts]
    if cfg.chat and not system and (default := lm.chat_format.default_system):
        print(f"system prompt, the template's own: {default!r}; --system TEXT", file=sys.stderr)
    if cfg.tools:
        for number, messages in enumerate(asked):
            own = adapter[number] if isinstance(adapter, list) else adapter
            said = lm.play_chat(
                messages, cfg.tools, seed=cfg.seed, stop=cfg.stop, adapter=own, **vars(settings)
            )
            print("\n".join(("→ " if m["role"] == "tool" else "") + m["content"] for m in said))
            if len(prompts) > 1:
                print()
        return
    if cfg.chat:
        ids = [lm.encode_chat(messages) for messages in asked]
    else:
        ids = [lm.encode(prompt) or [lm.tokenizer.eos_id] for prompt in prompts]
    shown = ["" if cfg.chat else prompt for prompt in prompts]
    write = partial(print, end="", flush=True)
    complete = partial(lm.complete, ids, settings, cfg.seed, cfg.stop, adapter=adapter, draft=draft)
    if len(prompts) == 1:
        write(shown[0])
        stream = language_model.streamed(write)
        complete(on_text=stream)
        write("\n")
        return
    for before, text in zip(shown, complete(), strict=True):
        write(f"{before}{text}\n\n")
