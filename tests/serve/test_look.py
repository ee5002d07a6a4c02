"""What the page draws and asks for: numbers as the library gives them, whatever the text holds."""

import asyncio
import base64
import gzip
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

pytest.importorskip("starlette", reason="the serve extra is not installed")

from jaxgpt.checkpoint import Checkpoints
from jaxgpt.config import ModelConfig
from jaxgpt.convert.load import Loaded, own_files
from jaxgpt.data import tokenizer as tokenizers
from jaxgpt.language_model import LanguageModel
from jaxgpt.model import gpt
from jaxgpt.serve import drawing, look
from jaxgpt.serve.engine import COMPILED
from jaxgpt.serve.fields import Refused

ROOT = Path(__file__).parents[2]
TEXT = "a </script> naïve <b>"


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    """A random mixture of experts that reads bytes."""
    path = tmp_path_factory.mktemp("bytes") / "tokenizer.json"
    tokenizers.load("byte").save(path)
    files = own_files({"tokenizer.json": path.read_bytes()})
    template = json.loads(files["tokenizer_config.json"])["chat_template"]
    tokenizer = tokenizers.load(path)
    cfg = ModelConfig(
        vocab_size=260, context_length=64, num_layers=2, model_dim=16, num_heads=4, num_kv_heads=2,
        mlp_dim=24, num_experts=3, experts_per_token=2,
    )  # fmt: skip
    params = jax.tree.map(lambda x: 4 * x, gpt.init(cfg, jax.random.key(1)))
    stops = (tokenizer.eos_id,)
    return LanguageModel(Loaded(cfg, params, tokenizer, template, (), stops, files), "random")


@pytest.fixture
def server(lm, tmp_path, monkeypatch):
    """A served model without an engine, beside a run that is training."""
    monkeypatch.chdir(tmp_path)
    made = SimpleNamespace(
        cfg=SimpleNamespace(checkpoint="random.gguf"), lm=lm, name="random", models={"random": 0},
        engine=SimpleNamespace(capacity=64, mesh=None),
    )  # fmt: skip
    made.looker = look.Looker(made)  # type: ignore[arg-type]
    return made


def ask(server, path, **body):
    """The answer of one request."""
    reply = asyncio.run(look.ROUTES[path](server, None, body))  # type: ignore[arg-type]
    return json.loads(reply.body)


def unpacked(text, heads, size):
    """[heads, size, size], as the page reads it."""
    codes = np.frombuffer(gzip.decompress(base64.b64decode(text)), np.uint8)
    found = np.zeros((heads, size, size))
    rows, columns = np.tril_indices(size)
    found[:, rows, columns] = (codes.reshape(heads, -1) / 255) ** 2
    return found


def test_a_view_holds_the_models_own_numbers(server, lm):
    found = lm.inspect(TEXT, temperature=0.5, top_p=0.5)
    drawn = ask(server, "/look", text=TEXT, temperature=0.5, top_p=0.5)["first"]
    assert drawn["tokens"] == found.tokens_T.tolist() and drawn["texts"] == found.texts
    assert drawn["p"][0] is None and drawn["model"] == "random"
    np.testing.assert_allclose(drawn["p"][1:], np.exp(found.token_logprobs_T[1:]), rtol=1e-4)
    best = int(found.logprobs_TV[3].argmax())
    token, before, after = drawn["top"][3][0]
    assert token == best and before < after  # what is left shares what was cut
    assert before == pytest.approx(np.exp(found.logprobs_TV[3, best]), rel=1e-4)
    assert after == pytest.approx(np.exp(found.truncated_TV[3, best]), rel=1e-4)
    assert drawn["expert"] == found.expert_LTJ.tolist()
    np.testing.assert_allclose(drawn["gate"], found.gate_LTJ, rtol=1e-4)


def test_layers_are_sent_as_they_are(server, lm):
    found = lm.inspect(TEXT)
    sent = ask(server, "/look/attention", text=TEXT, layer=1)["weights"]
    np.testing.assert_allclose(
        unpacked(sent, 4, len(found.tokens_T)), found.attention(1), atol=0.005
    )
    lens = ask(server, "/look/lens", text=TEXT)
    ids_ATC = np.array(lens["ids"])
    assert ids_ATC[..., 0].tolist() == found.lens_ATV.argmax(-1).tolist()
    scores = ask(server, "/look/heads")["scores"]
    np.testing.assert_allclose(scores, lm.induction_scores(), atol=1e-3)


def test_tokens_and_messages_are_read_too(server, lm):
    said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    found = ask(server, "/look", messages=said)["first"]
    assert found["tokens"] == lm.inspect(said).tokens_T.tolist()
    assert ask(server, "/look", tokens=found["tokens"])["first"]["p"] == found["p"]


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/look", {}, "give one of"),
        ("/look", {"text": "a", "tokens": [1]}, "give one of"),
        ("/look", {"text": "x" * 65}, "has 65 tokens"),
        ("/look", {"tokens": [999]}, "vocab_size"),
        ("/look", {"text": "a", "model": "run:../../etc"}, "neither served nor a run"),
        ("/look", {"text": "a", "against": "gone"}, "model=gone"),
        ("/look", {"text": "a", "depth": 1}, "depth"),
        ("/look/attention", {"text": "a", "layer": 2}, "the model has 2"),
        ("/look/run", {"name": "../x"}, "no such run"),
        ("/look/tool", {"name": "shell"}, "name"),
    ],
)
def test_what_cannot_be_shown_is_refused_by_name(server, path, body, message):
    with pytest.raises((Refused, ValueError), match=message):
        ask(server, path, **body)


def test_a_run_in_training_is_listed_followed_and_opened(server, lm, tmp_path):
    lm.save(tmp_path / "runs" / "mine", "jaxgpt")
    log = tmp_path / "runs" / "mine" / "metrics.jsonl"
    log.write_text('{"step": 1, "train/loss": 3.5}\n{"step": 2, "val/l')
    (run,) = ask(server, "/look/about")["runs"]
    assert (run["name"], run["step"], run["loss"], run["live"]) == ("mine", 1, 3.5, True)
    first = ask(server, "/look/run", name="mine")
    assert [record["step"] for record in first["records"]] == [1]
    with log.open("a") as file:
        file.write('oss": 3.25}\n')
    then = ask(server, "/look/run", name="mine", offset=first["offset"])
    assert then["records"] == [{"step": 2, "val/loss": 3.25}] and not then["restarted"]
    log.write_text('{"step": 1, "train/loss": 4.0}\n')
    again = ask(server, "/look/run", name="mine", offset=then["offset"])
    assert again["restarted"] and again["records"][0]["train/loss"] == 4.0

    opened = ask(server, "/look", text=TEXT, model="run:mine")["first"]
    assert opened["p"] == ask(server, "/look", text=TEXT)["first"]["p"]
    params = jax.tree.map(lambda x: x * 1.1, lm.params)
    checkpoints = Checkpoints(tmp_path / "runs" / "mine" / "checkpoints")
    checkpoints.save(7, {"params": {"policy": params}}, meta={})
    checkpoints.wait()
    beside = ask(server, "/look", text=TEXT, against="run:mine")
    assert beside["second"]["p"] != opened["p"]  # its newest weights
    differences = np.array(beside["comparison"]["second"][1:], float)
    expected = LanguageModel(Loaded(lm.config, params, lm.tokenizer), "x").inspect(TEXT)
    np.testing.assert_allclose(differences, expected.token_logprobs_T[1:], atol=1e-3)
    wrote = ask(server, "/look/write", model="run:mine", prompt="a", max_tokens=4, temperature=0)
    assert wrote["step"] == 7 and isinstance(wrote["text"], str)


def test_settings_compile_nothing(server):
    def all_of(temperature, top_p, min_p, penalty):
        how = {"temperature": temperature, "top_p": top_p, "min_p": min_p,
               "repetition_penalty": penalty}  # fmt: skip
        ask(server, "/look", text=TEXT, **how)
        ask(server, "/look/write", prompt=TEXT, max_tokens=2, **how)

    compiled = []
    note = lambda event, *_, **__: compiled.append(event) if event == COMPILED else None
    all_of(0.7, 0.5, 0.1, 1.5)
    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        all_of(0.71, 0.51, 0.11, 1.51)
        assert not compiled
        jax.jit(lambda x: x * 3)(1.0)
        assert compiled  # so the listener listens
    finally:
        jax.monitoring.unregister_event_duration_listener(note)


def test_tools_answer_calls_of_both_kinds(server):
    call = {"name": "calculator", "arguments": '{"expression": "6 * 7"}'}
    assert ask(server, "/look/tool", **call)["result"] == "42"
    assert ask(server, "/look/tool", text="It is calculator(6*7)")["result"] == "42"
    assert ask(server, "/look/tool", text="It is 42.")["result"] is None


def test_a_page_without_a_server_holds_all_that_it_shows(lm):
    found = lm.inspect(TEXT)
    scores = lm.induction_scores()
    page = drawing.document([("one", found, lm.tokenizer, scores)] * 2)
    text = re.search(r'<script type="application/json" id="data">(.*?)</script>', page)[1]
    data = json.loads(text)
    assert [view["texts"] for view in data["views"]] == [found.texts] * 2
    sent = data["views"][0]["attention"][1]
    np.testing.assert_allclose(
        unpacked(sent, 4, len(found.tokens_T)), found.attention(1), atol=0.005
    )
    assert not any(data["comparison"]["divergence"])


def test_the_page_names_no_other_origin_and_never_reads_text_as_html():
    page = drawing.PAGE.read_text()
    names = {*re.findall(r"https?://[\w.]+", page)} - {"http://www.w3.org"}  # SVG's namespace
    assert not names
    assert "default-src 'none'" in page and "connect-src 'self'" in page
    for unsafe in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert unsafe not in page


def test_the_command_writes_a_page(lm, tmp_path, command):
    lm.save(tmp_path / "run", "jaxgpt")
    code, said, error = command(
        "inspect.py", "--checkpoint", "run", "--text", TEXT, "--against", "run"
    )
    assert code == 0, error
    assert "run: 22 tokens" in said and "page.html" in said
    assert '"comparison"' in (tmp_path / "page.html").read_text()


def test_the_scripts_folder_hides_no_module_of_python():
    """Python puts a script's folder first on its path, where inspect.py stands."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); import inspect; inspect.Signature"
    subprocess.run([sys.executable, "-c", code, ROOT / "scripts"], check=True)
