"""Text that installed packages carry, so that the quickstart needs no download: `corpus:NAME` sources."""

from collections.abc import Iterator
from itertools import cycle, groupby, islice
from pathlib import Path

CORPORA = ("chatterbot", "python-topics", "facts", "chitchat")
ROLES = ("user", "assistant")
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
        return _python_topics()
    family, _, part = name.partition("/")
    if family == "chatterbot":
        return _chatterbot(_chatterbot_files(part or "english"))
    if family == "chitchat" and (part.isdecimal() or not part):
        return islice(_chitchat(_chitchat_talks()), int(part) if part else None)
    if name == "facts":
        from rwkv_train.data.corpora.facts import fact_chats, facts

        facts()  # a missing package is said at once
        return fact_chats()
    raise ValueError(f"corpus:{name} is unknown. There are: {', '.join(f'corpus:{c}' for c in CORPORA)}.")


def _python_topics() -> Iterator[tuple[str, dict]]:
    from pydoc_data.topics import topics

    for topic in sorted(topics):
        yield f"python-topics/{topic}", {"text": topics[topic]}


def _chatterbot_files(language: str) -> list[Path]:
    from chatterbot_corpus.corpus import DATA_DIRECTORY

    folders = sorted(folder.name for folder in Path(DATA_DIRECTORY).iterdir() if folder.is_dir())
    if language not in folders:
        known = ", ".join(folders)
        raise ValueError(f"corpus:chatterbot has no language {language!r}. It has: {known}.")
    return sorted((Path(DATA_DIRECTORY) / language).glob("*.yml"))


def _chatterbot(files: list[Path]) -> Iterator[tuple[str, dict]]:
    import yaml

    # The base loader keeps every scalar as it was written: a reply "Yes" or "1969" stays text.
    loader = getattr(yaml, "CBaseLoader", yaml.BaseLoader)
    for file in files:
        rows = yaml.load(file.read_text(encoding="utf-8"), Loader=loader)["conversations"]
        for number, row in enumerate(rows, 1):
            turns = [str(turn).strip() for turn in row] if isinstance(row, list) else []
            if len(turns) < 2 or not all(turns):
                continue
            messages = [{"role": r, "content": t} for r, t in zip(cycle(ROLES), turns, strict=False)]
            yield f"chatterbot/{file.parent.name}/{file.name}: conversation {number}", {"messages": messages}


def _chitchat_talks() -> dict:
    try:
        from chitchat_dataset import Dataset
    except ImportError:
        raise ValueError('corpus:chitchat needs chitchat_dataset: pip install "rwkv_train[starter]"') from None
    return Dataset()


def _chitchat(talks: dict) -> Iterator[tuple[str, dict]]:
    """The talks in which both spoke. Who begins is the user; what one writes in a row is one turn."""
    for key, talk in talks.items():
        lines = [line for block in talk["messages"] for line in block if line["text"].strip()]
        messages = []
        for role, (_, turn) in zip(cycle(ROLES), groupby(lines, lambda line: line["sender"]), strict=False):
            messages.append({"role": role, "content": "\n".join(line["text"].strip() for line in turn)})
        if len(messages) > 1:
            yield f"chitchat/{key}", {"messages": messages}
