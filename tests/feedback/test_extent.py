"""Other ways to ask a correction, and questions that keep their answer: learnt, replayed, undone with it, exported."""

import json
import shutil
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from feedback_toys import BYTES, CONFIG, QUICK, be_careless, old_model, open_learner, rehearsal_set, small_model
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_train.data.prepare import PrepareConfig, prepare
from rwkv_train.feedback import Correction, Learner, Reading

OLD = Path(__file__).parent / "old_profile"
MODEL = small_model()
REHEARSAL = rehearsal_set(MODEL)
DIALOGUE = [{"role": "user", "content": "so?"}, {"role": "assistant", "content": "no"}]


def without_snapshots(learner: Learner) -> str:
    """The weights that follow from the journal alone."""
    shutil.rmtree(learner.folder / "snapshots", ignore_errors=True)
    return learner.replay()


@pytest.fixture
def taught(tmp_path):
    """A learner that answers "hot" to most questions, and "wet" to many since it was taught that."""
    with open_learner(tmp_path, replace(CONFIG, steps=200)) as learner:
        for correction in (QUICK[0], QUICK[2]):
            assert learner.learn(correction).accepted
        yield learner


@contextmanager
def careless(folder):
    """A learner that accepts whatever two steps come to."""
    with pytest.MonkeyPatch.context() as patched:
        be_careless(patched)
        with Learner(MODEL, BYTES, folder, rehearsal=REHEARSAL) as learner:
            yield learner


@pytest.fixture
def untaught(tmp_path):
    """A learner that has learnt the same in two steps."""
    with careless(tmp_path / "profile") as learner:
        for correction in (QUICK[0], QUICK[2]):
            assert learner.learn(correction).accepted
        yield learner


def test_another_wording_is_learnt_with_its_correction_and_undone_with_it(taught):
    learnt_alone = taught.weights
    outcome = taught.also("is the sea?")
    assert outcome.accepted and taught.answer("is the sea?") == taught.answer("sea?") == "wet"
    assert taught.learnt()[-1]["of"] == 4 and without_snapshots(taught) == outcome.weights
    assert taught.undo() == [6] and taught.weights == learnt_alone  # it alone
    assert taught.also("is the sea?", of=2).answer_after == "hot"
    assert taught.forget([2]) == [2, 9] and [r["id"] for r in taught.learnt()] == [4]


def test_a_question_keeps_the_answer_it_had_before_the_correction(taught):
    leaked = next(text for text in ("see?", "sex?", "set?", "tea?") if taught.answer(text) == "wet")
    outcome = taught.keep(leaked)
    assert outcome.accepted and outcome.steps and outcome.answer_before == "wet"
    assert taught.answer(leaked) == outcome.answer_after == taught.learnt()[-1]["answer"] == "hot"
    assert not outcome.paraphrases and taught.answer("sea?") == "wet" and without_snapshots(taught) == outcome.weights
    again = taught.keep(leaked)  # nothing is left to do
    assert again.accepted and again.steps == 0 and again.weights == outcome.weights
    assert without_snapshots(taught) == outcome.weights
    assert taught.undo(3) == [4, 6, 8] and taught.answer(leaked) == "hot"


def test_of_answers_to_one_question_the_last_counts_and_says_which_it_replaces(untaught):
    assert "in place of correction 4" in untaught.learn(Correction("sea?", "dry")).note
    assert untaught.learn(Correction("sea?", "dry")).note == ""
    assert "in place of correction 8" in untaught.learn(Correction("sea?", None, rejected="dry")).note
    assert untaught.learn(Correction("sea?", "wet")).note == ""  # there was no right answer
    assert untaught.learn(Correction("sea?", None, rejected="so")).note == ""  # it still is wet
    untaught.also("sea!", of=12)
    note = untaught.learn(Correction("sea?", "dry")).note
    assert "in place of correction 12" in note and "asked as 'sea!', it keeps the answer of before" in note


def test_a_question_that_another_correction_taught_keeps_that(taught):
    outcome = taught.keep("sun?")
    assert outcome.accepted and outcome.answer_after == "hot" and "its answer is that of correction 2" in outcome.note
    with pytest.raises(ValueError, match="6 keeps an answer and is asked in no other way; name correction 4 itself"):
        taught.also("sunny?", of=6)
    assert taught.also("salty?").answer_after == "wet"  # of what the newest one belongs to


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        ("also", ("sea? ",), "is the corrected question itself"),
        ("keep", ("sea?",), "is the corrected question itself"),
        ("also", (" ",), "question is empty"),
        ("keep", ("x" * 2001,), "2,001 characters"),
        ("keep", ("\ud800",), "not valid Unicode"),
        ("also", ("what?", 3), "no active correction has the number 3"),
        ("keep", ("what?", 99), "no active correction has the number 99"),
    ],
)
def test_what_cannot_belong_to_a_correction_is_refused_before_it_is_recorded(untaught, method, arguments, message):
    records = list(untaught.journal.records)
    with pytest.raises(ValueError, match=message):
        getattr(untaught, method)(*arguments)
    assert untaught.journal.records == records


def test_what_belongs_to_nothing_that_is_learnt_is_refused(tmp_path):
    with open_learner(tmp_path) as learner:
        with pytest.raises(ValueError, match="nothing was corrected yet"):
            learner.also("sun?")
        assert learner.learn(QUICK[0]).accepted
        assert learner.learn(Correction("ice?", None, rejected=learner.answer("ice?"))).accepted
        with pytest.raises(ValueError, match="correction 4 has only a wrong answer"):
            learner.also("is ice?")
        learner.configure(steps=0)
        failed = learner.receive(QUICK[2])
        waits = learner.receive(Correction("is sea?", "wet", of=failed))
        assert not learner.commit(failed).accepted
        with pytest.raises(ValueError, match=f"correction {failed}, to which it belongs, is not learnt"):
            learner.commit(waits)
        with pytest.raises(ValueError, match=f"correction {failed} was not learnt .*; say which other one"):
            learner.keep("see?")
        assert learner.learn(Reading("to and fro")).accepted
        with pytest.raises(ValueError, match="is a text that was read"):
            learner.also("fro?", of=learner.journal.records[-1]["of"])


def test_what_waits_is_taken_back_with_what_it_belongs_to(untaught):
    waits = untaught.receive(Correction("is it?", "wet", of=4))
    assert untaught.forget([4]) == [4, waits] and not untaught.waiting()


def test_export_has_the_dialogue_before_and_trains_the_answers_alone(tmp_path):
    with open_learner(tmp_path) as learner:
        context = tuple(learner.form.dialogue(DIALOGUE))
        assert learner.learn(Correction("sun?", "hot", context, rejected="no")).accepted
        assert learner.also("is sun?").accepted
        assert learner.learn(Correction("ice?", "cold", tuple(BYTES.encode("torn")))).accepted
        kept = learner.keep("see?")
        assert kept.accepted, kept
        exported = learner.export(tmp_path / "out.jsonl")
        assert (exported.corrections, exported.also, exported.kept) == (2, 1, 1) and exported.alone in (1, 2)
        with pytest.raises(ValueError, match=r"out\.jsonl is there already; delete it, or name another file"):
            learner.export(tmp_path / "out.jsonl")
    chats = [json.loads(line)["messages"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [m["content"] for m in chats[0]] == ["so?", "no", "sun?", "hot"]
    assert [m["content"] for m in chats[1]] == ["so?", "no", "is sun?", "hot"]
    assert [m["content"] for m in chats[2]] == ["ice?", "cold"]
    (pair,) = map(json.loads, (tmp_path / "out.jsonl.pairs.jsonl").read_text().splitlines())
    assert pair["prompt"] == "User: so?\n\nAssistant: no\n\nUser: sun?\n\nAssistant:"
    store = prepare(PrepareConfig([str(tmp_path / "out.jsonl")], str(tmp_path / "store"), tokenizer="bytes"))
    trained = BYTES.decode([int(t) for t, m in zip(store.tokens, store.mask, strict=True) if m])
    assert sorted(trained.split("\n\n")) == sorted([" hot", " hot", " cold", f" {kept.answer_after}", ""])


def test_a_profile_of_before_takes_them(tmp_path):
    shutil.copytree(OLD, tmp_path / "profile")
    with Learner(old_model(), BYTES, tmp_path / "profile") as learner:
        before = learner.weights
        assert learner.also("is the sea?", of=14).accepted and learner.keep("ice? ice?", of=14).accepted
        weights = learner.weights
    with Learner(old_model(), BYTES, tmp_path / "profile") as learner:
        assert learner.weights == weights and learner.answer("is the sea?") == "wet"
        assert learner.export(tmp_path / "out.jsonl").also == 1
        assert learner.undo(2) and learner.weights == before


QUESTIONS = st.sampled_from(["a?", "b?", "c?", "d?"])
LEARN = st.tuples(st.just("learn"), QUESTIONS, st.sampled_from(["x", "y"]))
BELONGING = st.tuples(st.sampled_from(["also", "keep"]), QUESTIONS, st.none() | st.integers(1, 12))
BACK = st.tuples(st.just("undo"), st.integers(1, 3)) | st.tuples(st.just("forget"), st.integers(1, 12))


@settings(max_examples=15, deadline=None)
@given(operations=st.lists(LEARN | LEARN | BELONGING | BELONGING | BACK, min_size=2, max_size=8))
def test_whatever_is_done_the_weights_are_those_of_a_replay(tmp_path_factory, operations):
    folder = tmp_path_factory.mktemp("profile")
    with careless(folder) as learner:
        active: dict[int, int | None] = {}  # and what they belong to
        for name, *arguments in operations:
            try:
                if name == "learn":
                    active[learner.learn(Correction(*arguments)).id] = None
                elif name == "forget":
                    gone = {arguments[0], *(n for n, of in active.items() if of == arguments[0])}
                    learner.forget(arguments)
                    active = {n: of for n, of in active.items() if n not in gone}
                elif name == "undo":
                    last = set(list(active)[-arguments[0] :])
                    learner.undo(*arguments)
                    active = {n: of for n, of in active.items() if n not in last and of not in last}
                else:
                    outcome = getattr(learner, name)(*arguments)
                    record = learner.learnt()[-1]
                    active[outcome.id] = record["of"]
                    assert record["of"] in active and active[record["of"]] is None
                    assert record["answer"] and record["keeps"] == (name == "keep")
            except ValueError:
                pass  # refused, or not learnt
            assert [r["id"] for r in learner.learnt()] == list(active) and not learner.waiting()
        weights = learner.weights
        assert without_snapshots(learner) == weights
    with Learner(MODEL, BYTES, folder, rehearsal=REHEARSAL) as learner:
        assert learner.weights == weights
