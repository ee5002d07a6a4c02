"""Supervised fine-tuning: predict what the assistant says in conversations."""

from dataclasses import replace

from jaxgpt import scoring
from jaxgpt.config import SftConfig
from jaxgpt.convert import chatting
from jaxgpt.convert.load import Loaded
from jaxgpt.data import examples, tuning
from jaxgpt.data import tokenizer as tokenizers
from jaxgpt.train import Stage, spec
from jaxgpt.types import Params


def begin(cfg: SftConfig) -> Loaded:
    """A random network of the asked shape, for tasks small enough to be learned from nothing."""
    tokenizer = tokenizers.load(cfg.data.tokenizer)
    model = replace(cfg.model, vocab_size=cfg.model.vocab_size or tokenizer.vocab_size)
    return Loaded(model, None, tokenizer)


def objective(cfg: SftConfig, params: Params) -> Stage:
    """What is trained, towards what: the assistant's next token; `params` may be shapes."""
    width = examples.row_width(cfg.data.max_tokens, cfg.model.context_length)
    return Stage(
        params={"policy": params},
        trainable="^policy/",
        loss=scoring.next_token(cfg),
        batch=spec(examples.KINDS, cfg.train.batch_size, width),
    )


def data(cfg: SftConfig, start: Loaded) -> Stage:
    """The objective with its batches: conversations, and plain text beside them if asked."""
    train, held_out = tuning.batches(
        cfg.data,
        tuning.dialogues(cfg.data),
        chatting.chat_format(start),
        examples.row_width(cfg.data.max_tokens, cfg.model.context_length),
        cfg.train.batch_size,
        cfg.seed,
        cfg.run,
    )
    return objective(cfg, start.params)._replace(
        **scoring.on_rows(cfg, train, held_out, scoring.held_out(cfg)),
        prompts=examples.prompts(held_out, cfg.model.context_length),
    )
