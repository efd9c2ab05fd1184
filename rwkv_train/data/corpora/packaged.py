"""Readers of texts that installed packages carry. Each yields (where, record)."""

from collections.abc import Iterator
from itertools import cycle, groupby
from pathlib import Path

ROLES = ("user", "assistant")


def python_topics() -> Iterator[tuple[str, dict]]:
    from pydoc_data.topics import topics

    for topic in sorted(topics):
        yield f"python-topics/{topic}", {"text": topics[topic]}


def chatterbot_files(language: str) -> list[Path]:
    from chatterbot_corpus.corpus import DATA_DIRECTORY

    folders = sorted(folder.name for folder in Path(DATA_DIRECTORY).iterdir() if folder.is_dir())
    if language not in folders:
        known = ", ".join(folders)
        raise ValueError(f"corpus:chatterbot has no language {language!r}. It has: {known}.")
    return sorted((Path(DATA_DIRECTORY) / language).glob("*.yml"))


def chatterbot(files: list[Path]) -> Iterator[tuple[str, dict]]:
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


def chitchat_talks() -> dict:
    try:
        from chitchat_dataset import Dataset
    except ImportError:
        raise ValueError('corpus:chitchat needs chitchat_dataset: pip install "rwkv_train[starter]"') from None
    return Dataset()


def chitchat(talks: dict) -> Iterator[tuple[str, dict]]:
    """The talks in which both spoke. Who begins is the user; what one writes in a row is one turn."""
    for key, talk in talks.items():
        lines = [line for block in talk["messages"] for line in block if line["text"].strip()]
        messages = []
        for role, (_, turn) in zip(cycle(ROLES), groupby(lines, lambda line: line["sender"]), strict=False):
            messages.append({"role": role, "content": "\n".join(line["text"].strip() for line in turn)})
        if len(messages) > 1:
            yield f"chitchat/{key}", {"messages": messages}
