"""Chat templates as Jinja programs: ours, and the surroundings in which any of them runs."""

import datetime
import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

# The calls of a turn, in the form that Hermes and Qwen were tuned on.
CALLS = (
    "{% for call in message['tool_calls'] or [] %}{% set call = call['function'] or call %}"
    "{{ '\n' if message['content'] or not loop.first }}"
    "{{ '<tool_call>\n' + {'name': call['name'], 'arguments': call['arguments']} | tojson"
    " + '\n</tool_call>' }}{% endfor %}"
)
# What our own models are tuned on.
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
    + CALLS
    + "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{ message['content'] | trim }}" + CALLS + "{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# For vocabularies without special tokens for chat: only the end of a turn is one.
PLAIN = (
    "{% for message in messages %}"
    "{{ '### ' + message['role'].capitalize() + ':\n' + message['content'] }}"
    + CALLS
    + "{{ eos_token + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:\n' }}{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "plain": PLAIN}

# They stand around what {% generation %} encloses until the text is done; Unicode has no such
# characters, and `chat` hides them where a message has them nevertheless.
OPEN, CLOSE = "\ufdd0", "\ufdd1"

# Characters that take the place of special tokens in messages: ideographs of compatibility, which
# nobody writes; they are printable, and neither upper nor lower case.
STAND_INS = range(0x2F800, 0x2FA1E)
FOREIGN = f"[^\x00-\x7f{chr(STAND_INS[0])}-{chr(STAND_INS[-1])}]"

SYSTEM = (
    "{{%- if not messages or messages[0]['role'] not in ('system', 'developer') %}}"
    "{{%- set messages = [{{'role': 'system', 'content': {}}}] + (messages | list) %}}"
    "{{%- endif %}}{{{{ '' }}}}"
)


class Rendered(NamedTuple):
    """A conversation as text."""

    text: str
    generated: tuple[tuple[int, int], ...]  # first and last + 1 of what {% generation %} encloses


def render(template: str, messages: Sequence[Mapping[str, Any]], **variables: Any) -> Rendered:
    """Runs a template. It comes with a model, so it runs in Jinja's sandbox.

    Args:
        variables: what else it may read: add_generation_prompt, tools, bos_token, eos_token …

    Raises:
        ValueError: the template refuses the messages, or fails on them.
    """
    try:
        text = _compile(template).render(messages=messages, documents=None, **variables)
    except Exception as error:  # the template is a program of somebody else: it may raise anything
        known = type(error).__module__.startswith("jinja2")
        kind = "" if known else f"{type(error).__name__}: "
        raise ValueError(f"the chat template does not take these messages: {kind}{error}") from None
    parts, generated, opened = [], [], [0]
    length = 0
    for part in re.split(f"([{OPEN}{CLOSE}])", text):
        if part == OPEN:
            opened.append(length)
        elif part == CLOSE:
            generated.append((opened.pop(), length))
        else:
            parts.append(part)
            length += len(part)
    return Rendered("".join(parts), tuple(generated))


def with_system(template: str, system: str) -> str:
    """The template that gives this system prompt to conversations that have none."""
    return SYSTEM.format(json.dumps(system, ensure_ascii=False)) + template


def names(template: str, *fields: str) -> list[str]:
    """Which of these names the template's source mentions."""
    return [name for name in fields if re.search(rf"\b{name}\b", template)]


@functools.lru_cache(64)
def takes_parts(template: str, **variables: Any) -> bool:
    """Whether the template reads a content that is a list of parts, and not only prints it."""
    part = {"type": "text", "text": "jaxgpt's probe"}
    try:
        text = render(template, [{"role": "user", "content": [part]}], **variables).text
    except ValueError:
        return False
    return part["text"] in text and str([part])[1:-1] not in text


@functools.lru_cache(64)
def _compile(template: str) -> Any:
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} … {% endgeneration %}, by which a template marks what is learned."""

        tags = {"generation"}  # noqa: RUF012 # the class attribute is Jinja's own way

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            call = self.call_method("_mark")
            return nodes.CallBlock(call, [], [], body).set_lineno(line)

        def _mark(self, caller: Any) -> str:
            return OPEN + caller() + CLOSE

    # The same surroundings as in transformers' apply_chat_template.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(template)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Without the HTML escapes of Jinja's own filter; stand-ins stay as they are."""
    text = json.dumps(
        value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys
    )
    return re.sub(FOREIGN, lambda found: json.dumps(found[0])[1:-1], text) if ensure_ascii else text


def _refuse(reason: str) -> None:
    import jinja2

    raise jinja2.TemplateError(reason)
