"""Corrections that are learnt while the chat goes on: what is told, what /history says, and that nothing ends it."""

import threading

import pytest
from feedback_toys import QUICK, open_learner

from rwkv_train.chat.dialogue import Dialogue
from rwkv_train.chat.feedback_commands import Teacher
from rwkv_train.chat.session import Chat
from rwkv_train.feedback.background import Background
from rwkv_train.generate import Sampling


def chat_with(learner, tmp_path, wait=False) -> tuple[Chat, Teacher]:
    chat = Chat(Dialogue(learner.model, learner.form.tokenizer, sampling=Sampling(0), max_new_tokens=8), tmp_path)
    return chat, Teacher(chat, learner, wait)


def answer(chat: Chat, line: str) -> str:
    return "".join(chat.answer(line))


@pytest.fixture
def slow(tmp_path, monkeypatch):
    """A learner whose corrections fail with an IndexError for "sun?", and go on only when `go` is set."""
    learner, begun, go = open_learner(tmp_path), threading.Event(), threading.Event()
    learn = learner._learn

    def learn_or_fail(model, received, lesson, *tick):
        begun.set()
        assert go.wait(60)
        if received.item.question == "sun?":
            raise IndexError("a bug")
        return learn(model, received, lesson, *tick)

    monkeypatch.setattr(learner, "_learn", learn_or_fail)
    yield learner, begun, go
    learner.close()


def test_a_failure_is_told_the_next_is_learnt_and_history_says_which_is_which(slow, tmp_path, capsys):
    learner, begun, go = slow
    chat, teacher = chat_with(learner, tmp_path)
    with teacher:
        chat.add(teacher.commands(), teacher.settings(), before_answer=teacher.swap)
        assert answer(chat, "/teach sun? => hot") == "received as correction 2\nlearning; go on"
        answer(chat, "/teach ice? => cold")
        assert begun.wait(60)
        assert answer(chat, "/history") == "2: sun? => hot (being learnt)\n3: ice? => cold (waiting)"
        assert "0 corrections" in answer(chat, "/diff")
        exported = answer(chat, f"/export {tmp_path / 'out.jsonl'}")
        assert "wrote 0 corrections" in exported and "2 that are not learnt yet" in exported
        go.set()
        teacher.background.wait()
        told = capsys.readouterr().out
        assert "2: not learnt, nothing was changed: IndexError: a bug\n" in told and "3: learnt" in told
        assert answer(chat, "/history") == "2: sun? => hot (not learnt: IndexError: a bug)\n3: ice? => cold"
        assert answer(chat, "ice?") == "cold" and chat.dialogue.version == learner.weights[:8]


def test_what_cannot_be_recorded_is_not_called_learnt_either(slow, tmp_path, monkeypatch, capsys):
    learner, _, go = slow
    go.set()
    append = learner.journal.append

    def full(kind, **content):
        if kind == "committed":
            raise OSError(28, "No space left on device")
        return append(kind, **content)

    monkeypatch.setattr(learner.journal, "append", full)
    chat, teacher = chat_with(learner, tmp_path)
    with teacher:
        chat.add(teacher.commands(), teacher.settings(), before_answer=teacher.swap)
        answer(chat, "/teach ice? => cold")
        teacher.background.wait()
        assert "not learnt, nothing was changed: [Errno 28] No space left" in capsys.readouterr().out
        assert "ice? => cold (not learnt: [Errno 28]" in answer(chat, "/history")
        assert learner.model is learner.base


def test_a_first_measurement_that_fails_is_told_and_the_chat_goes_on(slow, tmp_path, monkeypatch, capsys):
    learner, _, go = slow
    go.set()

    def damaged(self):
        raise RuntimeError("no")

    with monkeypatch.context() as patched:
        patched.setattr(type(learner), "rehearsal", property(damaged))
        chat, teacher = chat_with(learner, tmp_path)
        teacher.__enter__()
        teacher.background.wait()
    chat.add(teacher.commands(), teacher.settings(), before_answer=teacher.swap)
    assert "could not be measured" in capsys.readouterr().out and chat.status == ""
    answer(chat, "/teach ice? => cold")
    teacher.__exit__(None, None, None)
    assert "2: learnt" in capsys.readouterr().out


@pytest.mark.parametrize("wait", [True, False])
def test_what_was_received_before_a_crash_is_learnt_and_told(slow, tmp_path, capsys, wait):
    learner, _, go = slow
    go.set()
    for correction in QUICK[:2]:
        learner.receive(correction)
    chat, teacher = chat_with(learner, tmp_path, wait)
    with teacher:
        teacher.background.wait()
        chat.add(teacher.commands(), teacher.settings(), before_answer=teacher.swap)
        assert answer(chat, "/history") == "2: sun? => hot (not learnt: IndexError: a bug)\n3: ice? => cold"
    out, err = capsys.readouterr()
    told, other = (err, out) if wait else (out, err)  # a script's answers stay one for each line
    assert "2: not learnt" in told and "3: learnt" in told and other == ""


def test_an_interrupt_while_what_waits_is_learnt_ends_the_thread(slow, tmp_path, monkeypatch, capsys):
    learner, _, go = slow
    for correction in QUICK[:2]:
        learner.receive(correction)

    def interrupted(background):
        go.set()
        raise KeyboardInterrupt

    monkeypatch.setattr(Background, "wait", interrupted)
    _, teacher = chat_with(learner, tmp_path, wait=True)
    with pytest.raises(KeyboardInterrupt), teacher:
        pass
    assert not teacher.background._thread.is_alive() and not learner.waiting()
