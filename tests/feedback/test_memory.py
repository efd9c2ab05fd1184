"""Where memory is short less is trained and it is said; what is done in pieces to save it changes nothing."""

from dataclasses import replace

import pytest
import torch
from feedback_toys import BYTES, CONFIG, DIALOGUES, FORM, QUESTIONS, QUICK, small_model
from helpers import assert_close_rel, random_model

from rwkv_train.checkpoints.modelfile import _NoInit
from rwkv_train.feedback import FeedbackConfig, Learner, curvature, decode, rehearsal, texts
from rwkv_train.feedback.curvature import Curvature
from rwkv_train.feedback.lesson import Lesson
from rwkv_train.feedback.memory import bytes_of, fitting, needed, told_of
from rwkv_train.feedback.rehearsal import RehearsalSet, free_running
from rwkv_train.feedback.steps import take_steps
from rwkv_train.feedback.texts import Anchored, Example, divergence
from rwkv_train.feedback.trainable import changed, curved_names, localised_names, upper_names, with_weights
from rwkv_train.models.rwkv4 import RWKV4, RWKV4Config

USUAL = FeedbackConfig()


def deep_model():
    return random_model(n_embd=48, n_layer=6, vocab_size=257).requires_grad_(False)


def open_learner(folder, memory: int, config=CONFIG) -> Learner:
    base = deep_model()
    chosen = fitting(base, config, memory)
    measured = Curvature.measure(base, *curved_names(base, chosen.trainable, chosen.layers), DIALOGUES)
    made = RehearsalSet(base, FORM, DIALOGUES, QUESTIONS, DIALOGUES, measured)
    return Learner(base, BYTES, folder / "profile", config=config, rehearsal=made, memory=memory)


def test_what_does_not_fit_gives_way_to_the_most_that_does():
    model = deep_model()
    need = {n: needed(model, replace(USUAL, trainable="localised", layers=n)) for n in (1, 2, 3)}
    assert bytes_of(model) < need[1] < need[2] < need[3] < needed(model, USUAL) < needed(model.double(), USUAL)
    model = deep_model()
    assert fitting(model, USUAL, needed(model, USUAL)) == USUAL
    for layers in (1, 2, 3):
        chosen = fitting(model, USUAL, need[layers])
        assert (chosen.trainable, chosen.layers) == ("localised", layers)
    assert "more than there is" not in told_of(model, chosen, need[3])
    assert told_of(model, USUAL, needed(model, USUAL)) == ""
    assert "train upper (" in told_of(model, USUAL, 0) and "layers)" in told_of(model, USUAL, 0)
    least = fitting(model, USUAL, 0)
    assert least.layers == 1 and "which is more than there is" in told_of(model, least, 0)
    assert fitting(model, replace(USUAL, trainable="lora"), 0).trainable == "lora"


def test_a_model_of_15_billion_in_8_gigabytes():
    with torch.device("meta"), _NoInit():
        model = RWKV4(RWKV4Config(65536, 2048, 24)).bfloat16()
    chosen = fitting(model, USUAL, 8 << 30)
    assert chosen.trainable == "localised" and chosen.layers > 1 and needed(model, chosen) <= 8 << 30


def test_settings_that_follow_from_the_memory_are_kept_and_said(tmp_path, capsys):
    memory = needed(deep_model(), replace(CONFIG, layers=2))
    with open_learner(tmp_path, memory) as learner:
        told = capsys.readouterr().err
        assert "corrections train localised of the upper 2 layers" in told and told.count("\n") == 1
        outcome = learner.learn(QUICK[0])
        assert outcome.accepted and list(changed(learner.model, learner.base)) == localised_names(learner.base)[1:]
        hashed = learner.weights
        with pytest.raises(ValueError, match="was begun with trainable localised and layers 2, and knows no more"):
            learner.configure(trainable="upper")
        with pytest.raises(ValueError, match="knows no more"):
            learner.configure(layers=0)
        learner.configure(trainable="lora", layers=1)
    learner = open_learner(tmp_path, memory)
    assert learner.weights == hashed and "train lora of the upper 1 layers" in capsys.readouterr().err
    learner.close()


def test_fewer_layers_are_the_uppermost_and_never_more_than_half():
    model = deep_model()
    assert localised_names(model, 1) == localised_names(model)[-1:]
    assert localised_names(model, 9) == localised_names(model) and upper_names(model, 3) == upper_names(model)
    assert [n for n in upper_names(model, 1) if not n.startswith("blocks.5.")] == ["head.weight"]


@pytest.mark.parametrize("trainable", ["upper", "localised"])
def test_activations_that_are_computed_again_change_nothing(trainable, generation, monkeypatch):
    model = small_model(generation=generation)
    before = with_weights(model, {"head.weight": model.head.weight * 1.1})
    lesson = Lesson([Example(DIALOGUES[0], 4), Example(DIALOGUES[1], 3)], rehearsed=[Anchored(DIALOGUES[2], before)])
    config = replace(USUAL, trainable=trainable, steps=2, layers=1)
    plain, _ = take_steps(model, lesson, None, config)
    monkeypatch.setattr(texts, "LARGE", 0)
    again, _ = take_steps(model, lesson, None, config)
    for name, weight in changed(plain, model).items():
        assert_close_rel(changed(again, model)[name], weight, 1e-5)


def test_texts_in_turn_are_decoded_as_side_by_side(generation, monkeypatch):
    model, prompts = small_model(generation=generation), [FORM.prompt(q) for q in ("a", "some more", "b c")]
    together = decode.greedy(model, FORM, prompts, max_new_tokens=8)
    monkeypatch.setattr(decode, "STATES", 1)
    monkeypatch.setattr(rehearsal, "SAMPLES", 3)
    monkeypatch.setattr(rehearsal, "SAMPLE", 9)
    assert decode.lanes_at_once(model) == 1
    assert decode.greedy(model, FORM, prompts, max_new_tokens=8) == together
    assert list(map(len, free_running(model, FORM, torch.Generator().manual_seed(0)))) == [9, 9, 9]


def test_curvature_and_drift_in_pieces_are_those_of_the_whole(monkeypatch):
    model = small_model()
    names = localised_names(model)
    whole = Curvature.measure(model, names, names, DIALOGUES)
    rows = torch.randn(2, 9, 5).log_softmax(-1)
    drift = divergence(*rows)
    monkeypatch.setattr(curvature, "LOGITS", 1)
    monkeypatch.setattr(texts, "ROWS", 2)
    for name, tensor in Curvature.measure(model, names, names, DIALOGUES).tensors.items():
        assert_close_rel(tensor, whole.tensors[name], 1e-3)
    torch.testing.assert_close(divergence(*rows), drift)
