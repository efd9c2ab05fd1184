"""A server that is killed loses nothing that it acknowledged."""

import random

from kill_server import Said, check, kill, running


def test_a_server_killed_at_random_moments(tmp_path):
    """More of them: python tests/tools/kill_server.py 50"""
    said, rng = Said(), random.Random(3)
    for _ in range(2):
        kill(tmp_path, said, rng)
    with running(tmp_path) as (_, url):
        check(url, said)
    assert said.responses and said.corrections
