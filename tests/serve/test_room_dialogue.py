"""The live room's one dialogue: how it goes on after breaks, restarts and failures; and standard input."""

import io
import queue

import pytest
from live_room import PATIENCE, alone, open_room, shown

from rwkv_train.serve import room_dialogue
from rwkv_train.serve.errors import ApiError
from rwkv_train.serve.jobs import End

LONG = {"reply_tokens": 10**6, "most_tokens": 10**6}  # no reply ends by itself before a test does

pytestmark = pytest.mark.usefixtures("careless")


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


def test_a_busy_server_is_asked_again_and_a_failure_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(room_dialogue, "BUSY_SECONDS", 0)
    with open_room(tmp_path) as opened:
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
    err = capfd.readouterr().err.splitlines()[2:]  # after a note on the model, and what the server says when it begins
    name = "n" * 60
    assert err[:3] == [
        'not taken, muted: "eve: !hi"',
        'not taken, not an operator: "tv: !/quit"',
        f'not taken, too long: "{name}..."',
    ]
    assert err[3:] == ["answers are not printed any more: gone"]
