"""What a request must pass, and how errors are told."""

import asyncio
import errno
import json
import traceback
from typing import Annotated, Any

import pytest
from fastapi import APIRouter, Depends, FastAPI, WebSocket
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.testclient import TestClient, WebSocketDenialResponse

from rwkv_train.chat.room import Room
from rwkv_train.serve.guard import (
    ERRORS,
    ApiError,
    ErrorAnswer,
    Guard,
    Rate,
    Rights,
    Tokens,
    check_json,
    install_errors,
    require,
)

VIEWER, OWNER = "viewer-token-0123456789", "owner-token-0123456789"
TOKENS = {VIEWER: Rights("viewers", talk=True), OWNER: Rights("owner", True, frozenset({"starter"}), True)}


class Message(BaseModel):
    role: str
    content: str


class Ask(BaseModel):
    model_config = ConfigDict(extra="forbid")
    text: str | list[Message]
    temperature: float = Field(1.0, ge=0, le=2)
    metadata: dict[str, Any] = {}


def small_app(tokens: Tokens) -> FastAPI:
    app, routes = FastAPI(responses=ERRORS), APIRouter()
    app.state.tokens = tokens
    install_errors(app)

    @app.post("/v1/ask")
    async def ask(body: Ask, rights: Annotated[Rights, Depends(require("talk"))]) -> dict:
        return {"name": rights.name, "metadata": body.metadata}

    @app.get("/v1/teach")
    async def teach(profile: str, rights: Annotated[Rights, Depends(require("teach"))]) -> bool:
        return rights.may_teach(profile)

    @routes.delete("/v1/teach")
    async def operate(rights: Annotated[Rights, Depends(require("operate"))]) -> None: ...

    @app.get("/page")
    async def page() -> PlainTextResponse:
        return PlainTextResponse("a page", headers={"Access-Control-Allow-Origin": "*", "X-Frame-Options": "DENY"})

    @app.get("/fail/{how}")
    async def fail(how: str) -> None:
        if how == "ours":
            Room(queue=0)
        raise {
            "api": ApiError(409, "no \ud800 now", "busy", "model", headers={"X-Why": "this"}),
            "full": OSError(errno.ENOSPC, "No space left on device", "/home/somebody/journal"),
            "gone": FileNotFoundError(errno.ENOENT, "no such file", "/home/somebody/journal"),
            "theirs": ValueError("/home/somebody"),
            "bug": KeyError("/home/somebody"),
        }[how]

    @app.websocket("/ws")
    async def ws(socket: WebSocket) -> None:
        await socket.accept()
        await socket.send_text("hello")

    app.include_router(routes)
    return app


def client(tokens: Tokens | None = None, base: str = "http://localhost:8000", **limits) -> TestClient:
    tokens = tokens or Tokens()
    guard = Guard(small_app(tokens), tokens, **limits)
    return TestClient(guard, base, raise_server_exceptions=False)


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def told(answer, status: int) -> dict:
    """The error of an answer, which has OpenAI's shape."""
    assert answer.status_code == status, answer.text
    return ErrorAnswer.model_validate(answer.json(), strict=True).error.model_dump()


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


@pytest.mark.parametrize(
    "body",
    [
        b'{"metadata": {"a": NaN}, "text": "a"}',
        b'{"text": "a", "temperature": -Infinity}',
        b'{"text": "a", "temperature": 1e999}',
        b'{"text": "\xff"}',
        b'{"text": "\xed\xa0\x80"}',
        b'{"text": "\\ud800"}',
        b'{"text": "a", "metadata": {"\\uDC00 \\ud83d": 1}}',
        b'{"text": "a", "metadata": {"n": ' + b"9" * 5000 + b"}}",
        b"[" * 100_000,
        b"[" * 100_000 + b"]" * 100_000,
        b'{"a":' * 100 + b"1" + b"}" * 100,
        b'{"text": "a", "metadata": {"a": ' + b"[" * 70 + b"]" * 70 + b"}}",
        b'{"text": "a"',
        b"{'text': 1}",
        b'"' + b'\\"' * 400_000,
        b'{"text": "a"}'.decode().encode("utf-16"),
        b"\x00",
        b"null",
        b"[]",
        b'"text"',
    ],
)
def test_bodies_that_are_unsound(body):
    answer = client().post("/v1/ask", content=body, headers={"Content-Type": "application/json"})
    error = told(answer, 400)
    assert error["type"] == "invalid_request_error" and len(error["message"]) < 200


@pytest.mark.parametrize(
    "value",
    [
        {"text": "\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16"), "n": [1.5, -2e-30, None, True]},
        ["[[[" * 100, '"[', "\\", '\\"', "]]", {"\\ud800": "\\"}],
        json.loads("[" * 64 + "]" * 64),
        10**400,
        "",
    ],
)
def test_bodies_that_are_sound(value):
    for ascii_alone in (True, False):
        check_json(json.dumps(value, ensure_ascii=ascii_alone).encode())
    with pytest.raises(ApiError, match="64 deep"):
        check_json(json.dumps(json.loads("[" * 64 + json.dumps([value]) + "]" * 64)).encode())


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({}, "text", '"text" is missing; give it'),
        (
            {"text": "a", "temperature": 5},
            "temperature",
            '"temperature": Input should be less than or equal to 2; found 5',
        ),
        ({"text": "a", "temprature": 1}, "temprature", '"temprature" is not known here; leave it out'),
        ({"text": [{"role": "user", "content": "a"}, {"role": "user"}]}, "text.1.content", "is missing"),
        ({"text": [{"role": 3, "content": "a"}]}, "text.0.role", "valid string; found 3"),
        ({"text": 1}, "text", "valid string; found 1"),
        ([1], None, "the request: "),
    ],
)
def test_a_wrong_field_is_named(body, param, said):
    error = told(client().post("/v1/ask", json=body), 400)
    assert error["param"] == param and said in error["message"]


def test_errors():
    ours = client()
    assert told(ours.post("/v1/ask"), 400)["message"] == "the body is missing; send JSON"
    assert told(ours.get("/v1/teach"), 400)["param"] == "profile"
    assert "/openapi.json" in told(ours.get("/v1/%22%0a%ff"), 404)["message"]
    answer = ours.patch("/v1/teach")
    assert told(answer, 405) and answer.headers["allow"] == "DELETE, GET"
    answer = ours.get("/fail/api")
    assert told(answer, 409) == {
        "message": "no \\ud800 now",
        "type": "invalid_request_error",
        "param": "model",
        "code": "busy",
    }
    assert answer.headers["x-why"] == "this"
    assert "queue" in told(ours.get("/fail/ours"), 400)["message"]
    assert told(ours.get("/fail/full"), 507)["code"] == "disk_full"
    for how in ("gone", "theirs", "bug", "unknown"):
        answer = ours.get(f"/fail/{how}", headers=bearer(OWNER))
        assert told(answer, 500)["code"] == "internal_error" and "somebody" not in answer.text


def test_mistakes_reach_the_server_and_tell_no_token():
    """uvicorn logs what comes out of the app, with its traceback."""
    app = TestClient(Guard(small_app(Tokens(TOKENS)), Tokens(TOKENS)), "http://localhost")
    with pytest.raises(KeyError) as mistake:
        app.get("/fail/bug", headers=bearer(OWNER))
    assert OWNER not in "".join(traceback.format_exception(mistake.value))


def test_errors_are_described():
    described = small_app(Tokens()).openapi()
    for path in described["paths"].values():
        for operation in path.values():
            assert set(operation["responses"]) == {"200", *map(str, ERRORS)}
    assert "HTTPValidationError" not in described["components"]["schemas"]
    assert described["components"]["securitySchemes"]["token"]["scheme"] == "bearer"
    assert described["paths"]["/v1/ask"]["post"]["security"] == [{"token": []}]


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
