"""The live room over real sockets: who sees what, and who may do what."""

import json
import socket

import pytest
from feedback_toys import BYTES
from live_room import PATIENCE, alone, open_room, shown
from served import TOKENS, small_config
from websockets.exceptions import ConnectionClosed

from rwkv_train.feedback import Correction
from rwkv_train.serve import live
from rwkv_train.serve.command import open_server

UPGRADE = b"""GET /room/ws HTTP/1.1\r
Host: localhost\r
Upgrade: websocket\r
Connection: Upgrade\r
Sec-WebSocket-Version: 13\r
Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r
\r
"""
pytestmark = pytest.mark.usefixtures("careless")


@pytest.fixture
def opened(tmp_path):
    with open_room(tmp_path) as opened:
        yield opened


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
        waiting = bob.queued(text)
    ann.say("d")
    assert ann.hear("refused")["why"] == "too many waiting"
    assert [(w["user"], w["text"]) for w in waiting["waiting"]] == [("ann", "c"), ("bob", "b"), ("ann", "a")]
    assert opened.guest("eve").hear("queue") == waiting
    bob.say("e")
    bob.queued("e")
    opened.release()
    assert [bob.hear("asked")["text"] for _ in range(3)] == ["e", "c", "b"]
    bob.hear("answered", text="b")
    opened.hold()
    bob.ask("policy", type="policy", pick="fifo")
    assert bob.ask("error", type="policy", queue=0)["message"] == "queue must be at least 1, found 0"
    assert "pick" in bob.ask("error", type="policy", pick="best")["message"]
    bob.say("x")
    bob.hear("asked", text="x")
    for text in "yz":
        bob.say(text)
    bob.queued("z")
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
    wanted = {
        "ann": "somebody here",
        "Ａｎｎ": "somebody here",
        "OP": "an operator's name",
        "owner": "an operator's name",
        "a:b": "no colon",
        "a" * 41: "at most 40 characters",
    }
    for number, (name, why) in enumerate(wanted.items()):
        guest = opened.guest(token=None)
        assert why in guest.ask("refused", type="hello", token=TOKENS["viewer"], name=name)["why"]
        assert guest.ask("welcome", type="hello", token=TOKENS["viewer"], name=f"another {number}")
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
    op.queued("b")
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
    assert early.ask("welcome", type="hello", token=TOKENS["viewer"], name="early")["name"] == "early"
    guest.socket.send(" " * (live.LARGEST + 1))
    assert guest.closed() == live.TOO_LARGE
    fast = opened.guest("fast")
    with pytest.raises(ConnectionClosed):
        for _ in range(10 * live.MESSAGES):
            fast.ask("refused", type="say", text="")
    assert fast.closed() == live.TOO_FAST
    monkeypatch.setattr(live, "MOST", 0)
    late = opened.guest(token=None)
    late.send(type="hello", token=TOKENS["viewer"], name="late")
    assert late.closed() == live.LATER
    monkeypatch.setattr(live, "HELLO_SECONDS", 0)
    assert opened.guest(token=None).closed() == live.NO_HELLO


def test_who_does_not_read_holds_nobody(opened):
    ann, audience = opened.guest("ann"), opened.room.audience
    hello = json.dumps({"type": "hello", "token": TOKENS["viewer"], "name": "silent"}).encode()
    with socket.socket() as silent:
        silent.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        silent.connect(("127.0.0.1", int(opened.url.rpartition(":")[2])))
        silent.settimeout(PATIENCE)
        silent.sendall(UPGRADE)
        assert b" 101 " in silent.recv(4096)
        silent.sendall(bytes([0x81, 0x80 | len(hello), 0, 0, 0, 0]) + hello)
        assert b"welcome" in silent.recv(4096)
        assert len(audience) == 2

        async def tell():
            audience.tell("error", message="x" * 10_000)

        while len(audience) == 2:  # what waits for one viewer is bounded
            opened.do(tell())
            ann.hear("error")
        ann.say("hi")
        assert ann.hear("answered")["reply"]


def test_limits_that_cannot_be(tmp_path):
    with pytest.raises(ValueError, match="queue must be at least 1, found 0"):
        open_server(small_config(tmp_path, queue=0))
