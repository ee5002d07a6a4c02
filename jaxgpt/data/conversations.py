"""Conversations and preferences from files, in the shapes that public data sets have.

messages                       OpenAI: [{"role": …, "content": …}]
conversations                  ShareGPT: [{"from": "human", "value": …}]
conversation                   pairs: [{"human": …, "assistant": …}], or texts by turns
instruction, input, output     Alpaca; Dolly says context for input; either may have a history
prompt, completion             or response; the prompt is text or messages
question, answer               GSM8K; its <<48/2=24>> may become calls of a calculator
"\\n\\nHuman: …\\n\\nAssistant: …"   HH-RLHF transcripts, wherever a conversation may stand

Preferences have `chosen` and `rejected` beside their prompt, or as two whole conversations, or
response_0, response_1 and better_response_id; single answers that are good or bad (KTO) have a
`label`. Which columns hold these is in columns.py, and can be said (data.columns, data.roles).
Every field of a message stays with it.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

from jaxgpt.config.checks import nearest
from jaxgpt.data import rows
from jaxgpt.data.columns import KNOWN, Columns, Row
from jaxgpt.data.rows import Paths

Message = dict[str, Any]  # role, content and whatever else the data says of it
T = TypeVar("T")

ROLE, CONTENT = ("role", "from", "speaker"), ("content", "value", "text")
# A turn without a role may hold a question and its answer.
SIDES = {
    "system": "system",
    **dict.fromkeys(("user", "human", "input", "prompt", "instruction", "question"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "output", "response", "answer"), "assistant"),
}
KINDS = ("text", "reasoning", "tool_call")  # of a message's parts
CALL = re.compile(r"<<([^<>=]*)=([^<>]*)>>")
CALL_TAGS = re.compile(r"^\s*<[a-z_]+>|</[a-z_]+>\s*$")
TRANSCRIPT = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant): ?")
OPENS = re.compile(r"\n\n(Human|Assistant):|\s*Human:.*\n\nAssistant:", re.DOTALL)
GOOD = {"true", "1", "yes", "good", "desirable", "chosen", "positive", "+1"}
BAD = {"false", "0", "no", "bad", "undesirable", "rejected", "negative", "-1"}


class Dialogue(NamedTuple):
    """A conversation to learn from."""

    messages: list[Message]
    where: str  # file and line
    tools: Sequence[dict[str, Any]] = ()  # what the assistant may call


class Preference(NamedTuple):
    """Two continuations of a prompt."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    margin: float  # by how much the chosen one is better, where the data says so
    where: str
    tools: Sequence[dict[str, Any]] = ()


class Rated(NamedTuple):
    """One continuation of a prompt, good or bad."""

    prompt: list[Message]
    answer: list[Message]
    desirable: bool
    where: str
    tools: Sequence[dict[str, Any]] = ()


class Asked(NamedTuple):
    """A question whose answer a rule can judge."""

    prompt: list[Message]
    answer: str
    where: str


def dialogues(
    paths: Paths, split: str = "train", columns: Columns | None = None
) -> Iterator[Dialogue]:
    """The conversations of files or a Hub data set; of preferences, the chosen ones."""
    return _read(paths, split, columns, _dialogue)


def preferences(
    paths: Paths, split: str = "train", columns: Columns | None = None
) -> Iterator[Preference]:
    """The pairs of files or a Hub data set."""
    return _read(paths, split, columns, _preference)


def ratings(paths: Paths, split: str = "train", columns: Columns | None = None) -> Iterator[Rated]:
    """Answers with a label; a pair gives two of them."""
    for found in _read(paths, split, columns, _ratings):
        yield from found


def questions(
    paths: Paths, split: str = "train", columns: Columns | None = None
) -> Iterator[Asked]:
    """Prompts and their right answers, which are text or numbers."""
    return _read(paths, split, columns, _asked)


def transcript(text: str, where: str) -> list[Message]:
    """The messages of an HH-RLHF transcript."""
    before, *turns = TRANSCRIPT.split(text)
    if not turns or before.strip():
        raise ValueError(f"{where}: a conversation must start with '\\n\\nHuman: '")
    names = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": names[name], "content": content.strip()}
        for name, content in zip(turns[::2], turns[1::2], strict=True)
    ]


def with_calls(dialogue: Dialogue) -> Dialogue:
    """The same conversation, in which every <<48/2=24>> is a turn that calls the calculator.

    "He needs 48/2 = <<48/2=24>>24 boxes" becomes "He needs 48/2 = calculator(48/2)", the tool's
    "24", and "24 boxes".
    """
    messages: list[Message] = []
    for message in dialogue.messages:
        if message["role"] != "assistant" or not isinstance(message["content"], str):
            messages.append(message)
            continue
        *parts, rest = CALL.split(message["content"])
        for text, expression, result in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
            apart = " " if text[-1:].isalnum() else ""
            messages.append(_says("assistant", f"{text}{apart}calculator({expression})"))
            messages.append(_says("tool", result))
        messages.append(_says("assistant", rest))
    return dialogue._replace(messages=messages)


def _read(
    paths: Paths, split: str, columns: Columns | None, parse: Callable[[Row], T]
) -> Iterator[T]:
    """What `parse` makes of every row; then what was read of them is said on stderr."""
    columns = columns or Columns()
    try:
        for values, where in rows.read(paths, split):
            row = columns.open(values, where)
            try:
                found = parse(row)
            except RecursionError:
                raise ValueError(f"{where}: holds objects too deep in each other") from None
            columns.close(row, _texts(found))
            yield found
    except ValueError:
        columns.require_mapped()  # which would be the reason
        raise
    columns.require_mapped()
    columns.report(", ".join(rows.names(paths)))


def _texts(found: Any) -> Iterator[str]:
    """All that is said in what was read of a row."""
    if isinstance(found, dict):
        yield str(found.get("content"))
    elif isinstance(found, (list, tuple)):
        for part in found:
            yield from _texts(part)


def _dialogue(row: Row) -> Dialogue:
    if row.has("chosen") and row.has("rejected"):
        pair = _preference(row)
        return Dialogue(pair.prompt + pair.chosen, row.where, pair.tools)
    messages = _prompt(row)
    if not messages:
        raise ValueError(f"{row.where}: nothing is asked {row.holds}")
    if messages[-1]["role"] != "assistant":
        messages = messages + _answer(row)
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError(f"{row.where}: nothing is said by the assistant {row.holds}")
    return Dialogue(messages, row.where, _tools(row))


def _answer(row: Row) -> list[Message]:
    answer, thought = row.take("answer"), row.take("reasoning")
    if answer is None:
        return []
    said = _messages(_as_text(answer), row, "assistant")
    if thought is not None and len(said) == 1:
        said[0]["reasoning_content"] = _text(thought, row.where)
    return said


def _asked(row: Row) -> Asked:
    prompt, answer = _prompt(row), row.take("answer", "answer", "solution")
    if not any(message["role"] == "user" for message in prompt):
        raise ValueError(f"{row.where}: asks no question {row.holds}")
    answer = _as_text(answer)
    if not isinstance(answer, str) or not answer.strip():
        raise ValueError(f"{row.where}: answer must be text or a number, not {answer!r:.40}")
    return Asked(prompt, answer.strip(), row.where)


def _as_text(answer: Any) -> Any:
    """7 and 7.0 are "7"; what is no number stays."""
    if isinstance(answer, float) and answer.is_integer():
        return f"{answer:.0f}"
    return (
        f"{answer}" if isinstance(answer, (int, float)) and answer not in (True, False) else answer
    )


def _tools(row: Row) -> list[dict[str, Any]]:
    """A list of JSON schemas, which some data sets hold as text."""
    tools = _from_json(row.take("tools") or [], "tools", row.where)
    tools = [tools] if isinstance(tools, dict) else tools
    if isinstance(tools, list):
        tools = [_from_json(tool, "tools", row.where) for tool in tools]
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"{row.where}: tools must be a list of objects, not {tools!r:.40}")
    return tools


def _from_json(value: Any, name: str, where: str) -> Any:
    """What a text holds that is JSON; another value is itself."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise ValueError(f"{where}: {name} is no JSON ({error}): {value!r:.40}") from None


def _preference(row: Row) -> Preference:
    prompt = _prompt(row)
    chosen, rejected = _two_answers(row, prompt)
    if not prompt or any(answer[0]["role"] != "assistant" for answer in (chosen, rejected)):
        # Whole conversations; what they share, but for the last message, is the prompt.
        shared, most = 0, min(len(chosen), len(rejected)) - 1
        while shared < most and chosen[shared] == rejected[shared]:
            shared += 1
        before = [m for m in prompt if m["role"] == "system" and m not in chosen[:shared]]
        prompt, chosen, rejected = before + chosen[:shared], chosen[shared:], rejected[shared:]
    if not any(message["role"] != "system" for message in prompt):
        raise ValueError(f"{row.where}: chosen and rejected must be two answers to one prompt")
    margin, scores = (
        row.number("margin"),
        [row.number(f"score_{n}") for n in ("chosen", "rejected")],
    )
    if margin is None:
        margin = 0.0 if None in scores else scores[0] - scores[1]  # type: ignore[operator]
    return Preference(prompt, chosen, rejected, margin, row.where, _tools(row))


def _two_answers(row: Row, prompt: list[Message]) -> tuple[list[Message], list[Message]]:
    """The better and the worse one; the better may be the end of what stands in the prompt."""
    if row.has("chosen") or not row.has("response_0"):
        # ms-swift has the chosen answer where fine-tuning has its only one.
        worse, better = row.take("rejected"), row.take("chosen")
        if better is None and worse is not None and prompt and prompt[-1]["role"] == "assistant":
            better = [prompt.pop()]
        elif better is None:
            better = _as_text(row.take("answer"))
    else:
        both, number = [row.take(f"response_{n}") for n in (0, 1)], row.number("better_response_id")
        if number not in (0, 1):
            raise ValueError(f"{row.where}: better_response_id must be 0 or 1, not {number}")
        better, worse = both[int(number)], both[1 - int(number)]
    if isinstance(prompt := row.look("prompt"), str) and prompt.rstrip().endswith("Assistant:"):
        # The blank after "Assistant:" is no part of the answer.
        better, worse = (a.lstrip() if isinstance(a, str) else a for a in (better, worse))
    if better is None or worse is None:
        raise ValueError(f"{row.where}: needs chosen and rejected {row.holds}")
    return _messages(better, row, "assistant"), _messages(worse, row, "assistant")


def _ratings(row: Row) -> list[Rated]:
    if not row.has("label"):
        pair = _preference(row)
        return [
            Rated(pair.prompt, pair.chosen, True, row.where, pair.tools),
            Rated(pair.prompt, pair.rejected, False, row.where, pair.tools),
        ]
    label = row.take("label")
    said = f"{label:g}" if isinstance(label, float) else str(label).strip().lower()
    if said not in GOOD | BAD:
        raise ValueError(f"{row.where}: label must be true or false, not {label!r:.40}")
    messages, _, tools = _dialogue(row)
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise ValueError(f"{row.where}: must be a prompt and an answer to it")
    return [Rated(messages[:-1], messages[-1:], said in GOOD, row.where, tools)]


def _prompt(row: Row) -> list[Message]:
    """Everything before the answer: what the system says, a history, and what is asked."""
    messages, name = row.take("messages") if _has_messages(row) else None, "messages"
    if messages is None:
        name = "prompt" if row.has("prompt") else "text"
        messages = row.take(name)
    elif isinstance(messages, str) and not OPENS.match(messages):
        messages = _from_json(messages, name, row.where)
    said = [] if messages is None else _messages(messages, row, "user", name == "messages")
    if said and said[-1] == {"role": "assistant", "content": ""} and len(said) > 1:
        said.pop()  # a transcript that ends in "Assistant:", where the answer begins
    more = [_text(v, row.where) for n in ("input", "context") if (v := row.take(n)) is not None]
    first = next((message for message in said if message["role"] == "user"), None)
    if more and first is None:
        said.append(_says("user", "\n\n".join(more)))
    elif more and first is not None:
        first["content"] = "\n\n".join([first["content"], *more])
    history = row.take("history")
    before = [] if history is None else _messages(history, row, "user", True)
    start = 1 if said and said[0]["role"] in ("system", "developer") else 0
    system = None if start else row.take("system")
    opening = [] if system is None else [_says("system", _text(system, row.where))]
    return opening + said[:start] + before + said[start:]


def _has_messages(row: Row) -> bool:
    """Whether the row's messages are its prompt; a column that the user named goes before them."""
    if not row.has("messages") or (
        "prompt" in row.columns.own and "messages" not in row.columns.own
    ):
        return False
    value = row.look("messages")
    return not isinstance(value, str) or value.lstrip().startswith("[") or bool(OPENS.match(value))


def _says(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _messages(value: Any, row: Row, role: str, turns: bool = False) -> list[Message]:
    """Text by `role`, a transcript, one message, or a list of messages.

    Args:
        turns: the items of a list may be texts, of the user and the assistant by turns, or pairs.
    """
    if isinstance(value, str):
        return transcript(value, row.where) if OPENS.match(value) else [_says(role, value)]
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or not value:
        raise ValueError(f"{row.where}: a conversation must be text or a list, not {value!r:.40}")
    found: list[Message] = []
    calling = False  # the turn before was nothing but a call
    for number, turn in enumerate(value):
        if turns and isinstance(turn, str):
            found.append(_says(("user", "assistant")[number % 2], turn))
        elif turns and isinstance(turn, list) and len(turn) == 2:
            said = {"user": turn[0], "assistant": turn[1]}
            found += _sides(said, row.where)
        elif not isinstance(turn, dict):
            raise ValueError(f"{row.where}: a message must be an object, not {turn!r:.40}")
        elif _speaker(turn, row) == "tool_call":
            calls = _calls(_content(turn), row.where)
            if calling:  # several calls at one time
                found[-1]["tool_calls"] += calls
            else:
                rest = {key: turn[key] for key in turn if key not in (*ROLE, *CONTENT)}
                found.append(_says("assistant", "") | {"tool_calls": calls} | rest)
            calling = True
            continue
        elif _speaker(turn, row):
            found.append(_message(turn, row))
        else:
            found += _sides(turn, row.where)
        calling = False
    return found


def _speaker(turn: dict[str, Any], row: Row) -> str:
    """One of KNOWN; empty where the turn names nobody."""
    said = next((turn[key] for key in ROLE if turn.get(key) is not None), None)
    if said is None:
        return ""
    role = row.columns.roles.get(str(said).strip().lower())
    if role is None:
        setting = row.columns.setting
        advice = f', or say whose it is with --{setting}.roles \'{{"{said}": "user"}}\''
        raise ValueError(
            f"{row.where}: {said!r:.40} is no role{nearest(str(said), row.columns.roles)}; use "
            f"{', '.join(KNOWN)}{advice if setting else ''}"
        )
    return role


def _sides(turn: dict[str, Any], where: str) -> list[Message]:
    """A turn such as {"human": …, "assistant": …}, which holds a question and its answer."""
    said = [_says(SIDES[k], _text(v, where)) for k, v in turn.items() if k in SIDES]
    if not said or any(value and key not in SIDES for key, value in turn.items()):
        raise ValueError(f"{where}: a message needs role and content, not {turn!r:.60}")
    return sorted(said, key=lambda message: ("system", "user", "assistant").index(message["role"]))


def _content(turn: dict[str, Any]) -> Any:
    return next((turn[key] for key in CONTENT if turn.get(key) is not None), None)


def _message(turn: dict[str, Any], row: Row) -> Message:
    """The turn with the names that templates know; its other fields stay as they are."""
    role, content = _speaker(turn, row), _content(turn)
    named = {next(key for key in ROLE if turn.get(key) is not None)}
    named |= {next((key for key in CONTENT if key in turn), "content")}
    rest = {key: value for key, value in turn.items() if key not in named}
    calls = _from_json(rest.get("tool_calls"), "tool_calls", row.where)
    if rest.get("function_call"):  # OpenAI's older form
        calls = [*(calls or []), *_calls(rest.pop("function_call"), row.where)]
    if calls:
        rest["tool_calls"] = calls
    if role == "tool" and not isinstance(content, (str, type(None))) and not _is_parts(content):
        content = json.dumps(content, ensure_ascii=False)
    if role == "assistant" and isinstance(content, list) and _is_parts(content):
        content, made = _parted(content, row.where)
        rest |= made
        calls = rest.get("tool_calls")
    silent = content is None and (calls or rest.get("reasoning_content") or rest.get("thinking"))
    return {"role": role, "content": None if silent else _text(content, row.where), **rest}


def _calls(value: Any, where: str) -> list[dict[str, Any]]:
    """The calls of a turn that is nothing else, as OpenAI writes them."""
    if isinstance(value, str):
        value = _from_json(CALL_TAGS.sub("", value), "a function call", where)
    found = []
    for call in value if isinstance(value, list) else [value]:
        said = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(said, dict) or not isinstance(said.get("name"), str):
            raise ValueError(
                f'{where}: a function call must be {{"name": …, "arguments": …}}, not {call!r:.60}'
            )
        name, arguments = said["name"], said.get("arguments", said.get("parameters", {}))
        ids = {"id": call["id"]} if "id" in call else {}
        found.append(
            {**ids, "type": "function", "function": {"name": name, "arguments": arguments}}
        )
    return found


def _is_parts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(p, dict) for p in value)


def _parted(parts: list[dict[str, Any]], where: str) -> tuple[str | None, dict[str, Any]]:
    """The text of an assistant's parts, and what they are beside it: a thought and calls."""
    said = {
        kind: [_part(p, where, KINDS) for p in parts if p.get("type", "text") == kind]
        for kind in KINDS
    }
    fields: dict[str, Any] = {}
    if said["reasoning"]:
        fields["reasoning_content"] = "".join(said["reasoning"])
    if said["tool_call"]:
        fields["tool_calls"] = [call for text in said["tool_call"] for call in _calls(text, where)]
    return "".join(said["text"]) or (None if fields else ""), fields


def _text(value: Any, where: str) -> str:
    if _is_parts(value):
        value = "".join(_part(part, where, ("text",)) for part in value)
    if not isinstance(value, str):
        raise ValueError(f"{where}: a message's content must be text, not {value!r:.40}")
    return value


def _part(part: dict[str, Any], where: str, kinds: Sequence[str]) -> str:
    """The text of one of several parts of a message, such as {"type": "text", "text": …}."""
    kind = part.get("type", "text")
    text = part.get("text", part.get("value", part.get(kind)))
    if kind not in kinds or not isinstance(text, str):
        raise ValueError(
            f"{where}: a message's part must be text of type {', '.join(kinds)}, not {part!r:.60}"
        )
    return text
