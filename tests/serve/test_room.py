"""The live room over real sockets: who sees what, who may do what, and what of it lasts."""

import asyncio
import io
import json
import queue
import socket
import threading
from contextlib import ExitStack, asynccontextmanager, contextmanager

import pytest
import uvicorn
from fastapi import FastAPI
from feedback_toys import BYTES
from served import TOKENS, small_config
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from rwkv_train.chat.dialogue import Dialogue
from rwkv_train.feedback import Correction
from rwkv_train.generate import Sampling
from rwkv_train.serve import live, room_dialogue
from rwkv_train.serve.batcher import End
from rwkv_train.serve.command import open_server
from rwkv_train.serve.connections import make_config
from rwkv_train.serve.errors import ApiError
from rwkv_train.serve.room import LiveRoom
from rwkv_train.serve.tokens import Rights, Tokens

PATIENCE = 60  # seconds until a test gives up
RIGHTS = {
    TOKENS["viewer"]: Rights("viewer", talk=True),
    TOKENS["owner"]: Rights("owner", True, True, True),
    TOKENS["stranger"]: Rights("stranger", operate=True),
}
LONG = {"reply_tokens": 10**6, "most_tokens": 10**6}  # no reply ends by itself before a test does

pytestmark = pytest.mark.usefixtures("careless")


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

    def closed(self):
        """The code that the socket is closed with."""
        with pytest.raises(ConnectionClosed):
            while True:
                self.socket.recv(PATIENCE)
        return self.socket.close_code


class Open:
    """A server with a room, and who is in it. hold(): no message is answered until release()."""

    def __init__(self, service, room, port, closing):
        self.service, self.room, self.port, self._closing = service, room, port, closing
        self._gate = threading.Event()
        self._gate.set()
        original = service.reply

        async def reply(*args, **kwargs):
            await asyncio.to_thread(self._gate.wait, PATIENCE)
            return await original(*args, **kwargs)

        service.reply = reply

    def guest(self, *args, sock=None, **kwargs):
        there = f"ws://127.0.0.1:{self.port}/room/ws"
        return Guest(self._closing.enter_context(connect(there, sock=sock, open_timeout=PATIENCE)), *args, **kwargs)

    def hold(self):
        self._gate.clear()

    def release(self):
        self._gate.set()

    def do(self, work):
        """Have it done in the server's thread."""
        asyncio.run_coroutine_threadsafe(work, self.service.loop).result(PATIENCE)


@contextmanager
def open_room(folder, tokens=RIGHTS, **settings):
    config = small_config(folder, temperature=0.0, **settings)
    service, guests, begun = open_server(config).service, ExitStack(), threading.Event()
    room = LiveRoom(service, config)

    @asynccontextmanager
    async def lifespan(app):
        async with service, room:
            begun.set()
            yield

    app = FastAPI(lifespan=lifespan)
    app.state.tokens = Tokens(tokens)
    room.attach(app)
    listening = socket.create_server(("127.0.0.1", 0))
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    server = uvicorn.Server(make_config(app, shutdown_seconds=1))
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    opened = Open(service, room, listening.getsockname()[1], guests)
    try:
        assert begun.wait(PATIENCE)
        yield opened
    finally:
        opened.release()
        server.should_exit = True
        thread.join()
        guests.close()
        listening.close()


@pytest.fixture
def opened(tmp_path):
    with open_room(tmp_path) as opened:
        yield opened


def alone(opened, *texts, tokens=12):
    """What a chat replies to these."""
    dialogue = Dialogue(opened.service.opened.model, BYTES, sampling=Sampling(0), max_new_tokens=tokens)
    return ["".join(dialogue.say(text)) for text in texts]


def shown(turns):
    return [(turn["user"], turn["text"], turn["reply"]) for turn in turns]


def test_all_see_the_same_and_it_is_the_dialogue_of_a_chat(opened):
    ann, bob = opened.guest("ann"), opened.guest("bob", "owner")
    assert ann.welcome | {"transcript": [], "muted": []} == ann.welcome and not ann.welcome["operator"]
    assert bob.welcome["operator"] and bob.welcome["policy"] == {"pick": "fifo", "queue": 50, "per_user": 3, "rate": 10}
    said = [("ann", "hi you"), ("bob", "//2?"), ("ann", "what: \t now?\nhm")]
    texts = ["hi you", "/2?", "what:   now? hm"]
    replies = alone(opened, *texts)
    typed = [texts[0], "//2?", texts[2]]
    for (user, text), kept, reply in zip(said, typed, replies, strict=True):
        (ann if user == "ann" else bob).say(text)
        for guest in (ann, bob):
            assert guest.hear("asked") == {"type": "asked", "user": user, "text": kept}
            guest.before.clear()
            answered = guest.hear("answered")
            assert (answered["user"], answered["text"], answered["reply"]) == (user, kept, reply)
            assert "".join(m["text"] for m in guest.before if m["type"] == "piece") == reply
    late = opened.guest("late")
    assert shown(late.welcome["transcript"]) == [(u, t, r) for (u, _), t, r in zip(said, typed, replies, strict=True)]
    turn = opened.room.dialogue.last
    assert "ann" not in BYTES.decode(turn.read) and turn.messages == [{"role": "user", "content": texts[2]}]
    assert opened.service.sessions.get(turn.id, "viewer") is None


def test_who_is_answered_next(opened):
    ann, bob = opened.guest("ann"), opened.guest("bob", "owner")
    opened.hold()
    ann.say("first")
    bob.hear("asked")
    assert bob.ask("policy", type="policy", pick="newest", per_user=2, queue=3)["rate"] == 10
    for guest, text in ((ann, "a"), (bob, "b"), (ann, "c")):
        guest.say(text)
        guest.hear("queue")
    ann.say("d")
    assert ann.hear("refused")["why"] == "too many waiting"
    waiting = bob.hear("queue", waiting=[{"user": u, "text": t} for u, t in (("ann", "c"), ("bob", "b"), ("ann", "a"))])
    assert opened.guest("eve").hear("queue") == waiting
    bob.say("e")
    opened.release()
    assert [bob.hear("asked")["text"] for _ in range(3)] == ["e", "c", "b"]
    bob.hear("answered", text="b")
    opened.hold()
    bob.ask("policy", type="policy", pick="fifo")
    assert bob.ask("error", type="policy", queue=0)["message"] == "queue must be at least 1, found 0"
    assert "pick" in bob.ask("error", type="policy", pick="best")["message"]
    for text in "xyz":
        bob.say(text)
        bob.hear("queue")
    opened.release()
    assert [bob.hear("answered")["text"] for _ in range(3)] == ["x", "y", "z"]


def test_viewers_operate_nothing(opened):
    ann, op = opened.guest("ann"), opened.guest("op", "stranger")
    for message in (
        {"type": "policy", "queue": 1},
        {"type": "mute", "user": "op", "on": True},
        {"type": "teach", "answer": "a", "question": "b"},
        {"type": "skip"},
        {"type": "undo"},
    ):
        assert ann.ask("refused", **message)["why"] == "not an operator"
    for text in ("/teach a => b", "/quit"):
        ann.say(text)
        assert ann.hear("refused")["why"] == "not an operator"
    assert "may not teach" in op.ask("error", type="teach", answer="a", question="b")["message"]
    assert "may not teach" in op.ask("error", type="undo")["message"]
    assert op.ask("refused", type="say", text="hi")["why"] == "this token may not talk"
    assert op.ask("error", type="skip")["message"] == "nothing is being answered"
    owner = opened.guest("", "owner")
    assert "nothing was answered" in owner.ask("error", type="teach", answer="a")["message"]
    assert "no such reply" in owner.ask("error", type="teach", answer="a", id="room_1")["message"]
    assert "taken back" in owner.ask("error", type="undo")["message"]
    assert not opened.service.teaching.corrections("small")


def test_names(opened):
    ann = opened.guest(" A\x1bnn\u200b ")
    assert ann.welcome["name"] == "Ann" and opened.guest().welcome["name"].startswith("guest-")
    op = opened.guest("Op", "owner")
    for name, why in {
        "ann": "somebody here",
        "Ａｎｎ": "somebody here",
        "OP": "an operator's name",
        "owner": "an operator's name",
        "a:b": "no colon",
        "a" * 41: "at most 40 characters",
    }.items():
        guest = opened.guest(token=None)
        assert why in guest.ask("refused", type="hello", token=TOKENS["viewer"], name=name)["why"]
        assert guest.ask("welcome", type="hello", token=TOKENS["viewer"], name=f"not {len(name)}{name[0]}")
    op.socket.close()
    ann.socket.close()
    assert opened.guest("Ann ", "owner").welcome["name"] == "Ann"  # whether or not she has gone, it is the operator's


def test_who_is_muted_is_not_heard(opened):
    ann, op = opened.guest("ann"), opened.guest("op", "owner")
    opened.hold()
    op.say("first")
    op.hear("asked")
    for text in ("a", "b"):
        ann.say(text)
        op.hear("queue")
    assert op.ask("muted", type="mute", user="\tann", on=True)["users"] == ["ann"]
    op.hear("queue", waiting=[])
    ann.say("c")
    assert ann.hear("refused")["why"] == "muted"
    assert opened.guest().welcome["muted"] == ["ann"]
    assert op.ask("muted", type="mute", user="ann", on=False)["users"] == []
    assert "no name" in op.ask("error", type="mute", user="\n", on=True)["message"]
    ann.say("d")
    opened.release()
    assert [op.hear("answered")["text"] for _ in range(2)] == ["first", "d"]


def test_skip_breaks_a_reply_off_and_the_dialogue_goes_on(tmp_path):
    with open_room(tmp_path, **LONG) as opened:
        ann, op, replies = opened.guest("ann"), opened.guest("op", "owner"), []
        for text in ("go on", "and on"):
            ann.say(text)
            op.hear("piece")
            late = opened.guest()
            assert late.hear("asked")["text"] == text
            so_far = late.hear("piece")["text"]
            op.send(type="skip")
            answered = [guest.hear("answered") for guest in (late, ann, op)]
            assert answered[0] == answered[1] == answered[2] and answered[0]["reply"].startswith(so_far) and so_far
            replies.append(answered[0]["reply"])
        first, last = opened.service.conversations.transcript(opened.room.dialogue.last)[::2]
        assert (first["content"], last["content"]) == ("go on", "and on")
        assert opened.room.dialogue.last.status == "incomplete"

        opened.hold()
        ann.say("never begun")
        op.hear("asked")
        op.send(type="skip")
        op.send(type="policy", rate=9)
        op.hear("policy")
        opened.release()
        assert op.hear("answered")["text"] == "never begun"
        ann.say("stopped")
        seen = ann.hear("piece")["text"]
    with open_room(tmp_path, **LONG) as opened:
        transcript = opened.guest().welcome["transcript"]
        assert [turn["text"] for turn in transcript] == ["go on", "and on", "never begun", "stopped"]
        assert transcript[-1]["reply"].startswith(seen) and [t["reply"] for t in transcript[:2]] == replies


def test_it_goes_on_after_a_restart(tmp_path):
    texts = ["hi", "a?", "and?", "b?"]
    with open_room(tmp_path) as opened:
        ann = opened.guest("ann")
        replies = alone(opened, *texts)
        for text in texts[:2]:
            ann.say(text)
            ann.hear("answered")
    with open_room(tmp_path) as opened:
        ann = opened.guest("ann")
        assert shown(ann.welcome["transcript"]) == [("ann", *pair) for pair in zip(texts[:2], replies[:2], strict=True)]
        ann.say(texts[2])
        assert ann.hear("answered")["reply"] == replies[2]
        before = opened.room.dialogue.last.id
        ann.say("lost")
        ann.hear("answered")
        opened.service.sessions.delete(
            opened.room.dialogue.last.id, "the room"
        )  # as if a crash had kept it from the disk
    with open_room(tmp_path) as opened:
        assert opened.room.dialogue.last.id == before
        ann = opened.guest("ann")
        ann.say(texts[3])
        assert ann.hear("answered")["reply"] == replies[3]


def test_what_operators_teach_is_learnt_before_all_and_taken_back(opened):
    ann, op = opened.guest("ann"), opened.guest("op", "owner")
    (reply,) = alone(opened, "sun?")
    elsewhere = opened.service.teaching.receive("small", "answer", Correction("a secret?", "told"))
    ann.say("sun?")
    ann.hear("answered")
    op.send(type="teach", answer="hot")
    for guest in (ann, op):
        learning = guest.hear("learning")
        assert learning["id"] > elsewhere and learning["step"] is None
        assert guest.hear("learning")["loss"] > 0
        feedback = guest.hear("learnt")["feedback"]
        assert (feedback["question"], feedback["answer"], feedback["rejected"]) == ("sun?", "hot", reply)
        assert feedback["status"] == "learnt" and feedback["response_id"] == opened.room.dialogue.last.id
        assert not any("secret" in json.dumps(message) for message in guest.before)
    op.send(type="teach", answer="cold", question="ice?")
    taught = ann.hear("learnt")["feedback"]
    ann.say("ice?")
    version = opened.service.teaching.model("small")[1]
    ann.hear("answered")
    assert opened.room.dialogue.last.version == version
    for number in (taught["id"], feedback["id"]):
        op.send(type="undo")
        assert ann.hear("undone")["ids"] == [number]
    assert "taken back" in op.ask("error", type="undo")["message"]
    assert opened.service.teaching.one("small", elsewhere)["status"] == "learnt"
    first = op.welcome["transcript"]
    op.send(type="teach", answer="warm", id=opened.room.dialogue.transcript[0]["id"])
    assert ann.hear("learnt")["feedback"]["question"] == "sun?" and not first


def test_a_dialogue_too_long_to_be_read_again_goes_on_from_its_last_turns(tmp_path):
    with open_room(tmp_path, prompt_tokens=400) as opened:
        op = opened.guest("op", "owner")
        for n in range(5):
            op.say(f"{n}" + "x" * 80)
            op.hear("answered")
        op.send(type="teach", question="sun?", answer="hot")
        op.hear("learnt")
        op.say("now?")
        answered = op.hear("answered")
        turn = opened.room.dialogue.last
        assert turn.parent is None and [m["content"] for m in turn.messages[::2]] == ["4" + "x" * 80, "now?"]
        assert not any(message["type"] == "error" for message in op.before)
        op.say("y" * 450)
        assert "at most" in op.hear("error")["message"]
        op.hear("answered")
        op.say("again")
        op.hear("answered")
        assert opened.room.dialogue.last.parent == turn.id
    with open_room(tmp_path, prompt_tokens=400) as opened:
        transcript = opened.guest().welcome["transcript"]
        assert [turn["text"][0] for turn in transcript] == ["4", "n", "a"]
        assert answered["reply"] == transcript[1]["reply"] and transcript[0]["user"] == "op"


def test_who_knocks_wrongly(opened, monkeypatch):
    for token in ("wrong", None):
        guest = opened.guest(token=None)
        guest.send(type="hello", token=token, name="x")
        assert guest.closed() == live.WRONG_TOKEN
    guest = opened.guest("ann")
    for text in (
        "{",
        "[]",
        '{"type": "sing"}',
        '{"type": "say"}',
        '{"type": "say", "text": 3}',
        '{"type": "skip", "a": 1}',
    ):
        guest.socket.send(text)
        assert "\n" not in guest.hear("error")["message"]
    guest.socket.send(b"{}")
    assert "text" in guest.hear("error")["message"]
    guest.socket.send('{"type": "say", "text": "\\ud800"}')
    assert "surrogate" in guest.hear("error")["message"]
    early = opened.guest(token=None)
    assert early.ask("error", type="say", text="hi")["message"] == "say hello first"
    guest.socket.send(" " * (live.LARGEST + 1))
    assert guest.closed() == live.TOO_LARGE
    fast = opened.guest("fast")
    with pytest.raises(ConnectionClosed):
        for _ in range(10 * live.MESSAGES):
            fast.say("")
    assert fast.closed() == live.TOO_FAST
    monkeypatch.setattr(live, "MOST", 0)
    early.send(type="hello", token=TOKENS["viewer"], name="early")
    assert early.closed() == live.LATER
    monkeypatch.setattr(live, "HELLO_SECONDS", 0)
    assert opened.guest(token=None).closed() == live.NO_HELLO


def test_who_does_not_read_holds_nobody(opened):
    small = socket.socket()
    small.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    small.connect(("127.0.0.1", opened.port))
    silent, ann = opened.guest("silent", sock=small), opened.guest("ann")
    silent.socket.recv_events_exc = None
    silent.socket.recv_messages.pause()  # its thread reads no more from the socket
    audience = opened.room.audience
    assert len(audience) == 2

    async def tell():
        audience.tell("error", message="x" * 10_000)

    for _ in range(2000):
        opened.do(tell())
        ann.hear("error")
        if len(audience) == 1:
            break
    assert len(audience) == 1
    ann.say("hi")
    assert ann.hear("answered")["reply"]


def test_a_busy_server_is_asked_again_and_a_failure_is_told(opened, monkeypatch):
    monkeypatch.setattr(room_dialogue, "BUSY_SECONDS", 0)
    ann, original, events = opened.guest("ann"), opened.service.reply, opened.service.events
    errors = [ApiError(503, "busy")] * 3 + [ApiError(400, "no")]

    async def reply(*args, **kwargs):
        if errors:
            raise errors.pop(0)
        return await original(*args, **kwargs)

    async def failing(running):
        async for event in events(running):
            yield event._replace(reason="error", error="it broke") if isinstance(event, End) else event

    opened.service.reply = reply
    ann.say("hi")
    assert ann.hear("error")["message"] == "no" and ann.hear("answered")["reply"] == ""
    opened.service.events = failing
    ann.say("hi")
    assert "it broke" in ann.hear("error")["message"]
    opened.service.events = lambda running: 1 / 0
    ann.say("hi")
    assert "mistake" in ann.hear("error")["message"]
    opened.service.events = events
    ann.say("hi")
    assert ann.hear("answered")["reply"] == alone(opened, "hi")[0]


class Pipe(io.TextIOBase):
    """What is written, block by block."""

    def __init__(self):
        self.pieces, self.gone = queue.Queue(), False

    def write(self, text):
        if self.gone:
            raise BrokenPipeError("gone")
        self.pieces.put(text)

    def block(self):
        text = ""
        while not text.endswith("\n\n"):
            text += self.pieces.get(timeout=PATIENCE)
        return text


def test_fed_from_standard_input(tmp_path, capfd):
    lines, out = queue.Queue(), Pipe()
    with open_room(tmp_path, prefix="!") as opened:
        ann, op = opened.guest("ann"), opened.guest("op", "owner")
        opened.room.feed(iter(lines.get, None), out)
        op.ask("muted", type="mute", user="eve", on=True)
        replies = alone(opened, "hi", "and you?")
        for line in (
            "\ufefftv: !hi\n",
            "just talk\n",
            "tv: hello\n",
            "eve: !hi\n",
            "tv: !/quit\n",
            f"{'n' * 501}: !a\n",
        ):
            lines.put(line)
        assert out.block() == f"tv: hi\n{replies[0]}\n\n"
        answered = ann.hear("answered")
        assert (answered["user"], answered["reply"]) == ("tv", replies[0])
        ann.say("!and you?")
        assert out.block() == f"ann: and you?\n{replies[1]}\n\n"
        lines.put("tv: !more\n")
        assert out.block().startswith("tv: more\n")
        out.gone = True
        ann.say("still?")
        ann.hear("answered")
        ann.say("there?")
        ann.hear("answered", text="there?")
        lines.put(None)
    err = capfd.readouterr().err.splitlines()
    name = "n" * 60
    assert err[:3] == [
        'not taken, muted: "eve: !hi"',
        'not taken, not an operator: "tv: !/quit"',
        f'not taken, too long: "{name}..."',
    ]
    assert err[3:] == ["answers are not printed any more: gone"]


def test_limits_that_cannot_be(tmp_path):
    config = small_config(tmp_path, queue=0)
    service = open_server(config).service
    with pytest.raises(ValueError, match="queue must be at least 1, found 0"):
        LiveRoom(service, config)
