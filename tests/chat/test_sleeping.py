"""Sleep in a chat: on command and by itself, until somebody types."""

import threading
from dataclasses import asdict, replace

import pytest
from feedback_toys import BYTES, open_learner, small_model
from helpers import run
from test_teacher import answer, chat_with

from rwkv_train import save_model
from rwkv_train.chat.sleeping import told_slept
from rwkv_train.data.templates import Template
from rwkv_train.data.text_format import TextFormat
from rwkv_train.feedback import Learner, Slept

SLEPT = Slept(True, "better", [2, 4, 6], 3, 1, 2, [4], 0.25, 0.125, 5, 12.25, "0" * 64)


@pytest.fixture
def dreaming(tmp_path, monkeypatch):
    """A learner that is asleep from `begun` on until it is told to stop, then has `slept`."""
    learner, begun, slept = open_learner(tmp_path), threading.Event(), []

    def sleep(stop):
        begun.set()
        while not stop():
            pass
        return slept.pop() if slept else None

    monkeypatch.setattr(learner, "sleep", sleep)
    yield learner, begun, slept
    learner.close()


def test_a_line_that_is_typed_wakes_the_learner(dreaming, tmp_path, capsys):
    learner, begun, _ = dreaming
    chat, teacher = chat_with(learner, tmp_path)
    with teacher:
        chat.add(teacher.commands(), teacher.settings(), before_answer=teacher.swap)
        assert answer(chat, "/sleep") == "sleeping; type anything to end it"
        assert begun.wait(60)
        assert answer(chat, "/history") == "nothing was learnt yet"
        teacher.background.wait()
    assert "woken up, nothing was changed" in capsys.readouterr().out


def test_the_end_of_a_chat_wakes_the_learner(dreaming, tmp_path, capsys):
    learner, begun, _ = dreaming
    chat, teacher = chat_with(learner, tmp_path)
    with teacher:
        chat.add(teacher.commands(), teacher.settings(), before_answer=teacher.swap)
        answer(chat, "/sleep")
        assert begun.wait(60)
    assert "woken up, nothing was changed" in capsys.readouterr().out


def test_what_a_sleep_came_to_is_told(dreaming, tmp_path, monkeypatch):
    learner, *_ = dreaming
    monkeypatch.setattr(learner, "sleep", lambda stop: SLEPT)
    chat, teacher = chat_with(learner, tmp_path, wait=True)
    with teacher:
        chat.add(teacher.commands(), teacher.settings(), before_answer=teacher.swap)
        told = answer(chat, "/sleep")
        for accepted in (True, False):
            learner.journal.append("slept", **(asdict(SLEPT) | {"accepted": accepted}))
        assert answer(chat, "/history").splitlines() == [
            "2: slept on 3 corrections",
            "3: slept on 3 corrections (not kept: better)",
        ]
        monkeypatch.setattr(learner, "undo", lambda count: [2])
        ledger = {2: learner.journal.records[1]}
        monkeypatch.setattr(learner.journal.ledger, "sequence", ledger)
        assert answer(chat, "/undo") == "forgot 2 (a sleep); the weights are as before"
    assert told == told_slept(SLEPT) == (
        "3 corrections were learnt together (best after epoch 5, 12.2 s)\n"
        "right answers 1 -> 2 of 3, drift elsewhere 0.25 -> 0.12 nats a token\n"
        "no longer right: 4"
    )  # fmt: skip
    assert told_slept(replace(SLEPT, epochs=0)).startswith("3 corrections were learnt together (12.2 s)\n")


def test_the_corrections_of_a_profile_are_learnt_together_from_the_command_line(tmp_path, monkeypatch, capsys):
    save_model(small_model(), tmp_path / "model.pth")
    TextFormat(BYTES, Template()).save(tmp_path)
    argv = ["feedback", f"--model={tmp_path / 'model.pth'}", f"--folder={tmp_path / 'home'}"]
    code, _, err = run(*argv, capsys=capsys)
    assert code == 1 and "nothing to do; give --file to learn corrections, or --sleep to learn all together" in err
    code, _, err = run(*argv, "--sleep", capsys=capsys)
    assert code == 1 and "nothing to sleep on: fewer than two corrections" in err
    monkeypatch.setattr(Learner, "sleep", lambda self: SLEPT)
    assert run(*argv, "--sleep", capsys=capsys) == (0, told_slept(SLEPT) + "\n", "")


def test_it_sleeps_by_itself_when_idle_for_as_long_as_the_profile_says_and_only_if_there_is_something_new(
    dreaming, tmp_path, capsys, monkeypatch
):
    learner, begun, slept = dreaming
    chat, teacher = chat_with(learner, tmp_path)
    ledger = learner.journal.ledger
    with teacher:
        chat.add(teacher.commands(), teacher.settings(), before_answer=teacher.swap)
        sleeper = teacher._sleeper
        ledger.sequence, ledger.tired = {2: {"kind": "received"}, 4: {"kind": "received"}}, True
        assert not sleeper.due(chat.typed + 1e9)  # never, unless the profile says so
        assert answer(chat, "/settings sleep_after 2") == "sleep_after 2.0"
        assert not sleeper.due(chat.typed + 119) and sleeper.due(chat.typed + 120)
        for name, other in [("tired", False), ("waiting", {6: {}}), ("sequence", {2: {"kind": "received"}})]:
            with monkeypatch.context() as patched:
                patched.setattr(ledger, name, other)
                assert not sleeper.due(chat.typed + 120), name
        slept.append(SLEPT)
        sleeper.look(chat.typed + 120)
        assert begun.wait(60) and not sleeper.due(chat.typed + 120)  # it does already
        answer(chat, "/help")
        teacher.background.wait()
        assert told_slept(SLEPT) in capsys.readouterr().out and sleeper.due(chat.typed + 120)
        monkeypatch.setattr(learner, "sleep", lambda stop: 1 / 0)
        sleeper.look(chat.typed + 120)
        teacher.background.wait()
        assert "sleep failed, nothing was changed: ZeroDivisionError" in capsys.readouterr().out
        assert not sleeper.due(chat.typed + 120)
