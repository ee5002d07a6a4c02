"""The whole life of a language model in readable JAX.

lm = jaxgpt.load("runs/pretrain")  # or a Hugging Face directory, a GGUF or a llama2.c file
lm.generate("Once upon a time", max_new_tokens=64)
"""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from jaxgpt.language_model import LanguageModel
    from jaxgpt.launching import Run

__all__ = ["LanguageModel", "Run", "__version__", "launch", "load"]

__version__ = "0.1.0"


def load(
    path: str | Path,
    *,
    dtype: Literal["float32", "bfloat16"] | None = None,
    adapters: Mapping[str, str | Path] = MappingProxyType({}),
    quantize: Literal["stored", "int8"] | None = None,
) -> "LanguageModel":
    """Opens a run directory, a Hugging Face directory, a GGUF file or a llama2.c file.

    Args:
        dtype: compute type; default: the one that the model was trained with here, or float32.
        adapters: name -> run with --peft.kind lora or qlora on `path`, or a PEFT directory; every
            request chooses one by name: lm.generate(prompts, adapter=["formal", None, "short"]).
        quantize: stored: a GGUF file's kernels stay in its blocks on a CPU, which reads a token's
            weights several times faster; int8: eight bits a weight, of any model. Such a model
            writes and scores, but is not saved. None: plain arrays.

    Raises:
        ValueError: nothing we know, damaged files, or settings that our model does not have.
    """
    from jaxgpt import language_model  # here, so that `import jaxgpt` needs no JAX

    return language_model.load(path, dtype=dtype, adapters=adapters, quantize=quantize)


def launch(stage: str, **settings: Any) -> "Run":
    """Trains as the command of that name: jaxgpt.launch("sft", init="runs/base", data="a.jsonl").

    Settings are those of the command line, nested ({"train": {"steps": 9}} is train={"steps": 9})
    or dotted (**{"train.steps": 9}); they are checked and refused in the same words. Beside them
    jaxgpt.launching.launch names what may be given as Python objects: data, reward, task, tools,
    environment, optimizer, loss, callbacks; and background=True, which trains in a thread.

    Raises:
        ValueError: a setting that is unknown, wrong, or does not fit the others, data or directory.
        FloatingPointError: the loss exploded.
    """
    from jaxgpt import launching

    return launching.launch(stage, **settings)


def __getattr__(name: str) -> Any:
    if name == "LanguageModel":
        from jaxgpt.language_model import LanguageModel

        return LanguageModel
    if name == "Run":
        from jaxgpt.launching import Run

        return Run
    raise AttributeError(f"module 'jaxgpt' has no attribute {name!r}")
