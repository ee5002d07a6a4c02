"""Conversations as token ids: the only way there, for training, chatting, evaluation and rollouts.

A conversation becomes one text, and the text becomes ids as a whole, so that they are those of
transformers' apply_chat_template. Every turn of the assistant is learned as the model is asked for
it: with the prompt that `prompt` gives for the messages before it. Where the template shows earlier
turns in another way once later ones follow, as those that leave out earlier thoughts do, a
conversation becomes several examples.

In a text, the special tokens that somebody wrote into a message are replaced by stand-ins, single
characters that the conversation does not hold, until the ids are made.
"""

import functools
import itertools
import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from jaxgpt import files
from jaxgpt.data import templates
from jaxgpt.data.engines import Span
from jaxgpt.data.templates import TEMPLATES, Message, Rendered
from jaxgpt.data.tokenizer import Tokenizer

CHATML, LLAMA3, PLAIN = TEMPLATES["chatml"], TEMPLATES["llama3"], TEMPLATES["plain"]
ROLES = ("", "system", "developer", "user", "assistant", "tool")  # "" is padding
# What may open a thought at the end of a prompt, such as <think> or [THINK], and end it again.
MARK = re.compile(r"(?i)([<\[]\w*(?:think|thought|reason)\w*[>\]])(\s*[<\[]/\w+[>\]])?(?=\s*\Z)")
# Texts that keep the first characters of what follows from melting into a token before it.
SHORTEST = 3  # characters by which the end of a prompt is known again
APART = ("\n", "a", ".", "0", "!", "?", "é")


class Encoded(NamedTuple):
    """A rendered conversation, token by token."""

    tokens_T: np.ndarray
    target_T: np.ndarray  # this token is to be predicted
    role_T: np.ndarray  # index into ROLES


class Format(NamedTuple):
    """How a model chats: its template, and the tokens that this may name."""

    template: str
    tokenizer: Tokenizer
    variables: Mapping[str, str] = MappingProxyType({})  # bos_token, eos_token and others

    @property
    def end_of_turn(self) -> int:
        """The token by which the assistant stops.

        Raises:
            ValueError: the template ends a turn without a token of its own.
        """
        said = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
        talk = _Talk.of(self, said)
        last = _ids(talk, _turn(talk, 1).written)[0][-1]
        if last not in self.tokenizer.special.values():
            raise ValueError(
                "data.template: ends the assistant's turn without a special token, so the model "
                f"would never learn to stop; use one of {', '.join(TEMPLATES)}"
            )
        return last

    @property
    def default_system(self) -> str:
        """The system prompt that the template gives to conversations that have none."""
        mark = "jaxgpt's probe"
        asked = [{"role": "user", "content": "?"}]
        try:
            without = render(self, asked)
            before, _, after = render(
                self, [{"role": "system", "content": mark}, *asked]
            ).partition(mark)
        except ValueError:
            return ""
        rest = without[len(before) :]
        fits = without.startswith(before) and rest.endswith(after)
        return rest[: len(rest) - len(after)].strip() if fits else ""


def find_format(
    name: str, own: str | None, tokenizer: Tokenizer, system: str | None = None, **variables: str
) -> Format:
    """The template called `name`, or in that file; empty: the model's own, else ours.

    Args:
        system: system prompt of conversations that have none.
        variables: special tokens by the names that templates have for them, such as bos_token.

    Raises:
        ValueError: no such template, or one whose special tokens the vocabulary lacks.
    """
    if not variables.get("eos_token"):
        variables["eos_token"] = tokenizer.decode([tokenizer.eos_id])
    if name and name not in TEMPLATES and not files.path(name).is_file():
        raise ValueError(f"data.template={name}: no such file, and not {', '.join(TEMPLATES)}")
    ours = CHATML if "<|im_start|>" in tokenizer.special else PLAIN
    template = TEMPLATES.get(name) or (files.path(name).read_text() if name else own or ours)
    if name in TEMPLATES:
        needed = re.findall(r"<\|\w+\|>", template)
        missing = [token for token in needed if token not in tokenizer.special]
        if missing:
            raise ValueError(
                f"data.template={name}: the vocabulary has no {missing[0]}; use plain, or leave "
                "it empty"
            )
    if system is not None:
        written = next((token for token in tokenizer.special if token in system), None)
        if written:
            raise ValueError(f"data.system: holds the special token {written}; leave it out")
        template = templates.with_system(template, system)
    return Format(template, tokenizer, variables)


def render(
    form: Format,
    messages: Sequence[Message],
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The conversation as the text that the model reads.

    Args:
        add_generation_prompt: ends with the beginning of the assistant's turn.
        tools: what the assistant may call, for templates that list it.

    Raises:
        ValueError: messages of another form, or ones that the template refuses.
    """
    return render_marked(form, messages, add_generation_prompt, tools)[0]


def render_marked(
    form: Format,
    messages: Sequence[Message],
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] = (),
) -> tuple[str, list[Span]]:
    """`render`, and where a special token's text stands in it that somebody wrote in a message."""
    talk = _Talk.of(form, messages, tools)
    return talk.restore(talk.draw(len(messages), add_generation_prompt).text)


def prompt(
    form: Format, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()
) -> list[int]:
    """The ids with which the assistant is asked for its next turn."""
    talk = _Talk.of(form, messages, tools)
    return _ids(talk, talk.draw(len(messages), True).text)[0]


def encode(
    form: Format,
    messages: Sequence[Message],
    *,
    learn_from: int = 0,
    tools: Sequence[Mapping[str, Any]] = (),
) -> list[Encoded]:
    """A conversation as examples to learn from, at least one.

    Targets are what the assistant writes after its prompt, with its end of turn; with a template
    that marks it by {% generation %}, what stands there. An example has as many turns as the
    template shows in the same way in all their prompts.

    Args:
        learn_from: the first message that may be learned.

    Raises:
        ValueError: messages of another form, ones that the template refuses, or a template that
            leaves out the calls of a turn.
    """
    talk = _Talk.of(form, messages, tools)
    learned = [
        index
        for index, message in enumerate(talk.messages)
        if message["role"] == "assistant" and index >= learn_from and templates.weight(message)
    ]
    groups: list[tuple[str, list[_Turn]]] = []
    for turn in (_turn(talk, index) for index in learned):
        text = turn.asked + turn.written
        if groups and turn.asked.startswith(groups[-1][0]):
            groups[-1] = (text, [*groups[-1][1], turn])
        else:
            groups.append((text, [turn]))
    whole = talk.draw(len(talk.messages)).text
    if not groups:
        groups.append((whole, []))
    elif whole.startswith(groups[-1][0]):
        groups[-1] = (whole, groups[-1][1])
    return list(itertools.chain(*(_examples(talk, *group) for group in groups)))


def after_turn(
    form: Format, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()
) -> list[int]:
    """The ids between the end of the assistant's last turn and where it writes again.

    Raises:
        ValueError: the template writes that turn in another way once something follows it.
    """
    talk = _Talk.of(form, messages, tools)
    last = max(i for i, message in enumerate(talk.messages) if message["role"] == "assistant")
    said = talk.draw(last + 1).text
    said = said[: _end_of_turn(said, talk)]
    text = talk.draw(len(messages), True).text
    if not text.startswith(said):
        raise ValueError(
            "data.template: writes the assistant's turn in another way once a tool answers; use "
            "another template"
        )
    ids, starts = _ids(talk, text)
    return ids[bisect_left(starts, len(said)) :]


class _Turn(NamedTuple):
    """What the assistant is asked with, and what it writes then."""

    asked: str
    written: str
    targets: Sequence[Span]  # characters of `asked + written` that are learned


@dataclass(frozen=True)
class _Talk:
    """A conversation in work, with special tokens in its messages hidden by stand-ins."""

    form: Format
    messages: Sequence[Message]
    tools: Sequence[Any]
    hidden: Mapping[str, str]  # what each stand-in stands for
    drawn: dict[tuple[int, bool], Rendered] = field(default_factory=dict)

    @classmethod
    def of(cls, form: Format, messages: Sequence[Message], tools: Sequence[Any] = ()) -> "_Talk":
        prepared: Any = templates.prepare(messages)
        if not templates.takes_parts(form.template, **form.variables):
            prepared = [templates.joined(m, f"message {n}") for n, m in enumerate(prepared)]
        fields = templates.names(form.template, *templates.THOUGHTS)
        prepared = [_named(message, fields) for message in prepared]
        texts = _texts([prepared, list(tools)])
        pattern = _written(tuple(form.tokenizer.special))
        found = dict.fromkeys(itertools.chain(*map(pattern.findall, texts)))
        used = set("".join(texts)) if found else set()
        chars = map(chr, itertools.chain(templates.STAND_INS, range(0x20000, 0x2A6DF)))
        free = (char for char in chars if char not in used)
        stand_in = {text: next(free) for text in found}
        hide = lambda text: pattern.sub(lambda match: stand_in[match[0]], text)
        if stand_in:
            prepared = [_hidden_message(message, hide) for message in prepared]
            tools = _mapped(list(tools), hide)
        return cls(form, prepared, tools, {char: text for text, char in stand_in.items()})

    def draw(self, count: int, add_generation_prompt: bool = False) -> Rendered:
        """The first messages as text."""
        key = (count, add_generation_prompt)
        if key not in self.drawn:
            said = self.messages[:count]
            write = functools.partial(
                templates.render, self.form.template, **self.form.variables,
                tools=list(self.tools) or None, add_generation_prompt=add_generation_prompt,
            )  # fmt: skip
            try:
                self.drawn[key] = write(said)
            except ValueError:  # beside a call, some need no content, others an empty one
                if all("content" in message for message in said):
                    raise
                self.drawn[key] = write([{"content": "", **message} for message in said])
        return self.drawn[key]

    def restore(self, text: str) -> tuple[str, list[Span]]:
        """The text that the stand-ins stand for, and their places in it."""
        parts = [self.hidden.get(char, char) for char in text] if self.hidden else [text]
        ends = itertools.accumulate(map(len, parts))
        places = [
            (end - len(part), end)
            for end, part, char in zip(ends, parts, text, strict=False)
            if char in self.hidden
        ]
        return "".join(parts), places


def _turn(talk: _Talk, index: int) -> _Turn:
    message = talk.messages[index]
    whole, generated = talk.draw(index + 1)
    end = _end_of_turn(whole, talk)
    asked = _asked(talk, index, whole)
    thought = templates.thought(message)
    if whole.startswith(asked) and _holds(whole[len(asked) : end], thought):
        written = whole[len(asked) : end]
        spans = [(max(a, len(asked)), b) for a, b in generated if b > len(asked)]
        marked = bool(generated) or "endgeneration" in talk.form.template
        turn = _Turn(asked, written, spans if marked else [(len(asked), end)])
    else:
        written = _completed(talk, index, asked, whole[:end], thought)
        turn = _Turn(asked, written, [(len(asked), len(asked) + len(written))])
    for name in templates.called(message):
        if name not in turn.written:  # a template that knows of no tools leaves an empty turn
            raise ValueError(
                f"data.template: does not write the assistant's tool_calls (of {name}); use one "
                "that does, or messages that hold the call as text"
            )
    return turn


def _asked(talk: _Talk, index: int, whole: str) -> str:
    """The prompt of a turn; one that opens the conversation is asked for by the same words."""
    try:
        asked = talk.draw(index, True).text
    except ValueError:
        asked = None
        if index > 1 or (index == 1 and talk.messages[0]["role"] == "user"):
            raise
    if asked is not None and (index > 0 or whole.startswith(asked)):
        return asked
    question = _Talk.of(talk.form, [{"role": "user", "content": "?"}], talk.tools)
    before, header = question.draw(1).text, question.draw(1, True).text
    header = header[len(before) :] if header.startswith(before) else ""
    opened = MARK.search(header)
    bare = header[: opened.start()] if opened and header not in whole else header
    content = talk.messages[index].get("content")
    if bare and bare in whole:
        return whole[: whole.index(bare)] + header
    if isinstance(content, str) and content.strip() and content.strip() in whole:
        return whole[: whole.index(content.strip())]
    raise ValueError("data.template: does not show where the assistant's first turn begins")


def _completed(talk: _Talk, index: int, asked: str, whole: str, thought: str) -> str:
    """What the model writes after a prompt with which the finished turn does not begin.

    Such a prompt opens a thought, or shows the messages before it in another way, or the finished
    turn leaves the thought out:

        prompt    …<|im_start|>assistant\n<think>\n
        finished  …<|im_start|>assistant\nTwelve.<|im_end|>
        written   count them\n</think>\n\nTwelve.<|im_end|>
    """
    mark, closed, opened, shown = "<think>", False, "", whole[len(asked) :]
    if not whole.startswith(asked):
        found = MARK.search(asked)
        bare = asked[: found.start()] if found else asked.rstrip()
        mark, closed = (found[1], bool(found[2])) if found else (mark, False)
        opened, shown = asked[len(bare) :], whole[_border(talk, index, bare, whole) :]
    shown = shown.lstrip() if opened or thought else shown
    closing = f"{mark[0]}/{mark[1:]}"
    if closed or asked.rstrip().endswith(closing):
        if thought:
            raise ValueError(
                f"data.template: its prompt ends a thought ({closing}), so that of the assistant "
                "would be left out; use another template"
            )
        return shown
    if mark in opened:
        thought = thought or "<think>\n\n</think>\n\n"
    thought = thought.replace("<think>", mark, 1).replace("</think>", closing)
    if not thought.startswith(opened):
        thought = opened + thought[len(mark) :].lstrip()
    return thought[len(opened) :] + shown


def _border(talk: _Talk, index: int, asked: str, whole: str) -> int:
    """The place in a finished conversation up to which it ends as the prompt does."""
    if whole.startswith(asked):
        return len(asked)
    before = talk.draw(index).text
    header = asked[len(before) :] if asked.startswith(before) else ""
    end = asked[-max(len(header), SHORTEST) :]
    places = [found.end() for found in re.finditer(f"(?={re.escape(end)})", whole)]

    def shared(place: int) -> int:
        """How many characters before the place are the prompt's last ones."""
        pairs = zip(reversed(asked), reversed(whole[: place + len(end)]), strict=False)
        return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))

    if not places:
        raise ValueError(
            f"data.template: asks the assistant with {asked[-40:]!r}, with which its finished "
            f"turn does not begin ({whole[-40:]!r}); use another template"
        )
    return max(places, key=shared) + len(end)


def _examples(talk: _Talk, text: str, turns: Sequence[_Turn]) -> list[Encoded]:
    """The text as one example, and a further one for every turn whose prompt would have other ids.

    That is so where a token of the whole text lies across the border between prompt and answer.
    """
    ids, starts = _ids(talk, text)
    special = set(talk.form.tokenizer.special.values())
    role_of = _roles(talk, text)
    learned: list[Span] = []
    alone = []
    for turn in turns:
        count = bisect_left(starts, len(turn.asked))
        # A special token cuts the text: what stands before it does not change the ids behind it.
        last = next((n for n in reversed(range(count)) if ids[n] in special), 0)
        if _ids(talk, turn.asked[starts[last] if last else 0 :])[0] == ids[last:count]:
            learned += turn.targets
        else:
            alone.append(turn)
    made = []
    if learned or not alone:
        made.append(_encoded(ids, starts, learned, role_of))
    for turn in alone:
        before, first = _ids(talk, turn.asked)
        own, own_starts = _continuation(talk, turn.written)
        shifted = [len(turn.asked) + start for start in own_starts]
        roles = _roles(talk, turn.asked + turn.written)
        made.append(_encoded(before + own, first + shifted, turn.targets, roles, len(before)))
    return made


def _encoded(
    ids: Sequence[int],
    starts: Sequence[int],
    learned: Sequence[Span],
    role_of: np.ndarray,
    first: int = 0,
) -> Encoded:
    """Args:
    first: no target stands before this token.
    """
    target_T = np.zeros(len(ids), bool)
    for a, b in learned:
        target_T[max(bisect_left(starts, a), first) : bisect_left(starts, b)] = True
    role_T = np.array([role_of[start] for start in starts], np.int8)
    role_T[target_T] = ROLES.index("assistant")
    return Encoded(np.array(ids, np.int32), target_T, role_T)


def _ids(talk: _Talk, text: str) -> tuple[list[int], list[int]]:
    """Ids of a text with stand-ins, and the character of it at which each begins."""
    tokenizer = talk.form.tokenizer
    if not any(char in talk.hidden for char in text):
        return tokenizer.encode_with_starts(text)
    lengths = [len(talk.hidden.get(char, char)) for char in text]
    begins = list(itertools.accumulate(lengths, initial=0))
    ids, starts = tokenizer.encode_with_starts(*talk.restore(text))
    return ids, [min(bisect_right(begins, start) - 1, len(text) - 1) for start in starts]


def _continuation(talk: _Talk, text: str) -> tuple[list[int], list[int]]:
    """`_ids` of a text that stands in the middle of another one.

    At the beginning of a text some tokenizers write a blank.
    """
    for before in APART:
        ids, starts = _ids(talk, before + text)
        count = bisect_left(starts, len(before))
        if (
            count < len(ids)
            and starts[count] == len(before)
            and ids[:count] == _ids(talk, before)[0]
        ):
            return ids[count:], [start - len(before) for start in starts[count:]]
    return _ids(talk, text)


def _roles(talk: _Talk, text: str) -> np.ndarray:
    """Who says every character, as an index into ROLES; the templates' own words go with them."""
    role_of = np.full(len(text) + 1, ROLES.index("assistant"), np.int8)
    done = 0
    for count, message in enumerate(talk.messages, 1):
        try:
            end = talk.draw(count).text
        except ValueError:  # a template may refuse to stop here, say after the system's message
            continue
        if text.startswith(end):
            role = message["role"]
            role_of[done : len(end)] = ROLES.index(role) if role in ROLES else 0
            done = len(end)
    return role_of


def _end_of_turn(text: str, talk: _Talk) -> int:
    """Where a text ends if what follows its last special token is white space."""
    shown = text.rstrip()
    return len(shown) if shown.endswith(tuple(talk.form.tokenizer.special)) else len(text)


def _holds(text: str, thought: str) -> bool:
    """Whether a text shows a thought, perhaps as JSON."""
    inside = templates.THOUGHT.match(thought)
    bare = inside[1].strip() if inside else ""
    return bare in text or json.dumps(bare, ensure_ascii=False)[1:-1] in text


def _named(message: dict[str, Any], fields: Sequence[str]) -> dict[str, Any]:
    """The message whose thought also has the names by which the template reads it."""
    own = next((message[name] for name in templates.THOUGHTS if name in message), None)
    return message if own is None else {**dict.fromkeys(fields, own), **message}


def _hidden_message(message: dict[str, Any], hide: Callable[[str], str]) -> dict[str, Any]:
    """All texts of a message, but not the marks of a thought that opens the assistant's turn."""
    found = _mapped(message, hide)
    content = message.get("content")
    inside = templates.THOUGHT.match(content) if isinstance(content, str) else None
    if message["role"] == "assistant" and isinstance(content, str) and inside:
        a, b = inside.span(1)
        found["content"] = (
            content[: a] + hide(content[a:b]) + content[b : inside.end()]
            + hide(content[inside.end() :])
        )  # fmt: skip
    return found


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """The same value, all of whose texts are changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        made = {_mapped(name, change): _mapped(item, change) for name, item in value.items()}
        return templates.Arguments(made) if isinstance(value, templates.Arguments) else made
    return [_mapped(item, change) for item in value] if isinstance(value, list) else value


def _texts(value: Any) -> list[str]:
    """All texts in a value."""
    found: list[str] = []
    _mapped(value, lambda text: found.append(text) or text)
    return found


@functools.lru_cache(64)
def _written(special: tuple[str, ...]) -> re.Pattern[str]:
    """What is hidden in messages: special tokens, and the marks that templates are read by."""
    longest_first = sorted([*special, templates.OPEN, templates.CLOSE], key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)))
