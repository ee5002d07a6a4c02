"""Look inside a model as it reads a text, and write what is seen as one HTML page."""

from pathlib import Path

from jaxgpt import config, files


def main() -> None:
    cfg = config.parse(config.InspectConfig, __doc__)
    from jaxgpt import language_model, machine
    from jaxgpt.serve import drawing

    machine.use_compilation_cache()
    sampling = {"temperature": cfg.temperature, "top_p": cfg.top_p, "top_k": cfg.top_k}
    seen = []
    for path in filter(None, (cfg.checkpoint, cfg.against)):
        lm = language_model.load(path)
        found = lm.inspect(cfg.text, **sampling, min_p=cfg.min_p)
        name = Path(path).name or path
        seen.append((name, found, lm.tokenizer, lm.induction_scores()))
    page = drawing.document(seen)
    files.write(cfg.output, page)
    surprisal = [float(found.surprisal_T[1:].mean()) for _, found, *_ in seen]
    for (name, found, *_), mean in zip(seen, surprisal, strict=True):
        print(f"{name}: {len(found.tokens_T)} tokens, {mean:.4f} nats each")
    print(f"{cfg.output}: {len(page) / 1e6:.1f} MB; open it in a browser")
