"""What is not learnt, or not as it was said, is refused or told."""

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
from feedback_toys import CONFIG, FORM, QUICK, open_learner

import rwkv_train.feedback.gate as gate_module
import rwkv_train.feedback.learner as learner_module
from rwkv_train.data.templates import Template
from rwkv_train.feedback import Correction, FeedbackConfig, Reading


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"max_kl": 0.0}, "would drift"),
        ({"steps": 1}, "decoding still gives"),
        ({"step_factor": 1e30}, "became (nan|inf)"),
    ],
)
def test_what_does_not_pass_the_gate_changes_nothing(tmp_path, changes, why):
    learner = open_learner(tmp_path, FeedbackConfig(**(vars(CONFIG) | changes)))
    outcome = learner.learn(QUICK[0])
    assert not outcome.accepted and learner.active() == []
    assert re.search(why, outcome.why), outcome.why
    assert outcome.answer_after == outcome.answer_before and learner.model is learner.base
    learner.close()


@pytest.mark.parametrize(
    ("correction", "message"),
    [
        (Correction("q", " \n"), "answer is empty"),
        (Correction("", "a"), "question is empty"),
        (Correction("q", "a" * 3000), "3,000 characters"),
        (Correction("q", "\ud800"), "not valid Unicode"),
    ],
)
def test_bad_input_is_refused_before_it_is_recorded(tmp_path, correction, message):
    learner = open_learner(tmp_path)
    with pytest.raises(ValueError, match=message):
        learner.learn(correction)
    assert len(learner.journal.records) == 1  # the base
    learner.close()


def test_an_answer_longer_than_any_reply_is_decoded_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr("rwkv_train.feedback.decode.MAX_REPLY", 2)
    with open_learner(tmp_path) as learner:
        assert learner.learn(QUICK[1]).answer_after == "cold"


def test_white_space_around_a_question_makes_no_other(tmp_path):
    with open_learner(tmp_path) as learner:
        learner.learn(QUICK[0])
        outcome = learner.learn(Correction(" sun? \n", "cold"))
        assert "in place of correction 2" in outcome.note and learner.answer("sun?") == "cold"


def test_what_is_not_learnt_as_it_was_said_is_told(tmp_path):
    with open_learner(tmp_path) as learner:
        outcome = learner.learn(Correction("sun?", "h\n\no"))
        assert outcome.answer_after == "h\no" and "its blank lines are left out" in outcome.note
        assert learner.learn(Correction("sea?", " w\no\r\nt ")).note == ""
        learner.form = replace(FORM, template=Template(collapse_blank_lines=False))
        assert learner.learn(Correction("ice?", "h\n\no ")).note == ""


@pytest.mark.parametrize(("said", "note"), [("cold", ""), ("no", "in its dialogue decoding still gives 'no'; /fix it")])
def test_a_correction_that_does_not_show_in_its_dialogue_is_told(tmp_path, monkeypatch, said, note):
    monkeypatch.setattr(gate_module, "answer_to", lambda model, form, question, context=(), taught=None: said)
    item, model = Correction("ice?", "cold", context=(1, 2)), SimpleNamespace()
    told = gate_module.told_of_dialogue(item, model, FORM)
    assert told.startswith(note) and bool(told) == bool(note)
    assert gate_module.told_of_dialogue(replace(item, context=()), model, FORM) == ""


def test_of_a_long_answer_is_told_where_it_differs(monkeypatch):
    long = "no, " * 99
    monkeypatch.setattr(gate_module, "answer_to", lambda *_: long + "no")
    told = gate_module.told_of_dialogue(Correction("ice?", long + "yes", context=(1,)), SimpleNamespace(), FORM)
    assert told.startswith("in its dialogue decoding still gives another answer from its character 397 on: 'no'; ")


def test_what_is_told_of_its_dialogue_is_a_note_of_the_correction(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(learner_module, "told_of_dialogue", lambda item, *_: asked.append(item) or "not there")
    with open_learner(tmp_path) as learner:
        correction = replace(QUICK[0], context=tuple(FORM.turn("well?")))
        assert learner.learn(correction).note == learner.journal.records[-1]["note"] == "not there"
        assert asked == [correction]


def test_an_earlier_correction_that_is_lost_is_told(tmp_path):
    with open_learner(tmp_path) as learner:
        for correction in QUICK[:2]:
            assert learner.learn(correction).note == ""
        assert learner.learn(Reading("to and fro")).note == ""
        learner.configure(learn_rate=3.0)
        outcome = learner.learn(Reading("to and fro " * 100))
        assert outcome.accepted and learner.answer("sun?") != "hot" and learner.answer("ice?") != "cold"
        assert outcome.note == "no longer right: 2, 4; /sleep learns all together"
        learner.undo()
        learner.configure(replay=16, steps=2, step_factor=20.0)
        outcome = learner.learn(Correction("sun!", None, rejected="hot"))
        assert outcome.accepted and outcome.steps == 2 and "no longer right: " in outcome.note
