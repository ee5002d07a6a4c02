"""The commands: `jaxgpt NAME …`, which is also `python -m jaxgpt NAME …`.

In a checkout of the repository `python scripts/NAME.py …` is the same.
"""

import argparse
import importlib
import os
import re
import sys

import jaxgpt
from jaxgpt import config
from jaxgpt.config.checks import nearest

# By name, in the order in which a reader may want them; new stages come by themselves.
ABOUT = {
    "doctor": "Look whether all is well here: devices, versions, caches, disk, a short training.",
    "train_tokenizer": "Learn a byte-level BPE vocabulary from text.",
    "prepare_data": "Turn text of any size into token files.",
    "pretrain": "Pretrain a GPT on text. Without arguments: on the source code of Python's "
    "standard library.",
    "sft": "Fine-tune a model on conversations. Without data: on an embedded arithmetic assistant.",
    "reward": "Train a reward model on preferred and rejected answers.",
    "dpo": "Tune a model on preferred and rejected answers: DPO, IPO, hinge, KTO, ORPO or SimPO.",
    "distill": "Distil a teacher into a smaller student.",
    "grpo": "Let a model practise a task against its own answers: GRPO, Dr. GRPO, DAPO, RLOO, "
    "REINFORCE++.",
    "ppo": "Let a model practise a task with a value network beside it, by a rule or a reward "
    "model: PPO.",
    "sample": "Let a model write: continue prompts, or answer them.",
    "chat": "Talk to a model in the terminal.",
    "serve": "Serve a model by OpenAI's API, with a page to talk to it.",
    "evaluate": "Evaluate any model.",
    "inspect": "Look inside a model as it reads a text.",
    "convert": "Write a model for Hugging Face, as a run of ours, or as a GGUF file.",
    "plan": "What a training run will need of its devices, before it runs.",
    "life": "Live a whole life: a list of commands, from a tokenizer to an assistant.",
    "lineage": "Print where a model comes from, and hash all of it again.",
    "compare": "Compare groups of runs, with what chance alone would explain.",
    "runs": "List the runs in a folder.",
    "sweep": "Run a grid of settings and seeds, and compare.",
}


def main() -> None:
    """The entry point of `jaxgpt`."""
    config.exit_cleanly(_dispatch)


def names() -> list[str]:
    """Every command."""
    return list(dict.fromkeys([*ABOUT, *config.RUN_CONFIGS]))


def _dispatch() -> None:
    if "_ARGCOMPLETE" in os.environ:
        _complete()
    asked = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if asked in ("--help", "-h"):
        return print(_help())
    if asked == "--version":
        return print(jaxgpt.__version__)
    name = asked.replace("-", "_").removesuffix(".py")
    if name not in names():
        raise ValueError(f"{asked}: is no command{nearest(name, names())}; jaxgpt --help lists all")
    # As if the command were a program of its own: each reads what stands behind its name.
    sys.argv = [f"jaxgpt {name}", *sys.argv[2:]]
    if name in config.RUN_CONFIGS:
        return importlib.import_module("jaxgpt.commands.training").main(name)
    importlib.import_module(f"jaxgpt.commands.{name}").main()


def _complete() -> None:
    """A shell asks what may follow (argcomplete): a command's name, or what that command takes."""
    words = os.environ["COMP_LINE"].split()
    if len(words) > 2 or (len(words) == 2 and os.environ["COMP_LINE"].endswith(" ")):
        os.environ["_ARGCOMPLETE"] = "2"  # the word at which the program's name ends
        sys.argv = [*sys.argv[:1], words[1]]
        return
    parser = argparse.ArgumentParser()
    parser.add_argument("command", choices=names())
    config.complete(parser)


def _help() -> str:
    width = max(map(len, names()))
    about = {name: ABOUT.get(name) or config.RUN_CONFIGS[name].__doc__ or "" for name in names()}
    return "\n".join([
        "usage: jaxgpt COMMAND [--help] …", "",
        *(f"  {name:{width}}  {re.split('[.:] ', text)[0].rstrip('.')}"
          for name, text in about.items()), "",
        "jaxgpt COMMAND --help explains one; jaxgpt --version prints the version.",
    ])  # fmt: skip
