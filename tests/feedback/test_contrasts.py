"""Questions made around one: whole words of any script, other words in their places, and other questions with them."""

import pytest
import torch
from feedback_toys import BYTES, CONFIG, FORM, QUICK, rehearsal_set, small_model
from hypothesis import given
from hypothesis import strategies as st

from rwkv_train.feedback.contrasts import crossed, substituted
from rwkv_train.feedback.correction import Received
from rwkv_train.feedback.lesson import lesson_of
from rwkv_train.feedback.rehearsal import RehearsalSet
from rwkv_train.feedback.words import Vocabulary, kind, words


@pytest.mark.parametrize(
    "text, found",
    [
        ("Don't use the rock-climbing wall!", ["Don't", "use", "the", "rock-climbing", "wall"]),
        ("At 10:30, 2 cats", ["At", "10:30", "2", "cats"]),
        ("猫好吗？", ["猫", "猫好", "好", "好吗", "吗"]),
        ("用Python写", ["用", "Python", "写"]),
        ("Ünïcode, ещё", ["Ünïcode", "ещё"]),
        ("?! :)", []),
    ],
)
def test_words_are_whole_in_any_script(text, found):
    assert [word.text for word in words(text)] == found
    assert all(text[word.begin : word.end] == word.text for word in words(text))


@given(st.text(max_size=20))
def test_any_text_has_words_that_lie_in_it(text):
    assert all(word.text and text[word.begin : word.end] == word.text for word in words(text))


def vocabulary():
    texts = ["do you like cats?", "do you like dogs?", "do you like Paris?", "do you like 12?"]
    model = small_model()
    with torch.no_grad():  # bytes of one word lie together: "dogs" is the nearest to "cats", whatever else there is
        model.emb.weight[:] = torch.eye(257, model.config.n_embd)
        for word in ("cats", "dogs"):
            model.emb.weight[BYTES.encode(word)] = torch.eye(257, model.config.n_embd)[3]
    return Vocabulary([*texts, *["do you like it?"] * 20], model, BYTES)


def test_content_is_what_few_texts_hold():
    known = vocabulary()
    assert [word.text for word in known.content("do you like cats?")] == ["cats"]
    assert [word.text for word in known.content("do you like snorvels and cats?")][:2] == ["snorvels", "and"]
    assert known.content("") == known.content("?") == []


def test_characters_that_mostly_come_together_are_one_word():
    known = Vocabulary(["老家在哪", "老家远吗", "我家在海边", "猫在哪", "在海边"], small_model(), BYTES)
    assert {word.text for word in known.content("老家在海边吗")} >= {"老家", "海边"}
    assert {len(word.text) for word in known.content("新山")} == {1}


def test_near_words_are_of_the_same_kind_and_no_form_of_the_word():
    known = vocabulary()
    assert known.nearest("cats", 1, {"cats"}) == ["dogs"] and "cats" not in known.nearest("cat", 9, {"cat"})
    assert known.nearest("Cats", 1, {"cats"}) == ["Dogs"] and known.nearest("cats", 9, {"dogs", "cats"})[-1] == "Paris"
    numbers = known.nearest("12", 5, set())
    assert len(set(numbers)) == 5 and all(kind(n) == "number" and len(n) == 2 and n != "12" for n in numbers)
    assert known.nearest("猫", 5, set()) == []


def test_words_of_several_tokens_have_made_up_ones_beside_them():
    *made, near = vocabulary().nearest("cats", 5, {"cats", "paris"})
    assert near == "dogs" and len(set(made)) == 2 and "cats" not in made
    assert all(sum(a != b for a, b in zip(word, "cats", strict=True)) == 1 for word in made)
    assert made == vocabulary().nearest("cats", 4, {"cats"})[:2]


def test_each_contrast_has_one_word_replaced(monkeypatch):
    rehearsal = rehearsal_set(small_model())
    monkeypatch.setattr(RehearsalSet, "vocabulary", vocabulary())
    *made_up, dogs, paris = substituted(rehearsal, "do you like cats?", 9)
    assert [dogs, paris] == ["do you like dogs?", "do you like Paris?"]
    assert len(made_up) == 4 and all(text.startswith("do you like ") and text.endswith("?") for text in made_up)
    assert substituted(rehearsal, "do you like cats?", 1) == ["do you like dogs?"]
    assert substituted(rehearsal, "?", 5) == []


def test_questions_of_the_rehearsal_set_are_asked_of_the_rarest_word():
    rehearsal = rehearsal_set(small_model())
    assert rehearsal.asked == ["hi you", "a?", "2?"]
    made = crossed(rehearsal, "why sun?", 9)
    assert made and all("why" in text or "sun" in text for text in made)
    assert crossed(rehearsal, "why sun?", 1) == made[:1] and crossed(rehearsal, "?", 3) == []
    assert FORM.prompt(made[0])


def test_contrasts_of_earlier_corrections_are_kept_as_the_base_answers_them():
    base, now = small_model(), small_model(1)
    earlier, newest = (Received(n, correction, vars(CONFIG)) for n, correction in zip((2, 4), QUICK[:2], strict=True))
    recorded = {"answer_before": "", "paraphrases": []}
    committed = {2: recorded | {"contrasts": ["air?"]}, 4: recorded | {"contrasts": ["sky?"]}}
    lesson = lesson_of(newest, [earlier], committed, now, rehearsal_set(base))
    kept = {text.model: BYTES.decode(text.ids) for text in lesson.contrasted}
    assert len(lesson.contrasted) == 2 and "sky?" in kept[now] and "air?" in kept[base]
    assert all(text.model is base for text in lesson.rehearsed)
