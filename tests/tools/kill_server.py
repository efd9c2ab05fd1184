"""Kill a server that talks and learns at random moments and see that nothing is lost.

    python tests/tools/kill_server.py [MOMENTS]

Every server goes on with the folder that the last one left. After each kill: every response and every correction that
was acknowledged is there, and a conversation goes on as it went on before: the same chance gives the same text.
"""

import random
import subprocess
import sys
import tempfile
import threading
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest
from feedback_toys import be_careless
from served import small_config
from tqdm import tqdm

from rwkv_train.serve.command import serve

LONGEST = 2.0  # seconds from the first sign of life to the kill
PROBE = {"input": "and?", "seed": 1, "temperature": 1.5, "top_p": 1, "max_output_tokens": 24, "store": False}


class Said:
    """What was acknowledged, over all servers.

    responses: their objects by id; probes: (version, text) of what would have come after one; corrections: by id, as
    they were asked for; undone: their numbers.
    """

    def __init__(self):
        self.responses, self.probes, self.corrections, self.undone = {}, {}, {}, set()
        self.compared = 0


@contextmanager
def running(folder: Path):
    """A server in a process of its own: (it, its address)."""
    command = [sys.executable, __file__, "--serve", str(folder)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        line = child.stdout.readline()
        assert line.startswith("serving "), f"no server began: {line!r}"
        yield child, line.split()[-1]
    finally:
        child.kill()
        child.wait()


def talk(url: str, said: Said, seed: int) -> None:
    """Turns of one conversation after another, and what would come next, until the server is gone."""
    rng, last = random.Random(seed), None
    with httpx.Client(base_url=url, timeout=30) as client:
        while True:
            asked = {"input": rng.choice("abcdefgh") * 5, "max_output_tokens": 8}
            if last and rng.random() < 0.8:
                asked["previous_response_id"] = last
            answer = client.post("/v1/responses", json=asked).raise_for_status().json()
            last = answer["id"]
            said.responses[last] = answer
            probe = client.post("/v1/responses", json=PROBE | {"previous_response_id": last}).raise_for_status().json()
            said.probes[last] = probe["version"], probe["output"][0]["content"]


def teach(url: str, said: Said, seed: int) -> None:
    """Corrections, some of them taken back, until the server is gone."""
    rng = random.Random(seed)
    with httpx.Client(base_url=url, timeout=30) as client:
        while True:
            word = "".join(rng.choices("abcdefgh", k=4))
            asked = {"kind": "answer", "question": f"{word}?", "answer": word[::-1]}
            number = client.post("/v1/feedback", json=asked).raise_for_status().json()["id"]
            said.corrections[number] = asked
            with client.stream("GET", f"/v1/feedback/{number}/events") as events:
                events.read()
            if rng.random() < 0.5:
                said.undone.update(client.delete(f"/v1/feedback/{number}").raise_for_status().json()["undone"])


def check(url: str, said: Said) -> None:
    """Whether all that was acknowledged is there."""
    with httpx.Client(base_url=url, timeout=60) as client:
        corrections = {each["id"]: each for each in client.get("/v1/feedback").json()["data"]}
        for number, asked in said.corrections.items():
            found = corrections[number]
            assert {key: found[key] for key in ("question", "answer")} == {
                key: asked[key] for key in ("question", "answer")
            }
            assert found["status"] not in ("failed", "refused") and (found["status"] == "undone") >= (
                number in said.undone
            )
        for number, found in corrections.items():
            if found["status"] in ("waiting", "learning"):  # received by the last server, and learnt by this one
                with client.stream("GET", f"/v1/feedback/{number}/events") as events:
                    events.read()
        for name, response in said.responses.items():
            assert client.get(f"/v1/responses/{name}").json() == response
        for name in list(said.probes)[-3:]:
            version, text = said.probes[name]
            probe = client.post("/v1/responses", json=PROBE | {"previous_response_id": name}).json()
            if probe["version"] == version:
                said.compared += 1
                assert probe["output"][0]["content"] == text


def kill(folder: Path, said: Said, rng: random.Random) -> None:
    """Start a server on a folder, check what the last one left, talk and teach, and kill it at a random moment."""
    with running(folder) as (child, url):
        check(url, said)
        work = [(talk, 2), (teach, 1)] if rng.random() < 0.6 else [(talk, 3)]
        threads = [
            threading.Thread(target=until_gone, args=(each, url, said, rng.getrandbits(32)), daemon=True)
            for each, count in work
            for _ in range(count)
        ]
        for thread in threads:
            thread.start()
        try:
            child.wait(rng.uniform(0.1, LONGEST))
        except subprocess.TimeoutExpired:
            child.kill()
        assert child.wait() == -9, f"the server ended by itself: {child.returncode}"
        for thread in threads:
            thread.join()


def until_gone(work, url: str, said: Said, seed: int) -> None:
    with suppress(httpx.TransportError, httpx.StreamError):
        work(url, said, seed)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        with pytest.MonkeyPatch.context() as patched:
            be_careless(patched)
            sys.exit(serve(small_config(Path(sys.argv[2]))))
    moments, rng, said = int((sys.argv[1:] or ["50"])[0]), random.Random(0), Said()
    with tempfile.TemporaryDirectory() as folder:
        for _ in tqdm(range(moments), unit="kill"):
            kill(Path(folder), said, rng)
        with running(Path(folder)) as (_, url):
            check(url, said)
    print(
        f"killed at {moments} random moments: all {len(said.responses)} responses and {len(said.corrections)} "
        f"corrections there, {said.compared} conversations went on with the same text"
    )
