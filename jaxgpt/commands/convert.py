"""Write any model as a Hugging Face directory, as a run directory of ours or as a GGUF file."""

from jaxgpt import config
from jaxgpt.config import ConvertConfig


def main() -> None:
    cfg = config.parse(ConvertConfig, __doc__ or "")
    from jaxgpt import language_model

    lm = language_model.load(cfg.checkpoint, merged=cfg.merge_lora)
    lm.save(cfg.output, cfg.to, cfg.base_name, cfg.type)
    print(f"{cfg.output}: {lm}")
