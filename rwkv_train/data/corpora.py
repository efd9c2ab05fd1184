"""Text that installed packages carry, so that the quickstart needs no download: `corpus:NAME` sources."""

from collections.abc import Iterator
from pathlib import Path

CORPORA = ("chatterbot", "python-topics")


def corpus_version(name: str) -> str:
    """The package and version behind a corpus; the text changes only with it."""
    import platform
    from importlib.metadata import version

    if name == "python-topics":
        return f"python {platform.python_version()}"
    return f"chatterbot-corpus {version('chatterbot-corpus')}"


def read_corpus(name: str) -> Iterator[tuple[str, dict]]:
    """Yield (where, record) of a built-in corpus; ValueError for an unknown one.

    "chatterbot" or "chatterbot/LANGUAGE": short dialogues, {"messages": [...]}, user and assistant in turn
    (English unless named). "python-topics": the Python language reference, {"text": ...} a topic.
    """
    if name == "python-topics":
        return _python_topics()
    family, _, language = name.partition("/")
    if family != "chatterbot":
        raise ValueError(f"corpus:{name} is unknown. There are: {', '.join(f'corpus:{c}' for c in CORPORA)}.")
    return _chatterbot(_chatterbot_files(language or "english"))


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
            roles = ("user", "assistant") * len(turns)
            messages = [{"role": r, "content": t} for r, t in zip(roles, turns, strict=False)]
            yield f"chatterbot/{file.parent.name}/{file.name}: conversation {number}", {"messages": messages}
