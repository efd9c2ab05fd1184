"""The corpus `talk` as chats: every wording alone, then dialogues that mix everything. The same each time."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain, islice
from operator import itemgetter
from typing import Any

from rwkv_train.data.corpora.fact_questions import Relation
from rwkv_train.data.corpora.facts import Fact, chatter, facts
from rwkv_train.data.corpora.packaged import chatterbot, chatterbot_files, chitchat, chitchat_talks
from rwkv_train.data.corpora.talk.texts import LANGUAGES, Entry, Texts, bare, read_texts
from rwkv_train.data.corpora.talk.wordings import filled, reworded, unheard, varied

Turn = tuple[str, str]
Message = dict[str, Any]
DIALOGUES = 20_000  # unless a number is given
LENGTHS = (2, 2, 3, 3, 4, 4, 5, 6, 7, 8, 10, 12)  # turns of a dialogue
CHANGE = 0.08  # how often the next turn is in the other language
WEIGHTS = {  # of a hundred turns
    **{"intents": 35, "relations": 25, "facts": 16, "chatter": 5},
    **{"unknown": 3, "told": 9, "untold": 2, "follow_ups": 5},
}
OPENED = 0.2  # of the dialogues, how many begin with one of
USUAL = 20  # the first intents of the file: what people say first
COUNTRY = ("country",)
AGAIN = {"en": "Could you say that in other words?", "zh": "你能换个说法吗？"}
ASKED_AGAIN = 0.12  # of the turns that can be said otherwise, how many come twice, in other words
NOT_KNOWN = {"en": "I do not know about that.", "zh": "这个我不懂。"}
OF_THE_WORLD = frozenset(  # topics of corpus:chatterbot
    "coding computers food health history literature money movies politics science sports tech_support trivia".split()
)
STRANGERS = 170  # of corpus:chitchat; benchmarks read the talks from the 400th on
OVERHEARD = 0.05  # of the turns, before how many something else was talked about
LETTERS = (30, 100, 300, 800)  # of that
UNTOLD = {"en": "You have not told me that yet.", "zh": "这个你还没有告诉我。"}


def talk_chats(languages: Sequence[str] = LANGUAGES, dialogues: int = DIALOGUES) -> Iterator[tuple[str, dict]]:
    """Yield (where, {"messages": [...]}): every wording alone, then so many dialogues of 2 to 12 turns.

    Dialogues mix what is known, what is not, facts about countries, turns of corpus:chatterbot, what the user tells and
    asks back, and questions that depend on the turn before. No held-out wording is ever asked. Now and then strangers
    talk in between, which is not learnt: without it, a model goes on with what was talked about, whatever it is asked.
    """
    speakers = [Speaker(read_texts(language)) for language in languages]
    yield from chats_of(speakers, dialogues, _strangers())


def chats_of(
    speakers: Sequence["Speaker"], dialogues: int, strangers: Sequence[Message] = ()
) -> Iterator[tuple[str, dict]]:
    for speaker in speakers:
        for number, turns in enumerate(speaker.alone(), 1):
            yield f"talk/{speaker.texts.language}/{number}", _chat(turns)
    draw = random.Random(1)
    for number in range(1, dialogues + 1):
        yield f"talk/dialogue {number}", {"messages": _dialogue(speakers, draw, strangers)}


def _chat(turns: Sequence[Turn]) -> dict:
    return {"messages": [*chain(*map(_messages, turns))]}


def _messages(turn: Turn) -> list[Message]:
    """Rewording is trained, but not to ask for it, as many turns have no likelier reply than that."""
    messages = [{"role": r, "content": t} for r, t in zip(("user", "assistant"), turn, strict=True)]
    return [m | {"weight": 0} if m["content"] in AGAIN.values() else m for m in messages]


def _strangers() -> list[Message]:
    """What is said in talks about anything, in English and Chinese."""
    talks = chain(islice(chitchat(chitchat_talks()), STRANGERS), chatterbot(chatterbot_files("chinese")))
    return [message for _, talk in talks for message in talk["messages"]]


def _overheard(strangers: Sequence[Message], draw: random.Random) -> list[Message]:
    """Nothing, or a stretch of what strangers say, which may break off within a word."""
    heard: list[Message] = []
    if strangers and draw.random() < OVERHEARD:
        left, at = draw.choice(LETTERS), draw.randrange(len(strangers))
        while left > 0 and at < len(strangers):
            said = strangers[at]["content"]
            heard.append(strangers[at] | {"content": said[:left].strip(), "weight": 0})
            left, at = left - len(said), at + 1
    return heard


def _not_known(relation: Relation) -> Entry:
    """A relation of corpus:facts, asked of countries that do not exist: "The capital of {} is {}." is not known."""
    known = relation.answer.format("{x}", "")
    if relation.language == "zh":
        say = f"我不知道{known.removesuffix('是。')}。"
    else:
        say = f"I do not know {known[0].lower()}{known[1:].partition(' is')[0]}."
    return Entry(say, tuple(question.format("{x}") for question in relation.train_questions), COUNTRY)


def _others(texts: Texts, known: list[Fact]) -> list[Entry]:
    """Questions of corpus:chatterbot that have no reply of ours. What they ask of the world is not known.

    To the English ones about oneself its own reply is given; the Chinese ones make no sense.
    """
    ours = {wording for entry in texts.entries for wording in entry.ask + entry.unseen + entry.before}
    ours |= {question for fact in known for unseen in (False, True) for question in fact.questions(unseen)}
    taken = {bare(wording) for wording in ours}
    files = chatterbot_files({"en": "english", "zh": "chinese"}[texts.language])
    asked = (chat["messages"][0]["content"] for _, chat in chatterbot([f for f in files if f.stem in OF_THE_WORLD]))
    found = {bare(question): Entry(NOT_KNOWN[texts.language], (question,)) for question in asked}
    for question, reply in chatter(texts.language) if texts.language == "en" else ():
        found.setdefault(bare(question), Entry(reply, (question,)))
    return [entry for question, entry in found.items() if question not in taken]


def _dialogue(speakers: Sequence["Speaker"], draw: random.Random, strangers: Sequence[Message]) -> list[Message]:
    """Turns one after another; what was told is asked back after some turns."""
    length, speaker = draw.choice(LENGTHS), draw.choice(speakers)
    turns: list[list[Message]] = []
    later: list[tuple[int, list[Message]]] = []  # what is asked back, and before which turn
    told: dict[tuple[str, ...], Speaker] = {}  # how it is asked back, and in whose language
    while len(turns) + len(later) < length:
        for due, turn in [pair for pair in later if pair[0] <= len(turns)]:
            later.remove((due, turn))
            turns.append(turn)
        if draw.random() < CHANGE:
            speaker = draw.choice(speakers)
        usual = not turns and not later and draw.random() < OPENED
        kind = "intents" if usual else draw.choices(*zip(*speaker.weights.items(), strict=True))[0]
        entry = speaker.next("usual" if usual else kind)
        if told and speaker.depends(kind, entry, told):
            continue
        first, *others = map(_messages, speaker.turns(kind, entry))
        together = [_overheard(strangers, draw) + first, *others]
        if kind == "told":
            told[entry.ask] = speaker
            due = len(turns) + len(others) + draw.choice((0, 0, 1, 1, 2, 3, 4, 6))
            later.append((due, _overheard(strangers, draw) + together.pop()))
        turns += together
    return [*chain(*turns, *(turn for _, turn in sorted(later, key=itemgetter(0))))]


class Speaker:
    """What is said in one language. Each kind of turn goes through all its entries before one comes again.

    entries: what there is, by kind of turn, and "things/KIND".
    """

    def __init__(self, texts: Texts, seed: int = 0) -> None:
        self.texts = texts
        self.draw = random.Random(f"{texts.language} {seed}")
        known = [fact for fact in facts() if fact.relation.language == texts.language]
        self.entries = {name: getattr(texts, name) for name in ("intents", "relations", "told", "follow_ups")}
        self.entries["usual"] = texts.intents[:USUAL]
        self.entries |= {f"things/{kind}": things for kind, things in texts.things.items()}
        self._asked_back = {bare(wording) for entry in texts.told for wording in entry.ask}
        answered = {bare(wording) for entry in texts.intents for wording in entry.ask + entry.unseen}
        untold = [replace(entry, say=UNTOLD[texts.language]) for entry in texts.told]
        untold = [entry for entry in untold if not answered & {bare(wording) for wording in entry.ask}]
        relations = dict.fromkeys(fact.relation for fact in known)
        self.entries |= {"facts": known, "untold": untold, "unknown": [_not_known(relation) for relation in relations]}
        self.entries["chatter"] = _others(texts, known)
        self._countries = [*dict.fromkeys(fact.subject for fact in known)]
        self._left: dict[Any, list] = {}
        self.weights = {name: weight for name, weight in WEIGHTS.items() if self.entries[name]}
        self._relations = {entry.say: entry.ask for entry in texts.relations}
        forms = [form.format("{x}") for relation in relations for form in relation.unseen_questions]
        self._held_out = texts.held_out | {bare(form) for form in forms}

    def depends(self, kind: str, entry: Entry | Fact, told: dict[tuple[str, ...], "Speaker"]) -> bool:
        """Whether what was told in a dialogue would change the reply, or be told again."""
        if kind in ("told", "untold"):
            return entry.ask in told or any(speaker is not self for speaker in told.values())
        return kind == "intents" and any(bare(wording) in self._asked_back for wording in entry.ask)

    def next(self, name: str) -> Any:
        return self._from(name, self.entries[name])

    def _from(self, key: Any, options: Sequence) -> Any:
        """The next of `options` in an order that is drawn anew each time all have come."""
        if not self._left.get(key):
            self._left[key] = self.draw.sample(options, len(options))
        return self._left[key].pop()

    def alone(self) -> Iterator[list[Turn]]:
        """Every wording as it is written, as a chat of its own, or after the turn that it needs."""
        for entry in self.texts.intents:
            yield from ([(wording, entry.say)] for wording in entry.ask)
        for fact in self.entries["facts"]:
            yield from ([(question, fact.answer)] for question in fact.questions())
        yield from ([(entry.ask[0], entry.say)] for entry in self.entries["chatter"])
        for entry in chain(self.texts.relations, self.texts.told, self.texts.follow_ups):
            for number in range(max(len(entry.ask), len(entry.before))):
                thing = self.thing(entry)
                before = self._before(entry, number)
                turn = (entry.ask[number % len(entry.ask)], entry.say)
                yield [tuple(filled(text, thing) for text in turn) for turn in (*before, turn)]

    def _before(self, entry: Entry, number: int) -> list[Turn]:
        return [(entry.before[number % len(entry.before)], entry.reply)] if entry.before else []

    def thing(self, entry: Entry) -> str:
        """What stands for {x}: of the files, or made up by rule."""
        if not entry.about:
            return ""
        if entry.about == COUNTRY:
            return unheard(self.draw.choice(self._countries), self.texts.language, self.draw)
        return varied(self.next(f"things/{self.draw.choice(entry.about)}"), self.texts.language, self.draw)

    def turns(self, kind: str, entry: Entry | Fact) -> list[Turn]:
        """The turn in which something is asked, after the one that it needs."""
        if kind in ("intents", "relations", "facts", "unknown") and self.draw.random() < ASKED_AGAIN:
            return self._twice(entry)
        if isinstance(entry, Fact):
            question = self._from(entry, entry.questions())
            return [(reworded(question, self.texts.language, self.draw, edits=False), entry.answer)]
        thing = self.thing(entry)
        turn = self._ask(entry.ask, thing), filled(entry.say, thing)
        if not entry.before or kind == "untold":
            return [turn]
        before = entry.before + self._relations.get(entry.reply, ())
        return [(self._ask(before, thing), filled(entry.reply, thing)), turn]

    def _twice(self, entry: Entry | Fact) -> list[Turn]:
        """A question that is asked for in other words, and those; a model learns to reword any."""
        wordings, say, thing = (
            (entry.questions(), entry.answer, "")
            if isinstance(entry, Fact)
            else (entry.ask, entry.say, self.thing(entry))
        )
        first, other = self.draw.sample([filled(wording, thing) for wording in wordings], 2)
        return [(first, AGAIN[self.texts.language]), (other, filled(say, thing))]

    def _ask(self, wordings: Sequence[str], thing: str) -> str:
        wording = self._from(wordings, wordings)
        return filled(reworded(wording, self.texts.language, self.draw, self._held_out), thing)
