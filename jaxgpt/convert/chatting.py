"""How a model chats: the template and special tokens in its tokenizer's files, read and written."""

import json
from collections.abc import Mapping

from jaxgpt.convert import tokenizer_files
from jaxgpt.convert.load import Loaded
from jaxgpt.data import chat

# The names by which transformers gives special tokens to a template.
NAMED = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
)  # fmt: skip


def chat_format(model: Loaded, template: str = "", system: str | None = None) -> chat.Format:
    """The model's own template, or the one asked for, with its special tokens.

    Args:
        system: system prompt of conversations that have none.

    Raises:
        ValueError: no such template, or it does not suit the vocabulary.
    """
    named = special_tokens(model.files)
    begin = tokenizer_files.special_ids(dict(model.files)).get("bos_token_id")
    if "bos_token" not in named and isinstance(begin, int):
        named["bos_token"] = model.tokenizer.decode([begin])
    return chat.find_format(template, model.chat_template, model.tokenizer, system, **named)


def special_tokens(files: Mapping[str, bytes]) -> dict[str, str]:
    """The special tokens that the tokenizer's own files name.

    What generation_config.json lists are tokens that end a text, which a template cannot write.
    """
    found = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        told = json.loads(files.get(file, b"{}"))
        for name in NAMED:
            token = told.get(name)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                found[name] = token
    return found


def with_format(model: Loaded, form: chat.Format) -> Loaded:
    """The model, chatting by this template: so its files say, and so it stops."""
    stops = tuple(sorted({*model.stop_ids, model.tokenizer.eos_id, form.end_of_turn}))
    generation = json.loads(model.files.get("generation_config.json", b"{}"))
    files = {
        **model.files,
        "chat_template.jinja": form.template.encode(),
        "generation_config.json": json.dumps(generation | {"eos_token_id": stops}).encode(),
    }
    return model._replace(chat_template=form.template, stop_ids=stops, files=files)
