"""A server of a real model: what a harness finds through it, and the memory that it takes."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
import smollm2
from serving import ROOT, running

import jaxgpt
from jaxgpt import evals
from jaxgpt.config import EvaluateConfig

DATA = Path(__file__).parents[3] / "shared" / "data" / "eval" / "hellaswag_val_full.txt.bz2"
ITEMS = 100
TIE = 2e-3  # float32 sums of up to a hundred tokens, added up in another order
TASK = """
task: mine
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{query}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{gold}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def test_the_harness_decides_as_our_own_command_item_by_item(tmp_path):
    lm_eval = pytest.importorskip("lm_eval", reason="the reference extra is not installed")
    for needed in ("torch", "tenacity"):
        pytest.importorskip(needed, reason="the reference extra is not installed")
    if not DATA.exists():
        pytest.skip("no shared data")
    checkpoint = smollm2.gguf()
    subprocess.run(
        [sys.executable, "scripts/evaluate.py", "--checkpoint", checkpoint, "--task", "hellaswag",
         "--data", DATA, "--limit", str(ITEMS), "--output", tmp_path / "ours.jsonl"],
        cwd=ROOT, check=True, env={**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""},
    )  # fmt: skip
    results = list(map(json.loads, (tmp_path / "ours.jsonl").read_text().splitlines()))[1:]
    ours = {result["index"]: result for result in results}
    lm = jaxgpt.load(checkpoint)
    lm.save(tmp_path / "hf")  # the harness brings its own tokenizer
    cfg = EvaluateConfig(checkpoint="", task="hellaswag", data=str(DATA))
    items = evals.TASKS["hellaswag"].read(lm, cfg, DATA)[:ITEMS]
    data = tmp_path / "items.jsonl"
    data.write_text("".join(
        json.dumps({"query": item.contexts[0], "choices": item.endings, "gold": item.gold}) + "\n"
        for item in items
    ))  # fmt: skip
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "mine.yaml").write_text(TASK.format(data=data))

    from lm_eval.tasks import TaskManager

    with running("--checkpoint", str(checkpoint), "--context", "512", "--queue", "1000") as (
        address,
        _,
    ):
        found = lm_eval.simple_evaluate(
            "local-completions",
            model_args={
                "model": checkpoint.name, "base_url": f"{address}/v1/completions",
                "tokenizer_backend": "huggingface", "tokenizer": str(tmp_path / "hf"),
                "num_concurrent": 8, "max_length": 512,
            },
            tasks=["mine"], log_samples=True, bootstrap_iters=0,
            task_manager=TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False),
        )  # fmt: skip
    assert found is not None
    samples = {sample["doc_id"]: sample for sample in found["samples"]["mine"]}
    assert len(samples) == len(ours) == ITEMS
    for number, sample in samples.items():
        theirs = [float(answer[0][0]) for answer in sample["resps"]]
        assert theirs == pytest.approx(ours[number]["logprobs"], abs=TIE), number
        lengths = [len(ending) for ending in items[number].endings]
        normed = [p / n for p, n in zip(theirs, lengths, strict=True)]
        for name, values in (("choice", theirs), ("choice_norm", normed)):
            assert values.index(max(values)) == ours[number][name], (number, name)
        right = [ours[number][name] == ours[number]["gold"] for name in ("choice", "choice_norm")]
        assert [sample["acc"], sample["acc_norm"]] == list(map(float, right))


def test_the_memory_is_that_of_weights_and_slots():
    checkpoint = str(smollm2.gguf())
    planned = subprocess.run(
        [sys.executable, "scripts/plan.py", "--serve", "--checkpoint", checkpoint],
        cwd=ROOT, check=True, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""},
    )  # fmt: skip
    plan = json.loads(planned.stdout.splitlines()[-1])
    slots = plan["slots"] * (plan["slot_bytes"] + plan["context"] * plan["token_bytes"])
    context = str(plan["context"])
    with running("--checkpoint", checkpoint, "--context", context) as (address, process):

        def ask(number: int) -> int:
            body = {"prompt": "word " * (100 + number), "max_tokens": 16}
            return httpx.post(f"{address}/v1/completions", json=body, timeout=600).status_code

        with ThreadPoolExecutor(8) as pool:
            assert set(pool.map(ask, range(16))) == {200}
        found = psutil.Process(process.pid).memory_info().rss
    assert found < 1.3 * (plan["weights_bytes"] + slots)
    assert found < plan["total_bytes"]
