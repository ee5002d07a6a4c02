"""The page in a real browser, on a real server: chat, stop, branch, look inside, compare."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxgpt.config import ModelConfig
from jaxgpt.convert.load import Loaded, own_files
from jaxgpt.data import tokenizer as tokenizers
from jaxgpt.language_model import LanguageModel
from jaxgpt.model import gpt
from jaxgpt.serve import drawing

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
if CHROMIUM is None:
    pytest.skip("chromium is not installed", allow_module_level=True)
playwright = pytest.importorskip(
    "playwright.sync_api", reason="the test extra's playwright is not installed"
)

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
ROOT = Path(__file__).parents[2]
EVIL = "<img src=x onerror=\"document.title='hacked'\"> **bold** `<b>`\n\n[x](javascript:alert(1))"


def save_model(folder: Path, seed: int) -> LanguageModel:
    """A run of a random model of bytes, which writes on and on."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.parent / "tokenizer.json"
    tokenizers.load("byte").save(path)
    files = own_files({"tokenizer.json": path.read_bytes()})
    path.unlink()
    template = json.loads(files["tokenizer_config.json"])["chat_template"]
    cfg = ModelConfig(
        vocab_size=260, context_length=8192, num_layers=2, model_dim=16, num_heads=4, mlp_dim=24,
        position="rope",
    )  # fmt: skip
    params = gpt.init(cfg, jax.random.key(seed))
    printable_V1 = ((np.arange(260) > 32) & (np.arange(260) < 127))[:, None]
    params["embed"]["embedding"] *= 10.0 * printable_V1  # all other tokens are unlikely
    tokenizer = tokenizers.load("byte")
    parts = Loaded(cfg, params, tokenizer, template, (), (tokenizer.eos_id,), files)
    lm = LanguageModel(parts, folder.name)
    lm.save(folder, "jaxgpt")
    return lm


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Of a server of one run, beside which another one stands."""
    folder = tmp_path_factory.mktemp("page")
    save_model(folder / "runs" / "mine", 1)
    save_model(folder / "runs" / "other", 2)
    log = folder / "runs" / "other" / "metrics.jsonl"
    log.write_text("".join(
        json.dumps({"step": n, "train/loss": 5 / n, "val/loss": 6 / n}) + "\n" for n in (1, 2, 3)
    ))  # fmt: skip
    server = subprocess.Popen(
        [sys.executable, ROOT / "scripts" / "serve.py", "--checkpoint", "runs/mine", "--port", "0",
         "--slots", "2"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "XLA_FLAGS": ""},
    )  # fmt: skip
    assert server.stdout is not None
    said = []
    for line in server.stdout:
        said.append(line)
        if found := re.search(r"ready.*?(http://[\d.:]+)", line):
            break
    else:
        pytest.fail("the server ended: " + "".join(said))
    threading.Thread(target=server.stdout.read, daemon=True).start()  # it must not fill its pipe
    yield found[1]
    server.terminate()
    server.wait(60)


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def page(browser, address):
    """The page, which asks nobody but its server and runs without an error."""
    made = browser.new_page()
    made.set_default_timeout(120_000)
    strangers, errors = [], []
    made.on("request", lambda r: r.url.startswith((address, "data:")) or strangers.append(r.url))
    made.on("pageerror", lambda error: errors.append(str(error)))
    made.goto(address)
    made.get_by_label("Message").wait_for()
    yield made
    made.close()
    assert not strangers and not errors


def ask(page, text):
    page.get_by_label("Message").fill(text)
    page.keyboard.press("Enter")


def stop(page):
    """Stops an answer that has begun."""
    begun = page.locator(".assistant .cursor")
    playwright.expect(begun).to_have_text(re.compile(r"\S.*\S", re.DOTALL), timeout=120_000)
    page.get_by_role("button", name="Stop").click()
    page.get_by_text("stopped").wait_for()


def set_fields(page, **values):
    """Settings by their labels, with _ for a blank."""
    page.get_by_role("button", name="Settings").click()
    for label, value in values.items():
        page.get_by_label(label.replace("Min_p", "Min-p").replace("_", " ")).fill(value)
    page.keyboard.press("Tab")
    page.keyboard.press("Escape")


def answer_of(page):
    return page.locator(".assistant .prose").last.inner_text()


def test_an_answer_is_stopped_written_again_and_the_question_edited(page):
    set_fields(page, Min_p="0.3", Tokens_of_an_answer="8000")  # which excludes its end token
    ask(page, "Hi")
    stop(page)
    first = answer_of(page)
    assert first
    page.get_by_role("button", name="Again").click()
    stop(page)
    page.get_by_text("2 / 2").wait_for()
    page.get_by_role("button", name="Earlier version").click()
    assert answer_of(page) == first
    page.get_by_role("button", name="Edit").click()
    page.get_by_label("Edit the message").fill("Hello")
    page.get_by_role("button", name="Ask this instead").click()
    stop(page)
    assert page.locator(".user .body").all_inner_texts() == ["Hello"]
    page.locator(".user").get_by_role("button", name="Earlier version").click()
    assert answer_of(page) == first


def test_an_answer_opens_into_its_tokens_and_branches_at_one(page):
    set_fields(page, Tokens_of_an_answer="12", Seed="3")
    ask(page, "Hi")
    page.get_by_role("button", name="Again").wait_for()
    page.locator(".under").get_by_text("Look inside").click()
    tokens = page.locator(".assistant .token")
    tokens.nth(5).click()
    assert tokens.count() == 12  # those that were drawn, byte by byte
    before = tokens.all_inner_texts()
    branches = page.get_by_role("button", name="Write on from")
    assert branches.count() > 3
    branches.nth(1).click()
    page.get_by_text("2 / 2").wait_for()
    page.locator(".under").get_by_text("Look inside").click()
    page.wait_for_selector(".assistant .token")
    after = page.locator(".assistant .token").all_inner_texts()
    assert after[:5] == before[:5] and after[5] != before[5] and len(after) == 18


def streamed(route, *deltas, finish="stop"):
    """Answers a request in the server's place."""
    parts = [{"choices": [{"index": 0, "delta": delta}]} for delta in deltas]
    parts += [{"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]}]
    body = "".join(f"data: {json.dumps(part)}\n\n" for part in parts) + "data: [DONE]\n\n"
    route.fulfill(body=body, headers={"content-type": "text/event-stream"})


def test_what_a_model_writes_is_text(page):
    page.route("**/v1/chat/completions", lambda route: streamed(route, {"content": EVIL}))
    ask(page, EVIL)
    page.get_by_role("button", name="Again").wait_for()
    assert page.locator("main img, main script, main a").count() == 0
    assert page.locator(".assistant strong").inner_text() == "bold"
    assert page.locator(".assistant code").inner_text() == "<b>"
    assert "<img src=x" in answer_of(page) and page.title() == "jaxgpt"
    assert page.locator(".user .body").inner_text().startswith("<img")


def test_markdown_becomes_elements(page):
    table = "| x | y |\n|---|---|\n| 1 | *2* |"
    text = f"# One\n\n1. a\n2. b\n   - c\n\n{table}\n\n```python\nx < 1\n```\n> q"
    page.route("**/v1/chat/completions", lambda route: streamed(route, {"content": text}))
    ask(page, "Hi")
    page.get_by_role("button", name="Again").wait_for()
    found = page.locator(".assistant .prose")
    assert found.locator("h1").inner_text() == "One"
    assert found.locator("ol > li").count() == 2 and found.locator("ol ul li").inner_text() == "c"
    assert found.locator("td em").inner_text() == "2" and found.locator("th").count() == 2
    assert found.locator("pre code").inner_text() == "x < 1"
    assert found.locator("blockquote").inner_text() == "q"


def test_tools_are_shown_as_they_are_called(page):
    replies = [{"content": "It is calculator(6*7)"}, {"content": "It is 42."}]
    page.route("**/v1/chat/completions", lambda route: streamed(route, replies.pop(0)))
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("calculator").check()
    page.keyboard.press("Escape")
    ask(page, "What is 6 times 7?")
    page.get_by_text("It is 42.").wait_for()
    assert page.locator(".tool .body").inner_text() == "42"  # from the server
    assert not replies


def test_a_conversation_is_exported(page):
    page.route("**/v1/chat/completions", lambda route: streamed(route, {"content": "Yo"}))
    ask(page, "Hi")
    page.get_by_role("button", name="Again").wait_for()
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("System prompt").fill("Be short.")
    with page.expect_download() as waiting:
        page.get_by_role("button", name="Export as JSON").click()
    found = json.loads(Path(waiting.value.path()).read_text())
    assert [m["role"] for m in found["messages"]] == ["user", "assistant"]
    with page.expect_download() as waiting:
        page.get_by_role("button", name="Export as Markdown").click()
    assert "Be short." in Path(waiting.value.path()).read_text()


def test_two_models_stand_side_by_side_and_their_inside_is_shown(page):
    page.get_by_role("tab", name="Look inside").click()
    page.get_by_label("Text").fill("abcabcabc")
    page.get_by_label("Model to compare").select_option("run:other")
    page.get_by_role("button", name="Look", exact=True).click()
    page.get_by_role("heading", name="Side by side").wait_for()
    page.wait_for_selector(".maps canvas")
    assert page.locator(".maps canvas").count() == 4
    page.get_by_role("button", name="Find induction heads").click()
    page.get_by_role("button", name=re.compile(r"layer \d, head \d")).first.click()
    page.get_by_label("Layer", exact=True).select_option("0")
    page.get_by_text("what token 8 reads").wait_for()
    painted = "c => c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some(Boolean)"
    assert page.locator(".map canvas").evaluate(painted)
    page.get_by_role("button", name="Read every layer").click()
    page.wait_for_selector("table.grid")
    assert page.locator("table.grid tbody tr").count() == 3
    page.locator(".card .strip .token").nth(3).click()
    page.get_by_role("button", name="other").click()
    page.wait_for_selector(".maps canvas")


def test_runs_are_listed_with_their_curves_and_write(page):
    page.get_by_role("tab", name="Runs").click()
    page.get_by_role("button", name=re.compile("other.*step 3", re.DOTALL)).click()
    page.wait_for_selector(".plot svg path")
    assert page.locator(".plot svg path").count() == 2  # train and val
    page.get_by_role("button", name="Let it write").click()
    page.get_by_text("Step 0:").wait_for()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_and_follows_the_systems_colours(browser, address, scheme):
    phone = browser.new_page(viewport={"width": 360, "height": 740}, color_scheme=scheme)
    phone.goto(address)
    phone.wait_for_selector("nav button")
    for part in ("Chat", "Look inside", "Runs"):
        phone.get_by_role("tab", name=part).click()
        if part == "Look inside":
            phone.get_by_role("button", name="Look", exact=True).click()
            phone.wait_for_selector(".maps canvas", timeout=120_000)
        assert phone.evaluate("document.documentElement.scrollWidth <= innerWidth"), part
    colour = phone.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", colour))) < 200) == (scheme == "dark")
    phone.close()


def test_a_file_shows_the_same_without_a_server(browser, tmp_path):
    lm = save_model(tmp_path / "lm", 3)
    found = lm.inspect("abcabc")
    seen = [(name, found, lm.tokenizer, lm.induction_scores()) for name in ("one", "two")]
    (tmp_path / "page.html").write_text(drawing.document(seen))
    page = browser.new_page()
    asked = []
    page.on("request", lambda r: asked.append(r.url))
    page.goto(f"file://{tmp_path}/page.html")
    page.wait_for_selector(".maps canvas")
    assert page.locator("table.grid tbody tr").count() == 3
    assert page.get_by_role("heading", name="Side by side").is_visible()
    assert all(url.startswith(("file://", "data:")) for url in asked)
    page.close()
