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
from pathlib import Path


class Journal:
    """An append-only file of records: dicts of plain JSON, numbered by "id" from 1."""

    def __init__(self, path: str | Path):
        """Open or create. Raises ValueError, naming file and line, for a damaged journal."""
        self.path = Path(path)
        self.records: list[dict] = []
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
        return record

    def close(self) -> None:
        self._file.close()

    def _read(self, data: bytes) -> None:
        *lines, rest = data.split(b"\n")
        for number, line in enumerate(lines, 1):
            record = _parse(line)
            if record is None or record["id"] != number:
                raise ValueError(
                    f"{self.path}, line {number} is damaged; restore the file from a backup, or move it away to start "
                    "again from the base model"
                )
            self.records.append(record)
        if rest:
            print(f"{self.path}: dropped an unfinished last record", file=sys.stderr)
            self._file.truncate(len(data) - len(rest))


def undone(records: list[dict]) -> set[int]:
    """Numbers of the corrections that were taken back."""
    return {number for r in records if r["kind"] == "undone" for number in r["of"]}


def refused(records: list[dict]) -> dict[int, str]:
    """Why, by number, of the corrections that were tried and not learnt."""
    return {r["of"]: r["why"] for r in records if r["kind"] == "committed" and not r["accepted"]}


def learnt(records: list[dict]) -> list[dict]:
    """Records of the corrections that the weights follow from, in the order in which they were learnt."""
    gone = undone(records) | refused(records).keys()
    tried = dict.fromkeys(r["of"] for r in records if r["kind"] == "committed")
    return [records[number - 1] for number in tried if number not in gone]


def waiting(records: list[dict]) -> list[dict]:
    """Records of the corrections that were received and not tried yet."""
    gone = undone(records) | {r["of"] for r in records if r["kind"] == "committed"}
    return [r for r in records if r["kind"] == "received" and r["id"] not in gone]


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
