"""`corpus:NAME` sources: which there are, and what is behind each. The quickstart needs no download."""

from collections.abc import Iterator
from itertools import islice

from rwkv_train.data.corpora.facts import fact_chats, facts
from rwkv_train.data.corpora.packaged import chatterbot, chatterbot_files, chitchat, chitchat_talks, python_topics

CORPORA = ("chatterbot", "python-topics", "facts", "chitchat")
PACKAGES = {
    "chatterbot": ("chatterbot-corpus",),
    "facts": ("rwkv_train", "countryinfo", "babel", "chatterbot-corpus"),
    "chitchat": ("chitchat-dataset",),
}


def corpus_version(name: str) -> str:
    """The package and version behind a corpus; the text changes only with it."""
    import platform
    from importlib.metadata import version

    if name == "python-topics":
        return f"python {platform.python_version()}"
    return ", ".join(f"{package} {version(package)}" for package in PACKAGES[name.partition("/")[0]])


def read_corpus(name: str) -> Iterator[tuple[str, dict]]:
    """Yield (where, record) of a built-in corpus; ValueError for an unknown one.

    "chatterbot" or "chatterbot/LANGUAGE": short dialogues, {"messages": [...]}, user and assistant in turn
    (English unless named). "python-topics": the Python language reference, {"text": ...} a topic. "facts": chats
    about countries, see facts.py. "chitchat" or "chitchat/NUMBER": (the first so many) talks of two strangers. The
    last two need `pip install "rwkv_train[starter]"`.
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
    raise ValueError(f"corpus:{name} is unknown. There are: {', '.join(f'corpus:{c}' for c in CORPORA)}.")
