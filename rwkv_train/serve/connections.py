"""Connections that do nothing, or everything very slowly, must not hurt those that do something.

uvicorn waits for ever for a request's head and for a client that does not read, and takes any number of connections.
Here every wait has an end, and a new connection takes the place of the one that has done nothing for longest.
"""

import asyncio
import logging
import sys
from contextlib import suppress
from functools import partial
from http import HTTPStatus
from typing import Any

import uvicorn
from uvicorn.config import LOGGING_CONFIG
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from rwkv_train.serve.errors import ApiError
from rwkv_train.serve.tokens import log_without_tokens

MOST = 4096  # connections, where the system allows as many open files
HEAD_BYTES = 64 << 10
BODY_FACTOR = 16  # bytes on the wire to a byte of a body, at most: what cuts it into chunks may be longer than itself
PIPELINED = 8  # requests that wait in a connection for the answer to the one before
SOCKET_BYTES, SOCKET_QUEUE = 64 << 10, 64  # of a message in a WebSocket; messages that the app has not read
LOGGER = "uvicorn.error.http"  # mistakes of clients are no news; the app's are


class Places:
    """Who is connected. most: connections. sockets: WebSockets among them, at most."""

    def __init__(self, most: int, sockets: int):
        self.most, self.most_sockets = most, sockets
        self.waiting: dict[Http, None] = {}  # for a request; whoever waits longest comes first
        self.sending: dict[Http, None] = {}  # a request's body
        self.busy: dict[Http, None] = {}  # with an answer
        self.sockets: set[Socket] = set()
        self._entered = 0

    def __len__(self) -> int:
        return len(self.waiting) + len(self.sending) + len(self.busy) + len(self.sockets)

    def enter(self, connection: "Http") -> bool:
        """Take a new connection in; False if there is no room, and all others have a whole request. One of the others
        goes for it, after one more turn of the loop: what came with them is looked at first."""
        full = len(self) >= self.most
        if full and not self.waiting and not self.sending:
            return False
        self.waiting[connection] = None
        connection.number = self._entered = self._entered + 1
        if full:
            connection.loop.call_soon(connection.loop.call_soon, self._make_room, connection)
        return True

    def _make_room(self, new: "Http") -> None:
        if len(self) <= self.most:
            return
        older = (one for place in (self.waiting, self.sending) for one in place if one.number < new.number)
        if oldest := next(older, None):
            self.leave(oldest)
            oldest.transport.abort()
        elif new in self.waiting:
            self.leave(new)
            new.refuse()

    def move(self, connection: "Http", to: "dict[Http, None]") -> None:
        if connection not in to:
            self.leave(connection)
            to[connection] = None

    def leave(self, connection: "Http") -> None:
        for place in (self.waiting, self.sending, self.busy):
            place.pop(connection, None)


class Reader:
    """Cuts off a client for which something waits and that has taken none of it in `write_seconds`."""

    _look: asyncio.TimerHandle | None = None

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch()

    def connection_lost(self, error: Exception | None) -> None:
        if self._look:
            self._look.cancel()
        super().connection_lost(error)

    def _watch(self, before: int | None = None) -> None:
        """Look again while something waits. before: bytes that waited the last time."""
        if self._look:
            self._look.cancel()
        waiting = self.transport.get_write_buffer_size()
        if before and waiting >= before:
            self.transport.abort()
        elif waiting:
            self._look = self.loop.call_later(self.write_seconds, self._watch, waiting)


class Http(Reader, HttpToolsProtocol):
    """uvicorn's, with an end to every wait.

    places: shared by all. head_seconds: until a request's head is here, from the connection's beginning, or from the
    end of the time that it is kept alive. write_seconds: see `Reader`. body_bytes: what the app takes.
    """

    def __init__(
        self, *args: Any, places: Places, head_seconds: float, write_seconds: float, body_bytes: int, **kwargs: Any
    ):
        super().__init__(*args, **kwargs)
        self.logger = logging.getLogger(LOGGER)
        self.places, self.head_seconds, self.write_seconds = places, head_seconds, write_seconds
        self.most_bytes = HEAD_BYTES + BODY_FACTOR * body_bytes
        self._head_end: asyncio.TimerHandle | None = None
        self._in_head, self._bytes = True, 0  # since the head, or the body, began
        self._is_socket, self.number = False, 0  # of all that entered

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        if self.places.enter(self):
            self._await_head(self.head_seconds)
        else:
            self.refuse()

    def connection_lost(self, error: Exception | None) -> None:
        self.places.leave(self)
        self._await_head(None)
        super().connection_lost(error)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        self._bytes += len(data)
        super().data_received(data)
        if self._is_socket or self.transport.is_closing():
            return
        self._settle()
        if self._in_head and self._bytes > HEAD_BYTES:
            self.refuse(431, f"the request's head has more than {HEAD_BYTES:,} bytes; send less")
        elif self._bytes > self.most_bytes:
            self.transport.abort()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:  # none that comes after a body
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if len(self.pipeline) >= PIPELINED:
            raise ValueError("too many requests at once")
        super().on_headers_complete()
        self._await_head(None)
        self._in_head, self._bytes = False, 0

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._in_head, self._bytes = True, 0

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._settle()
        if self.transport.is_closing():
            self._watch()
        elif self in self.places.waiting:
            self._await_head(self.timeout_keep_alive + self.head_seconds)

    def _await_head(self, seconds: float | None) -> None:
        """Cut off in so many seconds; None: not at all."""
        if self._head_end:
            self._head_end.cancel()
        self._head_end = None if seconds is None else self.loop.call_later(seconds, self.transport.abort)

    def _settle(self) -> None:
        """Be counted among those that wait, send or are answered."""
        in_progress = self.cycle and not self.cycle.response_complete
        busy, places = self.pipeline or (in_progress and not self.cycle.more_body), self.places
        places.move(self, places.busy if busy else places.sending if in_progress else places.waiting)

    def handle_websocket_upgrade(self) -> None:
        self._await_head(None)
        if len(self.places.sockets) < self.places.most_sockets:
            self._is_socket = True
            self.places.leave(self)
            super().handle_websocket_upgrade()
        else:
            self.refuse()

    def send_400_response(self, msg: str) -> None:
        self.refuse(400, "this is no HTTP/1.1 request")

    def refuse(self, status: int = 503, message: str = "the server has no room for one more; try again later") -> None:
        """An error in place of the app's answer, and the end of the connection."""
        answer = ApiError(status, message, headers={"Connection": "close", "Cache-Control": "no-store"}).answer()
        head = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}".encode(), *map(b": ".join, answer.raw_headers)]
        self.transport.write(b"\r\n".join([*head, b"", answer.body]))
        self.transport.close()
        self._watch()


class Socket(Reader, WebSocketsSansIOProtocol):
    """uvicorn's, with an end to every wait and to what waits for the app."""

    def __init__(self, *args: Any, places: Places, write_seconds: float, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.places, self.write_seconds = places, write_seconds

    def connection_made(self, transport: asyncio.Transport) -> None:
        self.places.sockets.add(self)
        super().connection_made(transport)

    def connection_lost(self, error: Exception | None) -> None:
        self.places.sockets.discard(self)
        super().connection_lost(error)

    def send_receive_event_to_app(self) -> None:
        if self.queue.qsize() >= self.config.ws_max_queue and not self.close_sent:
            self.conn.fail(1008, "too many messages at once")
            self.handle_parser_exception()
        else:
            super().send_receive_event_to_app()

    def keepalive_timeout(self) -> None:
        super().keepalive_timeout()
        self.transport.abort()  # whoever answers no ping reads no goodbye either

    async def run_asgi(self) -> None:
        await super().run_asgi()
        self._watch()


def raise_open_files(most: int = 1 << 16) -> int:
    """Have the system allow this process as many open files as it may have, up to `most`; how many that are."""
    if sys.platform == "win32":
        return 512  # what select() takes there
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    now, wanted = (most if limit == resource.RLIM_INFINITY else min(limit, most) for limit in (soft, hard))
    for files in (wanted, 10240):  # macOS tells of no hard limit, and has this one
        if files > now:
            with suppress(OSError, ValueError):
                resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
                return files
    return now


def share_files(files: int) -> tuple[int, int]:
    """(connections, backlog) for so many open files. asyncio accepts a whole backlog before any of it is looked at,
    and twice more before those cut off are closed; the rest is for the model, the journal and the states."""
    backlog = min(1024, max(files // 8, 1))
    return max(min(MOST, files - min(256, files // 4) - 3 * backlog), 1), backlog


def make_config(
    app: Any,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    most: int | None = None,
    sockets: int | None = None,
    head_seconds: float = 10,
    write_seconds: float = 30,
    keep_alive: int = 5,
    shutdown_seconds: int = 10,
    body_bytes: int = 1 << 20,
    log_level: str = "warning",
    access_log: bool = False,
) -> uvicorn.Config:
    """How uvicorn serves an app. Raises this process's limit of open files.

    most: connections, None for as many as open files allow. sockets: WebSockets among them, None for half.
    head_seconds, write_seconds, body_bytes: see `Http`. keep_alive: seconds that a connection waits for its next
    request. shutdown_seconds: for what is in progress when the server stops.
    """
    room, backlog = share_files(raise_open_files())
    places = Places(most := min(most or room, room), most // 2 if sockets is None else sockets)
    slow = {"places": places, "write_seconds": write_seconds}
    return uvicorn.Config(
        app,
        host=host,
        port=port,
        loop="asyncio",
        http=partial(Http, **slow, head_seconds=head_seconds, body_bytes=body_bytes),
        ws=partial(Socket, **slow),
        ws_max_size=SOCKET_BYTES,
        ws_max_queue=SOCKET_QUEUE,
        ws_per_message_deflate=False,
        lifespan="on",
        workers=1,
        proxy_headers=False,
        server_header=False,
        log_config=log_without_tokens(LOGGING_CONFIG, {LOGGER: {"level": "ERROR"}}),
        log_level=log_level,
        access_log=access_log,
        backlog=backlog,
        timeout_keep_alive=keep_alive,
        timeout_graceful_shutdown=shutdown_seconds,
    )
