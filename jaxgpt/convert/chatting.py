"""How a model chats: the template and special tokens in its tokenizer's files, read and written."""

import json

from jaxgpt.convert import tokenizer_files
from jaxgpt.convert.load import Loaded
from jaxgpt.data import chat


def chat_format(model: Loaded, template: str = "", system: str | None = None) -> chat.Format:
    """The model's own template, or the one asked for, with its special tokens.

    Args:
        system: system prompt of conversations that have none.

    Raises:
        ValueError: no such template, or it does not suit the vocabulary.
    """
    named = tokenizer_files.special_tokens(model.files)
    begin = tokenizer_files.special_ids(dict(model.files)).get("bos_token_id")
    if "bos_token" not in named and isinstance(begin, int):
        named["bos_token"] = model.tokenizer.decode([begin])
    return chat.find_format(template, model.chat_template, model.tokenizer, system, **named)


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
