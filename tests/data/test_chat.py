"""Templates, targets, readers, and rows of conversations."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from jaxgpt.config import ConversationConfig
from jaxgpt.data import chat, conversations, engines, examples, tuning
from jaxgpt.data import tokenizer as tokenizers
from jaxgpt.data.chat import Encoded, Format
from jaxgpt.data.examples import Examples, Tally

BYTES = tokenizers.load("byte")
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "add(1, 1)"},
    {"role": "tool", "content": "2"},
    {"role": "assistant", "content": "It is 2."},
]
CHATML = """<|im_start|>system
Be brief.<|im_end|>
<|im_start|>user
Two?<|im_end|>
<|im_start|>assistant
[add(1, 1)<|im_end|>]
<|im_start|>tool
2<|im_end|>
<|im_start|>assistant
[It is 2.<|im_end|>]
"""
PLAIN = """### System:
Be brief.<|endoftext|>

### User:
Two?<|endoftext|>

### Assistant:
[add(1, 1)<|endoftext|>]

### Tool:
2<|endoftext|>

### Assistant:
[It is 2.<|endoftext|>]

"""
LLAMA3 = """<s><|start_header_id|>system<|end_header_id|>

Be brief.<|eot_id|><|start_header_id|>user<|end_header_id|>

Two?<|eot_id|><|start_header_id|>assistant<|end_header_id|>

[add(1, 1)<|eot_id|>]<|start_header_id|>tool<|end_header_id|>

2<|eot_id|><|start_header_id|>assistant<|end_header_id|>

[It is 2.<|eot_id|>]"""


def llama3_bytes() -> tokenizers.Tokenizer:
    """Bytes with Llama 3's special tokens."""
    special = ("<s>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>")
    ranks = {bytes([b]): b for b in range(256)}
    numbered = {text: 256 + i for i, text in enumerate(special)}
    return engines.bpe(r"[\s\S]", ranks, numbered)


def encode(form: Format, messages, **options) -> Encoded:
    """The only example of a conversation."""
    (example,) = chat.encode(form, messages, **options)
    return example


def marked(form: Format, encoded: Encoded) -> str:
    """The text with brackets around what is to be learned."""
    out, inside = "", False
    for token, target in zip(encoded.tokens_T, encoded.target_T, strict=True):
        if target != inside:
            out, inside = out + ("[" if target else "]"), bool(target)
        out += form.tokenizer.decode([int(token)])
    return out + ("]" if inside else "")


@pytest.mark.parametrize(
    ("name", "expected"), [("chatml", CHATML), ("plain", PLAIN), ("llama3", LLAMA3)]
)
def test_targets_are_what_the_assistant_says_and_its_end(name: str, expected: str) -> None:
    tokenizer = llama3_bytes() if name == "llama3" else BYTES
    form = chat.find_format(name, None, tokenizer, bos_token="<s>")
    assert marked(form, encode(form, TALK)) == expected


def test_a_models_own_template_comes_before_ours() -> None:
    own = "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
    own += "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
    form = chat.find_format("", own, BYTES)
    text = marked(form, encode(form, TALK[1:3]))
    assert text == "<|im_start|>user: Two?<|im_end|><|im_start|>assistant: [add(1, 1)<|im_end|>]"


def test_what_is_prompted_is_how_the_training_example_begins() -> None:
    form = chat.find_format("", None, BYTES)
    whole = encode(form, TALK)
    start = int(np.flatnonzero(whole.target_T)[-1]) - len("It is 2.")
    assert whole.tokens_T[:start].tolist() == chat.prompt(form, TALK[:4])


def test_both_answers_to_a_prompt_share_its_tokens() -> None:
    form = chat.find_format("", None, BYTES)
    arms = [
        encode(form, [*TALK[:4], {"role": "assistant", "content": text}], learn_from=4)
        for text in ("2", " 2, I think")
    ]
    first = [int(np.flatnonzero(arm.target_T)[0]) for arm in arms]
    assert first[0] == first[1]
    assert (arms[0].tokens_T[: first[0]] == arms[1].tokens_T[: first[0]]).all()


def test_special_tokens_that_a_user_types_stay_text() -> None:
    form = chat.find_format("", None, BYTES)
    said = [{"role": "user", "content": "a<|im_end|>b"}, TALK[2]]
    tokens = encode(form, said).tokens_T.tolist()
    assert tokens.count(BYTES.special["<|im_end|>"]) == 2
    assert "a<|im_end|>b" in BYTES.decode(tokens)


def test_a_template_that_rewrites_earlier_turns_gives_an_example_a_turn() -> None:
    forgetful = "{% for m in messages %}{% if loop.last or m.role == 'user' %}{{ m.content }}"
    forgetful += "<|im_end|>{% endif %}{% endfor %}"
    form = chat.find_format("", forgetful, BYTES)
    assert [marked(form, example) for example in chat.encode(form, TALK)] == [
        "Two?<|im_end|>[add(1, 1)<|im_end|>]",
        "Two?<|im_end|>2<|im_end|>[It is 2.<|im_end|>]",
    ]


def test_a_template_without_an_end_of_turn_is_refused() -> None:
    endless = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    endless += "{% if add_generation_prompt %}assistant: {% endif %}"
    with pytest.raises(ValueError, match="never learn to stop"):
        _ = chat.find_format("", endless, BYTES).end_of_turn


def test_a_template_is_refused_by_a_vocabulary_without_its_tokens() -> None:
    with pytest.raises(ValueError, match=r"no <\|start_header_id\|>"):
        chat.find_format("llama3", None, BYTES)


OPENAI = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
ROWS = {
    "openai": {"messages": OPENAI},
    "sharegpt": {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
    "alpaca": {"instruction": "Q", "input": "", "output": "A"},
    "prompt": {"prompt": "Q", "completion": "A"},
    "hh": {"text": "\n\nHuman: Q\n\nAssistant: A"},
    "chosen": {"prompt": "Q", "chosen": "A", "rejected": "B"},
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("form", ["jsonl", "json", "jsonl.gz", "parquet"])
def test_every_shape_of_conversation_is_read(name: str, form: str, tmp_path: Path) -> None:
    file, row = tmp_path / f"data.{form}", ROWS[name]
    if form == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist([row]), file)
    elif form == "jsonl.gz":
        file.write_bytes(gzip.compress(json.dumps(row).encode()))
    else:
        file.write_text(json.dumps([row] if form == "json" else row))
    (found,) = conversations.dialogues(str(file))
    assert [(m["role"], m["content"]) for m in found.messages] == [
        ("user", "Q"),
        ("assistant", "A"),
    ]


CALLING = '{"name": "f", "arguments": {}}'


def test_the_parts_of_a_message_are_its_text_its_thought_and_its_calls(tmp_path: Path) -> None:
    part = lambda kind, text, name="text": {"type": kind, name: text}
    row = {
        "messages": [
            {"role": "user", "content": [part("text", "What "), part("text", "time?", "value")]},
            {
                "role": "assistant",
                "content": [
                    part("reasoning", "Ask.", "value"),
                    part("tool_call", CALLING, "value"),
                ],
            },
        ]
    }
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps(row))
    (found,) = conversations.dialogues(str(file))
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    assert found.messages == [
        {"role": "user", "content": "What time?"},
        {"role": "assistant", "content": None, "reasoning_content": "Ask.", "tool_calls": [call]},
    ]
    row["messages"][0]["content"] = [{"type": "image_url", "image_url": "x.png"}]
    file.write_text(json.dumps(row))
    with pytest.raises(ValueError, match=r"data.jsonl, line 1: a message's part must be text"):
        list(conversations.dialogues(str(file)))


def test_a_template_that_leaves_out_calls_is_refused() -> None:
    call = {"type": "function", "function": {"name": "clock", "arguments": "{}"}}
    said = [OPENAI[0], {"role": "assistant", "content": "", "tool_calls": [call]}]
    with pytest.raises(ValueError, match=r"does not write the assistant's tool_calls \(of clock\)"):
        chat.encode(chat.find_format("", LEAVES_OUT_CALLS, BYTES), said)


LEAVES_OUT_CALLS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("name", chat.TEMPLATES)
@pytest.mark.parametrize("content", ["", "Look."])
def test_our_templates_write_calls(name: str, content: str) -> None:
    made = [{"function": {"name": n, "arguments": {"at": n}}} for n in ("clock", "sun")]
    said = [OPENAI[0], {"role": "assistant", "content": content, "tool_calls": made}]
    form = chat.Format(chat.TEMPLATES[name], BYTES, {"bos_token": "", "eos_token": "<|im_end|>"})
    encoded = encode(form, said)
    assert BYTES.decode(encoded.tokens_T[encoded.target_T].tolist()).startswith(
        content
        + "\n" * bool(content)
        + '<tool_call>\n{"name": "clock", "arguments": {"at": "clock"}}'
        '\n</tool_call>\n<tool_call>\n{"name": "sun", "arguments": {"at": "sun"}}\n</tool_call><|'
    )


def test_the_tools_of_a_row_reach_the_template(tmp_path: Path) -> None:
    tools = [{"name": "clock", "description": "The time."}]
    file = tmp_path / "data.jsonl"
    file.write_text(
        "".join(
            json.dumps({"messages": OPENAI, "tools": t}) + "\n" for t in (tools, json.dumps(tools))
        )
    )
    lists = "{% if tools %}{{ tools | tojson }}\n{% endif %}" + chat.CHATML
    form = chat.find_format("", lists, BYTES)
    first, second = conversations.dialogues(str(file))
    for found in (first, second):
        encoded = encode(form, found.messages, tools=found.tools)
        text = BYTES.decode(encoded.tokens_T.tolist())
        assert text.startswith(json.dumps(tools))
        assert not encoded.target_T[: len(json.dumps(tools))].any()
    pair = {"prompt": "Q", "chosen": "A", "rejected": "B", "tools": tools}
    file.write_text(json.dumps(pair))
    (preferred,), rated = conversations.preferences(str(file)), conversations.ratings(str(file))
    assert [one.tools for one in (preferred, *rated)] == [tools] * 3
    splits = tuning.pairs(ConversationConfig(path=str(file), val_fraction=0), form, 200, 1, 0)
    shown = BYTES.decode(splits[0].items[0][1][0].tokens_T.tolist())
    assert shown.startswith(json.dumps(tools)) and "B<|im_end|>" in shown
    file.write_text(json.dumps({"messages": OPENAI, "tools": "[clock"}))
    with pytest.raises(ValueError, match=r"data.jsonl, line 1: tools is no JSON"):
        list(conversations.dialogues(str(file)))


PAIRS = {
    "prompt": {"prompt": "Q", "chosen": "A", "rejected": "B"},
    "hh": {"chosen": "\n\nHuman: Q\n\nAssistant: A", "rejected": "\n\nHuman: Q\n\nAssistant: B"},
    "messages": {
        "prompt": [{"role": "user", "content": "Q"}],
        "chosen": [{"role": "assistant", "content": "A"}],
        "rejected": [{"role": "assistant", "content": "B"}],
    },
    "whole": {
        "chosen": OPENAI,
        "rejected": [OPENAI[0], {"role": "assistant", "content": "B"}],
    },
    "sharegpt": {
        "conversations": [{"from": "human", "value": "Q"}],
        "chosen": {"from": "gpt", "value": "A"},
        "rejected": {"from": "gpt", "value": "B"},
    },
    "alpaca": {"instruction": "Q", "output": "A", "chosen": "A", "rejected": "B"},
}


@pytest.mark.parametrize("name", PAIRS)
def test_every_shape_of_preference_is_read(name: str, tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps(PAIRS[name]))
    (pair,) = conversations.preferences(str(file))
    said = [[m["content"] for m in part] for part in (pair.prompt, pair.chosen, pair.rejected)]
    assert said == [["Q"], ["A"], ["B"]]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: must be an object"),
        ('{"question": "Q"}', "line 2: nothing is said"),
        ('{"messages": [{"role": "poet", "content": "Q"}]}', "line 2: 'poet' is no role"),
        ('{"messages": [{"role": "user", "content": 3}]}', "line 2: a message's content"),
        ('{"prompt": "Q"}', "line 2: nothing is said by the assistant"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(line: str, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps(ROWS["alpaca"]) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=f"data.jsonl, {reason}"):
        list(conversations.dialogues(str(file)))


def sentence(length: int, first: int = 1) -> Encoded:
    """Tokens first, first + 1, …, of which the second half are targets."""
    tokens_T = np.arange(first, first + length, dtype=np.int32)
    return Encoded(tokens_T, np.arange(length) >= length // 2, np.full(length, 4, np.int8))


def test_packed_rows_restart_and_never_ask_for_the_next_example() -> None:
    row = examples.fill([sentence(4, 10), sentence(3, 20)], 8)
    assert row["tokens"].tolist() == [10, 11, 12, 20, 21, 0, 0, 0]
    assert row["targets"].tolist() == [11, 12, 13, 21, 22, 0, 0, 0]
    assert row["mask"].tolist() == [0, 1, 1, 1, 1, 0, 0, 0]
    assert row["segments"].tolist() == [1, 1, 1, 2, 2, 0, 0, 0]
    assert row["positions"].tolist() == [0, 1, 2, 0, 1, 0, 0, 0]


def test_the_tally_tells_what_became_of_the_rows() -> None:
    tally = Tally()
    for length, truncate in ((5, True), (30, True), (14, True), (30, False)):
        examples.fit([sentence(length)], 8, truncate, tally)
    assert tally.used == 2 and tally.truncated == 1
    assert str(tally) == (
        "2 used, 1 truncated, 2 dropped, 1 without a target in the first 8 tokens, "
        "1 longer than 8 tokens"
    )


def test_every_example_comes_once_an_epoch_in_another_order_each_time() -> None:
    rows = Examples([([sentence(3, i)],) for i in range(10)], 8, 5, seed=1)
    seen = [rows.rows(step, np.arange(5))["tokens"][:, 0] for step in range(4)]
    epochs = [np.concatenate(seen[:2]).tolist(), np.concatenate(seen[2:]).tolist()]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(10))
    assert epochs[0] != epochs[1]


def test_rows_do_not_depend_on_which_process_asks() -> None:
    items = [([sentence(3 + i % 90, i)],) for i in range(30)]
    rows = Examples(items, 128, 8, seed=3)
    whole = rows.rows(5, np.arange(8))
    for part in (np.arange(4), np.arange(4, 8)):
        for name, array in rows.rows(5, part).items():
            np.testing.assert_array_equal(array, whole[name][part])


def test_held_out_rows_come_once_and_the_rest_is_empty() -> None:
    rows = Examples([([sentence(3, 1 + i)],) for i in range(7)], 8, 4)
    batches = [rows.held_out(index, np.arange(4)) for index in range(rows.num_held_out())]
    first = np.concatenate([batch["tokens"][:, 0] for batch in batches])
    assert first.tolist() == [1, 2, 3, 4, 5, 6, 7, 0]
    assert batches[-1]["mask"][-1].sum() == 0
