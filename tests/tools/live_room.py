"""A server with a live room, and people in it."""

import asyncio
import json
import threading
from contextlib import ExitStack, contextmanager

import pytest
from feedback_toys import BYTES
from served import TOKENS, served, small_config
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from rwkv_train.chat.dialogue import Dialogue
from rwkv_train.generate import Sampling
from rwkv_train.serve import app
from rwkv_train.serve.room import LiveRoom

PATIENCE = 60  # seconds until a test gives up
ALLOWED = f"""
viewer: {{token: {TOKENS["viewer"]}, talk: true}}
owner: {{token: {TOKENS["owner"]}, talk: true, teach: true, operate: true}}
stranger: {{token: {TOKENS["stranger"]}, operate: true}}
"""


class Guest:
    """Somebody in the room."""

    def __init__(self, socket, name="", token="viewer"):
        self.socket = socket
        self.before = []  # what was heard and not asked for
        if token:
            self.welcome = self.ask("welcome", type="hello", token=TOKENS.get(token, token), name=name)

    def say(self, text):
        self.send(type="say", text=text)

    def send(self, **message):
        self.socket.send(json.dumps(message))

    def next(self):
        return json.loads(self.socket.recv(PATIENCE))

    def hear(self, type, /, **fits):
        """The next message of that type that says this."""
        while True:
            message = self.next()
            if message["type"] == type and fits.items() <= message.items():
                return message
            self.before.append(message)

    def ask(self, answer, /, **message):
        self.send(**message)
        return self.hear(answer)

    def queued(self, text):
        """The queue once a message of that text waits in it."""
        while True:
            message = self.hear("queue")
            if any(waiting["text"] == text for waiting in message["waiting"]):
                return message

    def closed(self):
        """The code that the socket is closed with."""
        with pytest.raises(ConnectionClosed):
            while True:
                self.socket.recv(PATIENCE)
        return self.socket.close_code


class Open:
    """A server with a room, and who is in it. hold(): no message is answered until release()."""

    def __init__(self, running, room, closing):
        self.url, self.service, self.room, self._closing = running.url, running.service, room, closing
        self._gate = threading.Event()
        self._gate.set()
        original = self.service.reply

        async def reply(*args, **kwargs):
            await asyncio.to_thread(self._gate.wait, PATIENCE)
            return await original(*args, **kwargs)

        self.service.reply = reply

    def guest(self, *args, **kwargs):
        there = connect(f"{self.url.replace('http', 'ws')}/room/ws", open_timeout=PATIENCE, max_queue=None)
        return Guest(self._closing.enter_context(there), *args, **kwargs)

    def hold(self):
        self._gate.clear()

    def release(self):
        self._gate.set()

    def do(self, work):
        """Have it done in the server's thread."""
        asyncio.run_coroutine_threadsafe(work, self.service.loop).result(PATIENCE)


@contextmanager
def open_room(folder, **settings):
    (folder / "tokens.yaml").write_text(ALLOWED)
    (folder / "tokens.yaml").chmod(0o600)
    rooms, config = [], small_config(folder, tokens=str(folder / "tokens.yaml"), temperature=0.0, **settings)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(app, "LiveRoom", lambda *args: rooms.append(LiveRoom(*args)) or rooms[0])
        with served(config) as running, ExitStack() as closing:
            opened = Open(running, rooms[0], closing)
            closing.callback(opened.release)
            yield opened


def alone(opened, *texts, tokens=12):
    """What a chat replies to these."""
    dialogue = Dialogue(opened.service.opened.model, BYTES, sampling=Sampling(0), max_new_tokens=tokens)
    return ["".join(dialogue.say(text)) for text in texts]


def shown(turns):
    return [(turn["user"], turn["text"], turn["reply"]) for turn in turns]
