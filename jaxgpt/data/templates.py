"""Chat templates as Jinja programs, and messages in the one form that they read.

Every field of a message is kept. A field that is null equals one that is absent.
"""

import datetime
import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Message = Mapping[str, Any]  # {"role": "user", "content": "…"}

THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # three names of one field
THOUGHT = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)

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


class Arguments(dict):
    """A call's arguments: an object which, written as text, is JSON.

    Some templates print the arguments with `tojson`, others put them in a text as they are.
    """

    def __str__(self) -> str:
        return json.dumps(self, ensure_ascii=False)

    def __radd__(self, other: str) -> str:
        return other + str(self)

    def __add__(self, other: str) -> str:
        return str(self) + other


def prepare(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages without null fields, and with the arguments of calls as objects.

    Raises:
        ValueError: one of them has no role, no content, or a field of another form.
    """
    if isinstance(messages, str | Mapping) or not messages:
        raise ValueError(
            'messages must be a list such as [{"role": "user", "content": "Hello"}] with at least '
            "one entry"
        )
    return [_prepared(message, number) for number, message in enumerate(messages)]


def weight(message: Message) -> int:
    """0: the message is read, not learned."""
    return int(message.get("weight", 1))


def thought(message: Message) -> str:
    """What the assistant thought, as it stands before its answer: <think>…</think>, or nothing."""
    for name in THOUGHTS:
        if isinstance(message.get(name), str) and message[name].strip():
            inside = message[name].strip("\n")
            return f"<think>\n{inside}\n</think>\n\n"
    content = message.get("content")
    found = THOUGHT.match(content) if isinstance(content, str) else None
    return found[0].lstrip() if found and found[1].strip() else ""


def called(message: Message) -> list[str]:
    """Names of the tools that the message calls."""
    return [call.get("function", call).get("name", "") for call in message.get("tool_calls") or ()]


def joined(message: Message, where: str) -> dict[str, Any]:
    """The message whose content is one text, where it is a list of texts."""
    content = message.get("content")
    if not isinstance(content, list):
        return dict(message)
    texts = [part if isinstance(part, str) else part.get("text") for part in content]
    for part, text in zip(content, texts, strict=True):
        if not isinstance(text, str):
            raise ValueError(
                f"{where}: the chat template reads text, not a part such as {part!r:.60}"
            )
    return {**message, "content": "".join(texts)}


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


def _prepared(message: Any, number: int) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ValueError(f'message {number} must be {{"role": …, "content": …}}')
    where = f"message {number} ({message['role']})"
    found = {name: value for name, value in message.items() if value is not None}
    if found.get("weight", 1) not in (0, 1):
        raise ValueError(
            f"{where}: weight={found['weight']!r:.40} must be 0 (read, not learned) or 1"
        )
    if "function_call" in found and "tool_calls" not in found:  # OpenAI's older form of one call
        found["tool_calls"] = [{"type": "function", "function": found["function_call"]}]
    if "tool_calls" in found:
        if not isinstance(found["tool_calls"], list):
            raise ValueError(f"{where}: tool_calls={found['tool_calls']!r:.40} must be a list")
        found["tool_calls"] = [_call(call, where) for call in found["tool_calls"]]
    speaks = found.get("tool_calls") or any(name in found for name in THOUGHTS)
    content = found.get("content", "" if speaks else None)
    parts = content if isinstance(content, list) else []
    if not isinstance(content, str) and not (
        parts and all(isinstance(part, str | Mapping) for part in parts)
    ):
        raise ValueError(f"{where}: content must be text, not {content!r:.40}")
    return found


def _call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError(
            f'{where}: a call must be {{"function": {{"name": …, "arguments": …}}}}, not '
            f"{call!r:.60}"
        )
    given = function.get("arguments")
    arguments = given
    if isinstance(given, str):
        try:
            arguments = json.loads(given)
        except ValueError:
            arguments = None
    if not isinstance(arguments, Mapping) and given is not None:
        raise ValueError(
            f"{where}: the arguments of {function['name']} must be an object, or the text of one "
            f"in JSON, not {given!r:.60}"
        )
    whole = {**function, "arguments": Arguments(arguments or {})}
    if "function" not in call:
        return whole
    return {name: value for name, value in call.items() if value is not None} | {"function": whole}
