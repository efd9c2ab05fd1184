"""What the talk is made of: the texts of en.yaml and zh.yaml, and which of them the corpus never uses.

intents: what is known; any of `ask` gets `say`. relations: what is not known of a thing {x}. told: what the user says
of themself, and how it is asked back later. follow_ups: short questions that depend on the turn before. things: what
stands for {x}, by kind.
"""

import re
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from zlib import crc32

LANGUAGES = ("en", "zh")
FEWEST = 4  # wordings of which one can be left out
ONE_IN = 12  # things that are left out
PUNCTUATION = re.compile(r"[\s.,;:!?~…。，；：！？、\"'“”‘’]+")


@dataclass(frozen=True)
class Entry:
    """Questions of one meaning, and the reply to them. about: kinds of things that stand for {x}; () has no {x}.

    before, reply: what the user said in an earlier turn of the same dialogue, and the reply to that; () and "" for
    what needs no such turn. unseen: the wordings of `ask` that the corpus never uses.
    """

    say: str
    ask: tuple[str, ...]
    about: tuple[str, ...] = ()
    before: tuple[str, ...] = ()
    reply: str = ""
    unseen: tuple[str, ...] = ()


@dataclass(frozen=True)
class Texts:
    """The texts of one language. unseen_things: those that the corpus never uses, by kind."""

    language: str
    intents: tuple[Entry, ...]
    relations: tuple[Entry, ...]
    told: tuple[Entry, ...]
    follow_ups: tuple[Entry, ...]
    things: dict[str, list[str]]
    unseen_things: dict[str, list[str]]

    @property
    def entries(self) -> tuple[Entry, ...]:
        return self.intents + self.relations + self.told + self.follow_ups

    @property
    def held_out(self) -> frozenset[str]:
        """The bare forms of all wordings that the corpus never uses."""
        return frozenset(bare(wording) for entry in self.entries for wording in entry.unseen)


def bare(wording: str) -> str:
    """A wording without case and punctuation, to tell whether two are the same."""
    return PUNCTUATION.sub(" ", wording).strip().lower()


@cache
def read_texts(language: str) -> Texts:
    return parse(language, _file(language).read_text(encoding="utf-8"))


def fingerprint() -> str:
    """Changes with any of the texts."""
    return f"{crc32(b''.join(_file(language).read_bytes() for language in LANGUAGES)):08x}"


def _file(language: str) -> Path:
    return Path(__file__).with_name(f"{language}.yaml")


def parse(language: str, text: str) -> Texts:
    """The texts of a file like en.yaml. Of each entry with enough wordings one is held out, the same each time."""
    import yaml

    # The base loader keeps every scalar as it was written: a reply "Yes" or "1969" stays text.
    file = yaml.load(text, Loader=getattr(yaml, "CBaseLoader", yaml.BaseLoader))
    entries = {
        "intents": [Entry(row["say"], tuple(row["ask"])) for row in file["intents"]],
        "relations": [Entry(row["say"], tuple(row["ask"]), tuple(row["about"])) for row in file["relations"]],
        "told": [_later(row, row["tell"], row["ask"]) for row in file["told"]],
        "follow_ups": [_later(row, row["first"], row["then"]) for row in file["follow_ups"]],
    }
    # What is said somewhere else too cannot be held out.
    count = Counter(bare(wording) for rows in entries.values() for row in rows for wording in row.ask + row.before)
    entries = {name: tuple(_hold_out(row, count) for row in rows) for name, rows in entries.items()}
    unseen = {
        kind: tuple(x for x in known if crc32(x.encode()) % ONE_IN == 0) for kind, known in file["things"].items()
    }
    things = {kind: tuple(x for x in known if x not in unseen[kind]) for kind, known in file["things"].items()}
    return Texts(language, **entries, things=things, unseen_things=unseen)


def _later(row: dict, before: list[str], ask: list[str]) -> Entry:
    return Entry(row["say"], tuple(ask), tuple(row.get("about", ())), tuple(before), row["reply"])


def _hold_out(entry: Entry, count: Counter) -> Entry:
    """The entry without one of its wordings; the first one stays, as it is the plainest."""
    free = [wording for wording in entry.ask[1:] if count[bare(wording)] == 1]
    if len(entry.ask) < FEWEST or not free:
        return entry
    unseen = free[crc32(entry.say.encode()) % len(free)]
    return replace(entry, ask=tuple(wording for wording in entry.ask if wording != unseen), unseen=(unseen,))
