"""Keys, limits, and what a server says whose engine fails: one process, which fails at the end."""

import json
import time

import httpx
import pytest
from serving import running

FLAGS = ("--slots", "1", "--queue", "0", "--max_body", "3000", "--api_key", "secret", "other",
         "--cors", "http://page.example", "--request_seconds", "30")  # fmt: skip
ENDLESS = {"logit_bias": {"65": 100}}  # never a stop token
# As scripts/serve.py, with a device that is gone once a file is there.
BREAKABLE = """
import sys
from pathlib import Path
from jaxgpt.serve.engine import Engine
write, flag = Engine._write, Path(sys.argv.pop(1))
def fragile(self, *given):
    if flag.exists():
        raise RuntimeError("the device is gone")
    return write(self, *given)
Engine._write = fragile
sys.path.insert(0, "scripts")
import serve
from jaxgpt import config
config.exit_cleanly(serve.main)
"""


@pytest.fixture(scope="module")
def flag(tmp_path_factory):
    return tmp_path_factory.mktemp("flag") / "broken"


@pytest.fixture(scope="module")
def served(checkpoint, flag):
    with running(
        "--checkpoint", str(checkpoint), *FLAGS, program=("-c", BREAKABLE, str(flag))
    ) as it:
        yield it


@pytest.fixture
def ask(served):
    def post(path="/v1/completions", key="secret", headers=(), **body):
        headers = {"authorization": f"Bearer {key}", **dict(headers)}
        return httpx.post(f"{served[0]}{path}", json=body, headers=headers, timeout=60)

    return post


def test_a_key_is_asked_for(ask, served):
    assert ask(prompt="a", max_tokens=1).status_code == 200
    assert ask(prompt="a", max_tokens=1, key="other").status_code == 200
    for key in ("wrong", "secre", "secret2"):
        found = ask(prompt="a", key=key)
        assert found.status_code == 401 and found.json()["error"]["code"] == "invalid_api_key"
    assert httpx.get(f"{served[0]}/v1/models").status_code == 401
    assert httpx.get(f"{served[0]}/health").status_code == 200


def test_pages_of_the_named_origin_may_ask_and_no_others(ask):
    found = ask(prompt="a", max_tokens=1, headers={"origin": "http://page.example"})
    assert found.headers["access-control-allow-origin"] == "http://page.example"
    assert ask(prompt="a", headers={"origin": "http://evil.example"}).status_code == 403


def test_bodies_have_a_limit(ask):
    assert ask(prompt="a" * 4000).status_code == 413


def test_a_full_queue_says_when_to_come_back(ask, served):
    # Sixteen answers one after the other in the only slot: longer than the second request takes.
    body = {"prompt": "a", "max_tokens": 900, "n": 16, "stream": True, **ENDLESS}
    key = {"authorization": "Bearer secret"}
    with httpx.stream("POST", f"{served[0]}/v1/completions", json=body, headers=key) as parts:
        lines = parts.iter_lines()  # kept: when the iterator goes, the connection is closed
        next(lines)
        found = ask(prompt="a", max_tokens=1)
    assert found.status_code == 429 and found.headers["retry-after"] == "1"
    assert found.json()["error"]["code"] == "rate_limit_exceeded"


def test_bad_settings_end_in_one_line(checkpoint, served, command):
    port = served[0].rsplit(":", 1)[1]
    for flags, word in (
        (("--slots", "0"), "slots=0"), (("--adapter", "x"), "adapter=x"),
        (("--context", "9999"), "context=9999"), (("--port", port), f"port={port}"),
    ):  # fmt: skip
        code, _, error = command("serve.py", "--checkpoint", str(checkpoint), *flags)
        assert code == 2 and word in error and len(error.splitlines()) == 1, error


def test_a_failed_engine_ends_all_requests_turns_health_and_exits(served, flag, ask):
    address, process = served
    stream = {"authorization": "Bearer secret"}
    body = {"prompt": "a", "max_tokens": 900, "stream": True, **ENDLESS}
    with httpx.stream(
        "POST", f"{address}/v1/completions", json=body, headers=stream, timeout=60
    ) as parts:
        lines = parts.iter_lines()
        assert next(lines).startswith("data: ")
        flag.touch()
        began = time.monotonic()
        *_, last = [line for line in lines if line.startswith("data: ")]
        assert json.loads(last.removeprefix("data: "))["error"]["type"] == "server_error"
    assert httpx.get(f"{address}/health").status_code == 503
    assert time.monotonic() - began < 1.5
    assert ask(prompt="a", max_tokens=1).status_code == 503
    assert process.wait(120) == 1
