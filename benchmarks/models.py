"""Parity of every family with transformers, on tiny random models; writes docs/models.yaml.

python benchmarks/models.py                    # all settings of tests/reference_models.py
python benchmarks/models.py gemma3_text phi3   # these families alone; the others stay as they are

For every setting: the largest difference of logits over texts of 96 tokens, relative to the largest
logit; the type under which it is exported; its architecture as a GGUF file, if any. Greedy tokens
and gradients are held against transformers in tests/convert/test_hf.py. Then run python
docs/tables.py, which makes docs/models.md of it.
"""

import sys
import tempfile
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
sys.path += [str(ROOT), str(ROOT / "tests")]
FILE = ROOT / "docs" / "models.yaml"


def main() -> None:
    import reference_models as reference

    asked = sys.argv[1:]
    reference.transformers.logging.set_verbosity_error()
    data = yaml.safe_load(FILE.read_text())
    for name in reference.CONFIGS:
        if asked and name not in asked and name.split("-")[0] not in asked:
            continue
        data["measured"][name] = found = measure(name)
        print(name, found, flush=True)
    by_line = {"default_flow_style": None, "sort_keys": False, "width": 1000}
    told, _, _ = FILE.read_text().partition("measured:\n")  # by hand
    FILE.write_text(told + yaml.safe_dump({"measured": data["measured"]}, **by_line))


def measure(name: str) -> dict:
    import jax
    import jax.numpy as jnp
    import numpy as np
    import reference_models as reference

    from jaxgpt.convert import gguf_write, hf
    from jaxgpt.model import gpt

    model = reference.build(name)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        cfg, params = hf.load(folder)
    tokens_BT = reference.tokens()
    with jax.disable_jit():  # a program for every setting would take long to compile
        hidden_BTD = gpt.apply(cfg, params, jnp.asarray(tokens_BT)).hidden_BTD
        ours = np.asarray(gpt.logits(cfg, params, hidden_BTD))
    expected = reference.logits(model, tokens_BT)
    off = np.abs(ours - expected).max() / np.abs(expected).max()
    try:
        architecture = gguf_write._express(cfg)[0]
    except ValueError:
        architecture = None
    return {
        "type": model.config.model_type, "logits": float(f"{off:.1e}"),
        "written": hf.config_to_hf(cfg)["model_type"], "gguf": architecture,
    }  # fmt: skip


if __name__ == "__main__":
    main()
