"""The ways to train, by name. A new stage is one file and one line here (docs/new_stage.md)."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxgpt.convert.load import Loaded
from jaxgpt.data import tokenizer as tokenizers
from jaxgpt.stages import distill, dpo, grpo, ppo, pretrain, reward, sft
from jaxgpt.train import Stage
from jaxgpt.types import Params


def _by_tokenizer(cfg: Any) -> int:
    return tokenizers.load(getattr(cfg.data, "tokenizer", "byte")).vocab_size


class Entry(NamedTuple):
    """What a stage is made of; its settings stand in config.RUN_CONFIGS under the same name."""

    # (cfg, parameters or their shapes) -> what is trained, towards what, on arrays of which shapes
    objective: Callable[[Any, Params], Stage]
    # (cfg, the weights to start from) -> the same with its batches and its held-out measures
    data: Callable[[Any, Loaded], Stage]
    # What to start from where init is empty; None: the stage needs trained weights.
    begin: Callable[[Any], Loaded] | None = None
    # The size of the vocabulary that `begin` comes to, before any text is read.
    vocab_size: Callable[[Any], int] = _by_tokenizer
    chats: bool = True  # its data are conversations, which a chat template renders


STAGES: dict[str, Entry] = {
    "pretrain": Entry(
        pretrain.objective, pretrain.data, pretrain.begin, pretrain.vocab_size, chats=False
    ),
    "sft": Entry(sft.objective, sft.data, sft.begin),
    "reward": Entry(reward.objective, reward.data),
    "dpo": Entry(dpo.objective, dpo.data),
    "distill": Entry(distill.objective, distill.data, distill.begin, distill.vocab_size),
    "grpo": Entry(grpo.objective, grpo.data),
    "ppo": Entry(ppo.objective, ppo.data),
}
