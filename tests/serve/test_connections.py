"""Connections that do nothing, or everything slowly: real sockets against a small app in a thread."""

import asyncio
import contextlib
import errno
import json
import logging
import os
import resource
import select
import socket
import threading

import httpx
import pytest
import uvicorn
from websockets.exceptions import ConnectionClosedError, InvalidStatus
from websockets.sync.client import connect

from rwkv_train.serve.connections import HEAD_BYTES, PIPELINED, make_config

ASK = b"GET /%s HTTP/1.1\r\nHost: localhost\r\n\r\n"
PATIENCE = 60  # seconds until a test gives up


class App:
    """/ok answers, /hold once it is released, /body when the body is here, /much with more than any buffer holds."""

    def __init__(self):
        self.release, self.entered, self.gone = threading.Event(), threading.Semaphore(0), threading.Event()
        self.headers = []

    async def __call__(self, scope, receive, send):
        await {"lifespan": self.lifespan, "http": self.http, "websocket": self.websocket}[scope["type"]](
            scope, receive, send
        )

    async def lifespan(self, scope, receive, send):
        for what in ("startup", "shutdown"):
            assert (await receive())["type"] == f"lifespan.{what}"
            await send({"type": f"lifespan.{what}.complete"})

    async def http(self, scope, receive, send):
        self.entered.release()
        while (await receive()).get("more_body"):
            pass
        self.headers = scope["headers"]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        if scope["path"] == "/hold":
            await self.wait()
        for _ in range(1000 * (scope["path"] == "/much")):
            await send({"type": "http.response.body", "body": bytes(1 << 20), "more_body": True})
            if (await self.peek(receive)) == "http.disconnect":
                self.gone.set()
                return
        await send({"type": "http.response.body", "body": b"fine"})

    async def peek(self, receive):
        try:
            return (await asyncio.wait_for(receive(), 0.001))["type"]
        except TimeoutError:
            return None

    async def wait(self):
        await asyncio.get_running_loop().run_in_executor(None, self.release.wait, PATIENCE)

    async def websocket(self, scope, receive, send):
        await receive()
        await send({"type": "websocket.accept"})
        if scope["path"] == "/hold":
            await self.wait()
        try:
            while (message := await receive())["type"] == "websocket.receive":
                await send({"type": "websocket.send", "text": message["text"]})
        finally:
            self.gone.set()


@pytest.fixture
def serve():
    """serve(**settings): (App, port) of a server in a thread, until the test ends."""
    with contextlib.ExitStack() as closing:

        def start(**settings):
            listening = closing.enter_context(socket.socket())
            listening.bind(("127.0.0.1", 0))
            listening.listen(1000)
            app = App()
            server = uvicorn.Server(make_config(app, shutdown_seconds=1, **settings))
            thread = threading.Thread(target=server.run, args=([listening],))
            thread.start()

            def stop():
                server.should_exit = True
                app.release.set()
                thread.join()

            port = listening.getsockname()[1]
            closing.callback(stop)
            return app, port

        yield start


@pytest.fixture
def dial():
    """dial(port): a connected socket, until the test ends."""
    with contextlib.ExitStack() as closing:

        def connected(port, buffer=None):
            ours = closing.enter_context(socket.socket())
            if buffer:
                ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
            ours.settimeout(PATIENCE)
            ours.connect(("127.0.0.1", port))
            return ours

        yield connected


def rest(connection: socket.socket) -> bytes:
    """All that comes until the server ends the connection."""
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := connection.recv(1 << 16):
            found += piece
    return found


def status(connection: socket.socket) -> int:
    """That of the answer that comes next, all of which is here afterwards."""
    found = b""
    while b"fine" not in found and (piece := connection.recv(1 << 16)):
        found += piece
    return int(found.split(b" ")[1])


def test_a_client_that_sends_nothing_is_cut_off(serve, dial):
    _, port = serve(head_seconds=0.1)
    assert rest(dial(port)) == b""


def test_a_head_that_comes_byte_by_byte_is_cut_off(serve, dial):
    """Also in the company of others, and however often something comes."""
    _, port = serve(head_seconds=0.2)
    slow = dial(port)
    slow.sendall(b"GET /ok HTTP/1.1\r\nX: ")
    with contextlib.suppress(ConnectionResetError, BrokenPipeError):
        while not select.select([slow], [], [], 0.01)[0]:
            slow.sendall(b"x")
    assert rest(slow) == b""
    quick = dial(port)
    quick.sendall(ASK % b"ok")
    assert status(quick) == 200


def test_the_next_head_has_an_end_too(serve, dial):
    _, port = serve(head_seconds=0.1, keep_alive=0)
    idle, slow = dial(port), dial(port)
    for connection in (idle, slow):
        connection.sendall(ASK % b"ok" if connection is idle else ASK % b"ok" + b"GET /")
        assert rest(connection).endswith(b"fine\r\n0\r\n\r\n")


def test_a_connection_is_kept_for_the_next_request(serve, dial):
    _, port = serve()
    ours = dial(port)
    for _ in range(5):
        ours.sendall(ASK % b"ok")
        assert status(ours) == 200


def test_a_request_in_progress_is_not_cut_off(serve, dial):
    app, port = serve(head_seconds=0.1, keep_alive=0)
    busy, idle = dial(port), dial(port)
    busy.sendall(ASK % b"hold")
    assert app.entered.acquire(timeout=PATIENCE)
    assert rest(idle) == b""
    app.release.set()
    assert rest(busy).endswith(b"fine\r\n0\r\n\r\n")


def test_the_oldest_that_do_nothing_make_room(serve, dial):
    """Whoever asks is answered in the company of three times as many as there is room for."""
    app, port = serve(most=100)
    busy = dial(port)
    busy.sendall(ASK % b"hold")
    assert app.entered.acquire(timeout=PATIENCE)
    idle = [dial(port) for _ in range(300)]
    asking = dial(port)
    asking.sendall(ASK % b"ok")
    assert status(asking) == 200
    for oldest in idle[:200]:
        assert rest(oldest) == b""
    assert not select.select(idle[-90:], [], [], 0)[0]
    app.release.set()
    assert status(busy) == 200


def test_half_sent_bodies_make_room_before_whole_requests(serve, dial):
    app, port = serve(most=4)
    sending, busy = dial(port), dial(port)
    sending.sendall(b"POST /body HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\nhalf")
    busy.sendall(ASK % b"hold")
    for _ in range(2):
        assert app.entered.acquire(timeout=PATIENCE)
    others = [dial(port) for _ in range(3)]
    assert rest(others[0]) == b""  # the first to go, though it came last
    for other in others[1:]:
        other.sendall(ASK % b"hold")
        assert app.entered.acquire(timeout=PATIENCE)
    last = dial(port)
    assert rest(sending) == b""
    last.sendall(ASK % b"hold")
    assert app.entered.acquire(timeout=PATIENCE)
    refused = rest(dial(port))
    assert refused.startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
    assert "no room" in json.loads(refused.partition(b"\r\n\r\n")[2])["error"]["message"]
    app.release.set()
    for answered in (busy, *others[1:], last):
        assert status(answered) == 200


@pytest.mark.parametrize(
    ("sent", "answer"),
    [
        (b"GET / HTTP/1.1\r\nX: " + b"x" * (HEAD_BYTES + 1), b"HTTP/1.1 431 "),
        (b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * HEAD_BYTES, b"HTTP/1.1 431 "),
        (b"nonsense\r\n\r\n", b"HTTP/1.1 400 "),
        (b"GET /\xff HTTP/1.1\r\n\r\n", b"HTTP/1.1 400 "),
        ((ASK % b"hold") * (PIPELINED + 3), b"HTTP/1.1 400 "),
    ],
)
def test_heads_that_are_too_much(serve, dial, sent, answer, caplog):
    _, port = serve()
    ours = dial(port)
    ours.sendall(sent)
    found = rest(ours)
    assert found.startswith(answer) and not caplog.records
    assert set(json.loads(found.partition(b"\r\n\r\n")[2])["error"]) == {"message", "type", "param", "code"}


def test_what_comes_after_a_body_is_no_header(serve, dial):
    app, port = serve(body_bytes=0)
    head = b"POST /ok HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    ours = dial(port)
    ours.sendall(head + b"1\r\nx\r\n0\r\nAuthorization: Bearer x\r\n\r\n")
    assert status(ours) == 200 and [name for name, _ in app.headers] == [b"host", b"transfer-encoding"]
    ours.sendall(head + b"1;" + b"x" * 8 * HEAD_BYTES + b"\r\n")
    assert rest(ours) == b""


def test_a_client_that_reads_nothing_is_cut_off(serve, dial):
    app, port = serve(write_seconds=0.2)
    ours = dial(port, buffer=4096)
    ours.sendall(ASK % b"much")
    assert app.gone.wait(PATIENCE)


def test_websockets_have_a_limit_of_their_own(serve):
    _, port = serve(most=10, sockets=2)
    url = f"ws://127.0.0.1:{port}/ws"
    with connect(url) as first, connect(url) as second:
        for ours in (first, second):
            ours.send("x" * 60_000)
            assert ours.recv() == "x" * 60_000
        with pytest.raises(InvalidStatus) as refused:
            connect(url)
        assert refused.value.response.status_code == 503
        assert httpx.get(f"http://127.0.0.1:{port}/ok").text == "fine"
        second.send("x" * 70_000)
        with pytest.raises(ConnectionClosedError, match="1009"):
            second.recv()


def test_what_waits_in_a_websocket_has_a_limit(serve):
    """The app reads nothing; uvicorn itself keeps all messages that come at once."""
    app, port = serve()
    with connect(f"ws://127.0.0.1:{port}/hold") as ours:
        frames = b"".join(b"\x81\x81\0\0\0\0x" for _ in range(10_000))
        ours.socket.sendall(frames)
        with pytest.raises(ConnectionClosedError, match="1008"):
            ours.recv()
        app.release.set()
        assert app.gone.wait(PATIENCE)


def test_the_log_has_no_queries(capfd):
    make_config(App(), access_log=True, log_level="info")
    for name, args in (
        ("uvicorn.access", ("127.0.0.1:1", "GET", "/v1/models?token=secret", "1.1", 200)),
        ("uvicorn.error", ("127.0.0.1:1", "/room/ws?token=secret")),
    ):
        logging.getLogger(name).info(" ".join(["%s"] * len(args)), *args)
    told = "".join(capfd.readouterr())
    assert "/v1/models" in told and "/room/ws" in told and "secret" not in told
    make_config(App())
    logging.getLogger("uvicorn.access").info('%s - "%s %s HTTP/%s" %d', "a", "GET", "/", "1.1", 200)
    assert capfd.readouterr() == ("", "")


def test_settings_of_uvicorn(serve):
    _, port = serve()
    answer = httpx.get(f"http://127.0.0.1:{port}/ok", headers={"X-Forwarded-For": "1.2.3.4"})
    assert "server" not in answer.headers and "date" in answer.headers


def test_no_open_files_left_is_not_the_end(serve, dial, caplog):
    """As when the model's files take them all: who is connected is answered, and who comes waits."""
    _, port = serve()
    first, late = dial(port), socket.socket()
    before, taken = resource.getrlimit(resource.RLIMIT_NOFILE), []
    try:
        first.sendall(ASK % b"ok")
        assert status(first) == 200
        resource.setrlimit(resource.RLIMIT_NOFILE, (late.fileno() + 20, before[1]))
        with pytest.raises(OSError) as full:
            while True:
                taken.append(os.dup(0))
        assert full.value.errno == errno.EMFILE
        late.connect(("127.0.0.1", port))
        late.sendall(ASK % b"ok")
        first.sendall(ASK % b"ok")
        assert status(first) == 200
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        for file in taken:
            os.close(file)
    with late:
        late.settimeout(PATIENCE)
        assert status(late) == 200
    assert "out of system resource" in caplog.text
