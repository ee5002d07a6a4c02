"""The law of conversations: what is learned is asked for by the same ids, which are transformers'.

Over random conversations, templates of all families and every kind of tokenizer.
"""

import itertools
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
from chat_templates import KINDS, SPECIAL, TEMPLATES, WITH_CALLS, WITHOUT_SYSTEM, make, save
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from jaxgpt.data import chat
from jaxgpt.data import tokenizer as tokenizers
from jaxgpt.data.chat import Encoded, Format

NAMED = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
WORDS = [
    "boats",
    "Seven",
    "naïve",
    "漢字",
    "\n",
    "\n\n",
    " ",
    "  ",
    "🙂",
    ".",
    "{",
    '"',
    "tide",
    "é",
]
TOOLS = [{"type": "function", "function": {"name": "tide", "description": "Height, in m."}}]


@dataclass(repr=False)
class Both:
    """The same tokenizer in our hands and, where it is installed, in those of transformers."""

    ours: tokenizers.Tokenizer
    theirs: Any


@pytest.fixture(scope="module", params=KINDS)
def both(request, tmp_path_factory) -> Both:
    folder = tmp_path_factory.mktemp(request.param)
    save(make(request.param), folder)
    try:
        import transformers
    except ImportError:
        return Both(tokenizers.load(folder), None)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    return Both(tokenizers.load(folder), theirs)


def texts(words: list[str]) -> st.SearchStrategy[str]:
    return st.lists(st.one_of(st.sampled_from(words), st.text(max_size=3)), max_size=6).map("".join)


@st.composite
def conversations(draw, name: str, words: list[str] = WORDS) -> list[dict[str, Any]]:
    text = texts(words)
    said: list[dict[str, Any]] = []
    if name not in WITHOUT_SYSTEM and draw(st.booleans()):
        said.append({"role": "system", "content": draw(text)})
    for _ in range(draw(st.integers(1, 3))):
        said.append({"role": "user", "content": draw(text)})
        if name in WITH_CALLS and draw(st.booleans()):
            arguments = draw(st.dictionaries(st.sampled_from(["port", "hour"]), text))
            call = {"type": "function", "function": {"name": "tide", "arguments": arguments}}
            said.append({"role": "assistant", "content": draw(text), "tool_calls": [call]})
            said.append({"role": "tool", "name": "tide", "content": draw(text)})
        answer = {"role": "assistant", "content": draw(text)}
        if name in ("qwen3", "r1", "qwq", "harmony") and draw(st.booleans()):
            if name != "qwq" and draw(st.booleans()):
                answer["reasoning_content"] = draw(text)
            else:
                answer["content"] = f"<think>\n{draw(text)}\n</think>\n\n{answer['content']}"
        said.append(answer)
    return said


def form_of(name: str, tokenizer: tokenizers.Tokenizer) -> Format:
    return Format(TEMPLATES[name], tokenizer, NAMED)


def first_targets(example: Encoded) -> list[int]:
    """Where each stretch of targets begins."""
    before = np.append(False, example.target_T[:-1])
    return np.flatnonzero(example.target_T & ~before).tolist()


def many(test):
    """A few random conversations for each template and tokenizer, which are 64 pairs."""
    checks = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
    return settings(max_examples=8, deadline=None, suppress_health_check=checks)(test)


@pytest.mark.parametrize("name", TEMPLATES)
@many
@given(data=st.data())
def test_every_turn_is_learned_after_the_ids_that_ask_for_it(name, both, data) -> None:
    words = data.draw(st.sampled_from([WORDS, [*WORDS, *SPECIAL]]))
    said = data.draw(conversations(name, words))
    form = form_of(name, both.ours)
    examples = chat.encode(form, said, tools=TOOLS)
    found = [
        example.tokens_T[:start].tolist()
        for example in examples
        for start in first_targets(example)
    ]
    asked = [
        chat.prompt(form, said[:n], TOOLS) for n, m in enumerate(said) if m["role"] == "assistant"
    ]
    assert sorted(found) == sorted(asked)


@pytest.mark.parametrize("name", TEMPLATES)
@many
@given(data=st.data())
def test_ids_are_those_of_transformers(name, both, data) -> None:
    ours, theirs = both.ours, both.theirs
    if theirs is None:
        pytest.skip("transformers is not installed")
    said = data.draw(conversations(name))
    # Such a word stays text with us, which the next law holds; hypothesis tries constants of ours.
    assume(not any(word in repr(said) for word in [*SPECIAL, *NAMED.values()]))
    form = form_of(name, ours)
    options = {"chat_template": TEMPLATES[name], "tools": TOOLS, "return_dict": False}
    whole = theirs.apply_chat_template(said, tokenize=False, **options)
    shown = True  # every prompt stands in the finished conversation
    for count, message in enumerate(said):
        if message["role"] == "assistant":
            ask = partial(theirs.apply_chat_template, said[:count], **options)
            assert chat.prompt(form, said[:count], TOOLS) == ask(add_generation_prompt=True)
            shown &= whole.startswith(ask(add_generation_prompt=True, tokenize=False))
    examples = chat.encode(form, said, tools=TOOLS)
    turns = sum(message["role"] == "assistant" for message in said)
    if shown and len(examples) == 1 and len(first_targets(examples[0])) == turns:
        found = examples[0].tokens_T.tolist()
        assert found == theirs.apply_chat_template(said, **options)


@pytest.mark.parametrize("name", TEMPLATES)
@many
@given(data=st.data())
def test_special_tokens_in_messages_stay_text(name, both, data) -> None:
    tokenizer = both.ours
    said = data.draw(conversations(name, [*WORDS, *SPECIAL]))
    harmless = str.maketrans("<[", "(*")
    tame = [{**m, "content": _tame(m["content"], harmless)} for m in said]
    special = set(tokenizer.special.values())
    form = form_of(name, tokenizer)
    count = lambda ids: [i for i in ids if i in special and i != tokenizer.special["<unk>"]]
    for n, message in enumerate(said):
        if message["role"] == "assistant":
            assert count(chat.prompt(form, said[:n])) == count(chat.prompt(form, tame[:n]))
    for one, other in itertools.zip_longest(chat.encode(form, said), chat.encode(form, tame)):
        assert count(one.tokens_T.tolist()) == count(other.tokens_T.tolist())


def _tame(text: str, harmless: dict[int, str]) -> str:
    """Without special tokens, but with the marks of a thought."""
    head, mark, rest = text.partition("\n</think>\n\n")
    if not mark or not head.startswith("<think>\n"):
        return text.translate(harmless)
    return f"<think>\n{head[8:].translate(harmless)}{mark}{rest.translate(harmless)}"
