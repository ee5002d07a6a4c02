# ruff: noqa: E501 (a row of data stands on a line)
"""Layouts of public data sets: what is read, what is named as not read, and what is refused."""

import json
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest

from jaxgpt import tasks
from jaxgpt.config import EvaluateConfig
from jaxgpt.data import conversations, documents
from jaxgpt.data.columns import COLUMNS, KNOWN, ROLES, Columns
from jaxgpt.evals import choice, exact_match, lambada, records

DATA = Path(__file__).parents[3] / "shared" / "data"
READERS = [
    conversations.dialogues,
    conversations.preferences,
    conversations.ratings,
    conversations.questions,
]


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def says(text: str) -> dict:
    return {"role": "assistant", "content": text}


def calls(*named: tuple[str, dict]) -> dict:
    made = [{"type": "function", "function": {"name": n, "arguments": a}} for n, a in named]
    return {"role": "assistant", "content": "", "tool_calls": made}


def file(tmp_path: Path, *rows: object) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def dialogue(tmp_path: Path, row: object, **options) -> list:
    columns = Columns(options.get("columns"), options.get("roles"))
    (found,) = conversations.dialogues(file(tmp_path, row), columns=columns)
    return found.messages


Q, A = user("Q"), says("A")
SYSTEM = {"role": "system", "content": "S"}
TURNS = [
    ("human", "Q"), ("function_call", '{"name": "f", "arguments": {"x": 1}}'),
    ("observation", "1.4"), ("gpt", "A"),
]  # fmt: skip
CALLED = [Q, calls(("f", {"x": 1})), {"role": "tool", "content": "1.4"}, A]

LAYOUTS = {
    "chatgpt": ({"conversations": [{"from": "human", "value": "Q"}, {"from": "chatgpt", "value": "A"}]}, [Q, A]),
    "bing": ({"conversation": [{"from": "User", "value": "Q"}, {"from": "bing", "value": "A"}]}, [Q, A]),
    "assistant opens": ({"conversations": [{"from": "gpt", "value": "A"}, {"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}, [A, Q, A]),
    "function call": ({"conversations": [{"from": f, "value": v} for f, v in TURNS]}, CALLED),
    "ms-swift's calls": ({"messages": [{"role": r, "content": c} for r, c in [("user", "Q"), ("tool_call", TURNS[1][1]), ("tool_call", '{"name": "g", "arguments": {}}'), ("tool_response", "1"), ("assistant", "A")]]}, [Q, calls(("f", {"x": 1}), ("g", {})), {"role": "tool", "content": "1"}, A]),
    "a call that is an object": ({"dialog": [{"role": "user", "content": "Q"}, {"role": "function_call", "content": {"name": "f", "arguments": {"x": 1}}}, {"role": "function", "content": {"t": 1.4}}, A]}, [*CALLED[:2], {"role": "tool", "content": '{"t": 1.4}'}, A]),
    "alpaca's history": ({"instruction": "Q", "input": "", "output": "A", "history": [["Q1", "A1"], ["Q2", "A2"]]}, [user("Q1"), says("A1"), user("Q2"), says("A2"), Q, A]),
    "ms-swift's history": ({"system": "S", "query": "Q", "response": "A", "history": [["Q1", "A1"]]}, [SYSTEM, user("Q1"), says("A1"), Q, A]),
    "history of messages": ({"prompt": "Q", "response": "A", "history": [user("Q1"), says("A1")]}, [user("Q1"), says("A1"), Q, A]),
    "history is null": ({"instruction": "Q", "output": "A", "history": None, "input": None}, [Q, A]),
    "dolly": ({"instruction": "Q", "context": "C", "response": "A", "category": "c"}, [user("Q\n\nC"), A]),
    "a question and its context": ({"context": "C", "question": "Q", "answer": "A"}, [user("Q\n\nC"), A]),
    "messages and their context": ({"messages": [Q, A], "context": "C"}, [user("Q\n\nC"), A]),
    "system prompt": ({"system_prompt": "S", "prompt": "Q", "response": "A"}, [SYSTEM, Q, A]),
    "system beside messages": ({"system": "S", "messages": [Q, A]}, [SYSTEM, Q, A]),
    "distilabel": ({"system": "S", "input": "Q", "chosen": "A", "rejected": "B"}, [SYSTEM, Q, A]),
    "ultrachat": ({"id": "0", "data": ["Q", "A", "Q2", "A2"]}, [Q, A, user("Q2"), says("A2")]),
    "pairs": ({"conversation": [{"human": "Q", "assistant": "A"}, {"human": "Q2", "assistant": "A2"}]}, [Q, A, user("Q2"), says("A2")]),
    "capybara": ({"conversation": [{"input": "Q", "output": "A"}]}, [Q, A]),
    "messages as text": ({"messages": json.dumps([Q, A])}, [Q, A]),
    "numeric answer": ({"question": "Q", "answer": 7}, [Q, says("7")]),
    "context and continuation": ({"context": "7*2=", "continuation": "14"}, [user("7*2="), says("14")]),
    "reasoning column": ({"question": "Q", "thinking": "T", "answer": "A"}, [Q, A | {"reasoning_content": "T"}]),
    "transcript": ({"text": "Human: Q\n\nAssistant: A"}, [Q, A]),
    "a transcript that is a prompt": ({"prompt": "\n\nHuman: Q\n\nAssistant:", "response": "A"}, [Q, A]),
    "openai's older call": ({"messages": [Q, {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}, {"role": "function", "name": "f", "content": "1"}, A]}, [Q, calls(("f", "{}")) | {"content": None}, {"role": "tool", "name": "f", "content": "1"}, A]),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_is_read_whole(name, tmp_path, capsys):
    row, messages = LAYOUTS[name]
    assert dialogue(tmp_path, row) == messages
    assert "warning" not in capsys.readouterr().err


def test_every_field_of_a_message_stays(tmp_path):
    said = [
        Q | {"name": "Ann", "extra": {"deep": [1, None]}},
        A | {"weight": 0, "reasoning_content": "T"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "c1", "type": "function",
         "function": {"name": "f", "arguments": '{"x": null}'}}]},
        {"role": "tool", "name": "f", "tool_call_id": "c1", "content": "1"},
        A | {"weight": 1, "thinking": "T"},
    ]  # fmt: skip
    assert dialogue(tmp_path, {"messages": said}) == said


@pytest.mark.parametrize("role", ROLES)
def test_every_role_that_data_sets_use_is_known(role, tmp_path):
    content = '{"name": "f", "arguments": {}}' if "call" in role else "text"
    turns = [Q, {"from": role.upper(), "value": content}, A]
    second = dialogue(tmp_path, {"messages": turns})[1]
    assert second["role"] in KNOWN[:-1] and ("tool_calls" in second) == ("call" in role)


PAIRS = {
    "orca": {"system": "S", "question": "Q", "chosen": "A", "rejected": "B"},
    "a null margin": {"system": "S", "prompt": "Q", "chosen": "A", "rejected": "B", "margin": None},
    "hh prompt": {"system": "S", "prompt": "\n\nHuman: Q\n\nAssistant:", "chosen": " A", "rejected": " B"},
    "pku": {"system": "S", "prompt": "Q", "response_0": "B", "response_1": "A", "better_response_id": 1},
    "ms-swift": {"system": "S", "query": "Q", "response": "A", "rejected_response": "B"},
    "ms-swift's messages": {"messages": [SYSTEM, Q, A], "rejected_response": "B"},
    "ultrafeedback": {"system": "S", "prompt": "Q", "chosen": [Q, A], "rejected": [Q, says("B")], "score_chosen": 3, "score_rejected": 3.0},
    "trl": {"prompt": [SYSTEM, Q], "chosen": [A], "rejected": [says("B")]},
    "argilla": {"system_prompt": "S", "instruction": "Q", "chosen_response": "A", "rejected_response": "B"},
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
def test_a_layout_of_pairs_is_read_whole(name, tmp_path, capsys):
    (pair,) = conversations.preferences(file(tmp_path, PAIRS[name]))
    assert pair[:4] == ([SYSTEM, Q], [A], [says("B")], 0.0)
    assert "warning" not in capsys.readouterr().err


def test_scores_and_margins_are_numbers(tmp_path):
    base = {"prompt": "Q", "chosen": "A", "rejected": "B"}
    more = [{"margin": 2}, {"score_chosen": 3, "score_rejected": 1.5}, {"score_chosen": 3}]
    found = conversations.preferences(file(tmp_path, *(base | m for m in more)))
    assert [pair.margin for pair in found] == [2, 1.5, 0]
    for wrong in ("1", True, [1], {"a": 1}):
        with pytest.raises(ValueError, match="line 1: margin must be a number"):
            list(conversations.preferences(file(tmp_path, base | {"margin": wrong})))


@pytest.mark.parametrize(
    ("label", "good"),
    [
        (True, True), (1, True), (1.0, True), ("true", True), ("good", True), ("1", True),
        ("Desirable", True), (False, False), (0, False), (0.0, False), ("false", False),
        ("bad", False), ("0", False), (-1, False), ("undesirable", False),
    ],
)  # fmt: skip
def test_labels(label, good, tmp_path):
    for row in ({"prompt": "Q", "completion": "A", "label": label},
                {"messages": [Q, A], "kto_tag": label}):  # fmt: skip
        (rated,) = conversations.ratings(file(tmp_path, row))
        assert rated[:3] == ([Q], [A], good)


@pytest.mark.parametrize("label", [0.5, 2, "perhaps", [True], {"a": 1}])
def test_what_is_no_label_is_refused(label, tmp_path):
    with pytest.raises(ValueError, match=r"rows.jsonl, line 1: label must be true or false"):
        list(
            conversations.ratings(
                file(tmp_path, {"prompt": "Q", "completion": "A", "label": label})
            )
        )


@pytest.mark.parametrize(
    ("answer", "text"),
    [(7, "7"), (7.0, "7"), (-0.5, "-0.5"), ("7 ", "7"), (10**20, "1" + "0" * 20)],
)
def test_numbers_are_answers(answer, text, tmp_path):
    (asked,) = conversations.questions(file(tmp_path, {"question": "Q", "answer": answer}))
    assert asked[:2] == ([Q], text)


def test_columns_and_roles_may_be_named(tmp_path, capsys):
    row = {"frage": "Q", "antwort": "A", "notiz": "N"}
    named = {"prompt": "frage", "answer": "antwort", "notiz": None}
    assert dialogue(tmp_path, row, columns=named) == [Q, A]
    assert "warning" not in capsys.readouterr().err
    row = {"faden": [{"role": "orakel", "content": "A"}], "prompt": "Q"}
    assert dialogue(
        tmp_path, row, columns={"messages": "faden", "prompt": None}, roles={"orakel": "gpt"}
    ) == [A]
    # What is named goes before what is only known by its name.
    row = {"messages": [user("no"), says("no")], "question": "Q", "output": "no", "reply": "A"}
    assert dialogue(tmp_path, row, columns={"prompt": "question", "output": "reply"}) == [Q, A]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"columns": {"prompt": "questoin"}}, "no row has 'questoin'.*did you mean 'question'"),
        ({"columns": {"promt": "question"}}, "'promt' is nothing that is read.*mean 'prompt'"),
        ({"roles": {"bot": "asistant"}}, "'asistant' is no role.*did you mean 'assistant'"),
    ],
)  # fmt: skip
def test_a_wrong_name_is_met_with_the_nearest(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        dialogue(tmp_path, {"question": "Q", "answer": "A"}, **options)
    with pytest.raises(ValueError, match=message):
        dialogue(tmp_path, {"question": "Q"}, **options)


def test_an_unknown_role_is_met_with_the_nearest_and_the_setting(tmp_path):
    row = {"messages": [Q, {"role": "asistant", "content": "A"}]}
    with pytest.raises(
        ValueError, match=r"line 1: 'asistant' is no role; did you mean 'assistant'.*data.roles"
    ):
        dialogue(tmp_path, row)


def test_columns_are_accounted_for_by_name_and_share(tmp_path, capsys):
    rows = [{"prompt": "Q", "response": "A", "id": n, "empty": None} for n in range(3)]
    rows += [{"prompt": "Q", "response": "A", "notes": "N"}]
    list(conversations.dialogues(file(tmp_path, *rows)))
    summary, warning = capsys.readouterr().err.splitlines()
    assert summary.endswith(
        "4 rows; columns read: prompt, response; not read: id (75 %), notes (25 %); "
        "always empty: empty"
    )
    assert (
        warning.startswith("warning: ")
        and "notes (25 %)" in warning
        and "id" not in warning.split(":")[2]
    )
    assert """--data.columns '{"notes": null}'""" in warning


def test_a_column_that_repeats_what_was_read_is_no_loss(tmp_path, capsys):
    row = {"prompt": "Q", "messages": [Q, A], "chosen": [Q, A], "rejected": [Q, says("B")]}
    list(conversations.preferences(file(tmp_path, row)))
    assert "not read" not in capsys.readouterr().err


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from(["\n\nHuman: Q\n\nAssistant:", '{"name": "f"}', "[1]", *ROLES]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["role", "from", "content", "value", "tool_calls", "function_call", "name",
                         "type", "text", "weight"]) | st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from([*ROLES, "poet"]), "content": st.text(max_size=5) | JSON},
    optional={"weight": JSON, "tool_calls": JSON, "name": JSON, "reasoning_content": JSON},
)
ROWS = st.dictionaries(
    st.sampled_from([name for columns in COLUMNS.values() for name in columns]) | st.text(max_size=4),
    JSON | st.text(min_size=1, max_size=5) | st.lists(MESSAGE, max_size=4),
    max_size=6,
)  # fmt: skip


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(st.lists(ROWS, min_size=1, max_size=3))
def test_any_object_is_a_row_or_one_line_with_its_place(tmp_path_factory, table):
    path = file(tmp_path_factory.getbasetemp(), *table)
    for read in READERS:
        try:
            found = list(read(path))
        except ValueError as error:
            assert f"{path}, " in str(error)
        else:
            places = {one.where for one in found}
            # One object alone may hold the rows, as {"data": [...]}.
            assert len(table) == 1 or places == {f"{path}, line {n + 1}" for n in range(len(table))}


@pytest.mark.skipif(not DATA.exists(), reason="../shared/data is not here")
@pytest.mark.parametrize(
    "path",
    [f"{kind}/{p.name}" for kind in ("sft", "preference", "tools", "reasoning") for p in sorted((DATA / kind).glob("*"))],
)  # fmt: skip
def test_the_summary_of_real_files_accounts_for_every_row_and_column(path, capsys):
    from jaxgpt.data import rows

    table = [row for row, _ in rows.read(str(DATA / path))]
    read = conversations.dialogues
    if path.startswith("preference"):
        read = conversations.ratings if "kto" in path else conversations.preferences
    columns = Columns()
    found = list(read(str(DATA / path), columns=columns))
    assert len(found) == len(table) == columns.rows
    assert columns.seen.keys() == {name for row in table for name in row}
    summary = capsys.readouterr().err.splitlines()[0]
    assert f"{len(table):,} rows" in summary and all(name in summary for name in columns.seen)
    assert set(columns.unread) <= {"example_input"}


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(
    st.lists(
        st.dictionaries(
            st.sampled_from(
                [
                    "text",
                    "id",
                    "question",
                    "answer",
                    "query",
                    "choices",
                    "gold",
                    "context",
                    "continuation",
                ]
            )
            | st.text(max_size=3),
            JSON,
            max_size=5,
        ),
        min_size=1,
        max_size=3,
    )
)
def test_any_object_is_text_an_item_a_question_or_one_line_with_its_place(tmp_path_factory, table):
    path = file(tmp_path_factory.getbasetemp(), *table)

    def text(path):
        corpus = documents.Corpus((path,), val_fraction=0.0)
        pieces = list(corpus.pieces())
        assert len(pieces) == corpus.found.rows - corpus.found.empty

    readers = [
        text,
        tasks.read_rows,
        lambda path: [choice.local(row, place) for place, row in records.read_rows(Path(path))],
    ]
    readers += [
        lambda path, task=task: task(None, EvaluateConfig("x", "gsm8k", path), Path(path))
        for task in (exact_match.read_gsm8k, exact_match.read_arithmetic, lambada.read)
    ]
    for read in readers:
        try:
            read(path)
        except ValueError as error:
            assert path in str(error) or str(error).startswith("data.path: 1 of 1 answers")
