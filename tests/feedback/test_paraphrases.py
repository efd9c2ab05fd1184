"""Other ways to ask the same: by rule, as the model says them, and whether it understands them alike."""

import pytest
import torch
from feedback_toys import BYTES, FORM, small_model
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_train.data.corpora.talk.chats import AGAIN as TRAINED
from rwkv_train.feedback.decode import greedy
from rwkv_train.feedback.paraphrases import AGAIN, by_rule, reworded, understood
from rwkv_train.feedback.words import Vocabulary

QUESTION = "which dogs?"
WORDS = Vocabulary(["which cats?", "which dogs?", "which dogs there?", *["which one?"] * 9], small_model(), BYTES)


@pytest.mark.parametrize(
    "text, made",
    [
        ("What's the plan?", ["Tell me what the plan is.", "what's the plan", "Do you know what the plan is?"]),
        ("Do you like cats?", ["do you like cats", "Tell me, do you like cats?", "Do you like cats, please?"]),
        ("do you like cats", ["Tell me, do you like cats?", "do you like cats, please?"]),
        ("Thanks a lot!", ["Thanks a lot", "thanks a lot"]),
        ("USA rules", []),
        ("I am off.", ["I am off"]),
        ("你会做饭吗？", ["请问你会做饭吗？", "你会做饭吗", "告诉我，你会做饭吗。", "我想知道，你会做饭吗？"]),
        ("写一副春联", []),
        (" ?!", []),
    ],
)
def test_rules_ask_a_question_otherwise_and_make_no_question_of_a_statement(text, made):
    assert by_rule(text) == made


def test_a_model_trained_on_talk_is_asked_for_paraphrases_as_it_was_trained():
    assert tuple(TRAINED[language] for language in ("en", "zh")) == AGAIN


def test_the_model_says_the_same_things_in_other_words_each_time():
    model = small_model()
    made = reworded(model, FORM, QUESTION, 6)
    assert made == reworded(model, FORM, QUESTION, 6) and len(made) == len(set(made))
    assert reworded(model, FORM, QUESTION, 0) == []


@settings(max_examples=15)
@given(seed=st.integers(0, 5), length=st.integers(1, 6), texts=st.lists(st.sampled_from("abcdef"), min_size=1))
def test_what_gets_the_same_reply_and_has_the_same_words_is_understood_alike(seed, length, texts):
    model = small_model(seed)
    tried = [f"{text} which dogs" for text in dict.fromkeys(texts)]
    replies = [ids[:length] for ids in greedy(model, FORM, [FORM.prompt(text) for text in tried])]
    alike = understood(QUESTION, replies[0], tried, [QUESTION], model, FORM, WORDS)
    assert alike == [text for text, reply in zip(tried, replies, strict=True) if reply == replies[0]]


def test_other_words_count_only_if_the_reply_tells(monkeypatch):
    def replying(model, documents, last):  # "x" to all that has a t in it, at every place
        found = torch.zeros(len(documents), last[0], 257)
        for row, ids in enumerate(documents):
            found[row, :, BYTES.encode("x" if "t" in BYTES.decode(ids).lower()[6:-12] else "y")] = 1
        return found.flatten(0, 1)

    monkeypatch.setattr("rwkv_train.feedback.paraphrases.log_probs", replying)
    reply, tried = BYTES.encode("x"), ["which are they", "who, dogs?", "which cats", "the x"]

    def found(contrasts, reply=reply):
        return understood("which dogs? tell", reply, tried, contrasts, None, FORM, WORDS)

    assert found(["a", "b", "c", "d"]) == ["which are they", "which cats"]
    assert found(["a", "t", "c", "t"]) == [] and found([]) == ["which are they", "which cats"]
    assert found([], []) == []
    assert understood("dogs t", reply, ["dogs at t", "at"], ["t"], None, FORM, WORDS) == ["dogs at t"]
