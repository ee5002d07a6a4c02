"""Whatever arrives: an answer or a refusal, no failure, and nothing stays behind."""

import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlparse

import hostile
import httpx
import psutil
import pytest
from serving import idle

JSON = {"content-type": "application/json"}


def send(client: httpx.Client, number: int) -> str:
    """What is wrong with the answer to a request; empty: nothing."""
    try:
        return _send(client, hostile.request(number))
    except httpx.HTTPError as error:
        return f"no answer: {error!r}"


def _send(client: httpx.Client, asked: hostile.Hostile) -> str:
    if not asked.path or asked.half:
        return _send_raw(client, asked)
    if asked.leaves:
        with client.stream("POST", asked.path, content=asked.body, headers=JSON) as found:
            for _ in found.iter_raw():
                break
            return "" if found.status_code < 500 else f"status {found.status_code}"
    found = client.post(asked.path, content=asked.body, headers=JSON)
    if found.status_code >= 500:
        return f"status {found.status_code}: {found.text[:200]}"
    if found.status_code != 200 and not found.json()["error"]["message"]:
        return f"no message: {found.text[:200]}"
    if '"server_error"' in found.text:
        return f"the stream failed: {found.text[-200:]}"
    return ""


def _send_raw(client: httpx.Client, asked: hostile.Hostile) -> str:
    url = urlparse(str(client.base_url))
    sent = asked.body
    if asked.path:
        head = (
            f"POST {asked.path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        )
        sent = f"{head}Content-Length: {len(sent)}\r\nConnection: close\r\n\r\n".encode() + sent
    answer = b""
    with socket.create_connection((url.hostname, url.port), timeout=60) as opened:
        try:
            opened.sendall(sent)
            opened.shutdown(socket.SHUT_WR)
            while part := opened.recv(1 << 16):
                answer += part
        except (ConnectionResetError, BrokenPipeError):  # hanging up is an answer, too
            return ""
    first = answer.split(b"\r\n")[0]
    right = not answer or (first[:7] == b"HTTP/1." and first[9:10] in b"1234")
    return "" if right else f"{first[:100]!r}"


def survives(served, numbers: range) -> None:
    """Sends requests from twelve threads, and looks for what they left."""
    address, process = served[0], psutil.Process(served[1].pid)
    with (
        httpx.Client(base_url=address, timeout=120) as client,
        ThreadPoolExecutor(12) as pool,
    ):
        first, second = numbers[: len(numbers) // 4], numbers[len(numbers) // 4 :]
        wrong = dict(zip(first, pool.map(lambda n: send(client, n), first), strict=True))
        assert idle(address)
        before = process.memory_info().rss
        wrong |= zip(second, pool.map(lambda n: send(client, n), second), strict=True)
    wrong = {number: found for number, found in wrong.items() if found}
    assert not wrong, f"{len(wrong)}: {list(wrong.items())[:5]}"
    assert idle(address)
    until = time.monotonic() + 10
    while (connections := len(process.net_connections())) > 2 and time.monotonic() < until:
        time.sleep(0.2)
    assert connections <= 2  # the port, and the one that asked for health
    assert process.num_threads() < 100
    grown = (process.memory_info().rss - before) / 1e6
    assert grown < 50, f"{grown:.0f} MB more after {len(second):,} requests"
    found = httpx.post(f"{address}/v1/completions", json={"prompt": "a", "max_tokens": 3})
    assert found.status_code == 200
    lines = httpx.get(f"{address}/metrics").text.splitlines()
    counts = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert float(counts["jaxgpt_compiled_programs_total"]) == 0
    assert 'jaxgpt_finished_total{reason="error"}' not in counts


def test_whatever_arrives_is_answered_or_refused(served):
    survives(served, range(400))


@pytest.mark.slow
def test_whatever_arrives_ten_thousand_times(served):
    survives(served, range(1_000, 11_000))


def test_every_request_can_be_sent_again():
    again = [hostile.request(number) for number in range(200)]
    assert again == [hostile.request(number) for number in range(200)]
    assert len(set(again)) > 150 and {asked.path for asked in again} == {"", *hostile.GOOD}
    assert any(json.loads(a.body or b"0") for a in again if a.path and a.body[-1:] == b"}")
