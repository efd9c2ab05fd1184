"""Sources to raw records: text, JSON lines, CSV and parquet files, folders, hub data sets, built-in corpora.

Reading is sequential and cheap: what costs time (parsing, rendering, tokenising) is left to whoever gets
the records. A source is a path, a glob, "corpus:NAME", "hub:NAME[@CONFIG][:SPLIT]", or a hub name.
"""

import codecs
import csv
import glob
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from rwkv_train.data.corpora.catalogue import corpus_version, read_corpus

BLOCK = 1 << 20  # bytes of a text file that are handled at once
SUFFIXES = (".txt", ".jsonl", ".json", ".csv", ".tsv", ".parquet")
BOM = codecs.BOM_UTF8

Split = Literal["file", "blank", "line"]


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

    def signature(self) -> dict:
        """What to compare to know that the source is unchanged (a hub data set is trusted by name)."""
        if self.kind == "file":
            stat = Path(self.name).stat()
            return {"file": self.name, "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
        version = {"version": corpus_version(self.name)} if self.kind == "corpus" else {}
        return {self.kind: self.name, **version}


def resolve(names: Iterable[str]) -> list[Source]:
    """The sources that `names` stand for, folders and globs sorted; ValueError if one is missing."""
    return [source for name in names for source in _resolve(name)]


def _resolve(name: str) -> list[Source]:
    if name.startswith("corpus:"):
        corpus = name.removeprefix("corpus:")
        read_corpus(corpus)  # an unknown name fails here, before any work
        return [Source("corpus", corpus)]
    if name.startswith("hub:"):
        return [Source("hub", name.removeprefix("hub:"))]
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            known = ", ".join(SUFFIXES)
            raise ValueError(f"{name}: files ending in {path.suffix!r} are unknown; convert it to one of {known}.")
        return [Source("file", str(path))]
    if path.is_dir():
        found = [p for p in path.rglob("*") if not any(s.startswith(".") for s in p.relative_to(path).parts)]
    elif glob.has_magic(name):
        found = [Path(p) for p in glob.glob(str(path), recursive=True)]
    elif path.suffix.lower() in SUFFIXES or name.startswith(("/", "~", ".")) or name.count("/") > 1:
        raise ValueError(f"There is no file or folder {name}. Correct the path; it is relative to {Path.cwd()}.")
    else:
        return [Source("hub", name)]
    files = sorted(str(p) for p in found if p.suffix.lower() in SUFFIXES and p.is_file())
    if not files:
        raise ValueError(f"{name} holds no {', '.join(SUFFIXES)} file. Correct the path, or convert the files.")
    return [Source("file", file) for file in files]


def read(source: Source, split: Split = "file") -> Iterator[Raw]:
    """The records of a source in order. `split` cuts .txt files at blank lines or at every line."""
    if source.kind == "corpus":
        return (Raw(where, "record", record) for where, record in read_corpus(source.name))
    if source.kind == "hub":
        return _hub(source.name)
    suffix = Path(source.name).suffix.lower()
    if suffix == ".txt":
        return {"file": _text_file, "blank": _paragraphs, "line": _lines}[split](source.name)
    readers = {".jsonl": _json_lines, ".json": _json, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet}
    return readers[suffix](source.name)


def _text_file(path: str) -> Iterator[Raw]:
    """The whole file as one document, in pieces of about BLOCK bytes that end after a newline."""
    line = _first_bad_line(path)
    if line is not None:
        yield Raw(f"{path}:{line}", "bad", "invalid UTF-8")
        return
    with open(path, "rb") as file:
        piece, first = b"", True
        for block in _blocks(file):
            if piece:
                yield Raw(path, "text", piece, len(piece), first, last=False)
                first = False
            piece = block
        yield Raw(path, "text", piece, len(piece), first, last=True)


def _first_bad_line(path: str) -> int | None:
    """The number of the first line that is not UTF-8, checked ahead so that no document is half written."""
    decoder, line = codecs.getincrementaldecoder("utf-8")(), 1
    with open(path, "rb") as file:
        while True:
            block = file.read(BLOCK)
            try:
                line += decoder.decode(block, final=not block).count("\n")
            except UnicodeDecodeError as error:
                return line + error.object[: error.start].count(b"\n")
            if not block:
                return None


def _blocks(file: BinaryIO) -> Iterator[bytes]:
    rest = file.read(BLOCK).removeprefix(BOM)
    while block := file.read(BLOCK):
        rest += block
        if cut := _cut(rest):
            yield rest[:cut]
            rest = rest[cut:]
    if rest:
        yield rest


def _cut(data: bytes) -> int:
    """Where to cut: after the last newline with text behind it (tokens hardly ever reach over that), or else
    before the last character once there are more than BLOCK bytes, or not at all (0)."""
    newline = data.rfind(b"\n", 0, -1)
    while newline >= 0 and data[newline + 1 : newline + 2].isspace():
        newline = data.rfind(b"\n", 0, newline)
    if newline >= 0 or len(data) <= BLOCK:
        return newline + 1
    last = len(data) - 1
    while data[last] & 0xC0 == 0x80:
        last -= 1
    return last


def _numbered(path: str) -> Iterator[tuple[int, bytes]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            yield number, line.removeprefix(BOM) if number == 1 else line


def _lines(path: str, form: Literal["text", "json"] = "text") -> Iterator[Raw]:
    for number, line in _numbered(path):
        if line.strip():
            yield Raw(f"{path}:{number}", form, line.rstrip(b"\r\n"), len(line))


def _paragraphs(path: str) -> Iterator[Raw]:
    lines: list[bytes] = []
    start = 0
    for number, line in _numbered(path):
        if line.strip():
            start = start if lines else number
            lines.append(line)
        elif lines:
            yield _paragraph(f"{path}:{start}", lines)
            lines = []
    if lines:
        yield _paragraph(f"{path}:{start}", lines)


def _paragraph(where: str, lines: list[bytes]) -> Raw:
    text = b"".join(lines)
    return Raw(where, "text", text.rstrip(b"\r\n"), len(text))


def _json_lines(path: str) -> Iterator[Raw]:
    return _lines(path, "json")


def _json(path: str) -> Iterator[Raw]:
    """One array of records, or JSON lines under another name."""
    with open(path, "rb") as file:
        if not file.read(1 << 12).removeprefix(BOM).lstrip().startswith(b"["):
            yield from _json_lines(path)
            return
    data = Path(path).read_bytes()
    try:
        records = json.loads(data.removeprefix(BOM).decode("utf-8"))
    except UnicodeDecodeError:
        yield Raw(f"{path}:{_first_bad_line(path)}", "bad", "invalid UTF-8", len(data))
    except json.JSONDecodeError as error:
        yield Raw(f"{path}:{error.lineno}", "bad", f"bad JSON ({error.msg})", len(data))
    except RecursionError:
        yield Raw(path, "bad", "bad JSON (nested too deeply)", len(data))
    else:
        for number, record in enumerate(records, 1):
            yield Raw(f"{path}: record {number}", "record", record, len(data) // len(records))


def _csv(path: str) -> Iterator[Raw]:
    """CSV or TSV with a header line; quoted fields may hold newlines."""
    csv.field_size_limit(2**31 - 1)
    size = 0

    def decoded() -> Iterator[str]:
        nonlocal size
        for _, line in _numbered(path):
            size += len(line)
            yield line.decode("utf-8", errors="surrogateescape")

    reader = csv.reader(decoded(), delimiter="\t" if path.lower().endswith(".tsv") else ",")
    header = next(reader, [])
    if not all(header) or len(set(header)) < len(header) or _has_bad_bytes(header):
        raise ValueError(f"{path}:1: the header {header!r:.200} must name every column, each name once.")
    while True:
        start, before = reader.line_num + 1, size
        try:
            row = next(reader, None)
        except csv.Error as error:
            yield Raw(f"{path}:{start}", "bad", f"bad CSV ({error})", size - before)
            continue
        if row is None:
            return
        if row:
            yield _row(f"{path}:{start}", header, row, size - before)


def _row(where: str, header: list[str], row: list[str], size: int) -> Raw:
    if len(row) != len(header):
        return Raw(where, "bad", f"{len(row)} fields, but the header names {len(header)}", size)
    if _has_bad_bytes(row):
        return Raw(where, "bad", "invalid UTF-8", size)
    return Raw(where, "record", dict(zip(header, row, strict=True)), size)


def _has_bad_bytes(row: list[str]) -> bool:
    """Whether the decoder had to escape bytes that are no UTF-8 (to U+DC80 and up)."""
    return any("\udc80" <= letter <= "\udcff" for value in row if not value.isascii() for letter in value)


def _parquet(path: str) -> Iterator[Raw]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with ParquetFile(path) as file:
            size = Path(path).stat().st_size // max(1, file.metadata.num_rows)
            for batch in file.iter_batches(batch_size=1024):
                for record in batch.to_pylist():
                    number += 1
                    yield Raw(f"{path}:{number}", "record", record, size)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}, after row {number}: damaged parquet ({error}). Copy it again.") from None


def _hub(name: str) -> Iterator[Raw]:
    """NAME[@CONFIG][:SPLIT], the split "train" unless named."""
    import logging

    import datasets

    print(f"Asking the Hugging Face hub for {name} ...", flush=True)
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # what it tries again is told once, below
    repository, _, split = name.partition(":")
    repository, _, config = repository.partition("@")
    try:
        rows = datasets.load_dataset(repository, config or None, split=split or "train")
    except (OSError, ValueError, RuntimeError) as error:
        hint = "Check the spelling (hub:NAME[@CONFIG][:SPLIT]) and the network, or give a file's path."
        raise ValueError(f"{name} is no file here, and not on the hub either ({error}). {hint}") from error
    for number, record in enumerate(rows, 1):
        yield Raw(f"hub:{name}:{number}", "record", record)
