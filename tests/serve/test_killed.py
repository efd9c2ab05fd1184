"""A server that is killed loses nothing that it acknowledged."""

import json
import random
import signal
import threading

import httpx
import pytest
from kill_server import Said, check, kill, running

USER = {"role": "user", "content": "c"}


def test_a_server_killed_at_random_moments(tmp_path):
    """More of them: python tests/tools/kill_server.py 50"""
    said, rng = Said(), random.Random(3)
    for _ in range(2):
        kill(tmp_path, said, rng)
    with running(tmp_path) as (_, url):
        check(url, said)
    assert said.responses and said.corrections


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_a_server_that_is_asked_to_stop_finishes_and_says_so(tmp_path, sign, heard_signals):
    with running(tmp_path) as (child, url):
        asked = {"kind": "answer", "question": "sun?", "answer": "hot"}
        number = httpx.post(f"{url}/v1/feedback", json=asked).raise_for_status().json()["id"]
        child.send_signal(sign)
        assert child.wait(60) == 0 and child.stdout.read().startswith("stopped")
    with running(tmp_path) as (_, url):
        said = Said()
        said.corrections[number] = asked
        check(url, said)


def test_whoever_is_connected_when_it_stops_gets_an_end(tmp_path, heard_signals):
    """Streams end as they should, an answer that is waited for has what was written so far, and nothing is cut off."""
    long = {"max_output_tokens": 4096, "temperature": 0}
    asked = {
        "responses": ("POST", "/v1/responses", {"input": "a", "stream": True} | long),
        "chat": ("POST", "/v1/chat/completions", {"messages": [USER], "stream": True, "max_tokens": 4096}),
        "whole": ("POST", "/v1/responses", {"input": "b"} | long),
        "events": ("GET", "/v1/feedback/events", None),
    }
    found, begun = {}, threading.Semaphore(0)

    def ask(name, method, path, body):
        with httpx.Client(base_url=url, timeout=60) as client, client.stream(method, path, json=body) as response:
            found[name] = ""
            for text in response.iter_text():
                begun.release()
                found[name] += text

    with running(tmp_path) as (child, url):
        threads = [threading.Thread(target=ask, args=(name, *one)) for name, one in asked.items()]
        for thread in threads:
            thread.start()
        for _ in range(30):
            assert begun.acquire(timeout=60)
        while "rwkv_lanes 3.0" not in httpx.get(f"{url}/metrics").text:  # until all three are being written
            assert child.poll() is None and all(thread.is_alive() for thread in threads)
        child.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join(60)
        assert child.wait(60) == 0
    assert "event: response.incomplete" in found["responses"].split("\n\n")[-2]
    assert found["chat"].endswith("data: [DONE]\n\n")
    assert json.loads(found["whole"])["status"] == "incomplete"
    assert found["events"].startswith(": here")
