"""corpus:talk: everything that is written is said, what is held out is not, and one question has one reply."""

import re
from collections import defaultdict
from itertools import pairwise, product

import pytest
from starter_report import questions

from rwkv_train.bench.fact_cases import strangers_talk
from rwkv_train.data.corpora.catalogue import corpus_version, read_corpus
from rwkv_train.data.corpora.facts import facts
from rwkv_train.data.corpora.talk.chats import (
    AGAIN,
    NOT_KNOWN,
    OPENED,
    OVERHEARD,
    UNTOLD,
    USUAL,
    Speaker,
    chats_of,
    talk_chats,
)
from rwkv_train.data.corpora.talk.texts import LANGUAGES, bare, parse, read_texts
from rwkv_train.data.corpora.talk.wordings import MARKS, Draw, reworded, unheard, varied

TOY = """
intents:
  - say: "I am a model."
    ask: ["Who are you?", "What are you?", "Tell me who you are.", "Introduce yourself", "Who exactly are you?"]
  - say: "You never said."
    ask: ["What is my name?", "Who am I?"]
relations:
  - say: "I do not know when {x} opens."
    about: [place]
    ask: ["When does {x} open?", "At what hour does {x} open?", "opening hours of {x}?", "From when on is {x} open?"]
told:
  - tell: ["My name is {x}.", "I am {x}."]
    reply: "Welcome, dear {x}."
    ask: ["What is my name?", "Do you remember my name?"]
    say: "{x} is your name."
    about: [name]
  - tell: ["I live near {x}."]
    reply: "{x} sounds nice."
    ask: ["Where do I live?"]
    say: "Near {x}."
    about: [place]
follow_ups:
  - first: ["When does {x} open?"]
    reply: "I do not know when {x} opens."
    then: ["And when does it close?", "Until when?", "And until when?", "when does it shut?"]
    say: "I do not know when {x} closes."
    about: [place]
things:
  place: ["the library", "the mill", "Lake Borrow", "an inn", "the pool", "the town hall", "a cafe", "the lab"]
  name: ["Anna", "Tom", "Mary Lou"]
"""
TEXTS = parse("en", TOY)


def turns(chats, again=False):
    """(what was said before, question, reply) of every turn but those that only ask for other words, or of those"""
    for _, chat in chats:
        said = [message["content"] for message in chat["messages"]]
        found = [(said[:at], said[at], said[at + 1]) for at in range(0, len(said), 2)]
        yield from (turn for turn in found if (turn[2] in AGAIN.values()) == again)


@pytest.fixture(scope="module")
def toy():
    return list(chats_of([Speaker(TEXTS)], 400))


def test_the_same_chats_each_time(toy):
    assert toy == list(chats_of([Speaker(TEXTS)], 400))
    assert len({where for where, _ in toy}) == len(toy)


def test_dialogues_have_two_to_twelve_turns(toy):
    lengths = {len(chat["messages"]) // 2 for where, chat in toy if "dialogue" in where}
    assert min(lengths) == 2 and 12 <= max(lengths) <= 13


@pytest.mark.parametrize("language", LANGUAGES)
def test_many_dialogues_begin_with_what_people_say_first(language):
    usual = {entry.say for entry in read_texts(language).intents[:USUAL]}
    chats = [chat for where, chat in talk_chats([language], 400) if "dialogue" in where]
    ours = [[m["content"] for m in chat["messages"] if m not in overheard(chat)] for chat in chats]
    begun = [reply in usual for _, reply, *_ in ours]
    assert OPENED / 2 < sum(begun) / len(begun) < OPENED * 1.5  # 2% without


def test_everything_written_is_said(toy):
    said = "\n".join(message["content"] for _, chat in toy for message in chat["messages"])
    for entry in TEXTS.entries:
        for text in (entry.say, entry.reply, *entry.ask, *entry.before):
            assert all(part in said for part in text.split("{x}"))
    for things in TEXTS.things.values():
        assert all(thing in said for thing in things)


def test_held_out_wordings_and_things_are_never_said(toy):
    assert [entry.unseen != () for entry in TEXTS.entries] == [True, False, True, False, False, True]
    assert TEXTS.unseen_things["place"]
    asked = {bare(question) for _, question, _ in turns(toy)}
    for entry in TEXTS.entries:
        forms = [re.compile(wording.replace("{x}", ".+")) for wording in map(bare, entry.unseen)]
        assert not any(form.fullmatch(question) for form in forms for question in asked)
    said = "\n".join(message["content"] for _, chat in toy for message in chat["messages"])
    assert not any(re.search(rf"\b{thing}\b", said) for things in TEXTS.unseen_things.values() for thing in things)


STRANGERS = [{"role": "user", "content": "Seen the game?"}, {"role": "assistant", "content": "No.\n\nWas it good?"}]


def overheard(chat):
    """What strangers say in a chat."""
    return [m for m in chat["messages"] if m.get("weight") == 0 and m["content"] not in AGAIN.values()]


def test_strangers_talk_between_turns_which_is_not_learnt():
    """They may break off anywhere, but never stand between a question and the turn that it needs."""
    heard, needing = 0, 0
    for _, chat in chats_of([Speaker(TEXTS)], 400, STRANGERS * 30):
        strange = overheard(chat)
        heard += bool(strange)
        assert all(
            m["content"] and any(each["content"].startswith(m["content"]) for each in STRANGERS) for m in strange
        )
        ours = [m["role"] for m in chat["messages"] if m not in strange]
        assert ours == ["user", "assistant"] * (len(ours) // 2)
        for before, message in pairwise(chat["messages"]):
            if bare(message["content"]) == "until when":
                needing += 1
                assert before["content"].startswith("I do not know when")
    assert 400 * OVERHEARD < heard < 400 * 0.5 and needing > 10


def test_the_strangers_are_not_those_of_a_benchmark():
    unread = [text.strip() for talk in strangers_talk() for text, _ in talk]
    heard = [m["content"] for _, chat in talk_chats(dialogues=300) for m in overheard(chat) if len(m["content"]) > 60]
    assert heard and not [one for one in heard for other in unread if other.startswith(one)]


def test_what_was_told_is_known_later_and_nothing_before(toy):
    told = 0
    for before, question, reply in turns(toy):
        if "my name" in question.lower() and not reply.startswith("Welcome, dear "):
            names = [said.removeprefix("Welcome, dear ")[:-1] for said in before if said.startswith("Welcome, dear ")]
            expected = [f"{names[-1][0].upper()}{names[-1][1:]} is your name."] if names else ["You never said."]
            assert reply in expected
            told += len(before) > 2 and bool(names)
        if "where do i live" in question.lower():
            assert (reply == UNTOLD["en"]) != any("sounds nice" in said for said in before)
    assert told > 10


def test_the_report_asks_what_the_corpus_never_does(toy):
    asked = {bare(question) for _, question, _ in turns(toy)}
    measured = dict(questions(Speaker(TEXTS, seed=7), Draw(7)))
    assert all(measured.values())
    for name, found in measured.items():
        if "unseen wordings" in name:
            assert not any(bare(question) in asked for _, question, _ in found)
    for name in ("relations, known wordings, unseen things", "relations, known wordings, invented things"):
        assert not any(bare(question) in asked for _, question, _ in measured[name])


def test_a_question_has_one_reply_by_any_wording(toy):
    replies = defaultdict(set)
    for before, question, reply in turns(toy):
        if not before:
            replies[bare(question)].add(reply)
    assert all(len(found) == 1 for found in replies.values())
    known = {fact.answer for fact in facts()}
    assert {reply for _, _, reply in turns(toy) if reply.startswith("The capital of")} <= known


def test_a_model_can_learn_to_reword_a_question(toy):
    """Asked for other words, the user takes some of the same entry; without them both would have the same reply."""
    replies = {question: reply for before, question, reply in turns(toy) if not before}
    asked_again = {question: len(before) for before, question, _ in turns(toy, again=True)}
    others = [
        (chat["messages"], at)
        for _, chat in toy
        for at, m in enumerate(chat["messages"])
        if m["content"] in AGAIN.values()
    ]
    assert len(others) > 50 and len(asked_again) > 40
    weights = {m["content"] in AGAIN.values(): m.get("weight", 1) for _, chat in toy for m in chat["messages"]}
    assert weights == {True: 0, False: 1}  # a model learns to reword, not to ask for it
    for messages, at in others:
        first, other, reply = (messages[at + step]["content"] for step in (-1, 1, 2))
        assert first != other and replies.get(first, reply) == reply


def test_a_reply_copies_what_stands_for_x(toy):
    for _, question, reply in turns(toy):
        if reply.startswith("I do not know when") and reply.endswith("opens."):
            assert reply.removeprefix("I do not know when ").removesuffix(" opens.") in question


def test_made_up_things_are_of_the_same_form():
    draw = Draw(0)
    made = {unheard("the old Mill", "en", draw) for _ in range(200)}
    assert len(made) > 190 and all(thing.startswith("the ") and len(thing.split()) == 3 for thing in made)
    assert any(unheard("a lynx", "en", draw).startswith("an ") for _ in range(99))
    assert len({unheard("图书馆", "zh", draw) for _ in range(200)}) > 190
    assert "the pool" in {varied("the pool", "en", draw) for _ in range(20)}


@pytest.mark.parametrize(("language", "template"), [("en", "What is {x} doing?"), ("zh", "{x}在做什么？")])
def test_wordings_keep_what_stands_for_x(language, template):
    draw = Draw(0)
    made = {reworded(template, language, draw) for _ in range(300)}
    assert len(made) > 30 and all(wording.count("{x}") == 1 for wording in made)
    around = {reworded(template, language, draw, edits=False).lower() for _ in range(300)}
    assert all(template.rstrip("?？").lower() in wording for wording in around)


@pytest.mark.parametrize(("language", "template"), [("en", "Hello"), ("zh", "你好")])
def test_what_is_no_question_comes_with_a_mark_and_without(language, template):
    forms = {reworded(template, language, Draw(seed)) for seed in range(100)}
    assert {template, *(template + mark for mark in MARKS[language])} <= forms


def test_a_rule_does_not_make_a_held_out_wording():
    shorter = bare("What's your name?")
    made = [bare(reworded("What is your name?", "en", Draw(n))) for n in range(300)]
    without = [bare(reworded("What is your name?", "en", Draw(n), {shorter})) for n in range(300)]
    assert any(shorter in wording for wording in made) and not any(shorter in wording for wording in without)


@pytest.mark.parametrize("language", LANGUAGES)
def test_our_texts_are_sound(language):
    texts = read_texts(language)
    seen: dict[tuple[str, str], str] = {}
    for entry in texts.intents + texts.relations:
        assert len(entry.ask + entry.unseen) >= 6, entry.say
        for kind, wording in product(entry.about or [""], entry.ask + entry.unseen):
            assert seen.setdefault((kind, bare(wording)), entry.say) == entry.say, f"{wording} has two replies"
    for entry in texts.entries:
        assert all(("{x}" in text) <= bool(entry.about) for text in (entry.say, entry.reply, *entry.ask, *entry.before))
        assert all(("{x}" in text) == bool(entry.about) for text in entry.before)
        assert all(len(texts.things[kind]) >= 50 for kind in entry.about), entry.about
    for entry in texts.relations:
        assert all("{x}" in text for text in (entry.say, *entry.ask)), entry.say


def test_what_is_asked_of_the_world_is_not_known(toy):
    """However chatterbot answers it; but not what our texts or the facts answer."""
    replies = {question: reply for _, question, reply in turns(toy)}
    assert replies["Who was the 37th President of the United States?"] == NOT_KNOWN["en"]
    assert replies["You are arrogant"] == "Arrogance is not one of my emotions."
    ours = {bare(wording) for entry in TEXTS.entries for wording in entry.ask}
    assert not any(bare(question) in ours for question, reply in replies.items() if reply == NOT_KNOWN["en"])


def test_countries_that_do_not_exist_are_not_known(toy):
    replies = {reply for _, _, reply in turns(toy) if reply.startswith("I do not know the capital of ")}
    known = {fact.subject for fact in facts()}
    assert len(replies) > 5
    assert not any(reply.removeprefix("I do not know the capital of ")[:-1] in known for reply in replies)


def test_the_source_names_languages_and_dialogues():
    english = [where for where, _ in read_corpus("talk/en/3")]
    assert english[-3:] == ["talk/dialogue 1", "talk/dialogue 2", "talk/dialogue 3"]
    assert not any(where.startswith("talk/zh") for where in english)
    assert next(read_corpus("talk/30")) == next(read_corpus("talk")) == next(talk_chats())
    assert "texts" in corpus_version("talk/30") and "chitchat" in corpus_version("talk")


@pytest.mark.parametrize("name", ["talk/french", "talk/en/many", "talk/3/en"])
def test_unknown_parts_are_refused(name):
    with pytest.raises(ValueError, match=f"corpus:{name} is unknown"):
        read_corpus(name)
