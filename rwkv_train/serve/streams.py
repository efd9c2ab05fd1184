"""Answers that come piece by piece, and noticing that nobody waits for them any more."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from contextlib import aclosing, suppress
from typing import TypeVar

from fastapi import Request
from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")


class EventStream(Response):
    """Server-sent events. The generator is closed as soon as the client is gone."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[str], status_code: int = 200):
        super().__init__(status_code=status_code)
        self.events = events
        del self.headers["content-length"]
        self.headers["x-accel-buffering"] = "no"  # of proxies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with aclosing(self.events):
            pump, gone = asyncio.ensure_future(self._pump(send)), asyncio.ensure_future(_gone(receive))
            try:
                await asyncio.wait([pump, gone], return_when=asyncio.FIRST_COMPLETED)
                if pump.done():
                    pump.result()
            finally:
                for task in (pump, gone):
                    task.cancel()
                    with suppress(asyncio.CancelledError, OSError):
                        await task

    async def _pump(self, send: Send) -> None:
        async for text in self.events:
            await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(request: Request, work: Awaitable[T]) -> T | Response:
    """The work's result; it is cancelled once the client is gone, and nobody reads the answer."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request.receive))
    try:
        await asyncio.wait([task, gone], return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else Response(status_code=499)
    finally:
        for each in (task, gone):
            each.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await each


def sse(data: dict | str, event: str | None = None) -> str:
    """One event. Text is one line: JSON escapes line breaks."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, allow_nan=False)
    return f"event: {event}\ndata: {text}\n\n" if event else f"data: {text}\n\n"


async def together(streams: list[AsyncGenerator[T]]) -> AsyncIterator[tuple[int, T]]:
    """The items of several streams as they come, with the stream's number. Closing this closes them."""
    items: asyncio.Queue = asyncio.Queue()

    async def pump(number: int, stream: AsyncGenerator[T]) -> None:
        try:
            async with aclosing(stream):
                async for item in stream:
                    items.put_nowait((number, item))
        finally:
            items.put_nowait(None)

    tasks = [asyncio.ensure_future(pump(*pair)) for pair in enumerate(streams)]
    try:
        left = len(tasks)
        while left:
            item = await items.get()
            if item is None:
                left -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
