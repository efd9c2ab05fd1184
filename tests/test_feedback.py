"""Corrections: learnt means decoded, replayed = learnt, undone = before, nothing acknowledged is lost."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from helpers import random_model
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_train.data.prepare import PrepareConfig, prepare
from rwkv_train.feedback import Correction, FeedbackConfig, Learner
from rwkv_train.feedback.guards import Guards
from rwkv_train.feedback.journal import Journal
from rwkv_train.feedback.learner import weights_hash
from rwkv_train.feedback.steps import divergence, with_weights
from rwkv_train.tokenizer import load_tokenizer

BYTES = load_tokenizer("bytes")
GUARDS = [f"User: {q}\n\nAssistant: {a}\n\n" for q, a in [("hi", "hello"), ("up?", "no"), ("a", "b"), ("2", "4")]]
CONFIG = FeedbackConfig(rate=0.5, steps=200, loss=0.1, pull=0.01, budget=1e9, near=1, unrelated=1)
QUICK = [Correction("sun?", "hot"), Correction("ice?", "cold"), Correction("sea?", "wet")]


def learner(folder, config=CONFIG, seed=0) -> Learner:
    model = random_model(n_embd=48, vocab_size=257, seed=seed)
    guards = Guards(model, [BYTES.encode(text) for text in GUARDS], BYTES.eod)
    return Learner(model, BYTES, folder / "profile", guards, config)


def test_corrections_are_learnt_kept_and_undone_exactly(tmp_path):
    it = learner(tmp_path)
    before, seen = weights_hash(it.model), []
    hashes = []
    for correction in QUICK:
        outcome = it.learn(correction, received=seen.append, tick=lambda step, loss: seen.append(loss))
        assert outcome.accepted, outcome.why
        assert outcome.answer_after == correction.answer != outcome.answer_before
        assert outcome.loss_after < outcome.loss_before
        assert outcome.weights == weights_hash(it.model)
        hashes.append(outcome.weights)
    assert [it.answer(c.question) for c in QUICK] == ["hot", "cold", "wet"]  # the earlier ones as well
    assert seen[0] == it.active()[0]["id"] and len(seen) > 3
    it.close()

    again = learner(tmp_path)  # after a restart, from a snapshot
    assert weights_hash(again.model) == hashes[-1]
    for file in (tmp_path / "profile" / "snapshots").iterdir():  # and from the journal alone, past a damaged snapshot
        file.write_bytes(file.read_bytes()[:-1])
    assert again.replay() == hashes[-1]

    assert again.undo() == [again.journal.records[-1]["of"][0]]
    assert weights_hash(again.model) == hashes[1]
    first = again.active()[0]["id"]
    again.forget([first])
    only_second = weights_hash(again.model)
    assert len(again.active()) == 1 and again.answer("ice?") == "cold"
    again.undo()
    assert weights_hash(again.model) == before
    with pytest.raises(ValueError, match="0 corrections to undo"):
        again.undo()
    with pytest.raises(ValueError, match="no active correction has the number 99"):
        again.forget([99])
    again.close()
    assert only_second not in hashes


def test_base_model_and_serving_model_are_never_written_to(tmp_path):
    it = learner(tmp_path)
    base = {k: v.clone() for k, v in it.base.state_dict().items()}
    serving = it.model
    it.learn(QUICK[0])
    assert it.model is not serving and weights_hash(serving) == weights_hash(it.base)
    assert all(torch.equal(v, base[k]) for k, v in it.base.state_dict().items())
    shared = [p is q for p, q in zip(it.model.parameters(), it.base.parameters(), strict=True)]
    assert sum(not s for s in shared) == 1  # two layers: one matrix is its own, the rest costs nothing
    it.close()


def test_context_of_the_dialogue_is_trained_too(tmp_path):
    it = learner(tmp_path)
    context = tuple(BYTES.encode("User: something long before\n\nAssistant: yes\n\n"))
    outcome = it.learn(Correction("sun?", "hot", context))
    assert outcome.accepted, outcome.why
    it.close()


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"budget": 0.0}, "would drift"),
        ({"steps": 1}, "decoding still gives"),
        ({"rate": 1e30}, "became (nan|inf)"),
    ],
)
def test_what_does_not_pass_the_gate_changes_nothing(tmp_path, changes, why):
    it = learner(tmp_path, FeedbackConfig(**(vars(CONFIG) | changes)))
    outcome = it.learn(QUICK[0])
    assert not outcome.accepted and it.active() == []
    assert re.search(why, outcome.why), outcome.why
    assert outcome.answer_after == outcome.answer_before and weights_hash(it.model) == weights_hash(it.base)
    it.close()


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
    it = learner(tmp_path)
    with pytest.raises(ValueError, match=message):
        it.learn(correction)
    assert len(it.journal.records) == 1  # the base
    it.close()


def test_a_profile_has_one_base_and_one_process(tmp_path):
    it = learner(tmp_path)
    with pytest.raises(ValueError, match="in use by another process"):
        learner(tmp_path)
    it.close()
    with pytest.raises(ValueError, match="begun with another model"):
        learner(tmp_path, seed=1)


def test_export_is_training_data(tmp_path):
    it = learner(tmp_path)
    it.learn(Correction("sun?", "hot", rejected="cold"))
    assert it.export(tmp_path / "out.jsonl") == 1
    it.close()
    store = prepare(PrepareConfig([str(tmp_path / "out.jsonl")], str(tmp_path / "store"), tokenizer="bytes"))
    trained = [int(t) for t, m in zip(store.tokens, store.mask, strict=True) if m]
    assert BYTES.decode(trained) == " hot\n\n"
    (pair,) = map(json.loads, (tmp_path / "out.jsonl.pairs.jsonl").read_text().splitlines())
    assert pair == {"prompt": "User: sun?\n\nAssistant:", "chosen": "hot", "rejected": "cold"}


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from test_feedback import QUICK, learner
it = learner(Path(sys.argv[2]))
it.learn(QUICK[0])
steps = []

def tick(step, loss):
    steps.append(step)
    if len(steps) == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)

for correction in QUICK[1:]:
    it.learn(correction, received=lambda number: print(number, flush=True), tick=tick)
"""


@pytest.mark.parametrize("moment", [1, 7])
def test_a_killed_process_loses_nothing_it_acknowledged(tmp_path, moment):
    for name in ("killed", "whole"):
        (tmp_path / name).mkdir()
    argv = [sys.executable, "-c", KILLED, os.path.dirname(__file__), str(tmp_path / "killed"), str(moment)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    acknowledged = len(done.stdout.split())
    it, whole = learner(tmp_path / "killed"), learner(tmp_path / "whole")
    for correction in QUICK[: 1 + acknowledged]:
        whole.learn(correction)
    assert [r["question"] for r in it.active()] == [c.question for c in QUICK[: 1 + acknowledged]]
    assert weights_hash(it.model) == weights_hash(whole.model)
    it.close()
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


def test_guards_pull_to_the_base_and_know_their_neighbours():
    model = random_model(vocab_size=257)
    guards = Guards(model, [BYTES.encode(text) for text in GUARDS], 0)
    assert guards.near(BYTES.encode(GUARDS[2]), most=1) == [2]
    assert divergence(model, guards, [0, 3]).item() == pytest.approx(0, abs=1e-6)
    name = "blocks.1.ffn.value.weight"
    other = with_weights(model, {name: dict(model.named_parameters())[name] * 2})
    alone = [divergence(other, guards, [i]).item() * (len(GUARDS[i]) + 1) for i in (0, 3)]
    together = divergence(other, guards, [0, 3]).item() * sum(len(GUARDS[i]) + 1 for i in (0, 3))
    assert together == pytest.approx(sum(alone), rel=1e-4) and together > 0
    own = Guards.of_model(model, BYTES.encode("User:"), 0, count=5, length=7)
    again = Guards.of_model(model, BYTES.encode("User:"), 0, count=5, length=7)
    assert len(own) == 5 and torch.equal(own.draw([1, 4])[0], again.draw([1, 4])[0])
    with pytest.raises(ValueError, match="guard text is empty"):
        Guards(model, [], 0)
