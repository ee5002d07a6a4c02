"""GSM8K's rows as conversations, its calculator calls as text or as turns."""

import itertools
import json
from pathlib import Path

import pytest

from jaxgpt import tasks
from jaxgpt.config import ChatDataConfig
from jaxgpt.data import chat, conversations, tuning
from jaxgpt.data import tokenizer as tokenizers
from jaxgpt.tasks import tools, verify

ROW = {
    "question": "Ann needs 48 halves?",
    "answer": "She needs 48/2 = <<48/2=24>>24 wholes.\nAll: <<24+1=25>>25\n#### 25",
}
DATA = Path(__file__).parents[3] / "shared" / "data" / "reasoning" / "gsm8k_train.jsonl"


def read(tmp_path: Path, *rows: object, calls: str = "text") -> list[tuple[str, str]]:
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    cfg = ChatDataConfig(path=str(file), calls=calls, val_fraction=0.0)  # type: ignore[arg-type]
    train, held_out = tuning.dialogues(cfg)
    assert not held_out
    return [(m["role"], m["content"]) for m in train[0].messages]


def test_calls_stay_text(tmp_path: Path) -> None:
    assert read(tmp_path, ROW) == [("user", ROW["question"]), ("assistant", ROW["answer"])]


def test_calls_become_turns_of_the_tool(tmp_path: Path) -> None:
    assert read(tmp_path, ROW, calls="turns") == [
        ("user", ROW["question"]),
        ("assistant", "She needs 48/2 = calculator(48/2)"),
        ("tool", "24"),
        ("assistant", "24 wholes.\nAll: calculator(24+1)"),
        ("tool", "25"),
        ("assistant", "25\n#### 25"),
    ]


def test_what_the_tool_said_is_no_target(tmp_path: Path) -> None:
    messages = [{"role": r, "content": c} for r, c in read(tmp_path, ROW, calls="turns")]
    form = chat.find_format("chatml", None, tokenizers.load("byte"))
    (encoded,) = chat.encode(form, messages)
    learned = form.tokenizer.decode(encoded.tokens_T[encoded.target_T].tolist())
    assert learned == "".join(
        f"{m['content']}<|im_end|>" for m in messages if m["role"] == "assistant"
    )


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"question": "a", "answer": ""}, "nothing is said by the assistant"),
        ({"question": 1, "answer": "b"}, "a conversation must be text or a list, not 1"),
    ],
)
def test_a_bad_row_is_named(row: dict, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"line 1: {reason}"):
        read(tmp_path, row)


def test_a_part_of_a_hub_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name, part, split, **_):
        asked.append((name, part, split))
        return [ROW]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    for path in ("openai/gsm8k:main", "some/set"):
        assert [d.where for d in conversations.dialogues(path)] == [f"{path}, row 1"]
    assert asked == [("openai/gsm8k", "main", "train"), ("some/set", None, "train")]


@pytest.mark.skipif(not DATA.exists(), reason="../shared/data is not here")
def test_the_real_rows_agree_with_our_calculator_and_judge(tmp_path: Path) -> None:
    file = tmp_path / "some.jsonl"
    file.write_text("\n".join(DATA.read_text().splitlines()[:1000]))
    assert all(verify.value(row.answer) is not None for row in tasks.read_rows(str(file)))
    right = calls = 0
    for dialogue in conversations.dialogues(str(file)):
        answer = dialogue.messages[-1]["content"]
        assert verify.accuracy(answer, verify.stated(answer) or "") == 1.0
        turns = conversations.with_calls(dialogue).messages
        for call, result in itertools.pairwise(turns):
            if result["role"] == "tool":
                calls += 1
                right += verify.same(
                    tools.observe(call["content"], ["calculator"]), result["content"]
                )
    assert calls > 2500 and calls - right <= 2  # two of all 23,716 write //
