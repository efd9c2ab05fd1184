"""`corpus:NAME` sources: which there are, and what is behind each. The quickstart needs no download."""

from collections.abc import Iterator
from itertools import islice

from rwkv_train.data.corpora.facts import fact_chats, facts
from rwkv_train.data.corpora.packaged import chatterbot, chatterbot_files, chitchat, chitchat_talks, python_topics
from rwkv_train.data.corpora.talk.chats import DIALOGUES, talk_chats
from rwkv_train.data.corpora.talk.texts import LANGUAGES, fingerprint

CORPORA = ("chatterbot", "python-topics", "facts", "chitchat", "talk")
PACKAGES = {
    "chatterbot": ("chatterbot-corpus",),
    "facts": ("rwkv_train", "countryinfo", "babel", "chatterbot-corpus"),
    "chitchat": ("chitchat-dataset",),
    "talk": ("rwkv_train", "countryinfo", "babel", "chatterbot-corpus", "chitchat-dataset"),
}


def corpus_version(name: str) -> str:
    """The package and version behind a corpus; the text changes only with it."""
    import platform
    from importlib.metadata import version

    if name == "python-topics":
        return f"python {platform.python_version()}"
    family = name.partition("/")[0]
    packages = ", ".join(f"{package} {version(package)}" for package in PACKAGES[family])
    return f"{packages}, texts {fingerprint()}" if family == "talk" else packages


def read_corpus(name: str) -> Iterator[tuple[str, dict]]:
    """Yield (where, record) of a built-in corpus; ValueError for an unknown one.

    "chatterbot" or "chatterbot/LANGUAGE": short dialogues, {"messages": [...]}, user and assistant in turn
    (English unless named). "python-topics": the Python language reference, {"text": ...} a topic. "facts": chats
    about countries, see facts.py. "chitchat" or "chitchat/NUMBER": (the first so many) talks of two strangers. "talk",
    "talk/LANGUAGE", "talk/NUMBER", "talk/LANGUAGE/NUMBER": our own talk with so many dialogues, see talk/chats.py. The
    last three need `pip install "rwkv_train[starter]"`.
    """
    if name == "python-topics":
        return python_topics()
    family, _, part = name.partition("/")
    if family == "chatterbot":
        return chatterbot(chatterbot_files(part or "english"))
    if family == "chitchat" and (part.isdecimal() or not part):
        return islice(chitchat(chitchat_talks()), int(part) if part else None)
    if name == "facts":
        facts()  # a missing package is said at once
        return fact_chats()
    if family == "talk" and (asked := _talk(part)):
        facts()
        return talk_chats(*asked)
    raise ValueError(f"corpus:{name} is unknown. There are: {', '.join(f'corpus:{c}' for c in CORPORA)}.")


def _talk(part: str) -> tuple[tuple[str, ...], int] | None:
    """The languages and the number of dialogues that "", "en", "2000" or "en/2000" ask for; None for anything else."""
    first, _, rest = part.partition("/")
    languages, number = ((first,), rest) if first in LANGUAGES else (LANGUAGES, part)
    return (languages, int(number) if number else DIALOGUES) if number.isdecimal() or not number else None
