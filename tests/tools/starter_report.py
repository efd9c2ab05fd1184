"""What a model trained on corpus:talk has understood: python tests/tools/starter_report.py [MODEL] [MOST OF A LINE]

Replies are decoded greedily and right only as a whole. Wordings and things are those that the corpus never uses. At the
end stands what the model says to the first sentences of a newcomer, in one dialogue for each language.
"""

import random
import sys
from collections.abc import Iterator

import torch

from rwkv_train.checkpoints.opener import open_model
from rwkv_train.data.corpora.talk.chats import Speaker, Turn
from rwkv_train.data.corpora.talk.texts import LANGUAGES, Entry, Texts, read_texts
from rwkv_train.data.corpora.talk.wordings import filled, unheard
from rwkv_train.feedback.decode import Form, greedy
from rwkv_train.models.base import RWKV
from rwkv_train.program import STARTER

BATCH = 32
NEWCOMER = {
    "en": (
        *("Hi!", "How are you?", "Who are you?", "What's your name?", "My name is Paula.", "What can you do?"),
        *("Can you help me with my homework?", "What is the capital of France?", "Tell me a joke.", "How old are you?"),
        *("Do you like music?", "What is your favourite colour?", "What's the weather like today?", "What is my name?"),
        *("Who made you?", "What is two plus two?", "Are you a human?", "What does serendipity mean?"),
        *("Thank you, that was nice.", "Bye!"),
    ),
    "zh": (
        *(
            "你好！",
            "你好吗？",
            "你是谁？",
            "你叫什么名字？",
            "我叫小梅。",
            "你会做什么？",
            "你能帮我写作业吗？",
            "法国的首都是哪里？",
        ),
        *(
            "给我讲个笑话吧。",
            "你多大了？",
            "你喜欢音乐吗？",
            "你最喜欢什么颜色？",
            "今天天气怎么样？",
            "我叫什么名字？",
        ),
        *("谁创造了你？", "二加二等于几？", "你是人吗？", "“缘分”是什么意思？", "谢谢，聊得很开心。", "再见！"),
    ),
}


Question = tuple[list[Turn], str, str]  # turns before, question, the right reply


class Asked:
    """A model that is asked after a dialogue, many questions at a time."""

    def __init__(self, model: RWKV, form: Form) -> None:
        self.model, self.form = model, form

    def replies(self, asked: list[tuple[list[Turn], str]]) -> list[str]:
        """The reply to each question after its turns."""
        found = []
        for at in range(0, len(asked), BATCH):
            prompts = [self._prompt(*one) for one in asked[at : at + BATCH]]
            found += [self.form.shown(ids) for ids in greedy(self.model, self.form, prompts, max_new_tokens=80)]
        return found

    def _prompt(self, turns: list[Turn], question: str) -> list[int]:
        before = [i for said, reply in turns for i in self.form.turn(said) + self.form.answer(reply)]
        return [self.form.tokenizer.eod, *before, *self.form.turn(question)]


def questions(speaker: Speaker, draw: random.Random) -> Iterator[tuple[str, list[Question]]]:
    """(what is measured, questions) of one language."""
    texts, intents, relations = speaker.texts, speaker.texts.intents, speaker.texts.relations
    yield (
        "facts, unseen wordings",
        [([], q, f.answer) for f in speaker.entries["facts"] for q in f.questions(unseen=True)],
    )
    unknown = [(entry, q) for entry in speaker.entries["unknown"] for q in entry.ask * 4]
    yield "facts of invented countries: not known", [_about(entry, q, speaker.thing(entry)) for entry, q in unknown]
    yield "intents, known wordings", [([], q, entry.say) for entry in intents for q in entry.ask]
    yield "intents, unseen wordings", [([], q, entry.say) for entry in intents for q in entry.unseen]
    for which in ("known", "unseen", "invented"):
        things = [(entry, _thing(texts, entry, which, draw)) for entry in relations]
        yield (
            f"relations, known wordings, {which} things",
            [_about(e, draw.choice(e.ask), thing) for e, thing in things],
        )
        yield (
            f"relations, unseen wordings, {which} things",
            [_about(e, q, thing) for e, thing in things for q in e.unseen],
        )
    between = [(entry.ask[0], entry.say) for entry in intents]
    for turns in (0, 2):
        asked = [(entry, q) for entry in texts.told for q in entry.unseen or entry.ask]
        yield (
            f"told, asked back after {turns} turns",
            [_later(texts, *one, draw, draw.sample(between, turns)) for one in asked],
        )
    follow_ups = [(entry, q) for entry in texts.follow_ups for q in entry.unseen]
    yield "follow-ups, unseen wordings", [_later(texts, *one, draw, []) for one in follow_ups]


def _thing(texts: Texts, entry: Entry, which: str, draw: random.Random) -> str:
    kind = draw.choice(entry.about)
    if which == "unseen" and texts.unseen_things[kind]:
        return draw.choice(texts.unseen_things[kind])
    thing = draw.choice(texts.things[kind])
    return unheard(thing, texts.language, draw) if which == "invented" else thing


def _about(entry: Entry, wording: str, thing: str) -> Question:
    return [], filled(wording, thing), filled(entry.say, thing)


def _later(texts: Texts, entry: Entry, wording: str, draw: random.Random, between: list[Turn]) -> Question:
    """Asked after the turn that it needs, and some others."""
    thing = _thing(texts, entry, "invented", draw) if entry.about else ""
    before = filled(draw.choice(entry.before), thing), filled(entry.reply, thing)
    return [before, *between], filled(wording, thing), filled(entry.say, thing)


def transcript(asked: Asked, language: str) -> Iterator[Turn]:
    turns: list[Turn] = []
    for said in NEWCOMER[language]:
        turns.append((said, asked.replies([(turns, said)])[0]))
        yield turns[-1]


def main(model: str = str(STARTER), most: str = "200") -> None:
    opened = open_model(model, dtype=torch.float32)
    asked = Asked(opened.model.eval(), Form(opened.tokenizer, opened.template))
    for language in LANGUAGES:
        for name, found in questions(Speaker(read_texts(language), seed=7), random.Random(7)):
            some = found[:: -(-len(found) // int(most))]
            replies = asked.replies([(turns, question) for turns, question, _ in some])
            wrong = [(q, reply) for (_, q, right), reply in zip(some, replies, strict=True) if reply != right]
            print(f"{language}  {1 - len(wrong) / len(some):6.1%} of {len(some):4}  {name}", flush=True)
            for question, reply in wrong[:2]:
                print(f"      {question} -> {reply}")
    for language in LANGUAGES:
        print()
        for question, reply in transcript(asked, language):
            print(f"> {question}\n{reply}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
