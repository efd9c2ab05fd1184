"""What a correction must leave: rows the model wrote itself, its neighbours, talk without an end."""

import pytest
import torch
from feedback_toys import BYTES, DIALOGUES, FORM, guards, small_model

from rwkv_train.feedback.curvature import Curvature
from rwkv_train.feedback.decode import greedy
from rwkv_train.feedback.guards import TALK, TALKS, Guards, _wander
from rwkv_train.feedback.steps import localised_names, upper_names, with_weights


def test_guards_are_made_by_the_model_kept_in_a_file_and_know_their_neighbours(tmp_path):
    model = small_model()
    ours = guards(model)
    assert ours.near(DIALOGUES[2], 1, 0) == [DIALOGUES[2]]
    assert DIALOGUES[2] not in ours.near(DIALOGUES[2], 3, 0, [FORM.answer("4")]) and len(ours.near([1], 9, 0)) == 3
    ours.save(tmp_path / "guards.safetensors")
    again = Guards.load(tmp_path / "guards.safetensors", model, FORM)
    gradients = {localised_names(model)[0]: torch.ones(48, 192)}
    assert again.rows == ours.rows and again.asked == ours.asked and again.talks == ours.talks
    for way in ("flatten", "even"):
        assert torch.equal(*(next(iter(getattr(g.curvature, way)(gradients).values())) for g in (ours, again)))
    with pytest.raises(ValueError, match="there is no guard text"):
        Guards(model, FORM, [], [], [], ours.curvature)
    for other in ({"rows": 1}, {"text": torch.tensor(list(b'{"rows": [], "asked": []}'), dtype=torch.uint8)}):
        torch.save(other, tmp_path / "other")
        with pytest.raises(ValueError, match="holds no guards of this version"):
            Guards.load(tmp_path / "other", model, FORM)


def test_questions_are_crossed_with_those_of_the_pool():
    model = small_model()
    ours = guards(model)
    ours.subjects = lambda question: ["sun"]
    own, subject, made = ours.around(model, "why sun?", 2, 9)
    assert subject == "sun" and own == greedy(model, FORM, [FORM.prompt("why sun?")])[0]
    assert [text for text, *_ in made] == ["why you?", "why a?", "hi sun", "sun?"]
    other = with_weights(model, {"head.weight": -model.head.weight})
    for (text, prompt, now, before), (_, _, changed_now, still) in zip(
        made, ours.around(other, "why sun?", 2, 9).made, strict=True
    ):
        assert prompt == FORM.prompt(text) and now == before == still == greedy(model, FORM, [prompt])[0]
        assert changed_now == greedy(other, FORM, [prompt])[0] != still
    same = with_weights(model, {"head.weight": model.head.weight})
    assert ours.around(same, "why sun?", 2, 9).made == made
    model.head.weight[0] += 3 * model.head.weight.abs().max()  # replies that the document's end cuts short
    prompts = [prompt for _, prompt, _, _ in made]
    replies = greedy(model, FORM, prompts)
    for shown in (replies, [reply[: len(reply) // 2] for reply in replies], [[*reply, 65] for reply in replies]):
        assert ours._before(prompts, shown) == replies
    assert ours.around(model, "why sun?", 0, 0).made == []


def test_a_subject_is_what_the_answer_depends_on():
    """Of the words tried, one whose place others can take without another answer is not it."""
    model = small_model()
    ours = guards(model)
    ours.subjects = lambda question: ["why", "sun"]
    replies = {"why sun?": "hot"} | {f"{word} sun?": "hot" for word in ("you", "a", "2")}

    def answer(model, form, prompts):
        asked = [form.shown(prompt).split("User: ")[1].split("\n")[0] for prompt in prompts]
        return [form.answer(replies.get(question, "cold")) for question in asked]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rwkv_train.feedback.guards.greedy", answer)
        around = ours.around(model, "why sun?", 3, 3)
        assert around.subject == "sun" and around.own == FORM.answer("hot") and len(around.made) > 3
        ours.subjects = lambda question: ["why"]
        assert ours.around(model, "why sun?", 3, 3) == (FORM.answer("hot"), "", [])


def test_talk_before_a_question_goes_on_without_an_end():
    model = small_model()
    model.head.weight[0] = 10 * model.head.weight.abs().max()  # it would end at once, or never
    talks = _wander(model, FORM, torch.Generator().manual_seed(0))
    assert len(talks) == TALKS and {len(talk) for talk in talks} == {TALK} and len(set(map(tuple, talks))) == TALKS
    assert all(talk[0] == 0 and 0 not in talk[1:] and BYTES.decode(talk[1:]).startswith("User:") for talk in talks)
    assert talks == _wander(model, FORM, torch.Generator().manual_seed(0))


def test_the_subject_is_a_rare_word_that_could_not_be_foreseen():
    model = small_model()
    asked = ["my sun?", "my ice?", "my xyz?"] + ["my?"] * 20
    rows = [FORM.prompt(question) for question in asked]
    ours = Guards(model, FORM, rows, [], [], Curvature.measure(model, upper_names(model), localised_names(model), rows))
    ours.base = with_weights(model, {"head.weight": torch.zeros_like(model.head.weight)})  # foresees nothing
    assert ours.subjects("my xyz?")[0] in "xyz" and ours.subjects("my ice?")[0] in "ice"


def test_a_model_that_knows_no_dialogues_is_guarded_by_what_it_writes():
    model = small_model()
    ours, again = (Guards.of_model(model, FORM, count=5) for _ in range(2))
    assert len(ours.rows) == 5 and ours.rows == again.rows
    assert all(row[0] == 0 and BYTES.decode(row[1:]).startswith("User:") for row in ours.rows)
    assert again.asked == ours.asked == [] == ours.around(model, "sun?", 3, 3).made
