"""Chat templates: messages to the one text that a model was tuned on, and who wrote which token."""

import datetime
import functools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxgpt.data.tokenizer import Tokenizer

Message = Mapping[str, Any]  # {"role": "user", "content": "…"}

# What our own models are tuned on.
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{ message['content'] | trim }}{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# For vocabularies without special tokens for chat: only the end of a turn is one.
PLAIN = (
    "{% for message in messages %}"
    "{{ '### ' + message['role'].capitalize() + ':\n' + message['content'] + eos_token + '\n\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:\n' }}{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "plain": PLAIN}

ROLES = ("", "system", "developer", "user", "assistant", "tool")  # "" is padding
# Stand in for special tokens that someone wrote into a message, so that they stay plain text.
PRIVATE = 0xF0000


class Piece(NamedTuple):
    """A stretch of the rendered text."""

    text: str
    role: str
    target: bool  # written by the assistant, to be learned


class Encoded(NamedTuple):
    """A rendered conversation, token by token."""

    tokens_T: np.ndarray
    target_T: np.ndarray  # this token is to be predicted
    role_T: np.ndarray  # index into ROLES


class Format(NamedTuple):
    """A template, and the tokens that it and its tokenizer name."""

    template: str
    tokenizer: Tokenizer
    bos_token: str
    eos_token: str

    @property
    def end_of_turn(self) -> int:
        """The token by which the assistant stops.

        Raises:
            ValueError: the template ends a turn without a token of its own.
        """
        said = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
        encoded = encode(self, said)
        last = int(encoded.tokens_T[encoded.target_T][-1])
        if last not in self.tokenizer.special.values():
            raise ValueError(
                "data.template: ends the assistant's turn without a special token, so the model "
                f"would never learn to stop; use one of {', '.join(TEMPLATES)}"
            )
        return last


def render(
    template: str,
    messages: Sequence[Message],
    add_generation_prompt: bool = False,
    **variables: Any,
) -> str:
    """The conversation as text. A template comes with a model, so it runs in Jinja's sandbox.

    Args:
        add_generation_prompt: ends with the beginning of the assistant's turn.
        variables: what else the template may read, such as bos_token, eos_token and tools.

    Raises:
        ValueError: messages of another form, or ones that the template refuses.
    """
    import jinja2

    check_messages(messages)
    try:
        return _compile(template).render(
            messages=messages, add_generation_prompt=add_generation_prompt, **variables
        )
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template does not take these messages: {error}") from None


def find_format(
    name: str, own: str | None, tokenizer: Tokenizer, bos_token: str = "", eos_token: str = ""
) -> Format:
    """The template called `name`, or in that file; empty: the model's own, else ours.

    Raises:
        ValueError: no such template, or one whose special tokens the vocabulary lacks.
    """
    eos_token = eos_token or tokenizer.decode([tokenizer.eos_id])
    if name and name not in TEMPLATES and not Path(name).is_file():
        raise ValueError(f"data.template={name}: no such file, and not {', '.join(TEMPLATES)}")
    ours = CHATML if "<|im_start|>" in tokenizer.special else PLAIN
    template = TEMPLATES.get(name) or (Path(name).read_text() if name else own or ours)
    if name in TEMPLATES:
        needed = re.findall(r"<\|\w+\|>", template)
        missing = [token for token in needed if token not in tokenizer.special]
        if missing:
            raise ValueError(
                f"data.template={name}: the vocabulary has no {missing[0]}; use plain, or leave "
                "it empty"
            )
    return Format(template, tokenizer, bos_token, eos_token)


def encode(
    form: Format,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = False,
    learn_from: int = 0,
    tools: Sequence[Mapping[str, Any]] = (),
) -> Encoded:
    """A conversation as tokens; targets are what the assistant says, with its end of turn.

    Pieces are tokenised one by one, in training as in chatting, so that the model meets the same
    tokens in both.

    Args:
        add_generation_prompt: ends with the beginning of the assistant's turn.
        learn_from: the first message whose tokens may be targets.
        tools: what the assistant may call, for templates that list it.
    """
    special = {text: chr(PRIVATE + i) for i, text in enumerate(form.tokenizer.special)}
    original = {char: text for text, char in special.items()}
    hidden, listed = _replace(list(messages), special), _replace(list(tools), special)
    tokens: list[int] = []
    target: list[bool] = []
    role: list[int] = []
    for piece in pieces(form, hidden, add_generation_prompt, learn_from, listed):
        ids = _encode(form.tokenizer, piece.text, original)
        tokens += ids
        target += [piece.target] * len(ids)
        role += [ROLES.index(piece.role)] * len(ids)
    return Encoded(np.array(tokens, np.int32), np.array(target, bool), np.array(role, np.int8))


def pieces(
    form: Format,
    messages: Sequence[Message],
    add_generation_prompt: bool,
    learn_from: int = 0,
    tools: Sequence[Mapping[str, Any]] = (),
) -> list[Piece]:
    """The rendered text, cut where a turn begins or ends; rendered turn by turn to know where.

    Raises:
        ValueError: the template rewrites earlier turns, so that there is no such cut, or leaves
            out the calls of a turn.
    """
    done, found = "", []

    def extend(text: str, role: str, target: bool) -> None:
        nonlocal done
        if not text.startswith(done):
            raise ValueError(
                "data.template: writes earlier turns in another way once later ones follow, so "
                "what the assistant wrote cannot be told apart; use another template"
            )
        found.append(Piece(text[len(done) :], role, target))
        done = text

    draw = functools.partial(
        render, form.template, bos_token=form.bos_token, eos_token=form.eos_token,
        tools=tools or None,
    )  # fmt: skip
    for count, message in enumerate(messages, 1):
        role = message["role"]
        if role == "assistant":
            extend(draw(messages[: count - 1], True), role, False)
            whole, learned = draw(messages[:count]), count > learn_from
            end = _end_of_turn(whole, form.tokenizer)
            extend(whole[:end], role, learned)
            _require_calls(message, found[-1].text)
            extend(whole, role, False)
            continue
        try:
            whole = draw(messages[:count])
        except ValueError:  # a template may refuse to stop here, say after the system's message
            if count == len(messages):
                raise
            continue
        if whole.startswith(done):  # if not, the next assistant's turn takes these along
            extend(whole, role, False)
    if add_generation_prompt:
        extend(draw(messages, True), "assistant", False)
    return [piece for piece in found if piece.text]


def check_messages(messages: Sequence[Message]) -> None:
    """Raises ValueError unless every message has a role and text."""
    if isinstance(messages, str) or not messages:
        raise ValueError(
            'messages must be a list such as [{"role": "user", "content": "Hello"}] with at least '
            "one entry"
        )
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f'message {number} must be {{"role": …, "content": …}}')
        if not isinstance(message.get("content"), str) and "tool_calls" not in message:
            raise ValueError(f"message {number} ({message['role']}): content must be text")


@functools.lru_cache(8)
def _compile(template: str) -> Any:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    # The same surroundings as in transformers' apply_chat_template.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(template)


def _require_calls(message: Message, text: str) -> None:
    """A template that knows of no tools would leave an empty turn to learn from."""
    for call in message.get("tool_calls") or ():
        name = call.get("function", call).get("name", "")
        if name not in text:
            raise ValueError(
                f"data.template: does not write the assistant's tool_calls (of {name}); use one "
                "that does, or messages that hold the call as text"
            )


def _end_of_turn(text: str, tokenizer: Tokenizer) -> int:
    """Where a text ends if what follows its last special token is white space."""
    shown = text.rstrip()
    return len(shown) if shown.endswith(tuple(tokenizer.special)) else len(text)


def _replace(value: Any, table: Mapping[str, str]) -> Any:
    """The same value, in all of whose texts the keys of the table are replaced."""
    if isinstance(value, str):
        for old, new in table.items():
            value = value.replace(old, new)
        return value
    if isinstance(value, Mapping):
        return {name: _replace(item, table) for name, item in value.items()}
    return [_replace(item, table) for item in value] if isinstance(value, list) else value


def _encode(tokenizer: Tokenizer, text: str, original: Mapping[str, str]) -> list[int]:
    """Special tokens of the template become one id, those that stand-ins hide stay text."""
    parts = re.split(f"([{''.join(original)}])", text) if original else [text]
    ids: list[int] = []
    for part in parts:
        hidden = original.get(part)
        ids += tokenizer.encode(hidden or part, allow_special=hidden is None) if part else []
    return ids


def _to_json(value: Any, ensure_ascii: bool = False, **form: Any) -> str:
    """Without the HTML escapes of Jinja's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **form)


def _refuse(reason: str) -> None:
    import jinja2

    raise jinja2.TemplateError(reason)
