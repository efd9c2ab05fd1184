"""The live room: many people talk with the model in one dialogue, and watch each other's turns as they come."""

import asyncio
import queue
import sys
import threading
import time
import traceback
from collections.abc import Coroutine, Iterable
from contextlib import aclosing
from itertools import islice
from typing import TextIO

from fastapi import FastAPI

from rwkv_train.chat.room import Message, Room
from rwkv_train.feedback import Correction
from rwkv_train.feedback.background import in_a_line
from rwkv_train.files import quoted, typed_lines
from rwkv_train.serve.errors import ApiError
from rwkv_train.serve.jobs import End
from rwkv_train.serve.live import Audience, Mute, Policy, Said, Say, Skip, Teach, Undo, Viewer
from rwkv_train.serve.room_dialogue import SHOWN, Now, RoomDialogue
from rwkv_train.serve.service import Running, Service
from rwkv_train.serve.settings import ServeConfig

PIECE_SECONDS = 0.05  # pieces that come faster are sent together
QUEUE_SECONDS = 0.2  # and so is what the queue becomes
PRINTED = 10_000  # pieces that may wait to be printed
PRINT_SECONDS = 1.0  # for what is left of them when the room ends
UNDONE = ("waiting", "learning", "learnt", "outdated")  # what can be


class LiveRoom:
    """A room over a service, which is open before it and longer. A context, in the event loop of the service.

    What the model says and what viewers write never teaches; only what an operator gives as a correction does. Raises
    ValueError for limits that cannot be.
    """

    def __init__(self, service: Service, config: ServeConfig):
        self.service, self.profile = service, service.models[0]
        limits = {"queue": config.queue, "per_user": config.per_user, "rate": config.room_rate}
        self._room, self._lock = Room(config.prefix, config.pick, **limits), threading.Lock()  # the feed is a thread
        self.audience = Audience(self._greet, self._heard)
        self.dialogue = RoomDialogue(service, self.profile)
        self._ready = asyncio.Event()
        self._now: Now | None = None
        self._taught: list[int] = []  # corrections from here that were not taken back from here
        self._ours: set[int] = set()  # all from here
        self._receiving = asyncio.Lock()
        self._pause: asyncio.TimerHandle | None = None  # until the queue may be shown again
        self._stale = False
        self._tasks: set[asyncio.Task] = set()
        self._printed: queue.Queue[str | None] | None = None
        self._writer: threading.Thread | None = None

    def attach(self, app: FastAPI) -> None:
        """Have an app serve the room's WebSocket; its `state.tokens` says who may do what."""
        app.add_api_websocket_route("/room/ws", self.audience.serve)

    async def __aenter__(self) -> "LiveRoom":
        self.loop = asyncio.get_running_loop()
        await asyncio.to_thread(self.dialogue.load)
        self._do(self.run())
        self._do(self._watch())
        return self

    async def __aexit__(self, *error) -> None:
        """A reply that is being written is broken off, and kept by the service."""
        if self._pause:
            self._pause.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._print(None)
        if self._writer:
            await asyncio.to_thread(self._writer.join, PRINT_SECONDS)

    def feed(self, lines: Iterable[str], printed: TextIO | None = None) -> None:
        """Take messages from lines "user: text" as well, as of standard input, and print all answers (to standard
        output, if not given). What is not taken is told on standard error. Call it while the room is open."""
        printed, pieces = printed or sys.stdout, queue.Queue(PRINTED)
        for stream, errors in ((lines, "surrogateescape"), (printed, "backslashreplace")):
            if hasattr(stream, "reconfigure"):  # bytes that are no UTF-8 are a mistake of one line, not the end
                stream.reconfigure(encoding="utf-8", errors=errors, newline="\n")
        self._printed = pieces
        self._writer = threading.Thread(target=self._write, args=(printed, pieces), daemon=True)
        self._writer.start()
        threading.Thread(target=self._read, args=(lines,), daemon=True).start()

    # Answering

    async def run(self) -> None:
        """Answer what the room picks, one message after the other, until this is cancelled."""
        while True:
            await self._ready.wait()
            self._ready.clear()
            while message := self._pick():
                self._now = Now(message)
                try:
                    await self._answer(self._now)
                except Exception as error:
                    traceback.print_exception(error)
                    self.audience.tell("error", message="the server made a mistake; its log has more")
                self._now = None

    def _pick(self) -> Message | None:
        with self._lock:
            message = self._room.pick()
        if message:
            self._show_queue()
        return message

    async def _answer(self, now: Now) -> None:
        self.audience.tell("asked", **now.said)
        self._print(f"{now.message.user}: {now.message.text}\n")
        shown, told = now.said, ""
        try:
            now.running = await self.dialogue.ask(now)
            end = await self._stream(now, now.running) if now.running else None
            if end and end.reason == "error":
                told = f"the reply broke off: {end.error}"
            elif end and now.running:
                shown = self.dialogue.ended(now, now.running)
        except (ValueError, ApiError) as error:
            told = error.message if isinstance(error, ApiError) else in_a_line(error)
        if told:
            self.audience.tell("error", message=told)
        self._print(told or ("" if now.reply else "(empty reply)"))
        self._print("\n\n")
        self.audience.tell("answered", **shown | {"reply": now.reply})

    async def _stream(self, now: Now, running: Running) -> End | None:
        """Show a reply as it comes."""
        if now.skipped:
            self.service.batcher.cancel(running.job)
        waits, sent, end = "", 0.0, None
        async with aclosing(self.service.events(running)) as events:
            async for event in events:
                waits, end = waits + event.text, event if isinstance(event, End) else None
                if waits and (end or self.loop.time() >= sent + PIECE_SECONDS):
                    now.reply += waits
                    self.audience.tell("piece", text=waits)
                    self._print(waits)
                    waits, sent = "", self.loop.time()
        return end

    # What viewers and operators do

    def _greet(self, viewer: Viewer) -> None:
        with self._lock:
            rules = {"policy": self._room.policy, "muted": sorted(self._room.muted)}
        who = {"name": viewer.name, "operator": viewer.rights.operate}
        viewer.tell("welcome", **who, **rules, transcript=list(self.dialogue.transcript))
        viewer.tell("queue", waiting=self._waiting())
        if self._now:
            viewer.tell("asked", **self._now.said)
            viewer.tell("piece", text=self._now.reply)

    async def _heard(self, viewer: Viewer, message: Said) -> None:
        if isinstance(message, Say):
            line = f"{viewer.name}:{self._room.prefix}{message.text.removeprefix(self._room.prefix)}"
            verdict = self._offer(line) if viewer.rights.talk else "this token may not talk"
            if verdict != "taken":
                viewer.tell("refused", why=verdict)
        elif not viewer.rights.operate:
            viewer.tell("refused", why="not an operator")
        elif isinstance(message, Policy | Mute):
            self._rule(message)
        elif isinstance(message, Skip):
            self._skip()
        elif not viewer.rights.may_teach(self.profile):
            raise ValueError(f"this token may not teach {quoted(self.profile)}")
        elif isinstance(message, Teach):
            await self._teach(message)
        elif isinstance(message, Undo):
            self._undo(viewer)

    def _rule(self, message: Policy | Mute) -> None:
        with self._lock:
            if isinstance(message, Policy):
                self._room.configure(message.pick, message.queue, message.per_user, message.rate)
            else:
                self._room.mute(message.user, message.on)
            policy, muted = self._room.policy, sorted(self._room.muted)
        if isinstance(message, Policy):
            self.audience.tell("policy", **policy)
        else:
            self.audience.tell("muted", users=muted)
        self._show_queue()

    def _skip(self) -> None:
        if not self._now:
            raise ValueError("nothing is being answered")
        self._now.skipped = True
        if self._now.running:
            self.service.batcher.cancel(self._now.running.job)

    async def _teach(self, message: Teach) -> None:
        if message.question is None:
            correction, reply = await asyncio.to_thread(self.dialogue.correction, message.answer, message.id)
        else:
            correction, reply = Correction(message.question, message.answer), None
        async with self._receiving:  # its events are not looked at before its number is known
            work = self.profile, "answer", correction, reply
            number = await asyncio.to_thread(self.service.teaching.receive, *work)
            self._taught.append(number)
            self._ours.add(number)

    def _undo(self, viewer: Viewer) -> None:
        one = self.service.teaching.one
        while self._taught and one(self.profile, self._taught[-1])["status"] not in UNDONE:
            self._taught.pop()
        if not self._taught:
            raise ValueError("nothing that was taught in this room can be taken back")
        undone = self.service.teaching.undo(self.profile, self._taught.pop())

        async def told() -> None:  # it waits for what is being learnt; this operator can do other things meanwhile
            try:
                await asyncio.wrap_future(undone)
            except Exception as error:
                viewer.tell("error", message=in_a_line(error))

        self._do(told())

    async def _watch(self) -> None:
        """Tell what becomes of the corrections from here; others are not the viewers' business."""
        while True:
            async with aclosing(self.service.listeners.listen()) as events:
                async for profile, number, event, data in events:
                    async with self._receiving:
                        ours = profile == self.profile and number in self._ours
                    if ours and event in ("received", "step"):
                        self.audience.tell("learning", id=number, step=data.get("step"), loss=data.get("loss"))
                    elif ours and event == "done" and data["status"] == "undone":
                        self.audience.tell("undone", ids=[number])
                    elif ours and event == "done":
                        private = {"outcome": None} if data["status"] == "failed" else {}  # may name files
                        self.audience.tell("learnt", feedback=data | private)

    # The queue

    def _offer(self, line: str) -> str:
        """From any thread."""
        with self._lock:
            verdict = self._room.offer(line, time.monotonic())
        if verdict == "taken":
            self.loop.call_soon_threadsafe(self._taken)
        return verdict

    def _taken(self) -> None:
        self._ready.set()
        self._show_queue()

    def _waiting(self) -> list[dict]:
        with self._lock:
            waiting = self._room.waiting()
        return [{"user": message.user, "text": message.text} for message in islice(waiting, SHOWN)]

    def _show_queue(self) -> None:
        self._stale = self._pause is not None
        if not self._stale:
            self.audience.tell("queue", waiting=self._waiting())
            self._pause = self.loop.call_later(QUEUE_SECONDS, self._show_again)

    def _show_again(self) -> None:
        self._pause = None
        if self._stale:
            self._show_queue()

    # Standard input and output

    def _read(self, lines: Iterable[str]) -> None:
        for line in typed_lines(lines):
            try:
                verdict = self._offer(line)
            except RuntimeError:  # the server has stopped
                return
            if verdict not in ("taken", "not for us"):
                print(f"not taken, {verdict}: {quoted(line.strip())}", file=sys.stderr)

    def _write(self, printed: TextIO, pieces: queue.Queue) -> None:
        try:
            while (text := pieces.get()) is not None:
                printed.write(text)
                printed.flush()
        except OSError as error:
            self._printed = None
            print(f"answers are not printed any more: {error}", file=sys.stderr)

    def _print(self, text: str | None) -> None:
        """None: that was all."""
        pieces = self._printed
        if pieces and text != "":
            try:
                pieces.put_nowait(text)
            except queue.Full:
                self._printed = None
                print("answers are not printed any more: nobody takes them", file=sys.stderr)

    def _do(self, work: Coroutine) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
