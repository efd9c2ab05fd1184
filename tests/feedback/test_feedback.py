"""Corrections: learnt means decoded, replayed = learnt, undone = before, nothing acknowledged is lost."""

import random
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from feedback_toys import BYTES, CONFIG, FORM, QUICK, open_learner, upper_matrices

from rwkv_train.feedback import Correction, Reading
from rwkv_train.feedback.decode import greedy
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


def test_a_profile_has_one_base_and_one_process(tmp_path):
    learner = open_learner(tmp_path)
    with pytest.raises(ValueError, match="in use by another process"):
        open_learner(tmp_path)
    learner.close()
    with pytest.raises(ValueError, match="begun with another model"):
        open_learner(tmp_path, seed=1)


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
