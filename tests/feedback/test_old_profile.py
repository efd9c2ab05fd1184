"""A profile that was made before its settings had their names of today, with its weights' hash in weights.txt.

With `scope` upper it learnt an answer, one in a dialogue, one that was undone, and to leave a wrong reply; with
`scope` localised and other settings a text and an answer. The last one, with `scope` lora, did not pass the gate.
"""

import shutil
from pathlib import Path

import pytest
from feedback_toys import BYTES, old_model

from rwkv_train.chat.dialogue import Dialogue
from rwkv_train.chat.feedback_commands import Teacher
from rwkv_train.chat.session import Chat
from rwkv_train.feedback import Learner
from rwkv_train.feedback.settings import RENAMED

OLD = Path(__file__).parent / "old_profile"
ANSWERS = {"why sun?": "hot", "ice?": "cold", "is sea?": "wet"}


@pytest.fixture
def profile(tmp_path):
    return shutil.copytree(OLD, tmp_path / "profile")


def test_it_opens_from_its_snapshot_to_the_bit_and_its_history_is_told(profile):
    with Learner(old_model(), BYTES, profile) as learner:
        assert learner.weights == (OLD / "weights.txt").read_text().strip()
        assert {question: learner.answer(question) for question in ANSWERS} == ANSWERS
        chat = Chat(Dialogue(learner.model, BYTES), profile)
        with Teacher(chat, learner, wait=True) as teacher:
            chat.add(teacher.commands(), teacher.settings(), teacher.swap, RENAMED)
            history = "".join(chat.answer("/history")).splitlines()
            assert "".join(chat.answer("/settings rate")) == "rate is now step_factor\nstep_factor 0.7"
            assert "".join(chat.answer("/settings reach")) == "reach is now truncation\ntruncation 40"
    assert history == [
        "2: why sun? => hot",
        "4: ice? => cold",
        "9: a? => anything but: hot",
        "12: read to and fro to and fro to and fro to and fro to and fro to an ...",
        "14: is sea? => wet",
        "17: hi you => yes (not learnt: decoding still gives 'cold')",
    ]


def test_it_is_replayed_without_its_snapshot_by_the_recipe_of_today(profile, capsys):
    """Which gives other weights, and is told; the one that took all its 60 steps may get in the way of another."""
    shutil.rmtree(profile / "snapshots")
    with Learner(old_model(), BYTES, profile) as learner:
        assert [r["id"] for r in learner.learnt()] == [2, 4, 9, 12, 14]
        assert sum(learner.answer(question) == answer for question, answer in ANSWERS.items()) >= len(ANSWERS) - 1
    assert "that gives other weights than before" in capsys.readouterr().err
