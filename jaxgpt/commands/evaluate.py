"""Evaluate any model: a run, a Hugging Face directory, a GGUF or a llama2.c file.

The last line of the output is one JSON object: measures, their standard errors, the count.
"""

import json
import math
import sys
from typing import Any

from jaxgpt import config, files
from jaxgpt.config import EvaluateConfig


def main() -> None:
    cfg = config.parse(EvaluateConfig, __doc__ or "", config.join_lists(sys.argv[1:], "--tools"))
    from jaxgpt import kernels

    with kernels.use(cfg.kernels):
        evaluate(cfg)


def evaluate(cfg: EvaluateConfig) -> None:
    import jaxgpt
    from jaxgpt import evals, lineage, machine, rundir
    from jaxgpt.config import idle

    if not evals.is_embedded(cfg) and not (files.path(cfg.data).exists() or files.find(cfg.data)):
        raise ValueError(f"data={cfg.data}: does not exist")

    if cfg.task != "reward":
        lineage.require_writer("checkpoint", cfg.checkpoint)
    untuned = rundir.untuned("checkpoint", cfg.checkpoint) if cfg.chat else []
    for line in [*idle.of_evaluation(cfg), *untuned]:
        print(f"warning: {line}", file=sys.stderr)
    machine.use_compilation_cache()
    lm = jaxgpt.load(cfg.checkpoint, dtype=cfg.dtype)
    print(lm)
    output, of_run = files.path(cfg.output) if cfg.output else None, False
    if output is None and rundir.is_run(cfg.checkpoint):
        output, of_run = files.path(cfg.checkpoint) / "evals" / evals.results_name(lm, cfg), True
    measures = evals.evaluate(lm, cfg, output)
    if of_run and output:
        about = {"data": cfg.data, "command": machine.command()}
        plain = {name: _plain(value) for name, value in measures.items()}
        files.write(output.with_suffix(".json"), json.dumps(plain | about, indent=1))
    for name, value in measures.items():
        if isinstance(value, float) and not name.endswith("_stderr"):
            print(f"{name:>16} {value:.4f} ± {measures[f'{name}_stderr']:.4f}")
    print(json.dumps({name: _plain(value) for name, value in measures.items()}))


def _plain(value: Any) -> Any:
    """JSON has no NaN: the standard error of a single item is null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
