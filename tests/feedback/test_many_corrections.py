"""A profile of many corrections: what it costs does not grow with them, and little has to be learnt again."""

import os
from dataclasses import asdict, replace

import pytest
from feedback_toys import CONFIG, QUICK, open_learner, small_model
from hypothesis import given
from hypothesis import strategies as st

from rwkv_train.feedback import Correction, Reading, journal, replay, snapshots, steps
from rwkv_train.feedback.journal import Journal, Ledger
from rwkv_train.feedback.snapshots import Snapshots
from rwkv_train.feedback.trainable import localised_names, with_weights

MANY = 300
TEXTS = [Reading("to and fro"), Reading("up and down"), Reading("in and out")]  # quick to learn


@pytest.fixture
def many(tmp_path, monkeypatch):
    """A folder with a profile of MANY corrections, learnt as one would be, and a snapshot after the last."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    with open_learner(tmp_path, replace(CONFIG, replay=0)) as ours:
        after = ours.learn(QUICK[0])
        settings, as_learnt = asdict(ours.config), {k: v for k, v in asdict(after).items() if k != "id"}
        for n in range(1, MANY):
            received = ours.journal.append("received", **asdict(Correction(f"{n}?", f"{n}.")), config=settings)
            ours.journal.append("committed", of=received["id"], **(as_learnt | {"answer_before": f"{n}"}))
        ours._replay.keep(ours.model)
    return tmp_path


def counted(monkeypatch, owner, name) -> list:
    """The calls of a function from now on."""
    calls, function = [], getattr(owner, name)

    def count(*args, **kwargs):
        calls.append(args)
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, count)
    return calls


def test_each_record_is_read_once_and_a_correction_reads_no_earlier_ones(many, monkeypatch, capsys):
    lines, read = counted(monkeypatch, journal, "_parse"), counted(monkeypatch, replay, "received_of")
    files = counted(monkeypatch, snapshots, "read_weights")
    with open_learner(many) as ours:
        assert (len(lines), len(read), len(files)) == (1 + 2 * MANY, 0, 1)
        assert ours.learn(QUICK[1]).accepted
        assert (len(lines), len(read)) == (1 + 2 * MANY, MANY)
        ours.learn(QUICK[2])
        assert (len(lines), len(read), len(files)) == (1 + 2 * MANY, MANY + 1, 1)
    assert capsys.readouterr().err == ""  # nothing was learnt again


def test_what_is_learnt_again_is_told(tmp_path, capsys):
    with open_learner(tmp_path) as ours:
        for text in TEXTS:
            ours.learn(text)
        watched = []
        ours.watch = lambda what, items: (watched.append(len(items)), items)[1]
        ours.forget([2])
        assert watched == [2] and "2 corrections are learnt again" in capsys.readouterr().err
    for file in (tmp_path / "profile" / "snapshots").iterdir():
        file.unlink()
    open_learner(tmp_path).close()
    told = capsys.readouterr().err
    assert "2 corrections are learnt again" in told and "other weights" not in told


def test_what_is_learnt_again_to_other_weights_is_told(tmp_path, capsys, monkeypatch):
    def reopened():
        for file in (tmp_path / "profile" / "snapshots").iterdir():
            file.unlink()
        open_learner(tmp_path).close()
        return "other weights than before" in capsys.readouterr().err

    with open_learner(tmp_path) as ours:
        for text in TEXTS:
            ours.learn(text)
    assert not reopened()
    with monkeypatch.context() as otherwise:
        otherwise.setattr(steps, "READ_TOKENS", 2)
        assert reopened()
    with open_learner(tmp_path) as ours:
        ours.forget([2])  # what came after it has other weights than were recorded with it, and rightly so
    assert not reopened()


def test_an_undo_that_is_broken_off_leaves_the_snapshot_of_the_weights_in_use(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(snapshots, "NEWEST", 1)
    with open_learner(tmp_path) as ours:
        for text in TEXTS:
            ours.learn(text)
        used, learn = ours.weights, ours._learn

        def broken_off(model, received, lesson, *tick):
            if received.item == TEXTS[2]:
                raise KeyboardInterrupt
            return learn(model, received, lesson, *tick)

        monkeypatch.setattr(ours, "_learn", broken_off)
        with pytest.raises(KeyboardInterrupt):
            ours.forget([2])
        capsys.readouterr()
    with open_learner(tmp_path) as again:
        assert again.weights == used
    assert capsys.readouterr().err == ""


def test_the_newest_snapshots_are_kept_and_milestones_that_get_fewer(tmp_path, monkeypatch):
    monkeypatch.setattr(snapshots, "NEWEST", 2)
    monkeypatch.setattr(snapshots, "MILESTONES", 3)
    monkeypatch.setattr(snapshots, "APART", 2)
    base, kept = small_model(), Snapshots(tmp_path, small_model())
    sequence, own, files = [{"id": n, "kind": "received"} for n in range(1, 15)], dict(base.named_parameters()), {}
    for count in range(1, 15):
        after = with_weights(kept.base, {n: own[n] + count for n in localised_names(base)})
        kept.save(after, sequence[:count])
        files |= {file: count for file in tmp_path.iterdir() if file not in files}
        for file in tmp_path.iterdir():  # as if a second passed
            os.utime(file, (file.stat().st_mtime - 1,) * 2)
    stay = [4, 8, 12, 13, 14]
    assert sorted(files[file] for file in tmp_path.iterdir()) == stay
    for wanted in range(1, 15):
        count, model = kept.nearest(sequence[:wanted])
        assert count == max((n for n in stay if n <= wanted), default=0)
        assert (model is kept.base) == (count == 0)


events = st.lists(
    st.tuples(st.sampled_from(["received", "learnt", "refused", "undone"]), st.integers(0, 9)), max_size=30
)


@given(events)
def test_what_records_come_to_does_not_depend_on_when_they_are_read(drawn):
    ledger, records = Ledger(), []
    for kind, pick in drawn:
        if kind == "received":
            content = {"kind": kind}
        elif kind == "undone":
            content = {"kind": kind, "of": list(ledger.sequence)[pick : pick + 2]}
        elif pick < len(ledger.waiting):
            content = {"kind": "committed", "of": list(ledger.waiting)[pick], "accepted": kind == "learnt", "why": kind}
        else:
            continue
        records.append({"id": len(records) + 1, **content})
        ledger.add(records[-1])
    gone = {n for r in records if r["kind"] == "undone" for n in r["of"]}
    committed = [r for r in records if r["kind"] == "committed"]
    learnt = [r["of"] for r in committed if r["accepted"] and r["of"] not in gone]
    tried = {r["of"] for r in committed}
    assert list(ledger.sequence) == learnt
    assert list(ledger.waiting) == [r["id"] for r in records if r["kind"] == "received" and r["id"] not in tried]
    assert ledger.refused() == {r["of"]: "refused" for r in committed if not r["accepted"]}
    assert vars(Ledger(records)) == vars(ledger)


def test_a_journal_opens_to_what_it_was_closed_with(tmp_path):
    open_journal = Journal(tmp_path / "journal.jsonl")
    for kind, content in [("base", {}), ("received", {}), ("received", {})]:
        open_journal.append(kind, **content)
    open_journal.append("committed", of=3, accepted=True)
    open_journal.close()
    assert vars(Journal(open_journal.path).ledger) == vars(open_journal.ledger)
    assert list(open_journal.ledger.sequence) == [3] and list(open_journal.ledger.waiting) == [2]
