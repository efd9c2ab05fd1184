"""Sleep: corrections learnt together are replayed, undone and broken off like any other version of the weights."""

import shutil
from dataclasses import replace

import pytest
from feedback_toys import CONFIG, QUICK, open_learner, rehearsal_set, small_model

from rwkv_train.feedback import Correction, Learner, Reading, gate, sleep
from rwkv_train.feedback.correction import Received
from rwkv_train.feedback.lesson import Lesson
from rwkv_train.feedback.sleep import Sleep, agreeing, standing, together
from rwkv_train.feedback.texts import Anchored, Example

LEARNT = [Reading("to and fro"), Correction("sun?", "hot"), Correction("sea?", "wet")]
QUICKLY = replace(CONFIG, steps=8, target_loss=3.0, extra=0, contrasts=0)


@pytest.fixture
def quickly(monkeypatch):
    """Sleeps of two epochs that find every answer right, and corrections that are accepted whatever they gave."""
    monkeypatch.setattr(sleep, "EPOCHS", 2)
    monkeypatch.setattr(sleep, "right", lambda model, rehearsal, corrections: [True] * len(corrections))
    monkeypatch.setattr(gate, "shows", lambda *args: True)


@pytest.fixture(scope="module")
def before_sleep(tmp_path_factory):
    """(a folder with a profile of LEARNT, what its weights were)."""
    folder = tmp_path_factory.mktemp("before")
    with pytest.MonkeyPatch.context() as patched, open_learner(folder, QUICKLY) as learner:
        patched.setattr(gate, "shows", lambda *args: True)
        assert all(learner.learn(item).accepted for item in LEARNT)
        return folder, learner.weights


@pytest.fixture
def profile(before_sleep, tmp_path, quickly):
    shutil.copytree(before_sleep[0], tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture
def slept(profile):
    """A folder with the same profile after a sleep."""
    with open_learner(profile) as learner:
        assert learner.sleep().accepted
    return profile


def without_snapshots(folder):
    shutil.rmtree(folder / "profile" / "snapshots")
    return folder


def steps_of_a_stream(monkeypatch) -> list:
    """The corrections that are learnt one by one from now on."""
    learnt, learn = [], Learner._learn

    def count(self, model, received, *rest):
        learnt.append(received.id)
        return learn(self, model, received, *rest)

    monkeypatch.setattr(Learner, "_learn", count)
    return learnt


def test_what_was_learnt_together_is_right_and_drifts_less(tmp_path):
    with open_learner(tmp_path, replace(CONFIG, target_loss=0.3, kl_weight=0.05, rehearsed=3)) as learner:
        for correction in QUICK[:2]:
            assert learner.learn(correction).accepted
        slept = learner.sleep()
        assert slept.accepted and (slept.right_before, slept.right_after, slept.count) == (2, 2, 2), slept
        assert slept.drift_after < slept.drift_before and slept.of == [2, 4] and slept.lost == []
        assert [learner.answer(c.question) for c in QUICK[:2]] == ["hot", "cold"]
        assert slept.weights == learner.weights
        with pytest.raises(ValueError, match="nothing to sleep on"):
            learner.sleep()


def test_a_sleep_is_replayed_from_the_base_without_the_stream_before_it(slept, monkeypatch):
    with open_learner(slept) as learner:
        weights = learner.weights
        assert weights == learner.journal.records[-1]["weights"]
        assert learner.learn(QUICK[1]).accepted
        after = learner.weights
    learnt = steps_of_a_stream(monkeypatch)
    with open_learner(without_snapshots(slept)) as again:
        assert again.weights == after and learnt == [again.learnt()[-1]["id"]]
        assert again.undo() == learnt and again.weights == weights


def test_an_undone_sleep_leaves_the_weights_before_it_and_the_same_one_can_be_slept_again(slept, before_sleep):
    with open_learner(slept) as learner:
        weights, number = learner.weights, learner.journal.records[-1]["id"]
        assert learner.undo() == [number] and learner.weights == before_sleep[1]
        assert len(learner.learnt()) == len(LEARNT) and not learner.journal.ledger.tired
        assert learner.sleep().weights == weights == learner.weights
        learner.undo(2)
        assert len(learner.learnt()) == len(LEARNT) - 1
    with open_learner(without_snapshots(slept)) as again:
        assert again.weights == learner.weights


def test_the_snapshot_from_before_a_sleep_stays(slept, before_sleep, monkeypatch):
    monkeypatch.setattr("rwkv_train.feedback.snapshots.NEWEST", 1)
    learnt = steps_of_a_stream(monkeypatch)
    with open_learner(slept) as learner:
        for text in ("up and down", "in and out"):
            learner.learn(Reading(text))
        learnt.clear()
        learner.undo(3)
        assert learner.weights == before_sleep[1] and learnt == []


def test_without_one_of_them_the_others_are_learnt_together(slept, monkeypatch):
    with open_learner(slept) as learner:
        known = learner.learnt()
        learnt = steps_of_a_stream(monkeypatch)
        learner.forget([known[1]["id"]])
        others = learner._replay.received([known[0], known[2]])
        alone = Sleep(learner.rehearsal, others, learner.config, lambda what, items: items)
        assert alone.go_on() and learner.weights == learner.weights_of(alone.model) and learnt == []
        learner.forget([known[0]["id"], known[2]["id"]])
        assert learner.model is learner.base
    with open_learner(without_snapshots(slept)) as again:
        assert again.model is again.base


def test_a_sleep_that_is_left_changes_nothing_and_goes_on_to_the_same_weights(profile, before_sleep):
    with open_learner(profile) as learner:
        records, left = list(learner.journal.records), iter([False] * 3 + [True])
        assert learner.sleep(lambda: next(left)) is None
        assert learner.journal.records == records and learner.weights == before_sleep[1]
        asked = []
        together = learner.sleep(lambda: bool(asked.append(1))).weights
        assert len(asked) == len(LEARNT) + 2 * 2 - 4  # texts, lessons and two of each epoch; four were done
        learner.undo()
        assert learner.sleep().weights == together
        learner.undo()
        number = learner.receive(QUICK[1])
        assert learner.sleep() is None and learner.commit(number).accepted


def test_a_sleep_that_is_killed_leaves_the_profile_as_it_was(profile, before_sleep, monkeypatch):
    journal = (profile / "profile" / "journal.jsonl").read_bytes()
    with open_learner(profile) as learner, monkeypatch.context() as patched:

        def fail(*args):
            raise KeyboardInterrupt

        patched.setattr(sleep, "take_steps", fail)
        with pytest.raises(KeyboardInterrupt):
            learner.sleep()
        assert learner.weights == before_sleep[1]
        with pytest.raises(KeyboardInterrupt):  # nor does a part of it count as the whole
            learner.sleep()
    assert (profile / "profile" / "journal.jsonl").read_bytes() == journal
    with open_learner(profile) as again:
        assert again.weights == before_sleep[1] and again.sleep().accepted


@pytest.mark.parametrize(("right", "why"), [(True, "fewer right"), (False, "drift further")])
def test_what_is_no_better_is_not_kept_and_not_tried_again_by_itself(profile, before_sleep, monkeypatch, right, why):
    with open_learner(profile) as learner:
        if right:
            monkeypatch.setattr(sleep, "right", lambda model, *rest: [True, model is learner.model])
        else:
            monkeypatch.setattr(learner.rehearsal, "drift", lambda base, model: float(model is not learner.model))
        assert learner.journal.ledger.tired
        slept = learner.sleep()
        assert not slept.accepted and why in slept.why and len(slept.lost) == bool(right)
        assert learner.weights == before_sleep[1] and not learner.journal.ledger.tired
    with open_learner(profile) as again:
        assert again.weights == before_sleep[1] and not again.journal.ledger.tired
        assert again.undo() == [again.journal.records[-1]["of"][0]] != [slept]


def received(number, question, answer, rejected=None):
    return Received(number, Correction(question, answer, rejected=rejected), vars(CONFIG))


def test_the_last_word_on_a_question_is_what_is_slept_on():
    many = [
        received(2, "sun?", "hot"),
        Received(4, LEARNT[0], {}),
        received(6, "ice?", "cold"),
        received(8, "sun?", "wet"),
    ]
    assert [it.id for it in standing(many)] == [6, 8]
    answers = sleep.right(small_model(), rehearsal_set(small_model()), standing(many))
    assert answers == [False, False]
    many += [received(10, "sun?", None, "dry"), received(12, "sun?", None, "so"), received(14, "ice?", None, "cold")]
    assert [it.id for it in standing(many)] == [8, 10, 12, 14]  # that a reply is wrong does away with it alone
    assert [it.id for it in standing([*many, received(16, "sun?", "so")])] == [14, 16]


def test_lessons_learnt_together_keep_and_teach_nothing_about_each_others_questions():
    first = Lesson(
        [Example([0, 1, 2, 9], 1), Example([0, 5, 6, 9], 1), Example([0, 7, 9], 1)],
        contrasted=[Anchored([0, 5, 6, 3, 3], None, 2), Anchored([0, 5, 4, 3], None)],
    )
    second = Lesson([Example([0, 5, 6, 8], 1)], contrasted=[Anchored([0, 1, 2, 3], None), Anchored([0, 5, 6, 3], None)])
    (one, other), rows = agreeing([first, second], [[0, 1, 2, 4], [0, 1, 3], [0, 5, 6]])
    assert [example.ids for example in one.new] == [[0, 1, 2, 9], [0, 7, 9]]
    assert one.contrasted == first.contrasted[1:] and rows == [[0, 1, 3]]
    assert other.new == second.new and other.contrasted == second.contrasted[1:]
    avoided = Lesson([Example([0, 1, 2, 7], 1, negative=True)])
    (one, _, same), rows = agreeing([first, second, avoided], [[0, 1, 2, 4], [0, 1, 3]])
    assert one.new == [first.new[0], first.new[2]] and same == avoided and rows == [[0, 1, 3]]


def test_epoch_by_epoch_everything_is_read():
    lessons = [
        Lesson([Example([n, m], 1) for m in range(4)], contrasted=[Anchored([n, m], None) for m in range(11)])
        for n in range(3)
    ]
    read = [together(lessons, [], epoch) for epoch in range(sleep.TURNS)]
    assert all(lesson.new[:3] == [some.new[0] for some in lessons] for lesson in read)
    others = [example for lesson in read[:3] for example in lesson.new[3:]]
    assert sorted(e.ids for e in others) == sorted(e.ids for some in lessons for e in some.new[1:])
    kept = [text.ids for lesson in read for text in lesson.contrasted]
    assert sorted(kept) == sorted(text.ids for some in lessons for text in some.contrasted)


def test_the_best_epoch_counts(profile, monkeypatch):
    monkeypatch.setattr(sleep, "EPOCHS", 5)
    answers, seen = iter([[True, False], [True, True], [False, True], [True, True], [True, True]]), []
    with open_learner(profile) as learner:
        monkeypatch.setattr(sleep, "right", lambda model, *rest: (seen.append(model), next(answers))[1])
        monkeypatch.setattr(
            learner.rehearsal, "drift", lambda base, model: {1: 0.5, 2: 0.2, 4: 0.3}.get(len(seen), 0.1)
        )
        slept = Sleep(
            learner.rehearsal, learner._replay.received(learner.learnt()), learner.config, lambda _, some: some
        )
        assert slept.go_on() and slept.model is seen[slept.epochs - 1] and (slept.epochs, len(seen)) == (5, 5)


def test_what_is_kept_weighs_more_only_while_all_is_right(profile, monkeypatch):
    monkeypatch.setattr(sleep, "EPOCHS", 5)
    answers, weights = iter([[False, True], [True, True], [True, True], [True, False], [True, True]]), []

    def learn_nothing(model, lesson, curvature, config):
        weights.append(config.kl_weight)
        return model, 1

    monkeypatch.setattr(sleep, "right", lambda *args: next(answers))
    monkeypatch.setattr(sleep, "take_steps", learn_nothing)
    with open_learner(profile) as learner:
        received, config = learner._replay.received(learner.learnt()), replace(CONFIG, kl_weight=8.0)
        assert Sleep(learner.rehearsal, received, config, lambda _, some: some).go_on()
    assert weights == [8.0, 8.0, 8.0 * sleep.GROWTH, 8.0 * sleep.GROWTH**2, 8.0 * sleep.GROWTH**2]
