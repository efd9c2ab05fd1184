"""A server that is killed loses nothing that it acknowledged."""

import random
import signal

import httpx
import pytest
from kill_server import Said, check, kill, running


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
