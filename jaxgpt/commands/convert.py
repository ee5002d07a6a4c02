"""Write any model as a Hugging Face directory, as a run directory of ours or as a GGUF file."""

import contextlib
from pathlib import Path

from jaxgpt import config
from jaxgpt.config import ConvertConfig


def main() -> None:
    cfg = config.parse(ConvertConfig, __doc__ or "")
    from jaxgpt import hub, language_model, lineage, store

    if cfg.push:
        hub.check_push(cfg.push)  # before anything is read
    lm = language_model.load(cfg.checkpoint, merged=cfg.merge_lora)
    with contextlib.ExitStack() as stack:
        output = cfg.output
        if not output:
            name = cfg.push.rpartition("/")[2] + (".gguf" if cfg.to == "gguf" else "")
            output = str(stack.enter_context(store.scratch()) / name)
        lm.save(output, cfg.to, cfg.base_name, cfg.type)
        print(f"{cfg.output or cfg.push}: {lm}")
        if cfg.push:
            card = lineage.card_of(lm.name, cfg.push, repr(lm))
            print(hub.push(cfg.push, Path(output), card, cfg.public))
