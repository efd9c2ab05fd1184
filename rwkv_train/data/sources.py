"""What `prepare` is given to read: files, folders, globs, corpora and data sets, found by name.

A source is a path, a glob, "corpus:NAME", "hub:NAME[@CONFIG][:SPLIT]", or a hub name. What lies in a folder or fits a
glob and is not read is `Passed`, with the reason.
"""

import glob
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rwkv_train.data.corpora.catalogue import corpus_version, read_corpus

SUFFIXES = (".txt", ".jsonl", ".json", ".csv", ".tsv", ".parquet")


@dataclass(frozen=True)
class Raw:
    """One record, or one piece of a long text, as it was found.

    form: "text" (data is UTF-8 bytes), "json" (bytes of one JSON value), "record" (a dict), or "bad" (data
    says what is wrong). first, last: whether this piece opens and ends its document. size: bytes of source.
    """

    where: str
    form: Literal["text", "json", "record", "bad"]
    data: Any
    size: int = 0
    first: bool = True
    last: bool = True


@dataclass(frozen=True)
class Source:
    """One file, hub data set or corpus."""

    kind: Literal["file", "hub", "corpus"]
    name: str

    @property
    def size(self) -> int | None:
        """Bytes of the file, None for anything else."""
        return Path(self.name).stat().st_size if self.kind == "file" else None

    @property
    def suffix(self) -> str:
        """What a file's name ends in, in small letters: ".txt"; "" for anything else."""
        return Path(self.name).suffix.lower() if self.kind == "file" else ""

    def signature(self) -> dict:
        """What to compare to know that the source is unchanged (a hub data set is trusted by name)."""
        if self.kind == "file":
            stat = Path(self.name).stat()
            return {"file": self.name, "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
        version = {"version": corpus_version(self.name)} if self.kind == "corpus" else {}
        return {self.kind: self.name, **version}


class Passed(NamedTuple):
    """A file or folder that is not read, and what it is: "hidden", "empty", ..."""

    what: str
    name: str


def resolve(names: Iterable[str]) -> tuple[list[Source], list[Passed]]:
    """The sources that `names` stand for, folders and globs sorted, and what is passed over there; ValueError if one
    is missing."""
    sources, passed = [], []
    for name in names:
        found, left = _resolve(name)
        sources += found
        passed += left
    return sources, passed


def _resolve(name: str) -> tuple[list[Source], list[Passed]]:
    if name.startswith("corpus:"):
        corpus = name.removeprefix("corpus:")
        read_corpus(corpus)  # an unknown name fails here, before any work
        return [Source("corpus", corpus)], []
    if name.startswith("hub:"):
        return [Source("hub", name.removeprefix("hub:"))], []
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            known = ", ".join(SUFFIXES)
            raise ValueError(f"{name}: files ending in {path.suffix!r} are unknown; convert it to one of {known}.")
        return [Source("file", str(path))], []
    if path.is_dir():
        found = list(_below(path))
    elif glob.has_magic(name):
        found = list(_matching(str(path)))
    elif path.suffix.lower() in SUFFIXES or name.startswith(("/", "~", ".")) or name.count("/") > 1:
        raise ValueError(f"There is no file or folder {name}. Correct the path; it is relative to {Path.cwd()}.")
    else:
        return [Source("hub", name)], []
    files = sorted(path for path, what in found if what is None)
    passed = sorted(Passed(what, path) for path, what in found if what is not None)
    if not files:
        others = f" There are only: {described(passed)}." if passed else ""
        raise ValueError(f"{name} holds no {', '.join(SUFFIXES)} file.{others} Correct the path, or convert the files.")
    return [Source("file", file) for file in files], passed


def _below(folder: Path) -> Iterator[tuple[str, str | None]]:
    """(path, None or why it is passed over) of what lies in a folder and the folders in it."""
    closed: list[OSError] = []
    for here, folders, files in os.walk(folder, onerror=closed.append):
        if {"manifest.json", "tokens.idx"} <= set(files):
            folders.clear()
            yield here, "token store"
            continue
        for name in files:
            yield os.path.join(here, name), _reason(os.path.join(here, name))
        for name in folders:
            if name.startswith(".") or os.path.islink(os.path.join(here, name)):
                yield os.path.join(here, name), "hidden" if name.startswith(".") else "link to a folder"
        folders[:] = [name for name in folders if not name.startswith(".")]
    for error in closed:
        yield error.filename, "folder that cannot be read"


def _matching(pattern: str) -> Iterator[tuple[str, str | None]]:
    found = glob.glob(pattern, recursive=True)
    opened = {str(parent) for path in found for parent in Path(path).parents}  # folders of which something is matched
    for path in found:
        if not os.path.isdir(path):
            yield path, _reason(path)
        elif str(Path(path)) not in opened:
            yield path, "folder"


def _reason(path: str) -> str | None:
    """Why a file found in a folder is not read, None if it is."""
    suffix = Path(path).suffix.lower()
    if os.path.basename(path).startswith("."):
        return "hidden"
    if not os.path.exists(path):
        return "broken link"
    if not os.path.isfile(path):
        return "no file"
    if suffix not in SUFFIXES:
        return f"ending in {suffix}" if suffix else "without an ending"
    return None if os.path.getsize(path) else "empty"


def described(passed: Iterable[Passed], names: int = 3) -> str:
    """What was passed over in one line: ending in .md (2: a.md, b.md), hidden (1: .git)."""
    kinds: dict[str, list[str]] = {}
    for what, name in passed:
        kinds.setdefault(what, []).append(name)
    return ", ".join(
        f"{what} ({len(found):,}: {', '.join(found[:names])}{', ...' * (len(found) > names)})"
        for what, found in sorted(kinds.items())
    )
