"""Chat templates: messages to the one text that a model was tuned on."""

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

Message = Mapping[str, Any]  # {"role": "user", "content": "…"}

# What our own models are tuned on.
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


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
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    check_messages(messages)
    # The same surroundings as in transformers' apply_chat_template.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        return environment.from_string(template).render(
            messages=messages, add_generation_prompt=add_generation_prompt, **variables
        )
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template does not take these messages: {error}") from None


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


def _to_json(value: Any, ensure_ascii: bool = False, **form: Any) -> str:
    """Without the HTML escapes of Jinja's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **form)


def _refuse(reason: str) -> None:
    import jinja2

    raise jinja2.TemplateError(reason)
