"""Conversations and preferences from files, in the shapes that public data sets have.

messages                       OpenAI: [{"role": …, "content": …}]
conversations                  ShareGPT: [{"from": "human", "value": …}]
instruction, input, output     Alpaca
prompt, completion             or response; the prompt is text or messages
question, answer               GSM8K; its <<48/2=24>> may become calls of a calculator
"\\n\\nHuman: …\\n\\nAssistant: …"   HH-RLHF transcripts, wherever a conversation may stand

Preferences have `chosen` and `rejected` beside their prompt, or as two whole conversations; single
answers that are good or bad (KTO) have a `label`.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from jaxgpt.data import documents

Message = dict[str, Any]  # role, content and, from OpenAI, tool_calls
T = TypeVar("T")

ROLES = {
    "human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool",
    "function": "tool", "bot": "assistant", "model": "assistant",
}  # fmt: skip
# How a message's parts are written, by their type; as Qwen's models write them.
PARTS = {
    "text": "{}",
    "reasoning": "<think>\n{}\n</think>\n\n",
    "tool_call": "<tool_call>\n{}\n</tool_call>\n",
}
KNOWN = ("system", "developer", "user", "assistant", "tool")
CALL = re.compile(r"<<([^<>=]*)=([^<>]*)>>")
TRANSCRIPT = re.compile(r"\n\n(Human|Assistant): ?")


class Dialogue(NamedTuple):
    """A conversation to learn from."""

    messages: list[Message]
    place: str  # file and line
    tools: Sequence[dict[str, Any]] = ()  # what the assistant may call


class Preference(NamedTuple):
    """Two continuations of a prompt."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    margin: float  # by how much the chosen one is better, where the data says so
    place: str
    tools: Sequence[dict[str, Any]] = ()


class Rated(NamedTuple):
    """One continuation of a prompt, good or bad."""

    prompt: list[Message]
    answer: list[Message]
    desirable: bool
    place: str
    tools: Sequence[dict[str, Any]] = ()


def dialogues(path: str, split: str = "train") -> Iterator[Dialogue]:
    """The conversations of a file or a Hub data set; of preferences, the chosen ones."""
    return _read(path, split, _dialogue)


def preferences(path: str, split: str = "train") -> Iterator[Preference]:
    """The pairs of a file or a Hub data set."""
    return _read(path, split, _preference)


def ratings(path: str, split: str = "train") -> Iterator[Rated]:
    """Answers with a label; a pair gives two of them."""
    for found in _read(path, split, _ratings):
        yield from found


def rows(path: str, split: str = "train") -> Iterator[tuple[Any, str]]:
    """Every row of a JSONL, JSON or Parquet file (or its .gz) or Hub data set, with its place.

    A Hub data set that has several parts is named with one of them: openai/gsm8k:main.
    """
    file = Path(path)
    if not file.exists():
        repository = path.partition(":")[0]
        if not documents.HUB_NAME.fullmatch(repository) or file.suffix in documents.TABLES:
            raise ValueError(f"data.path={path}: no such file, embedded task or Hub data set")
        yield from _hub_rows(path, split)
    elif Path(file.stem if file.suffix in documents.PACKED else file).suffix == ".parquet":
        yield from _parquet_rows(file)
    else:
        yield from _json_rows(file)


def transcript(text: str, place: str) -> list[Message]:
    """The messages of an HH-RLHF transcript."""
    before, *turns = TRANSCRIPT.split(text)
    if not turns or before.strip():
        raise ValueError(f"{place}: a conversation must start with '\\n\\nHuman: '")
    names = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": names[name], "content": content.strip()}
        for name, content in zip(turns[::2], turns[1::2], strict=True)
    ]


def question_and_answer(row: Any, place: str) -> tuple[str, str]:
    """The two texts of a row such as GSM8K's."""
    question, answer = (
        row.get(name) if isinstance(row, dict) else None for name in ("question", "answer")
    )
    for text in (question, answer):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{place}: must have question and answer, both of them text")
    return str(question), str(answer)


def with_calls(dialogue: Dialogue) -> Dialogue:
    """The same conversation, in which every <<48/2=24>> is a turn that calls the calculator.

    "He needs 48/2 = <<48/2=24>>24 boxes" becomes "He needs 48/2 = calculator(48/2)", the tool's
    "24", and "24 boxes".
    """
    messages: list[Message] = []
    for message in dialogue.messages:
        if message["role"] != "assistant":
            messages.append(message)
            continue
        *parts, rest = CALL.split(message["content"])
        for text, expression, result in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
            apart = " " if text[-1:].isalnum() else ""
            messages.append(_says("assistant", f"{text}{apart}calculator({expression})"))
            messages.append(_says("tool", result))
        messages.append(_says("assistant", rest))
    return dialogue._replace(messages=messages)


def _read(path: str, split: str, parse: Callable[[dict[str, Any], str], T]) -> Iterator[T]:
    for row, place in rows(path, split):
        if not isinstance(row, dict):
            raise ValueError(f"{place}: must be an object, not {type(row).__name__}")
        yield parse(row, place)


def _dialogue(row: dict[str, Any], place: str) -> Dialogue:
    if "chosen" in row and "rejected" in row:
        pair = _preference(row, place)
        return Dialogue(pair.prompt + pair.chosen, place, pair.tools)
    if "question" in row and "answer" in row:
        question, answer = question_and_answer(row, place)
        return Dialogue([_says("user", question), _says("assistant", answer)], place)
    prompt = _prompt(row, place)
    answer = next((row[n] for n in ("output", "completion", "response") if row.get(n)), None)
    messages = prompt if answer is None else prompt + _messages(answer, place, "assistant")
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError(f"{place}: nothing is said by the assistant")
    return Dialogue(messages, place, _tools(row, place))


def _tools(row: dict[str, Any], place: str) -> list[dict[str, Any]]:
    """A list of JSON schemas, which some data sets hold as text."""
    tools = row.get("tools") or []
    try:
        tools = json.loads(tools) if isinstance(tools, str) else tools
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: tools is no JSON: {error}") from None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"{place}: tools must be a list of objects, not {tools!r:.40}")
    return tools


def _preference(row: dict[str, Any], place: str) -> Preference:
    if "chosen" not in row or "rejected" not in row:
        raise ValueError(f"{place}: needs chosen and rejected (it holds: {', '.join(row)})")
    chosen, rejected = (_messages(row[n], place, "assistant") for n in ("chosen", "rejected"))
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if len(chosen) == 1 and len(rejected) == 1:
        prompt = _prompt(row, place)
    else:  # whole conversations; what they share is the prompt
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    if not prompt:
        raise ValueError(f"{place}: chosen and rejected must be two answers to one prompt")
    found = (row.get(key) for key in ("score_chosen", "score_rejected"))
    scores = [float(score) for score in found if score is not None]
    margin = row.get("margin", scores[0] - scores[1] if len(scores) == 2 else 0.0)
    return Preference(prompt, chosen, rejected, float(margin), place, _tools(row, place))


def _ratings(row: dict[str, Any], place: str) -> list[Rated]:
    if "label" not in row:
        pair = _preference(row, place)
        return [
            Rated(pair.prompt, pair.chosen, True, place, pair.tools),
            Rated(pair.prompt, pair.rejected, False, place, pair.tools),
        ]
    if not isinstance(row["label"], (bool, int)):
        raise ValueError(f"{place}: label must be true or false, not {row['label']!r}")
    messages, _, tools = _dialogue(row, place)
    return [Rated(messages[:-1], messages[-1:], bool(row["label"]), place, tools)]


def _prompt(row: dict[str, Any], place: str) -> list[Message]:
    """Everything before the answer."""
    system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    for name in ("messages", "conversations", "prompt", "text"):
        if row.get(name):
            return system + _messages(row[name], place, "user")
    if row.get("instruction"):
        parts = [_text(row[name], place) for name in ("instruction", "input") if row.get(name)]
        return [*system, {"role": "user", "content": "\n\n".join(parts)}]
    raise ValueError(
        f"{place}: no messages, conversations, prompt or instruction (it holds: {', '.join(row)})"
    )


def _says(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _messages(value: Any, place: str, role: str) -> list[Message]:
    """Text by `role`, a transcript, one message, or a list of messages."""
    if isinstance(value, str):
        if TRANSCRIPT.match(value):
            return transcript(value, place)
        return [{"role": role, "content": _text(value, place)}]
    if isinstance(value, dict):
        return [_message(value, place)]
    if not isinstance(value, list) or not value:
        raise ValueError(f"{place}: a conversation must be text or a list, not {value!r:.40}")
    return [_message(message, place) for message in value]


def _message(message: Any, place: str) -> Message:
    if not isinstance(message, dict):
        raise ValueError(f"{place}: a message must be an object, not {message!r:.40}")
    said = str(message.get("role", message.get("from")))
    role = ROLES.get(said, said)
    if role not in KNOWN:
        raise ValueError(f"{place}: {role!r} is no role; use {', '.join(KNOWN)}")
    content = message.get("content", message.get("value"))
    calls = message.get("tool_calls")
    if calls:
        return {"role": role, "content": content or "", "tool_calls": calls}
    return {"role": role, "content": _text(content, place)}


def _text(value: Any, place: str) -> str:
    if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
        value = "".join(_part(part, place) for part in value)
    if not isinstance(value, str):
        raise ValueError(f"{place}: a message's content must be text, not {value!r:.40}")
    return value


def _part(part: dict[str, Any], place: str) -> str:
    """One of several parts of a message, such as {"type": "text", "text": …}."""
    kind, text = part.get("type", "text"), part.get("text", part.get("value"))
    if kind not in PARTS or not isinstance(text, str):
        raise ValueError(
            f"{place}: a message's part must be text of type {', '.join(PARTS)}, not {part!r:.60}"
        )
    return PARTS[kind].format(text)


def _json_rows(file: Path) -> Iterator[tuple[Any, str]]:
    text = documents.read_text(file)
    if text.lstrip().startswith("["):
        for number, row in enumerate(_parse(text, str(file)), 1):
            yield row, f"{file}, item {number}"
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield _parse(line, f"{file}, line {number}"), f"{file}, line {number}"


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{place}: not JSON ({error})") from None


def _parquet_rows(file: Path) -> Iterator[tuple[Any, str]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(file)
    except pa.ArrowException as error:
        raise ValueError(f"{file}: not a Parquet file ({error})") from None
    number = 0
    for batch in table.iter_batches():
        for row in batch.to_pylist():
            number += 1
            yield (
                {name: value for name, value in row.items() if value is not None},
                (f"{file}, row {number}"),
            )


def _hub_rows(name: str, split: str) -> Iterator[tuple[Any, str]]:
    from datasets import load_dataset

    repository, _, part = name.partition(":")
    try:
        loaded = load_dataset(repository, part or None, split=split)
    except Exception as error:  # no network, no such data set, no permission: dozens of kinds
        raise ValueError(
            f"data.path={name}: no such file or embedded task, and the Hub does not give a data "
            f"set of that name ({type(error).__name__}: {error})"
        ) from None
    for number, row in enumerate(loaded, 1):
        yield row, f"{name}, row {number}"
