"""Look inside a model as it reads a text, and write what is seen as one HTML page."""

if __name__ == "inspect":
    # Python puts the folder of a script first on its path, so in all of scripts/ this file stands
    # before the standard library's module of the same name, which `dataclasses` needs.
    import os
    import sys
    from importlib import machinery, util

    here = os.path.dirname(os.path.realpath(__file__))
    elsewhere = [path for path in sys.path if os.path.realpath(path) != here]
    found = machinery.PathFinder.find_spec("inspect", elsewhere)
    assert found is not None and found.loader is not None
    sys.modules["inspect"] = module = util.module_from_spec(found)
    found.loader.exec_module(module)


def main() -> None:
    from jaxgpt import config

    cfg = config.parse(config.InspectConfig, __doc__)
    from pathlib import Path

    from jaxgpt import files, language_model, machine
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


if __name__ == "__main__":
    from jaxgpt import config

    config.exit_cleanly(main)
