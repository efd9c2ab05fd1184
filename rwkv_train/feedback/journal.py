"""The journal of a profile: what was asked of the model, in order, never lost and never rewritten.

One JSON record a line, each with a checksum of itself. A record is on the disk before `append` returns. A last line
that a crash left unfinished was never acknowledged and is dropped with a notice; any other damage is an error.
"""

import errno
import hashlib
import json
import os
import sys
import threading
from collections.abc import Iterable
from itertools import dropwhile
from pathlib import Path


class Journal:
    """An append-only file of records: dicts of plain JSON, numbered by "id" from 1. ledger: what they come to."""

    def __init__(self, path: str | Path):
        """Open or create. Raises ValueError, naming file and line, for a damaged journal."""
        self.path = Path(path)
        self.records: list[dict] = []
        self.ledger = Ledger()
        self._lock = threading.Lock()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "a+b", buffering=0)  # noqa: SIM115
        self._file.seek(0)
        self._read(self._file.read())

    def append(self, kind: str, **content) -> dict:
        """Write one record {"id", "kind", ...content} and wait until it is on the disk; from any thread.

        Raises OSError, leaving the file as it was, if it cannot be written, as on a full disk.
        """
        with self._lock:
            record = {"id": len(self.records) + 1, "kind": kind, **content}
            line, size = _line(record), self._file.seek(0, os.SEEK_END)
            try:
                if self._file.write(line) < len(line):
                    raise OSError(errno.ENOSPC, "there is no room for another record", str(self.path))
                os.fsync(self._file.fileno())
            except OSError:
                self._file.truncate(size)  # half a record would be damage to all that come after it
                raise
            self.records.append(record)
            self.ledger.add(record)
        return record

    def close(self) -> None:
        self._file.close()

    def _read(self, data: bytes) -> None:
        self.records, rest = _parsed(data, self.path)
        self.ledger = Ledger(self.records)
        if rest:
            print(f"{self.path}: dropped an unfinished last record", file=sys.stderr)
            self._file.truncate(len(data) - len(rest))


class Ledger:
    """What records come to, kept up one by one: what it costs to add one does not grow with their number.

    By number: sequence, what the weights follow from, in that order: records of the corrections that were learnt and
    not undone, one that keeps an answer with the answer that was found then, and of sleeps; waiting: records of the
    corrections that were received and not tried yet; committed: what became of those that were tried. undone: numbers
    of what was taken back. unlike: of what was learnt on top of something that was taken back since, so that other
    weights than the recorded ones follow. tired: something was learnt since a sleep was last tried.
    """

    def __init__(self, records: Iterable[dict] = ()):
        self.sequence: dict[int, dict] = {}
        self.waiting: dict[int, dict] = {}
        self.committed: dict[int, dict] = {}
        self.undone: set[int] = set()
        self.unlike: set[int] = set()
        self.tired = False
        for record in records:
            self.add(record)

    def add(self, record: dict) -> None:
        """Take in the next record."""
        if record["kind"] == "received":
            self.waiting[record["id"]] = record
        elif record["kind"] == "committed":
            self.committed[record["of"]] = record
            received = self.waiting.pop(record["of"], None)
            if record["accepted"] and received:
                self.sequence[record["of"]], self.tired = received | record.get("kept", {}), True
        elif record["kind"] == "slept":
            self.tired = False
            if record["accepted"]:
                self.sequence[record["id"]] = record
        elif record["kind"] == "undone":
            self.unlike |= {*dropwhile(lambda number: number not in record["of"], self.sequence)}
            for number in record["of"]:
                self.undone.add(number)
                self.sequence.pop(number, None)
                self.waiting.pop(number, None)
            while self.sequence and next(iter(self.sequence.values()))["kind"] == "slept":  # nothing is left of it
                del self.sequence[next(iter(self.sequence))]

    def refused(self) -> dict[int, str]:
        """Why, by number, of the corrections that were tried and not learnt."""
        return {number: r["why"] for number, r in self.committed.items() if not r["accepted"]}


def read(path: Path) -> list[dict]:
    """The records of a journal that is only read. Raises ValueError, naming file and line, for a damaged one."""
    return _parsed(path.read_bytes(), path)[0]


def _parsed(data: bytes, path: Path) -> tuple[list[dict], bytes]:
    """(records, what a crash left of a last one)"""
    *lines, rest = data.split(b"\n")
    records = []
    for number, line in enumerate(lines, 1):
        record = _parse(line)
        if record is None or record["id"] != number:
            raise ValueError(
                f"{path}, line {number} is damaged; restore the file from a backup, or move it away to start again "
                "from the base model"
            )
        records.append(record)
    return records, rest


def _line(record: dict) -> bytes:
    text = json.dumps(record, ensure_ascii=False, sort_keys=True)
    return f"{_checksum(text)} {text}\n".encode()


def _parse(line: bytes) -> dict | None:
    """The record of a line without its end; None if the line is not what `_line` wrote."""
    try:
        checksum, text = line.decode().split(" ", 1)
        return json.loads(text) if checksum == _checksum(text) else None
    except ValueError:
        return None


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
