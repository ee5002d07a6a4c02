"""Write any model as a Hugging Face directory or as a run directory of ours."""

from jaxgpt import config
from jaxgpt.config import ConvertConfig


def main() -> None:
    cfg = config.parse(ConvertConfig, __doc__ or "")
    from jaxgpt import language_model

    lm = language_model.load(cfg.checkpoint, merged=cfg.merge_lora)
    lm.save(cfg.output, cfg.to)
    print(f"{cfg.output}: {lm}")


if __name__ == "__main__":
    config.exit_cleanly(main)
