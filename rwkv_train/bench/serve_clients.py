"""A server in a process of its own, and clients that take little of the processor: plain streams, and no library."""

import asyncio
import contextlib
import json
import os
import re
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from types import TracebackType

from rwkv_train.bench.apart import PACKAGE
from rwkv_train.bench.measure import number

STARTING, ENDING = 300.0, 120.0  # seconds in which a server must be there, or have ended
SILENT = 300.0  # seconds without a byte, after which a request has failed
LIMIT = 1 << 24  # bytes of a line at most
CALL = "from rwkv_train.cli import main; main()"  # what `python -c` runs
ENDS = ("response.completed", "response.incomplete")


class Failed(ValueError):
    """A request that was refused, or broke off."""


@contextlib.contextmanager
def serving(command: list[str], folder: Path, announced: str) -> Iterator[tuple[str, int]]:
    """The (host, port) that a server says after the word `announced`; it is ended behind the block.

    folder: for what it says. Raises ValueError where it does not come up.
    """
    path, log = os.pathsep.join(filter(None, [str(PACKAGE), os.environ.get("PYTHONPATH")])), folder / "server.log"
    with log.open("w") as out:
        child = subprocess.Popen(command, stdout=out, stderr=out, cwd=folder, env={**os.environ, "PYTHONPATH": path})
    try:
        begun = time.monotonic()
        while True:
            said = log.read_text(encoding="utf-8", errors="replace")
            if found := re.search(rf"{announced}.*http://(\S+):(\d+)\b", said):
                break
            if child.poll() is not None or time.monotonic() - begun > STARTING:
                raise ValueError(f"the server did not come up: {(said.strip().splitlines() or ['no word'])[-1][:300]}")
            time.sleep(0.05)
        yield "127.0.0.1" if found[1] == "0.0.0.0" else found[1], int(found[2])
    finally:
        child.terminate()
        try:
            child.wait(ENDING)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


@dataclass
class Reply:
    """What came for one request. asked: when; times: when each piece of text came; tokens: as the server counts them,
    or the pieces where it does not tell."""

    asked: float
    times: list[float] = field(default_factory=list)
    text: str = ""
    tokens: int = 0
    id: str | None = None
    ended: bool = False

    @property
    def first(self) -> float:
        return self.times[0] - self.asked

    @property
    def gaps(self) -> list[float]:
        """Seconds between pieces of text."""
        return [b - a for a, b in zip(self.times, self.times[1:], strict=False)]

    def take(self, event: dict) -> None:
        """An event of either API. Raises Failed for one that says so."""
        if event.get("error") or event.get("type") == "response.failed":
            raise Failed(f"{event.get('error') or event['response'].get('error')}")
        choice = (event.get("choices") or [{}])[0]
        if text := event.get("delta") or choice.get("text") or choice.get("delta", {}).get("content"):
            self.times.append(time.perf_counter())
            self.text += text
        if event.get("type") in ENDS:
            self.id, self.tokens, self.ended = (
                event["response"]["id"],
                event["response"]["usage"]["output_tokens"],
                True,
            )
        if event.get("usage"):
            self.tokens = event["usage"]["completion_tokens"]


class Client:
    """One connection, kept open. An async context."""

    def __init__(self, address: tuple[str, int]):
        self.address = address
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.hang_up()

    def hang_up(self) -> None:
        if self._streams:
            self._streams[1].close()
            self._streams = None

    async def ask(self, method: str, path: str, body: dict | None = None) -> dict:
        """The answer. Raises Failed."""
        with self._or_failed():
            async with asyncio.timeout(SILENT):
                headers = await self._send(method, path, body)
                data = b"".join([part async for part in self._parts(headers)])
        try:
            return json.loads(data)
        except ValueError:
            raise Failed(f"no JSON: {data[:100]!r}") from None

    async def stream(self, path: str, body: dict) -> Reply:
        """A reply as it comes. Raises Failed, also where no text came or its end was not told."""
        reply, rest, done = Reply(time.perf_counter()), b"", False
        with self._or_failed():
            async with asyncio.timeout(SILENT):
                headers = await self._send("POST", path, body | {"stream": True})
                async for part in self._parts(headers):
                    *events, rest = (rest + part).split(b"\n\n")
                    for event in events:
                        data = event.partition(b"data: ")[2]
                        if data == b"[DONE]":
                            done = True
                        elif data:
                            reply.take(json.loads(data))
        if not (done or reply.ended):
            raise Failed("a reply broke off")
        reply.tokens = reply.tokens or len(reply.times)
        return reply

    async def _send(self, method: str, path: str, body: dict | None) -> dict[str, str]:
        """The headers of the answer, by their names in small letters."""
        if self._streams is None or self._streams[0].at_eof():  # a server ends a connection that was idle for long
            self._streams = await asyncio.open_connection(*self.address, limit=LIMIT)
        reader, writer = self._streams
        data = b"" if body is None else json.dumps(body).encode()
        head = f"{method} {path} HTTP/1.1\r\nHost: {self.address[0]}:{self.address[1]}\r\n"
        writer.write(f"{head}Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
        await writer.drain()
        status, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin1").strip().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        if int(status.split()[1]) >= 400:
            said = b"".join([part async for part in self._parts(headers)])
            raise Failed(f"{status.split(maxsplit=1)[1]}: {said.decode(errors='replace')[:200]}")
        return headers

    async def _parts(self, headers: dict[str, str]):
        reader = self._streams[0]
        if "content-length" in headers:
            yield await reader.readexactly(int(headers["content-length"]))
            return
        while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
            yield (await reader.readexactly(size + 2))[:-2]
        await reader.readexactly(2)

    @contextlib.contextmanager
    def _or_failed(self) -> Iterator[None]:
        """Whatever goes wrong is Failed, and ends the connection."""
        try:
            yield
        except (Failed, OSError, EOFError, TimeoutError, ValueError) as error:
            self.hang_up()
            raise error if isinstance(error, Failed) else Failed(f"{type(error).__name__}: {error}") from None
        except asyncio.CancelledError:
            self.hang_up()
            raise


Turn = Callable[[Client, int, int, Reply | None], Awaitable[Reply]]  # of session, its turn, after a reply


@dataclass
class Load:
    """What became of sessions that talked from `begun` to `ended`, all the time."""

    begun: float = 0.0
    ended: float = 0.0
    replies: list[Reply] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Tokens a second, of all sessions together. Of a reply that was not over at the end, what had come by then."""
        shares = (sum(self.begun <= t <= self.ended for t in r.times) / len(r.times) * r.tokens for r in self.replies)
        return sum(shares) / (self.ended - self.begun)

    @property
    def firsts(self) -> list[float]:
        return [reply.first for reply in self.replies]

    @property
    def gaps(self) -> list[float]:
        return [gap for reply in self.replies for gap in reply.gaps]


async def talk(address: tuple[str, int], sessions: int, turn: Turn, until: Awaitable) -> Load:
    """Sessions side by side that ask for one reply after another until something is done; each has one at least."""
    load, over = Load(time.perf_counter()), asyncio.Event()

    async def session(number: int) -> None:
        count, last = 0, None
        async with Client(address) as client:
            while not (count and over.is_set()):
                try:
                    last = await turn(client, number, count, last)
                    load.replies += [last] * bool(last.times)  # a model may end without a word
                except Failed as error:
                    load.failed.append(str(error))
                    last = None
                    await asyncio.sleep(0.05)
                count += 1

    async def timing() -> None:
        try:
            await until
        finally:
            load.ended = time.perf_counter()
            over.set()

    await asyncio.gather(timing(), *map(session, range(sessions)))
    return load


@dataclass(frozen=True)
class Measured:
    """Of loads of one kind: tokens/s of each; seconds to the first piece of text and between two, of all replies."""

    rates: list[float]
    firsts: list[float]
    gaps: list[float]
    replies: int
    tokens: int
    failed: list[str]

    @classmethod
    def of(cls, loads: Sequence[Load]) -> "Measured":
        replies = [reply for load in loads for reply in load.replies]
        firsts, gaps = [f for load in loads for f in load.firsts], [g for load in loads for g in load.gaps]
        tokens, failed = sum(reply.tokens for reply in replies), [f for load in loads for f in load.failed]
        return cls([load.rate for load in loads], firsts, gaps, len(replies), tokens, failed)

    @property
    def rate(self) -> float:
        return median(self.rates)

    def row(self, what: str) -> dict[str, str]:
        spread = f" ({number(min(self.rates))}-{number(max(self.rates))})" if len(self.rates) > 1 else ""
        return {
            "what": what,
            "tokens/s": number(self.rate) + spread,
            "first piece, ms: p50": number(1e3 * centile(self.firsts, 50)),
            "p99": number(1e3 * centile(self.firsts, 99)),
            "between pieces, ms: p50": number(1e3 * centile(self.gaps, 50)),
            " p99": number(1e3 * centile(self.gaps, 99)),
            "replies": f"{self.replies:,}",
            "tokens of one": number(self.tokens / max(1, self.replies)),
            "failed": f"{len(self.failed)}",
        }

    def plain(self) -> dict:
        """For JSON."""
        spans = {"first_s": self.firsts, "between_s": self.gaps}
        told = {
            name: {f"p{p}": centile(x, p) for p in (50, 90, 99)} | {"most": max(x, default=None)}
            for name, x in spans.items()
        }
        return {"tokens_s": self.rates, "replies": self.replies, "tokens": self.tokens, "failed": self.failed} | told


def centile(values: Sequence[float], of_hundred: int) -> float:
    """What so many of a hundred values are below; no number where there are none."""
    if len(values) < 2:
        return values[0] if values else float("nan")
    return quantiles(values, n=100, method="inclusive")[of_hundred - 1]
