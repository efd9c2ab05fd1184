"""Turns and their states: in memory, on the disk, and gone when there is no room."""

import errno
import sqlite3

import pytest
import torch
from feedback_toys import BYTES, small_model

from rwkv_train.data.templates import Template
from rwkv_train.feedback.decode import Form
from rwkv_train.generation.prefill import prefill
from rwkv_train.serve.conversation import Conversations
from rwkv_train.serve.sessions import Sessions, Turn, key_of

MODEL = small_model(generation="rwkv7")
SIZE = sum(part.nbytes for part in MODEL.zero_state(1))


def user(text):
    return {"role": "user", "content": text}


def turn(name, parent=None, owner="me", said="hi", reply="yes", version="v", ended=True):
    ids = BYTES.encode(f" {reply}\n\n" if ended else f" {reply}")
    begin = parent.length if parent else 0
    prompt = [*([] if parent else [0]), *BYTES.encode(f"User: {said}\n\nAssistant:")]
    key = key_of(parent.key if parent else f"{owner}\nm", [user(said)], reply)
    names = parent and parent.id
    length = begin + len(prompt) + len(ids)
    return Turn(name, names, owner, key, "m", version, [user(said)], prompt, reply, ids, ended, length=length)


def state_after(ids):
    return prefill(MODEL, ids)[1]


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture
def sessions(tmp_path):
    found = Sessions(tmp_path / "s.sqlite")
    yield found
    found.close()


def test_a_turn_is_there_after_a_restart_to_the_bit(sessions):
    one, state = turn("r1"), state_after([1, 2, 3])
    sessions.add(one, state)
    again = Sessions(sessions.path)  # as after a crash: nobody has closed the other
    assert again.get("r1", "me") == one and again.find(one.key) == one and equal(again.state("r1"), state)
    assert again.get("r1", "another") is None and not again.delete("r1", "another")
    again.close()


def test_states_are_let_go_of_where_there_is_no_room(tmp_path):
    sessions = Sessions(tmp_path / "s.sqlite", memory=2 * SIZE, disk=int(3.9 * (SIZE + 500)))
    states = [state_after([n, n]) for n in range(5)]
    for n in range(3):
        sessions.add(turn(f"r{n}"), states[n])
    assert equal(sessions.state("r0"), states[0])  # out of memory, on the disk, and now used
    for n in range(3, 5):
        sessions.add(turn(f"r{n}"), states[n])
    kept = [n for n in range(5) if sessions.state(f"r{n}") is not None]
    assert kept == [0, 3, 4] and all(equal(sessions.state(f"r{n}"), states[n]) for n in kept)
    turns, memory, disk = sessions.sizes
    assert turns == 5 and memory <= 2 * SIZE and disk <= 3.9 * (SIZE + 500)
    assert sessions.get("r1", "me").reply == "yes"  # its transcript stays
    sessions.close()
    assert Sessions(sessions.path).sizes[2] == disk


def test_a_full_disk_keeps_the_turn_in_memory(sessions, monkeypatch):
    class Full:
        def execute(self, line, *rest):
            if not line.startswith("SELECT"):
                raise sqlite3.OperationalError("database or disk is full")
            return real.execute(line, *rest)

    real = sessions._db
    state, other = state_after([7]), state_after([8])
    sessions.add(turn("r0"), other)
    sessions._forget("r0")
    monkeypatch.setattr(sessions, "_db", Full())
    with pytest.raises(OSError, match="disk is full; free some space"):
        sessions.add(turn("r1"), state)
    assert equal(sessions.state("r1"), state)
    assert equal(sessions.state("r0"), other)  # to read it nothing has to be written
    with pytest.raises(OSError, match="free some space"):
        sessions.delete("r0", "me")
    assert sessions.get("r0", "me")


def test_what_else_cannot_be_written_is_not_called_a_full_disk(sessions):
    other = sqlite3.connect(sessions.path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    sessions._db.execute("PRAGMA busy_timeout=1")
    with pytest.raises(OSError, match="locked") as error:
        sessions.add(turn("r1"), None)
    assert error.value.errno != errno.ENOSPC and "space" not in str(error.value)
    other.close()
    sessions.add(turn("r1"), None)


def test_a_file_that_is_none_is_refused(tmp_path):
    (tmp_path / "s.sqlite").write_bytes(b"something else, and long enough to be looked at " * 99)
    with pytest.raises(ValueError, match="move it away"):
        Sessions(tmp_path / "s.sqlite")


@pytest.fixture
def talks(sessions):
    return Conversations(BYTES, Template(), sessions)


def ids_of(*messages):
    form = Form(BYTES)
    return [0, *form.dialogue(list(messages)), *BYTES.encode("Assistant:")]


def test_only_what_is_new_is_read(talks):
    one = turn("r1")
    state = state_after(one.read)
    talks.sessions.add(one, state)
    asked = talks.after(one, [user("and?")], "v")
    assert asked.read == asked.prompt == BYTES.encode("User: and?\n\nAssistant:") and equal(asked.state, state)
    sent = [user("hi"), {"role": "assistant", "content": "yes"}, user("and?")]
    assert talks.whole(sent, "me\nm", "v") == asked
    assert asked.key_with("so") == key_of(one.key, [user("and?")], "so")
    assert talks.whole(sent, "another\nm", "v").read == ids_of(*sent)  # what others said is not known
    assert asked.length == len(ids_of(*sent))


def test_another_version_reads_the_transcript(talks):
    one = turn("r1")
    two = turn("r2", one, said="so?", reply="no", ended=False)
    for each in (one, two):
        talks.sessions.add(each, state_after(each.read))
    asked = talks.after(two, [user("and?")], "newer")
    assert asked.state is None and asked.read == [*one.read, *two.read, *asked.prompt]
    assert asked.prompt == BYTES.encode("\n\nUser: and?\n\nAssistant:")  # the reply before had not ended itself
    assert len(asked.read) == asked.length


def test_a_turn_that_was_deleted_is_missed_only_where_it_is_read(talks):
    one = turn("r1")
    two = turn("r2", one)
    for each in (one, two):
        talks.sessions.add(each, state_after(each.read))
    assert talks.sessions.delete("r1", "me")
    assert talks.after(two, [user("and?")], "v").state is not None
    with pytest.raises(ValueError, match="r1 before r2 was deleted"):
        talks.after(two, [user("and?")], "newer")


def test_the_context_of_a_correction_is_the_dialogue_before_the_question(talks):
    one = turn("r1")
    talks.sessions.add(one, None)
    asked = talks.after(one, [{"role": "system", "content": "Be kind."}, user("so?")], "v")
    two = Turn("r2", "r1", "me", "k", "m", "v", asked.messages, asked.prompt, "no", BYTES.encode(" no"))
    said = [user("hi"), {"role": "assistant", "content": "yes"}, {"role": "system", "content": "Be kind."}]
    assert talks.context(two) == Form(BYTES).dialogue(said)
    assert talks.context(one) == []


def test_a_conversation_with_replies_of_others_is_known_after_its_first_turn(talks):
    """As where a reply was edited, or examples come first."""
    sent = [user("hi"), {"role": "assistant", "content": "edited"}, user("and?")]
    asked = talks.whole(sent, "me\nm", "v")
    assert asked.parent is None and asked.read == ids_of(*sent)
    ids = BYTES.encode(" so\n\n")
    one = Turn("r1", None, "me", asked.key_with("so"), "m", "v", asked.messages, asked.prompt, "so", ids, True)
    talks.sessions.add(one, state_after(one.read))
    more = [*sent, {"role": "assistant", "content": "so"}, user("then?")]
    assert talks.whole(more, "me\nm", "v").read == BYTES.encode("User: then?\n\nAssistant:")
    assert talks.whole([*sent[:1], {"role": "assistant", "content": "other"}, *more[2:]], "me\nm", "v").parent is None


def test_a_conversation_that_is_sent_whole_needs_no_turn_that_was_deleted(talks):
    one = turn("r1")
    two = turn("r2", one, said="so?", reply="no")
    for each in (one, two):
        talks.sessions.add(each, state_after(each.read))
    assert talks.sessions.delete("r1", "me")
    replies = [{"role": "assistant", "content": text} for text in ("yes", "no")]
    sent = [user("hi"), replies[0], user("so?"), replies[1], user("and?")]
    assert talks.whole(sent, "me\nm", "newer").read == ids_of(*sent)
    assert talks.whole(sent, "me\nm", "v").state is not None
