"""The person decides what a correction means: /also, /not, labels, a file's fields, another profile's corrections."""

import json
import re
import shutil
from dataclasses import replace

import pytest
from feedback_toys import BYTES, QUICK, be_careless, open_learner, small_model
from helpers import run

from rwkv_train import save_model
from rwkv_train.chat.corrections_read import of_profile, taught_by
from rwkv_train.chat.dialogue import Dialogue
from rwkv_train.chat.feedback_commands import Teacher
from rwkv_train.chat.session import Chat
from rwkv_train.chat.telling import question_of, told
from rwkv_train.data.templates import Template
from rwkv_train.data.text_format import TextFormat
from rwkv_train.feedback import Correction, Learner, Outcome
from rwkv_train.feedback.journal import Ledger
from rwkv_train.generate import Sampling


@pytest.fixture(autouse=True)
def carelessly(monkeypatch):
    be_careless(monkeypatch)


@pytest.fixture
def scripted(tmp_path):
    """A chat in which a command is answered when it is done, and its teacher."""
    with open_learner(tmp_path) as learner:
        chat = Chat(Dialogue(learner.model, BYTES, sampling=Sampling(0), max_new_tokens=8), tmp_path)
        with Teacher(chat, learner, wait=True) as teacher:
            chat.add(teacher.commands(), teacher.settings(), teacher.swap)
            yield chat, teacher


def answer(chat: Chat, line: str) -> str:
    return "".join(chat.answer(line))


def test_also_and_not_in_a_chat(scripted):
    chat, teacher = scripted
    assert answer(chat, "/also what?") == "nothing was corrected yet"
    answer(chat, "/teach sun? => hot")
    shown = answer(chat, "/teach sea? => wet").splitlines()
    assert shown[3:5] == ["also asked as: 4a one more?", "kept as before: 4b near? | 4c nearer?"]
    assert answer(chat, "/also is the sea?").startswith(
        "received as correction 6, another way to ask 4: is the sea?\n6: "
    )
    kept = "received as correction {}, which keeps its answer from before {}: {}\n"
    assert answer(chat, "/not 2: see?").startswith(kept.format(8, 2, "see?"))
    assert answer(chat, "/not 4a").startswith(kept.format(10, 4, "one more?"))
    assert answer(chat, "/also 4c").startswith("received as correction 12, another way to ask 4: nearer?\n")
    history = answer(chat, "/history").splitlines()
    assert [line.split(" =>")[0].split(" (")[0] for line in history] == [
        "2: sun?", "  8: not see?", "4: sea?", "  6: also is the sea?", "  10: not one more?",
        "  12: also nearer?",
    ]  # fmt: skip
    assert answer(chat, "/also 2 : warm?").startswith("received as correction 14, another way to ask 2: warm?\n")
    failures = chat.failures
    assert "nothing is labelled 4z" in answer(chat, "/not 4z") and "as 12: 4z" in answer(chat, "/not 4z")
    assert answer(chat, "/also") == "write /also TEXT, or /also 12: TEXT for correction 12"
    assert "no active correction has the number 99" in answer(chat, "/also 99: what?")
    assert "is the corrected question itself" in answer(chat, "/not 4: sea?")
    assert "corrections to undo, not 99" in answer(chat, "/undo 99")
    assert chat.failures == failures + 6
    for unclear in ("4", "4:warm?", "4a, 4b", "4, 6"):
        told = answer(chat, f"/also {unclear}")
        assert "is unclear; write /also 4: TEXT, or one label as 4a" in told and told.endswith(f": {unclear}")
    forgot = answer(chat, f"/undo {len(teacher.learner.learnt()) - 1}")
    assert forgot.startswith("forgot 4, 6") and answer(chat, "/history") == "2: sun? => hot"
    answer(chat, "/teach sun? => cold")
    assert answer(chat, "/history").splitlines()[0] == "2: sun? => hot (outdated by a later one)"


def test_undoing_a_correction_says_what_goes_with_it(scripted):
    chat, teacher = scripted
    answer(chat, "/teach sun? => hot")
    first = teacher.learner.learnt()[0]["id"]
    late = teacher.learner.receive(Correction("is sun?", "hot", of=first))
    teacher.learner.journal.append("committed", of=late, accepted=False, why="a test")
    waits = teacher.learner.receive(Correction("the sun?", "hot", of=first))
    assert answer(chat, "/undo") == f"forgot {first}, and with that {waits}; the weights are as before"


def outcome(**changes) -> Outcome:
    usual = {"id": 12, "accepted": True, "why": "learnt", "loss_before": 2.0, "loss_after": 0.1, "steps": 3}
    usual |= {"answer_before": "no", "answer_after": "yes", "share": 1.0, "drift": 0.0, "seconds": 1.0, "weights": ""}
    return Outcome(**usual | {"paraphrases": [], "contrasts": []} | changes)


def test_an_outcome_lists_some_of_what_it_took_along_and_protected_with_labels():
    many = [f"q{n}" for n in range(9)]
    lines = told(outcome(paraphrases=many[:2], contrasts=many)).splitlines()
    assert lines[2:4] == [
        "also asked as: 12a q0 | 12b q1",
        "kept as before: 12c q0 | 12d q1 | 12e q2 | 12f q3 | 12g q4 | 12h q5 | 3 more",
    ]
    record = {"kind": "committed", "of": 12, "accepted": True, "paraphrases": many[:2], "contrasts": many}
    ledger = Ledger([record, {"kind": "committed", "of": 3, "accepted": True, "wordings": ["old"]}])
    assert [question_of(ledger, f"12{c}") for c in "abch"] == ["q0", "q1", "q0", "q5"]
    assert question_of(ledger, "3a") == "old"
    assert "asked as" not in told(outcome(accepted=False, why="no", paraphrases=many))
    assert told(outcome(steps=0, note="so")).startswith("12: kept, as it is answered so already (0 steps")


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A model of random weights in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    save_model(small_model(), "model.pth")
    TextFormat(BYTES, Template()).save(tmp_path)
    return "model.pth"


def feedback(model, *argv, capsys):
    return run("feedback", "--model", model, "--folder=home", *argv, capsys=capsys)


def test_a_file_says_what_else_and_what_not_and_what_came_before(model, tmp_path, capsys):
    lines = [
        {"question": "sun?", "answer": "hot", "before": [["so?", "no"]]},
        {"question": "sea?", "answer": "wet", "also": "is the sea?", "not": ["sun?"]},
    ]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, out, err = feedback(model, "--file=c.jsonl", capsys=capsys)
    assert code == 0 and "4 of 4 learnt" in out, out + err
    assert (
        "  also is the sea? => " in out and "  not sun? => " in out and "(its answer is that of correction 2)\n" in out
    )
    (journal,) = (tmp_path / "home").rglob("journal.jsonl")
    folder = journal.parent
    with Learner(small_model(), BYTES, folder) as learner:
        learnt = learner.learnt()
        assert [(r["question"], r["answer"]) for r in learnt] == [
            ("sun?", "hot"), ("sea?", "wet"), ("is the sea?", "wet"), ("sun?", "hot"),
        ]  # fmt: skip
        context = learnt[0]["context"]
        assert BYTES.decode(context) == "User: so?\n\nAssistant: no\n\n"
        learner.export("out.jsonl")
        lines = (tmp_path / "out.jsonl").read_text().splitlines()
        dialogues = [one for line in lines for one in taught_by("", line, {})]
        assert [d.item.question for d in dialogues] == ["sun?", "sea?", "is the sea?", "sun?"]
        assert tuple(learner.form.dialogue(dialogues[0].before)) == tuple(context)  # as it was, in a file again


def test_the_corrections_of_another_models_profile_are_learnt_anew(model, tmp_path, capsys):
    with open_learner(tmp_path, seed=3) as other:
        assert other.learn(replace(QUICK[2], context=(3, 4))).accepted
        assert other.also("is the sea?").accepted
        assert other.learn(QUICK[0]).accepted and other.undo()
        other.receive(Correction("sun?", None, rejected="hot"))
        other.journal.append("slept", accepted=True, of=[2, 4])
    shutil.copytree(tmp_path / "profile", tmp_path / "home" / "profiles" / tmp_path.name)
    code, _, err = feedback(model, "--file=profile", "--profile", tmp_path.name, capsys=capsys)
    assert code == 1 and "was begun with another model" in err and "--file" in err and "--profile NEW" in err
    code, out, err = feedback(model, "--file=profile/journal.jsonl", capsys=capsys)
    assert code == 0 and "3 of 3 learnt" in out, out + err
    assert "Corrections of this one are kept in" in err and "the dialogues before 1 of its corrections" in err
    (ours,) = (tmp_path / "home" / "profiles").glob(f"{tmp_path.name}-*")
    with Learner(small_model(), BYTES, ours) as learner:
        assert [(r["question"], r["of"], r["context"]) for r in learner.learnt()] == [
            ("sea?", None, []),
            ("is the sea?", 2, []),
            ("sun?", None, []),
        ]
    code, _, err = feedback(model, f"--file={ours}", capsys=capsys)
    assert code == 1 and "is what is to learn from it; name another --profile" in err and "kept in" in err
    with pytest.raises(ValueError, match="is no profile: it holds no journal"):
        of_profile(tmp_path)


def test_the_last_word_in_a_profile_is_the_last_in_its_copy(model, tmp_path, capsys):
    with open_learner(tmp_path, seed=3) as other:
        other.learn(QUICK[0])
        other.learn(Correction("star?", "cold"))
        other.also("star?", 2)
    code, out, err = feedback(model, "--file=profile", "--profile=new", capsys=capsys)
    assert code == 0 and "3 of 3 learnt" in out, out + err
    assert "in place of correction 4" in out
    with Learner(small_model(), BYTES, tmp_path / "home" / "profiles" / "new") as learner:
        assert [(r["question"], r["answer"], r["of"]) for r in learner.learnt()] == [
            ("sun?", "hot", None), ("star?", "cold", None), ("star?", "hot", 2),
        ]  # fmt: skip


@pytest.mark.parametrize("name", ["", ".", "../x", "a/b"])
def test_a_profile_has_a_plain_name(model, capsys, name):
    code, _, err = feedback(model, "--sleep", f"--profile={name}", capsys=capsys)
    assert code == 1 and "--profile must be a plain name" in err


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"also": 3}, "also must be a text or a list of texts, found 3"),
        ({"not": ["x", None]}, "not must be a text or a list"),
        ({"also": " sun?"}, "is the corrected question itself"),
        ({"not": [""]}, "the question is empty"),
        ({"also": ["x", "y"], "not": "x "}, "also and not have 'x' twice"),
        ({"before": ["so?", "no"]}, "before must be a list of turns"),
        ({"before": [["so?", " "]]}, "message 2 .assistant. is empty"),
        ({"messages": []}, "messages must end with a user's and the assistant's"),
        (
            {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]},
            "found both messages",
        ),
        ({"messages": [{"role": "user"}]}, "message 1 must be"),
    ],
)
def test_fields_that_cannot_be_are_told_before_any_is_learnt(model, tmp_path, capsys, fields, message):
    sound = {"question": "sun?", "answer": "hot"}
    (tmp_path / "c.jsonl").write_text(json.dumps(sound) + "\n" + json.dumps(sound | fields))
    code, _, err = feedback(model, "--file=c.jsonl", capsys=capsys)
    assert code == 1 and err.count("\n") == 1 and "c.jsonl:2: " in err
    assert re.search(message, err), err
