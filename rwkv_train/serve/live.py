"""The live room's WebSockets: who is there, hearing them, and telling all of them without waiting for any."""

import asyncio
import json
import secrets
import unicodedata
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Annotated, Literal

from fastapi import WebSocket, WebSocketDisconnect
from pydantic import Field, TypeAdapter, ValidationError

from rwkv_train.chat.room import Pick, name_of
from rwkv_train.feedback.background import in_a_line
from rwkv_train.files import quoted
from rwkv_train.serve.errors import ApiError
from rwkv_train.serve.guard import Rate, check_json
from rwkv_train.serve.schemas import Strict
from rwkv_train.serve.tokens import Rights, Tokens

MOST = 300  # viewers
OUTBOX = 256  # messages that wait to be sent to one of them
HELLO_SECONDS = 10.0
CLOSE_SECONDS = 10.0
LARGEST = 16 << 10  # characters of a message
MESSAGES = 120  # of one viewer in a minute
LONGEST_NAME = 40
LONGEST_TEXT = 8000  # characters of what is taught
REMEMBERED = 1000  # operators' names
WRONG_TOKEN, NO_HELLO, TOO_FAST, TOO_LARGE, LATER = 4401, 4408, 4429, 1009, 1013


class Hello(Strict):
    type: Literal["hello"]
    token: str | None = None
    name: str = ""


class Say(Strict):
    type: Literal["say"]
    text: str


class Policy(Strict):
    type: Literal["policy"]
    pick: Pick | None = None
    queue: Annotated[int, Field(le=10_000)] | None = None
    per_user: Annotated[int, Field(le=10_000)] | None = None
    rate: Annotated[int, Field(le=10_000)] | None = None


class Mute(Strict):
    type: Literal["mute"]
    user: str
    on: bool


class Teach(Strict):
    """id: of the reply that is corrected, the last one if not given; or a question that gets the answer."""

    type: Literal["teach"]
    answer: str = Field(max_length=LONGEST_TEXT)
    question: str | None = Field(default=None, max_length=LONGEST_TEXT)
    id: str | None = Field(default=None, max_length=100)


class Skip(Strict):
    type: Literal["skip"]


class Undo(Strict):
    type: Literal["undo"]


Said = Hello | Say | Policy | Mute | Teach | Skip | Undo
SAID: TypeAdapter[Said] = TypeAdapter(Annotated[Said, Field(discriminator="type")])


class Leave(Exception):
    """A viewer's end. code: that the socket is closed with, None where it is closed already."""

    def __init__(self, code: int | None = None, reason: str = ""):
        super().__init__(reason)
        self.code, self.reason = code, reason


class Viewer:
    """Somebody in the room."""

    def __init__(self, socket: WebSocket, name: str, rights: Rights):
        self.socket, self.name, self.rights = socket, name, rights
        self._outbox: asyncio.Queue[str] = asyncio.Queue(OUTBOX)
        self.left: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def tell(self, type: str, **data) -> None:
        """Send a message when it is its turn."""
        self.put(encoded(type, data))

    def put(self, text: str) -> None:
        try:
            self._outbox.put_nowait(text)
        except asyncio.QueueFull:
            self.leave(LATER, "you read too slowly")

    def leave(self, code: int, reason: str) -> None:
        if not self.left.done():
            self.left.set_exception(Leave(code, reason))

    async def send(self) -> None:
        while True:
            await self.socket.send_text(await self._outbox.get())


class Audience:
    """All viewers.

    greet(viewer): tells a new one what there is, without waiting. heard(viewer, message): a ValueError, OSError or
    ApiError is told to that viewer.
    """

    def __init__(self, greet: Callable[[Viewer], None], heard: Callable[[Viewer, Said], Awaitable[None]]):
        self._greet, self._heard = greet, heard
        self._viewers: dict[str, Viewer] = {}  # by their names, folded
        self._operators: deque[str] = deque(maxlen=REMEMBERED)  # names that others must not take, folded

    def __len__(self) -> int:
        return len(self._viewers)

    def tell(self, type: str, **data) -> None:
        """Send a message to all. Whoever has not read so many that came before has to leave."""
        text = encoded(type, data)
        for viewer in self._viewers.values():
            viewer.put(text)

    async def serve(self, socket: WebSocket) -> None:
        """A viewer's stay, from the first message to the last."""
        await socket.accept()
        try:
            await self._stay(socket)
        except WebSocketDisconnect:
            return
        except Leave as end:
            if end.code is not None:
                with suppress(TimeoutError, WebSocketDisconnect, RuntimeError):  # who does not read is cut off
                    async with asyncio.timeout(CLOSE_SECONDS):
                        await socket.close(end.code, end.reason)

    async def _stay(self, socket: WebSocket) -> None:
        rate, tokens = Rate(MESSAGES, names=1), socket.app.state.tokens
        try:
            async with asyncio.timeout(HELLO_SECONDS):
                viewer = await self._hello(socket, rate, tokens)
        except TimeoutError:
            raise Leave(NO_HELLO, "say hello first") from None
        key = folded(viewer.name)
        self._viewers[key] = viewer
        self._greet(viewer)
        doing = [asyncio.ensure_future(viewer.send()), asyncio.ensure_future(self._listen(viewer, rate)), viewer.left]
        try:
            await asyncio.wait(doing, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if self._viewers.get(key) is viewer:
                del self._viewers[key]
            for each in doing:
                each.cancel()
            ends = await asyncio.gather(*doing, return_exceptions=True)
        raise next(end for end in ends if isinstance(end, Exception))

    async def _hello(self, socket: WebSocket, rate: Rate, tokens: Tokens) -> Viewer:
        while True:
            try:
                message = await _receive(socket, rate)
            except ValueError as error:
                await socket.send_text(encoded("error", {"message": str(error)}))
                continue
            if not isinstance(message, Hello):
                await socket.send_text(encoded("error", {"message": "say hello first"}))
                continue
            try:
                rights = tokens.of_token(message.token)
            except ApiError:
                raise Leave(WRONG_TOKEN, "the token is not known here") from None
            if len(self._viewers) >= MOST:
                raise Leave(LATER, "the room is full")
            name = self._name(message.name)
            why = self._why_not(name, rights, tokens)
            if not why:
                return Viewer(socket, name, rights)
            await socket.send_text(encoded("refused", {"why": why}))

    def _name(self, asked: str) -> str:
        """The name that is asked for, or that of a guest. Whoever came as a guest before may be another one now."""
        name = " ".join(name_of(asked).split())
        while not name or (name.startswith("guest-") and folded(name) in self._viewers):
            name = f"guest-{secrets.token_hex(2)}"
        return name

    def _why_not(self, name: str, rights: Rights, tokens: Tokens) -> str:
        """Why somebody cannot have a name; "" if nothing speaks against it. Operators' names are theirs."""
        key = folded(name)
        if ":" in name:
            return "a name has no colon"
        if len(name) > LONGEST_NAME:
            return f"a name has at most {LONGEST_NAME} characters"
        if not rights.operate and key in [*self._operators, *map(folded, tokens.operators)]:
            return f"{quoted(name)} is an operator's name"
        holder = self._viewers.get(key)
        if holder and (holder.rights.operate or not rights.operate):
            return f"somebody here is called {quoted(name)}"
        if holder:
            holder.leave(LATER, "this is an operator's name")
        if rights.operate:
            self._operators += [k for k in {key, folded(rights.name)} if k not in self._operators]
        return ""

    async def _listen(self, viewer: Viewer, rate: Rate) -> None:
        while True:
            try:
                await self._heard(viewer, await _receive(viewer.socket, rate))
            except (ValueError, OSError, ApiError) as error:
                viewer.tell("error", message=error.message if isinstance(error, ApiError) else in_a_line(error))


async def _receive(socket: WebSocket, rate: Rate) -> Said:
    """The next message. ValueError for one that is none, Leave for what is too much."""
    got = await socket.receive()
    if got["type"] == "websocket.disconnect":
        raise Leave()
    if rate.take(""):
        raise Leave(TOO_FAST, "too many messages; wait a while")
    text = got.get("text")
    if text is None:
        raise ValueError("a message is JSON, sent as text")
    if len(text) > LARGEST:
        raise Leave(TOO_LARGE, f"a message has at most {LARGEST} characters")
    try:
        check_json(text.encode())
        return SAID.validate_json(text)
    except ApiError as error:
        raise ValueError(error.message.replace("the body", "the message")) from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the message"
        raise ValueError(f"{where}: {first['msg']}") from None


def encoded(type: str, data: dict) -> str:
    return json.dumps({"type": type} | data, ensure_ascii=False, allow_nan=False)


def folded(name: str) -> str:
    """The same for names that look alike."""
    return unicodedata.normalize("NFKC", name).casefold()
