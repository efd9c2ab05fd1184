"""What a request must pass before the app sees it."""

import asyncio

import pytest
from guarded_app import OWNER, TOKENS, VIEWER, bearer, client, small_app, told
from starlette.responses import StreamingResponse
from starlette.testclient import TestClient, WebSocketDenialResponse

from rwkv_train.serve.guard import (
    Guard,
    Rate,
    Tokens,
)


@pytest.mark.parametrize(
    ("host", "limits", "status"),
    [
        ("localhost:8000", {}, 200),
        ("LOCALHOST.", {}, 200),
        ("127.0.0.1:1", {}, 200),
        ("[::1]:8000", {}, 200),
        ("127.0.0.1.evil.example", {}, 400),
        ("evil.example:8000", {}, 400),
        ("192.168.1.2", {}, 400),
        ("localhost@evil.example", {}, 400),
        ("localhost/x", {}, 400),
        ("localhost:port", {}, 400),
        ("", {}, 400),
        ("192.168.1.2:80", {"host": "192.168.1.2"}, 200),
        ("192.168.1.3", {"host": "192.168.1.2"}, 400),
        ("192.168.1.3", {"host": "0.0.0.0"}, 200),  # an address is nobody else's name
        ("[fe80::1]:8000", {"host": "::"}, 200),
        ("evil.example", {"host": "0.0.0.0"}, 400),
        ("Room.Example", {"allow": ["room.example"]}, 200),
    ],
)
def test_hosts(host, limits, status):
    answer = client(**limits).get("/page", headers={"Host": host})
    assert answer.status_code == status
    if status != 200:
        assert "Host" in told(answer, 400)["message"] or "--allow-host" in told(answer, 400)["message"]


@pytest.mark.parametrize(
    ("origin", "host", "allowed"),
    [
        ("http://localhost:8000", "localhost:8000", True),
        ("http://LOCALHOST:8000", "localhost:8000", True),
        ("http://localhost", "localhost:80", True),
        ("https://room.example", "room.example", True),  # behind a proxy that has the certificate
        ("https://room.example:443", "room.example", True),
        ("http://localhost:8001", "localhost:8000", False),
        ("http://localhost", "localhost:8000", False),
        ("http://127.0.0.1:8000", "localhost:8000", False),
        ("http://evil.example", "localhost:8000", False),
        ("http://localhost:8000.evil.example", "localhost:8000", False),
        ("http://localhost:8000@evil.example", "localhost:8000", False),
        ("file://localhost:8000", "localhost:8000", False),
        ("null", "localhost:8000", False),
        ("", "localhost:8000", False),
    ],
)
def test_origins(origin, host, allowed):
    ours, headers = client(allow=["room.example"]), {"Host": host, "Origin": origin}
    answer = ours.get("/page", headers=headers)
    assert answer.status_code == (200 if allowed else 403)
    assert not any(name.startswith("access-control") for name in answer.headers)
    assert not ours.options("/page", headers=headers).is_success
    if allowed:
        with ours.websocket_connect("/ws", headers=headers) as socket:
            assert socket.receive_text() == "hello"
    else:
        with pytest.raises(WebSocketDenialResponse) as refused, ours.websocket_connect("/ws", headers=headers):
            pass
        assert refused.value.status_code == 403


def test_every_answer_carries_the_headers():
    ours = client(rate=5)
    paths = ["/page", "/v1/nothing", "/fail/bug", "/fail/api", "/v1/teach", "/v1/teach"]
    for path, status in zip(paths, [200, 404, 500, 409, 400, 429], strict=True):
        answer = ours.get(path)
        assert answer.status_code == status
        assert answer.headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'; ")
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert (answer.headers.get("cache-control") == "no-store") == path.startswith("/v1")
    assert ours.get("/page").headers["content-type"] == "application/json"


def test_rights():
    ours = client(Tokens(TOKENS))
    body = {"text": "hi", "metadata": {"a": 1}}
    answer = ours.post("/v1/ask", json=body)
    assert told(answer, 401)["code"] == "invalid_api_key" and answer.headers["www-authenticate"] == "Bearer"
    assert told(ours.post("/v1/ask", json=body, headers=bearer("wrong")), 401)
    assert told(ours.post(f"/v1/ask?token={OWNER}", json=body), 401)
    assert ours.post("/v1/ask", json=body, headers=bearer(VIEWER)).json() == {"name": "viewers", "metadata": {"a": 1}}
    assert told(ours.delete("/v1/teach", headers=bearer(VIEWER)), 403)["type"] == "permission_error"
    assert ours.delete("/v1/teach", headers=bearer(OWNER)).status_code == 200
    for profile, may in (("starter", True), ("other", False)):
        assert ours.get("/v1/teach", params={"profile": profile}, headers=bearer(OWNER)).json() is may
    assert told(ours.get("/v1/teach?profile=starter"), 401) and ours.get("/page").status_code == 200
    assert client().get("/v1/teach?profile=any", headers=bearer("anything")).json() is True


def test_a_rate_is_kept():
    now = 0.0
    rate = Rate(6, lambda: now)  # one in 10 s, six at once
    assert [rate.take("a") for _ in range(7)] == [0] * 6 + [10]
    assert rate.take("b") == 0
    now = 9.5
    assert rate.take("a") == 1
    now = 10.0
    assert [rate.take("a"), rate.take("a")] == [0, 10]
    now = 1e9
    assert [rate.take("a") for _ in range(7)] == [0] * 6 + [10]


def test_a_rate_remembers_a_fixed_number_of_names():
    rate = Rate(1, lambda: 0.0, names=10)
    for n in range(1000):
        assert rate.take(f"other {n}") == rate.take("a") - 60 * bool(n) == 0
        assert len(rate._left) <= 10


def test_who_is_counted():
    ours = client(Tokens(TOKENS), rate=2, clock=lambda: 0.0)
    other = TestClient(ours.app, ours.base_url, client=("2001:db8::1", 1))
    neighbour = TestClient(ours.app, ours.base_url, client=("2001:db8::2", 1))  # most likely the same person
    for one in (ours, other):
        assert [one.get("/page", headers=bearer("guess")).status_code for _ in range(3)] == [200, 200, 429]
    answer = neighbour.get("/page")
    assert told(answer, 429)["code"] == "rate_limit_exceeded" and answer.headers["retry-after"] == "30"
    assert [c.get("/page", headers=bearer(OWNER)).status_code for c in (ours, other, ours)] == [200, 200, 429]
    assert ours.get("/page", headers=bearer(VIEWER)).status_code == 200
    with pytest.raises(ValueError, match="at least 1"):
        Rate(0)


def test_bodies_are_limited():
    ours = client(body_bytes=100)
    assert ours.post("/v1/ask", json={"text": "a" * 80}).status_code == 200
    for body in (b" " * 101, iter([b" " * 60, b" " * 60]), b" " * 1000, iter([b" " * 60] * 100)):
        answer = ours.post("/v1/ask", content=body, headers={"Content-Type": "application/json"})
        assert told(answer, 413)["code"] == "request_too_large" and answer.headers["connection"] == "close"
    for kind in ("text/plain", "application/x-www-form-urlencoded", "text/json", ""):
        answer = ours.post("/v1/ask", content='{"text": ""}', headers={"Content-Type": kind})
        assert "Content-Type" in told(answer, 400)["message"]


def ask(guard: Guard, receive, headers: dict[str, str] | None = None) -> list[dict]:
    """What a guard sends to a POST whose body comes from receive()."""
    usual = {"host": "localhost", "content-type": "application/json", "transfer-encoding": "chunked"}
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/ask",
        "raw_path": b"/v1/ask",
        "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in (usual | (headers or {})).items()],
        "client": ("127.0.0.1", 1),
    }
    sent = []

    async def send(message):
        sent.append(message)

    asyncio.run(guard(scope, receive, send))
    return sent


def test_a_body_must_come_in_time():
    pieces = [{"type": "http.request", "body": b'{"text":', "more_body": True}]

    async def receive():
        return pieces.pop() if pieces else await asyncio.Event().wait()

    tokens = Tokens()
    guard = Guard(small_app(tokens), tokens, body_seconds=0.01)
    start, end = ask(guard, receive)
    assert start["status"] == 408 and (b"connection", b"close") in start["headers"]
    assert b"0.01 s" in end["body"] and guard._held == 0


def test_a_client_that_goes_while_it_sends_is_not_answered():
    async def receive():
        return {"type": "http.disconnect"}

    assert ask(Guard(small_app(Tokens()), Tokens()), receive) == []


def test_no_body_is_read_of_a_client_without_a_token():
    async def receive():
        raise AssertionError("the body was read")

    guard = Guard(small_app(Tokens(TOKENS)), Tokens(TOKENS), body_bytes=10)
    assert ask(guard, receive)[0]["status"] == 401
    sized = {"authorization": f"Bearer {OWNER}", "transfer-encoding": "", "content-length": "1000"}
    assert ask(guard, receive, sized)[0]["status"] == 413
    waiting = sized | {"content-length": "11", "expect": "100-continue"}
    assert ask(guard, receive, waiting)[0]["status"] == 413


def test_all_bodies_together_are_limited():
    pieces = [{"type": "http.request", "body": b" " * 60, "more_body": n > 0} for n in range(2)]

    async def receive():
        return pieces.pop()

    guard = Guard(small_app(Tokens()), Tokens(), bodies_bytes=100)
    assert ask(guard, receive)[0]["status"] == 503 and guard._held == 0


def test_streams_are_passed_on_as_they_come():
    """Each piece leaves before the next is made, and the end of the client is seen."""
    made, gone = [], asyncio.Event()

    async def app(scope, receive, send):
        async def pieces():
            for n in range(3):
                made.append(n)
                yield str(n)
            await gone.wait()

        await StreamingResponse(pieces())(scope, receive, send)

    async def talk():
        messages = asyncio.Queue()
        first = iter([{"type": "http.request", "body": b"{}", "more_body": False}])

        async def receive():
            for message in first:
                return message
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            await messages.put((len(made), message.get("body")))

        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/x",
            "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
            "asgi": {"version": "3.0", "spec_version": "2.3"},
        }
        task = asyncio.ensure_future(Guard(app, Tokens())(scope, receive, send))
        seen = [await messages.get() for _ in range(4)]
        gone.set()
        await task
        return seen

    assert asyncio.run(talk()) == [(0, None), (1, b"0"), (2, b"1"), (3, b"2")]
