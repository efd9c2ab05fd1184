"""Questions made up around one: crossings, what a question is about, and the base's replies."""

import torch
from feedback_toys import FORM, rehearsal_set, small_model

from rwkv_train.feedback import contrasts
from rwkv_train.feedback.contrasts import around, candidates, replies_of_base
from rwkv_train.feedback.curvature import Curvature
from rwkv_train.feedback.decode import greedy
from rwkv_train.feedback.rehearsal import RehearsalSet
from rwkv_train.feedback.trainable import localised_names, upper_names, with_weights


def test_questions_are_crossed_with_those_of_the_rehearsal_set(monkeypatch):
    model = small_model()
    rehearsal = rehearsal_set(model)
    monkeypatch.setattr(contrasts, "candidates", lambda rehearsal, question: ["sun"])
    reply, subject, made = around(rehearsal, model, "why sun?", 2, 9)
    assert subject == "sun" and reply == greedy(model, FORM, [FORM.prompt("why sun?")])[0]
    assert [m.question for m in made] == ["why you?", "why a?", "hi sun", "sun?"]
    other = with_weights(model, {"head.weight": -model.head.weight})
    for here, there in zip(made, around(rehearsal, other, "why sun?", 2, 9).made, strict=True):
        assert here.prompt == FORM.prompt(here.question)
        assert here.now == here.before == there.before == greedy(model, FORM, [here.prompt])[0]
        assert there.now == greedy(other, FORM, [here.prompt])[0] != there.before
    same = with_weights(model, {"head.weight": model.head.weight})
    assert around(rehearsal, same, "why sun?", 2, 9).made == made
    model.head.weight[0] += 3 * model.head.weight.abs().max()  # replies that the document's end cuts short
    prompts = [m.prompt for m in made]
    replies = greedy(model, FORM, prompts)
    for shown in (replies, [reply[: len(reply) // 2] for reply in replies], [[*reply, 65] for reply in replies]):
        assert replies_of_base(rehearsal, prompts, shown) == replies
    assert around(rehearsal, model, "why sun?", 0, 0).made == []


def test_a_subject_is_what_the_answer_depends_on(monkeypatch):
    """Of the words tried, one whose place others can take without another answer is not it."""
    model = small_model()
    rehearsal = rehearsal_set(model)
    replies = {"why sun?": "hot"} | {f"{word} sun?": "hot" for word in ("you", "a", "2")}

    def answer(model, form, prompts):
        asked = [form.shown(prompt).split("User: ")[1].split("\n")[0] for prompt in prompts]
        return [form.answer(replies.get(question, "cold")) for question in asked]

    monkeypatch.setattr(contrasts, "greedy", answer)
    monkeypatch.setattr(contrasts, "candidates", lambda rehearsal, question: ["why", "sun"])
    found = around(rehearsal, model, "why sun?", 3, 3)
    assert found.subject == "sun" and found.reply == FORM.answer("hot") and len(found.made) > 3
    monkeypatch.setattr(contrasts, "candidates", lambda rehearsal, question: ["why"])
    assert around(rehearsal, model, "why sun?", 3, 3) == (FORM.answer("hot"), "", [])


def test_the_subject_is_a_rare_word_that_could_not_be_foreseen():
    model = small_model()
    rows = [FORM.prompt(question) for question in ["my sun?", "my ice?", "my xyz?"] + ["my?"] * 20]
    curvature = Curvature.measure(model, upper_names(model), localised_names(model), rows)
    rehearsal = RehearsalSet(model, FORM, rows, [], [], curvature)
    rehearsal.base = with_weights(model, {"head.weight": torch.zeros_like(model.head.weight)})  # foresees nothing
    assert candidates(rehearsal, "my xyz?")[0] in "xyz" and candidates(rehearsal, "my ice?")[0] in "ice"
