"""Sources to raw records: text files here, what has a structure in structured.py.

Reading is sequential and cheap: what costs time (parsing, rendering, tokenising) is left to whoever gets the records.
"""

import codecs
from collections.abc import Iterator
from typing import BinaryIO, Literal

from rwkv_train.data.corpora.catalogue import read_corpus
from rwkv_train.data.render import Columns
from rwkv_train.data.sources import Raw, Source
from rwkv_train.data.structured import read_csv, read_hub, read_json, read_parquet
from rwkv_train.files import BOM, UTF16, numbered_lines

BLOCK = 1 << 20  # bytes of a text file that are handled at once

Split = Literal["file", "blank", "line"]


def read(
    source: Source, split: Split = "file", columns: Columns | None = None, notes: list[str] | None = None
) -> Iterator[Raw]:
    """The records of a source in order.

    split: cuts .txt files at blank lines or at every line. columns: by which a JSON object is known for a record.
    notes: gets a sentence for what is to be told of the source.
    """
    if source.kind == "corpus":
        return (Raw(where, "record", record) for where, record in read_corpus(source.name))
    if source.kind == "hub":
        return read_hub(source.name)
    if source.suffix == ".parquet":
        return read_parquet(source.name)
    with open(source.name, "rb") as file:
        if file.read(2) in UTF16:
            return iter([Raw(f"{source.name}:1", "bad", "UTF-16; save the file as UTF-8 text", source.size)])
    if source.suffix == ".txt":
        return {"file": _text_file, "blank": _paragraphs, "line": _lines}[split](source.name)
    if source.suffix in (".csv", ".tsv"):
        return read_csv(source.name)
    return read_json(source.name, columns or Columns(), [] if notes is None else notes)


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


def _lines(path: str) -> Iterator[Raw]:
    with open(path, "rb") as file:
        for number, line in numbered_lines(file):
            if line.strip():
                yield Raw(f"{path}:{number}", "text", line.rstrip(b"\r\n"), len(line))


def _paragraphs(path: str) -> Iterator[Raw]:
    lines: list[bytes] = []
    start = 0
    with open(path, "rb") as file:
        for number, line in numbered_lines(file):
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
