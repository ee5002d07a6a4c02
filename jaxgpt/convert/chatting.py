"""How a model chats: the template and end tokens in its tokenizer's files, read and written."""

import json

from jaxgpt.convert import tokenizer_files
from jaxgpt.convert.load import Loaded
from jaxgpt.data import chat


def chat_format(model: Loaded, template: str = "") -> chat.Format:
    """The model's own template, or the one asked for, with its special tokens.

    Raises:
        ValueError: no such template, or it does not suit the vocabulary.
    """
    ids = tokenizer_files.special_ids(dict(model.files))
    named = {
        name: model.tokenizer.decode([ids[f"{name}_id"]])
        for name in ("bos_token", "eos_token")
        if isinstance(ids.get(f"{name}_id"), int)
    }
    return chat.find_format(template, model.chat_template, model.tokenizer, **named)


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
