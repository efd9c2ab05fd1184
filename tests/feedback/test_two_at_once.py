"""Learning beside answering: nothing shared is changed, failures are told and block nothing, versions change whole."""

import threading

import pytest
import torch
from feedback_toys import BYTES, DIALOGUES, QUICK, open_learner, rehearsal_set, small_model

from rwkv_train.feedback import Learner
from rwkv_train.feedback.background import Background, in_a_line
from rwkv_train.feedback.curvature import Curvature
from rwkv_train.feedback.trainable import localised_names, upper_names


def test_a_model_may_answer_while_its_curvature_is_measured(monkeypatch, generation):
    """In another thread, between the forward and the backward of every batch."""
    model = small_model(generation=generation)
    names = upper_names(model), localised_names(model)
    alone, cross_entropy, asked = Curvature.measure(model, *names, DIALOGUES), torch.nn.functional.cross_entropy, []

    def answer_first(*args, **kwargs):
        thread = threading.Thread(target=lambda: asked.append(model(torch.tensor([[1, 2]]))[0]))
        thread.start()
        thread.join()
        return cross_entropy(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", answer_first)
    beside = Curvature.measure(model, *names, DIALOGUES)
    assert all(torch.equal(beside.tensors[name], tensor) for name, tensor in alone.tensors.items())
    assert asked and torch.equal(asked[0], model(torch.tensor([[1, 2]]))[0]) and not asked[0].requires_grad


@pytest.mark.parametrize("error", [ValueError("a\nb"), KeyError("k"), IndexError(), MemoryError(), RuntimeError("r")])
def test_a_job_that_fails_is_told_and_the_next_one_runs(error):
    told, done = [], []

    def fail():
        raise error

    def tell(found):
        told.append(in_a_line(found))
        raise BrokenPipeError  # nor does a failure to tell it end the thread

    background = Background(tell)
    background.submit(fail)
    background.submit(lambda: done.append(1))
    background.wait()
    background.close()
    assert done == [1] and len(told) == 1
    assert told[0] == {"ValueError": "a b", "KeyError": "KeyError: 'k'", "RuntimeError": "RuntimeError: r"}.get(
        type(error).__name__, type(error).__name__
    )


def failing_for(learner: Learner, question: str, monkeypatch) -> None:
    """Let a learner's steps raise for one question."""
    learn = learner._learn

    def learn_or_fail(model, received, lesson, *tick):
        if received.item.question == question:
            raise IndexError("a bug")
        return learn(model, received, lesson, *tick)

    monkeypatch.setattr(learner, "_learn", learn_or_fail)


def test_a_correction_that_fails_is_recorded_with_the_reason_and_blocks_nothing(tmp_path, monkeypatch):
    learner = open_learner(tmp_path)
    failing_for(learner, "sun?", monkeypatch)
    with pytest.raises(IndexError):
        learner.learn(QUICK[0])
    assert (
        learner.model is learner.base
        and learner.active() == []
        and learner.journal.records[-1]["why"] == "IndexError: a bug"
    )
    assert learner.learn(QUICK[1]).accepted
    weights = learner.weights
    learner.close()
    again = open_learner(tmp_path)
    assert again.weights == weights and [r["question"] for r in again.learnt()] == ["ice?"]
    with pytest.raises(ValueError, match="no correction with the number 2 waits"):
        again.commit(2)
    again.close()


def test_what_was_received_before_a_crash_and_fails_does_not_keep_a_profile_from_opening(tmp_path, monkeypatch, capsys):
    learner = open_learner(tmp_path)
    for correction in QUICK[:2]:
        learner.receive(correction)
    learner.close()
    learn = Learner._learn

    def fail_once(self, model, received, lesson, *tick):
        if received.item.question == "sun?":
            raise RuntimeError("out of memory")
        return learn(self, model, received, lesson, *tick)

    monkeypatch.setattr(Learner, "_learn", fail_once)
    again = open_learner(tmp_path)
    assert "2 was not learnt: RuntimeError: out of memory" in capsys.readouterr().err
    assert [r["question"] for r in again.learnt()] == ["ice?"] and again.waiting() == []
    again.close()


def test_an_undo_leaves_alone_what_waits_and_replaces_the_model_as_a_whole(tmp_path, monkeypatch):
    learner = open_learner(tmp_path)
    for correction in QUICK[:2]:
        assert learner.learn(correction).accepted
    before, seen, learn = learner.model, [], learner._learn
    waits = learner.receive(QUICK[2])
    for file in (tmp_path / "profile" / "snapshots").iterdir():
        file.unlink()

    def look(*args):
        seen.append(learner.model is before)
        return learn(*args)

    monkeypatch.setattr(learner, "_learn", look)
    learner.undo()
    assert seen == [True] and learner.model is not before
    assert [r["question"] for r in learner.learnt()] == ["sun?"] and [r["id"] for r in learner.waiting()] == [waits]
    assert learner.commit(waits).accepted and learner.answer("sea?") == "wet"
    learner.close()


def test_an_undo_that_fails_changes_nothing(tmp_path, monkeypatch):
    learner = open_learner(tmp_path)
    for correction in QUICK[:2]:
        learner.learn(correction)
    before, records = learner.model, list(learner.journal.records)
    for file in (tmp_path / "profile" / "snapshots").iterdir():
        file.unlink()
    failing_for(learner, "sun?", monkeypatch)
    with pytest.raises(IndexError):
        learner.undo()
    assert learner.model is before and learner.journal.records == records
    learner.close()


def test_a_correction_learnt_late_is_replayed_in_the_order_of_learning(tmp_path):
    """As after a failure that could not even be recorded: it is learnt at the next start, after later ones."""
    model = small_model()
    learner = open_learner(tmp_path)
    late, early = learner.receive(QUICK[0]), learner.receive(QUICK[1])
    assert learner.commit(early).accepted and learner.commit(late).accepted
    weights = learner.weights
    learner.close()
    for file in (tmp_path / "profile" / "snapshots").iterdir():
        file.unlink()
    again = Learner(model, BYTES, tmp_path / "profile", rehearsal=rehearsal_set(model))
    assert again.weights == weights and [r["id"] for r in again.learnt()] == [early, late]
    again.close()
