"""The rehearsal set: dialogues that the model wrote itself, talk without an end, and their file."""

import pytest
import torch
from feedback_toys import BYTES, DIALOGUES, FORM, QUICK, open_learner, rehearsal_set, small_model

from rwkv_train.feedback import Learner
from rwkv_train.feedback.contrasts import crossed
from rwkv_train.feedback.rehearsal import SAMPLE, SAMPLES, RehearsalSet, free_running
from rwkv_train.feedback.trainable import localised_names


def test_a_rehearsal_set_is_kept_in_a_file_and_knows_the_nearest_dialogues(tmp_path):
    model = small_model()
    rehearsal = rehearsal_set(model)
    assert rehearsal.near(DIALOGUES[2], 1, 0) == [DIALOGUES[2]] and len(rehearsal.near([1], 9, 0)) == 3
    assert DIALOGUES[2] not in rehearsal.near(DIALOGUES[2], 3, 0, [FORM.answer("4")])
    rehearsal.save(tmp_path / "rehearsal.safetensors")
    again = RehearsalSet.load(tmp_path / "rehearsal.safetensors", model, FORM)
    gradients = {localised_names(model)[0]: torch.ones(48, 192)}
    for name in ("rows", "asked", "free_running"):
        assert getattr(again, name) == getattr(rehearsal, name)
    for way in ("precondition_kfac", "precondition_rms"):
        assert torch.equal(*(next(iter(getattr(r.curvature, way)(gradients).values())) for r in (rehearsal, again)))
    with pytest.raises(ValueError, match="the rehearsal set is empty"):
        RehearsalSet(model, FORM, [], [], [], rehearsal.curvature)


@pytest.mark.parametrize("content", [b'{"version": 1, "rows": [], "asked": []}', None, b"["])
def test_a_file_of_no_use_is_made_anew_and_told(tmp_path, monkeypatch, capsys, content):
    """It is only a cache of the model."""
    made = rehearsal_set(small_model())
    monkeypatch.setattr(RehearsalSet, "of_model", classmethod(lambda cls, base, form, **settings: made))
    path = tmp_path / "rehearsal.safetensors"
    if content is None:
        path.write_bytes(b"no tensors")
    else:
        torch.save({"text": torch.tensor(list(content), dtype=torch.uint8)}, path)
    assert RehearsalSet.kept(path, made.base, FORM).rows == DIALOGUES
    told = capsys.readouterr().err
    assert str(path) in told and "is made anew" in told and told.count("\n") == 1
    assert RehearsalSet.kept(path, made.base, FORM).rows == DIALOGUES and not capsys.readouterr().err


def test_drift_is_measured_once_for_each_model(monkeypatch):
    rehearsal, asked = rehearsal_set(small_model()), []
    base, other, third = rehearsal.base, small_model(1), small_model(2)
    there, back = rehearsal.drift(base, other), rehearsal.drift(other, base)
    log_probs = RehearsalSet.log_probs
    monkeypatch.setattr(RehearsalSet, "log_probs", lambda self, model: asked.append(model) or log_probs(self, model))
    assert rehearsal.drift(base, other) == there > 0 < back and asked == []
    rehearsal.drift(other, third)
    assert rehearsal.drift(base, third) > 0 and asked == [third]


def test_talk_before_a_question_goes_on_without_an_end():
    model = small_model()
    model.head.weight[0] = 10 * model.head.weight.abs().max()  # it would end at once, or never
    samples = free_running(model, FORM, torch.Generator().manual_seed(0))
    assert len(samples) == len(set(map(tuple, samples))) == SAMPLES and {len(ids) for ids in samples} == {SAMPLE}
    assert all(ids[0] == 0 and 0 not in ids[1:] and BYTES.decode(ids[1:]).startswith("User:") for ids in samples)
    assert samples == free_running(model, FORM, torch.Generator().manual_seed(0))


def test_a_model_that_ends_no_question_rehearses_what_it_says_to_what_it_writes():
    model = small_model()
    rehearsal, again = (RehearsalSet.of_model(model, FORM, count=5) for _ in range(2))
    assert len(rehearsal.rows) == 5 and rehearsal.rows == again.rows
    texts = [BYTES.decode(row[1:]) for row in rehearsal.rows]
    assert all(text.startswith("User:") and "\n\nAssistant:" in text for text in texts)
    assert again.asked == rehearsal.asked and len(rehearsal.asked) == 5 and crossed(rehearsal, "sun?", 3)


def test_a_set_under_its_old_name_is_taken_over(tmp_path):
    with open_learner(tmp_path) as learner:
        learner.rehearsal.save(learner.folder / "guards.safetensors")
    with Learner(small_model(), BYTES, tmp_path / "profile") as learner:
        assert learner.learn(QUICK[0]).accepted and learner.rehearsal.rows == DIALOGUES
        assert [path.name for path in learner.folder.glob("*.safetensors")] == ["rehearsal.safetensors"]
