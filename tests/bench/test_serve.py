"""`bench serve` with a small model: it runs, its figures fit together, and a request that fails is counted."""

import asyncio
import json

import pytest
from bench_toys import TOY
from feedback_toys import small_model
from helpers import run

from rwkv_train import save_model
from rwkv_train.bench import serve_peer
from rwkv_train.bench.serve import IDLE, LEARNING, Alone
from rwkv_train.bench.serve_clients import Client, Failed, Load, Measured, Reply, centile, serving, talk
from rwkv_train.bench.settings import ServeBench

pytest.importorskip("fastapi", reason="needs the extra serve")


def test_it_prints_tables_and_writes_figures_that_fit_together(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_model(small_model(generation="rwkv7"), "model.pth")
    model = ["--model=model.pth", "--tokenizer=bytes"]
    code, out, err = run("bench", "serve", *model, *TOY["bench serve"], "--json=f.json", capsys=capsys)
    assert code == 0, err + out
    for part in ("3 at once, conversations", IDLE, LEARNING, "tokens before", "alone and among 2", "not asked for"):
        assert part in out, out
    found = json.loads((tmp_path / "f.json").read_text())["results"]
    assert len(found["loads"]) == 6
    for load in found["loads"].values():
        assert load["replies"] >= 1 and load["failed"] == [] and all(rate > 0 for rate in load["tokens_s"])
        assert load["replies"] <= load["tokens"] <= 6 * load["replies"]
        assert 0 < load["first_s"]["p50"] <= load["first_s"]["p99"] <= load["first_s"]["most"]
    assert len(found["history"]) == 2 and max(map(int, found["history"])) >= 400
    assert all(text["same"] and text["difference"] < 1e-3 and text["tokens"] for text in found["alone"])
    assert len(found["learnt"]) == 2 and all(f["status"] in ("learnt", "refused") for f in found["learnt"])


def test_a_server_that_does_not_come_up_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, _, err = run("bench", "serve", "--model=nothing.pth", capsys=capsys)
    assert code == 1 and "did not come up" in err and "nothing.pth" in err


@pytest.mark.parametrize("wrong", ["--crowd=0", "--sessions=[]", "--history=[0]", "--corrections=-1"])
def test_what_cannot_be_measured_is_refused(wrong, capsys):
    code, _, err = run("bench", "serve", wrong, capsys=capsys)
    assert code == 1 and wrong.strip("-").partition("=")[0] in err


def served(answers: list[bytes], work):
    """work(address)'s result, with a server that sends these answers one after another, the last one for ever."""

    async def answer(reader, writer):
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(int(head.lower().partition(b"content-length: ")[2].split()[0]))
                data = answers.pop(0) if len(answers) > 1 else answers[0]
                writer.write(data)
                if b"Content-Length" not in data and not data.endswith(b"0\r\n\r\n"):
                    break
        except asyncio.IncompleteReadError:
            pass
        finally:
            writer.close()

    async def both():
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        async with server:
            return await work(server.sockets[0].getsockname()[:2])

    return asyncio.run(both())


def stream(*events: bytes, ended: bool = True) -> bytes:
    parts = b"".join(b"%x\r\ndata: %s\n\n\r\n" % (len(event) + 8, event) for event in events)
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + parts + b"0\r\n\r\n" * ended


GOOD = stream(b'{"choices":[{"text":"a"}]}', b'{"choices":[{"text":"b"}]}', b"[DONE]")
REFUSED = b"HTTP/1.1 503 Busy\r\nContent-Length: 4\r\n\r\nbusy"
BROKEN = stream(b'{"choices":[{"text":"a"}]}', ended=False)
ERROR = stream(b'{"error":{"message":"out of order"}}', b"[DONE]")


@pytest.mark.parametrize("bad, why", [(REFUSED, "503 Busy: busy"), (BROKEN, "Incomplete"), (ERROR, "out of order")])
def test_a_request_that_fails_is_counted_and_the_next_one_goes_on(bad, why):
    async def turn(client, session, count, last):
        asked.append(last)
        return await client.stream("/v1/completions", {})

    async def until():
        while len(asked) < 4:
            await asyncio.sleep(0.01)

    asked: list[Reply | None] = []
    load = served([GOOD, bad, GOOD], lambda address: talk(address, 1, turn, until()))
    assert len(load.failed) == 1 and why in load.failed[0]
    assert len(load.replies) >= 2 and all(reply.text == "ab" and reply.tokens == 2 for reply in load.replies)
    assert asked[0] is None and asked[1] is load.replies[0] and asked[2] is None
    assert Measured.of([load, load]).row("x")["failed"] == "2"


def test_a_stream_without_an_end_and_an_answer_that_is_no_json_have_failed():
    async def ask(address):
        async with Client(address) as client:
            with pytest.raises(Failed, match="broke off"):
                await client.stream("/", {})
            with pytest.raises(Failed, match="no JSON"):
                await client.ask("POST", "/", {})

    served([stream(b'{"choices":[{"text":"a"}]}'), b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhm"], ask)


def test_tokens_count_as_far_as_they_came_in_time():
    load = Load(10.0, 12.0, [Reply(10.0, [10.5, 11.0], tokens=4), Reply(11.0, [11.5, 12.5], tokens=6)], [])
    assert load.rate == (4 + 3) / 2
    assert load.firsts == [0.5, 0.5] and load.gaps == [0.5, 1.0]
    assert centile([], 99) != centile([], 99) and centile([3.0], 99) == 3.0 and centile([0.0, 1.0], 50) == 0.5


def test_texts_are_compared_up_to_the_first_token_that_differs():
    one = {"tokens": ["a", "b", "c"], "top_logprobs": [{"a": -1.0, "x": -2.0}, {"b": -1.0, "d": -1.5}, {"c": 0.0}]}
    two = {"tokens": ["a", "d", "e"], "top_logprobs": [{"a": -1.25}, {"b": -1.5, "d": -1.25}, {"c": 9.0}]}
    assert Alone.of(one, two) == Alone(False, 0.5, 3, 1)
    assert Alone.of(one, one) == Alone(True, 0.0, 3, 3)


def test_a_server_is_ended_behind_the_block(tmp_path):
    code = "import time; print('ready at http://127.0.0.1:1234', flush=True); time.sleep(600)"
    with serving(["python", "-c", code], tmp_path, "ready") as address:
        assert address == ("127.0.0.1", 1234)
    with pytest.raises(ValueError, match="no way"), serving(["python", "-c", "exit('no way')"], tmp_path, "ready"):
        pass


def test_a_peer_that_is_not_there_is_told(monkeypatch):
    monkeypatch.setattr(serve_peer, "installed", lambda package: None)
    assert serve_peer.load_peer(ServeBench()) == ({}, "it is not installed (pip install rwkvserve)")
