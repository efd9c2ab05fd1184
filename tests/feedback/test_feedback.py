"""Corrections: learnt means decoded, replayed = learnt, undone = before, nothing acknowledged is lost."""

import json
import os
import random
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from feedback_toys import BYTES, CONFIG, FORM, QUICK, open_learner, upper_matrices
from hypothesis import given, settings
from hypothesis import strategies as st

import rwkv_train.feedback.gate as gate_module
from rwkv_train.data.prepare import PrepareConfig, prepare
from rwkv_train.data.templates import Template
from rwkv_train.feedback import Correction, FeedbackConfig, Reading
from rwkv_train.feedback.decode import greedy
from rwkv_train.feedback.export import export
from rwkv_train.feedback.journal import Journal
from rwkv_train.feedback.trainable import changed, localised_names
from rwkv_train.generate import prefill


def test_corrections_are_learnt_kept_and_undone_exactly(tmp_path, generation):
    learner = open_learner(tmp_path, generation=generation)
    before, seen = learner.weights, []
    hashes = []
    for correction in QUICK:
        outcome = learner.learn(correction, received=seen.append, tick=lambda step, loss: seen.append(loss))
        assert outcome.accepted, outcome.why
        assert outcome.answer_after == correction.answer != outcome.answer_before
        assert outcome.loss_after < outcome.loss_before
        assert outcome.weights == learner.weights
        hashes.append(outcome.weights)
    assert [learner.answer(c.question) for c in QUICK] == ["hot", "cold", "wet"]  # the earlier ones as well
    assert seen[0] == learner.active()[0]["id"] and len(seen) > 3
    learner.close()

    again = open_learner(tmp_path, generation=generation)  # after a restart, from a snapshot
    assert again.weights == hashes[-1]
    for file in (tmp_path / "profile" / "snapshots").iterdir():  # and from the journal alone, past a damaged snapshot
        file.write_bytes(file.read_bytes()[:-1])
    assert again.replay() == hashes[-1]

    assert again.undo() == [again.journal.records[-1]["of"][0]]
    assert again.weights == hashes[1]
    first = again.active()[0]["id"]
    again.forget([first])
    only_second = again.weights
    assert len(again.active()) == 1 and again.answer("ice?") == "cold"
    again.undo()
    assert again.weights == before
    with pytest.raises(ValueError, match="0 corrections to undo"):
        again.undo()
    with pytest.raises(ValueError, match="no active correction has the number 99"):
        again.forget([99])
    again.close()
    assert only_second not in hashes


def test_base_model_and_serving_model_are_never_written_to(tmp_path):
    learner = open_learner(tmp_path)
    base = {k: v.clone() for k, v in learner.base.state_dict().items()}
    serving = learner.model
    learner.learn(QUICK[0])
    assert learner.model is not serving and serving is learner.base
    assert all(torch.equal(v, base[k]) for k, v in learner.base.state_dict().items())
    shared = [p is q for p, q in zip(learner.model.parameters(), learner.base.parameters(), strict=True)]
    assert sum(not s for s in shared) == 1  # two layers: one matrix is its own, the rest costs nothing
    learner.close()


def test_corrections_in_a_long_dialogue_show_in_it_in_a_new_one_and_after_other_talk(tmp_path, generation):
    before = BYTES.encode("User: something long before\n\nAssistant: yes\n\n" * 45)
    assert len(before) > 2000
    with open_learner(tmp_path, generation=generation) as learner:
        stranger = [0, *BYTES.encode("all kinds of talk. " * 20)]
        for correction in QUICK[:2]:
            outcome = learner.learn(replace(correction, context=tuple(before)))
            assert outcome.accepted, outcome.why
            for talk in ([0, *before], [0], stranger):
                state, turn = prefill(learner.model, talk)[1], FORM.turn(correction.question)
                assert FORM.shown(greedy(learner.model, FORM, [turn], state)[0]) == correction.answer, len(talk)
            before += FORM.turn(correction.question) + FORM.answer(correction.answer)


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


def test_a_profile_has_one_base_and_one_process(tmp_path):
    learner = open_learner(tmp_path)
    with pytest.raises(ValueError, match="in use by another process"):
        open_learner(tmp_path)
    learner.close()
    with pytest.raises(ValueError, match="begun with another model"):
        open_learner(tmp_path, seed=1)


def test_export_is_training_data(tmp_path):
    learner = open_learner(tmp_path)
    learner.learn(Correction("sun?", "hot", rejected="cold"))
    assert learner.export(tmp_path / "out.jsonl").chats == 1
    learner.close()
    store = prepare(PrepareConfig([str(tmp_path / "out.jsonl")], str(tmp_path / "store"), tokenizer="bytes"))
    trained = [int(t) for t, m in zip(store.tokens, store.mask, strict=True) if m]
    assert BYTES.decode(trained) == " hot\n\n"
    (pair,) = map(json.loads, (tmp_path / "out.jsonl.pairs.jsonl").read_text().splitlines())
    assert pair == {"prompt": "User: sun?\n\nAssistant:", "chosen": "hot", "rejected": "cold"}


def test_of_several_answers_to_a_question_the_last_is_exported(tmp_path):
    first, other = Correction("sun?", "hot"), Correction("sea?", "wet")
    for last, answers in [
        (Correction("sun?", "cold"), ["wet", "cold"]),
        (Correction("sun?", "hot", rejected="no"), ["hot", "wet", "hot"]),
        (Correction("sun?", None, rejected="hot"), ["wet"]),
        (Correction("sun?", None, rejected="cold"), ["hot", "wet"]),
    ]:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
        exported = export([first, other, last], FORM, path)
        written = [json.loads(line)["messages"][-1]["content"] for line in path.read_text().splitlines()]
        assert written == answers and exported.replaced == 2 + (last.answer is not None) - len(answers)


def test_killed_at_random_moments_nothing_is_lost(tmp_path):
    """More of them: python tests/tools/kill_learner.py 100"""
    from kill_learner import kill

    rng = random.Random(0)
    for _ in range(2):
        kill(tmp_path, rng)


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from feedback_toys import QUICK, open_learner
learner = open_learner(Path(sys.argv[2]))
learner.learn(QUICK[0])
steps = []

def tick(step, loss):
    steps.append(step)
    if len(steps) == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)

for correction in QUICK[1:]:
    learner.learn(correction, received=lambda number: print(number, flush=True), tick=tick)
"""


def test_a_process_killed_between_steps_loses_nothing_it_acknowledged(tmp_path):
    for name in ("killed", "whole"):
        (tmp_path / name).mkdir()
    argv = [sys.executable, "-c", KILLED, str(Path(__file__).parents[1] / "tools"), str(tmp_path / "killed"), "7"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    acknowledged = len(done.stdout.split())
    learner, whole = open_learner(tmp_path / "killed"), open_learner(tmp_path / "whole")
    for correction in QUICK[: 1 + acknowledged]:
        whole.learn(correction)
    assert [r["question"] for r in learner.active()] == [c.question for c in QUICK[: 1 + acknowledged]]
    assert learner.weights == whole.weights
    learner.close()
    whole.close()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=5), min_size=1, max_size=4), st.booleans(), st.data())
def test_a_damaged_journal_is_told_and_an_unfinished_end_is_dropped(tmp_path_factory, texts, cut, data):
    path = tmp_path_factory.mktemp("journal") / "journal.jsonl"
    journal = Journal(path)
    for text in texts:
        journal.append("received", text=text)
    journal.close()
    whole = path.read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    path.write_bytes(whole[:at] if cut else whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
    if not cut and at < len(whole) - 1:
        with pytest.raises(ValueError, match="is damaged"):
            Journal(path)
        return
    found = Journal(path)
    assert found.records == journal.records[: whole[:at].count(b"\n")]
    found.append("received", text="after")
    found.close()
    assert Journal(path).records == found.records


@pytest.mark.parametrize("failure", ["short", "fsync"])
def test_a_record_that_cannot_be_written_leaves_the_journal_as_it_was(tmp_path, monkeypatch, failure):
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append("received", text="before")
    before = journal.path.read_bytes()
    with monkeypatch.context() as patched:
        if failure == "fsync":
            patched.setattr(os, "fsync", lambda descriptor: os.fstat(-1))
        else:
            file = journal._file
            patched.setattr(
                journal, "_file", SimpleNamespace(**{n: getattr(file, n) for n in dir(file) if n[0] != "_"})
            )
            journal._file.write = lambda line: file.write(line[:5])
        with pytest.raises(OSError):
            journal.append("received", text="lost")
    assert journal.path.read_bytes() == before
    journal.append("received", text="after")
    journal.close()
    assert [(r["id"], r["text"]) for r in Journal(journal.path).records] == [(1, "before"), (2, "after")]


@pytest.mark.parametrize("trainable", ["upper", "lora", "full"])
def test_whatever_is_trained_learns_and_nothing_else_changes(tmp_path, trainable, generation):
    learner = open_learner(tmp_path, replace(CONFIG, trainable=trainable, steps=300), generation=generation)
    outcome = learner.learn(QUICK[0])
    assert outcome.accepted and learner.answer("sun?") == "hot", outcome
    ours, base = changed(learner.model, learner.base), dict(learner.base.named_parameters())
    if trainable == "lora":
        assert list(ours) == localised_names(learner.base)
        assert all(torch.linalg.matrix_rank(w - base[n], rtol=1e-4) <= 8 for n, w in ours.items())
    else:
        assert set(ours) == set(base if trainable == "full" else upper_matrices(learner.base, 1))
    hashed = learner.weights
    learner.close()
    again = open_learner(tmp_path, generation=generation)  # from the snapshot
    assert again.weights == hashed and again.answer("sun?") == "hot"
    again.undo()
    assert again.model is again.base
    again.close()


def test_a_wrong_reply_is_left_and_other_answers_are_kept(tmp_path):
    learner = open_learner(tmp_path)
    learner.learn(QUICK[0])
    outcome = learner.learn(Correction("sun?", None, rejected="hot"))
    assert outcome.accepted and outcome.answer_before == "hot" != outcome.answer_after
    with pytest.raises(ValueError, match="neither a right answer nor a wrong one"):
        learner.learn(Correction("sun?", None))
    assert learner.export(tmp_path / "out.jsonl").chats == 0  # nor an answer that is wrong by now
    learner.close()


def test_the_last_word_on_a_question_counts(tmp_path, generation):
    learner = open_learner(tmp_path, generation=generation)
    for answer in ("hot", "cold", "hot", "wet"):
        outcome = learner.learn(Correction("sun?", answer))
        assert outcome.accepted and learner.answer("sun?") == answer, outcome
    assert learner.learn(QUICK[1]).accepted and learner.answer("sun?") == "wet"
    learner.close()


def test_reading_gets_used_to_a_text_and_is_undone_and_replayed(tmp_path, generation):
    learner = open_learner(tmp_path, replace(CONFIG, learn_rate=0.01), generation=generation)
    losses = []
    outcome = learner.learn(Reading("to and fro " * 100), tick=lambda step, loss: losses.append(loss))
    assert outcome.accepted and outcome.steps == len(losses) == 9 and losses[-1] < losses[0]
    assert outcome.loss_after < outcome.loss_before
    learner.learn(QUICK[0])
    hashed = learner.weights
    for file in (tmp_path / "profile" / "snapshots").iterdir():
        file.unlink()
    assert learner.replay() == hashed
    assert learner.undo(2) and learner.model is learner.base
    assert learner.learn(Reading("to and fro " * 100)).weights == outcome.weights
    with pytest.raises(ValueError, match="text is empty"):
        learner.learn(Reading("\n"))
    learner.close()


def test_a_change_that_moves_too_much_is_scaled_down(tmp_path):
    whole = open_learner(tmp_path, replace(CONFIG, kl_weight=0.0))  # nothing else holds it back
    moved = whole.learn(QUICK[0]).drift
    whole.undo()
    whole.configure(max_kl=0.8 * moved, extra=2)
    outcome = whole.learn(QUICK[0])
    assert outcome.accepted and outcome.share < 1 and outcome.drift <= 0.8 * moved
    assert whole.answer("sun?") == "hot"
    whole.close()
    again = open_learner(tmp_path)  # settings are kept, and a replay scales as well
    assert again.config.max_kl == 0.8 * moved and again.weights == outcome.weights
    for file in (tmp_path / "profile" / "snapshots").iterdir():
        file.unlink()
    assert again.replay() == outcome.weights
    with pytest.raises(ValueError, match="must not be negative"):
        again.configure(step_factor=-1.0)
    with pytest.raises(ValueError, match="trainable must be one of"):
        again.configure(trainable="all")
    again.close()
