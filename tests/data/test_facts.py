"""corpus:facts and corpus:chitchat: what they say, that they say it the same way each time, what they need."""

import sys
from collections import Counter

import pytest

from rwkv_train.data.corpora.catalogue import corpus_version, read_corpus
from rwkv_train.data.corpora.fact_questions import RELATIONS
from rwkv_train.data.corpora.facts import COUNTRIES, fact_chats, facts
from rwkv_train.data.templates import Template


def test_every_country_has_every_fact_in_both_languages():
    assert len(facts()) == len(COUNTRIES) * len(RELATIONS)
    assert all(fact.subject and fact.value for fact in facts())


@pytest.mark.parametrize(
    "answer",
    [
        "The capital of France is Paris.",
        "The capital of the United States is Washington.",
        "The main language of Brazil is Portuguese.",
        "The currency of Japan is the Japanese Yen.",
        "The continent of Peru is South America.",
        "中国的首都是北京。",
        "日本的首都是东京。",
        "瑞士的主要语言是德语。",
        "英国的货币是英镑。",
    ],
)
def test_known_facts(answer):
    assert answer in {fact.answer for fact in facts()}


def test_unseen_questions_are_never_asked_in_the_corpus():
    asked = Counter(m["content"] for _, chat in fact_chats() for m in chat["messages"] if m["role"] == "user")
    for fact in facts():
        assert len(fact.questions(unseen=True)) >= 4
        assert all(asked[question] for question in fact.questions())
        assert not any(asked[question] for question in fact.questions(unseen=True))


def test_a_question_has_one_answer():
    answers = {}
    for fact in facts():
        for question in fact.questions() + fact.questions(unseen=True):
            assert answers.setdefault(question, fact.answer) == fact.answer


def test_chats_are_the_same_each_time_and_render():
    chats = list(read_corpus("facts"))
    assert chats == list(read_corpus("facts"))
    assert len({where for where, _ in chats}) == len(chats)
    assert max(len(chat["messages"]) for _, chat in chats) > 8
    segments = Template().segments(next(chat for _, chat in chats)["messages"])
    assert segments[1] == (" The capital of Afghanistan is Kabul.\n\n", True)


def test_chitchat_turns_alternate():
    chats = list(read_corpus("chitchat/20"))
    assert len(chats) == 20
    for _, chat in chats:
        assert [m["role"] for m in chat["messages"][:2]] == ["user", "assistant"]
        Template().segments(chat["messages"])


def test_versions_name_the_packages():
    assert "countryinfo" in corpus_version("facts") and "babel" in corpus_version("facts")
    assert corpus_version("chitchat/20").startswith("chitchat-dataset ")


@pytest.mark.parametrize(("name", "package"), [("facts", "countryinfo"), ("chitchat", "chitchat_dataset")])
def test_a_missing_package_is_named(monkeypatch, name, package):
    facts.cache_clear()
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=f"needs {package}: pip install"):
        read_corpus(name)


@pytest.mark.parametrize("name", ["facts/english", "chitchat/all"])
def test_unknown_parts_are_refused(name):
    with pytest.raises(ValueError, match=f"corpus:{name} is unknown"):
        read_corpus(name)
