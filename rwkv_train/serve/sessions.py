"""What was said, and the state after every turn: in memory, and on the disk before a turn is acknowledged.

One SQLite file. A turn's transcript is small and stays; states are kept within two budgets, and the least recently used
ones go. A turn whose state is gone is read again from its transcript.
"""

import errno
import hashlib
import json
import sqlite3
import threading
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch

from rwkv_train.models.state import State

MB = 2**20
COLUMNS = ("id", "parent", "owner", "key")
SCHEMA = """
CREATE TABLE IF NOT EXISTS turns (
    id TEXT PRIMARY KEY, parent TEXT, owner TEXT NOT NULL, key TEXT NOT NULL, used INTEGER NOT NULL,
    content TEXT NOT NULL, size INTEGER NOT NULL, state BLOB
);
CREATE INDEX IF NOT EXISTS keys ON turns (key);
CREATE INDEX IF NOT EXISTS kept ON turns (used) WHERE size > 0;
"""


@dataclass(frozen=True)
class Turn:
    """Messages of a conversation and the reply to them.

    id: of the response; parent: that of the turn before, None for the first; owner: who may see it; key: names what was
    said up to its reply, see `key_of`; model: the profile; version: of the weights that wrote it. messages: those since
    the turn before, as {"role", "content"}; prompt: ids read for them, up to where the reply begins. reply: as it was
    shown; ids: its tokens; ended: the model wrote the end of the turn. status: completed, or incomplete where it was
    broken off. length: tokens of the conversation up to its end. answer: what else its answer said.
    """

    id: str
    parent: str | None
    owner: str
    key: str
    model: str
    version: str
    messages: list[dict]
    prompt: list[int]
    reply: str = ""
    ids: list[int] = field(default_factory=list)
    ended: bool = False
    status: str = "completed"
    created: int = 0
    length: int = 0
    answer: dict = field(default_factory=dict)

    @property
    def read(self) -> list[int]:
        """All ids of the turn."""
        return [*self.prompt, *self.ids]


class Gone(ValueError):
    """A turn that was deleted is needed."""


class Sessions:
    """Turns by id, or by what was said. From any thread."""

    def __init__(self, path: Path, memory: int = 512 * MB, disk: int = 4096 * MB):
        """memory, disk: bytes that states may take. Raises ValueError for a file that is damaged or no such file."""
        self.path, self.memory, self.disk = path, memory, disk
        self._lock = threading.RLock()
        self._states: OrderedDict[str, State] = OrderedDict()
        self._held = 0  # bytes of those
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            for line in ("journal_mode=WAL", "synchronous=FULL"):
                self._db.execute(f"PRAGMA {line}")
            self._db.executescript(SCHEMA)
            self._stored, last = self._db.execute("SELECT TOTAL(size), MAX(used) FROM turns").fetchone()
        except sqlite3.DatabaseError as error:
            raise ValueError(f"{path} holds no conversations ({error}); move it away to begin anew") from None
        self._now = last or 0

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def add(self, turn: Turn, state: State | None) -> None:
        """Keep a turn; it is on the disk when this returns.

        Raises OSError where it cannot be written, as on a full disk; then its state is kept in memory alone.
        """
        state = state and state.to("cpu")
        data = b"" if state is None else safetensors.torch.save({k: t.contiguous() for k, t in state._asdict().items()})
        with self._lock:
            if state is not None:
                self._remember(turn.id, state)
            content = json.dumps({k: v for k, v in vars(turn).items() if k not in COLUMNS})
            row = (*(getattr(turn, name) for name in COLUMNS), self._tick(), content, len(data), data or None)
            self._write("INSERT OR REPLACE INTO turns VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)
            self._stored += len(data)
            self._trim()

    def get(self, name: str, owner: str) -> Turn | None:
        """The turn of that id, if it is the owner's."""
        return self._turn("id = ? AND owner = ?", name, owner)

    def find(self, key: str) -> Turn | None:
        """The newest turn at which that was said."""
        return self._turn("key = ?", key)

    def before(self, turn: Turn) -> list[Turn]:
        """The turns before one, oldest first. Raises Gone where one of them was deleted."""
        found: list[Turn] = []
        parent = turn.parent
        while parent:
            before = self.get(parent, turn.owner)
            if before is None:
                raise Gone(f"the turn {parent} before {turn.id} was deleted; send the whole conversation")
            found.append(before)
            parent = before.parent
        return found[::-1]

    def state(self, name: str) -> State | None:
        """The state after a turn, on the CPU; None where it is not kept."""
        with self._lock:
            if name in self._states:
                self._states.move_to_end(name)
                return self._states[name]
            row = self._db.execute("SELECT state FROM turns WHERE id = ? AND size > 0", (name,)).fetchone()
            if row is None:
                return None
            with suppress(OSError):  # a full disk forgets when it was used
                self._write("UPDATE turns SET used = ? WHERE id = ?", (self._tick(), name))
            state = State(**safetensors.torch.load(row[0]))
            self._remember(name, state)
            return state

    def delete(self, name: str, owner: str) -> bool:
        """Forget a turn; whether there was one. What follows it stays, while its own state is kept."""
        with self._lock:
            row = self._db.execute("SELECT size FROM turns WHERE id = ? AND owner = ?", (name, owner)).fetchone()
            if row:
                self._write("DELETE FROM turns WHERE id = ?", (name,))
                self._stored -= row[0]
                self._forget(name)
            return row is not None

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(turns, bytes of states in memory, on the disk)"""
        with self._lock:
            return self._db.execute("SELECT COUNT(*) FROM turns").fetchone()[0], self._held, int(self._stored)

    def _turn(self, where: str, *values: str) -> Turn | None:
        with self._lock:
            ask = f"SELECT {', '.join(COLUMNS)}, content FROM turns WHERE {where} ORDER BY used DESC LIMIT 1"
            row = self._db.execute(ask, values).fetchone()
        return Turn(*row[:-1], **json.loads(row[-1])) if row else None

    def _write(self, line: str, values: tuple) -> None:
        try:
            self._db.execute(line, values)
        except sqlite3.DatabaseError as error:
            is_full = "full" in str(error)  # what else there is, as a lock of another program, is no matter of space
            number, remedy = (errno.ENOSPC, "; free some space") if is_full else (errno.EIO, "")
            raise OSError(number, f"{error}{remedy}", str(self.path)) from None

    def _tick(self) -> int:
        self._now += 1
        return self._now

    def _remember(self, name: str, state: State) -> None:
        self._forget(name)
        self._states[name] = state
        self._held += _size(state)
        while self._held > self.memory and len(self._states) > 1:
            self._forget(next(iter(self._states)))

    def _forget(self, name: str) -> None:
        state = self._states.pop(name, None)
        self._held -= _size(state) if state else 0

    def _trim(self) -> None:
        """Let go of the states that were not used for longest."""
        while self._stored > self.disk:
            old = self._db.execute("SELECT id, size FROM turns WHERE size > 0 ORDER BY used LIMIT 64").fetchall()
            if not old:
                return
            for name, size in old:
                if self._stored <= self.disk:
                    return
                self._write("UPDATE turns SET state = NULL, size = 0 WHERE id = ?", (name,))
                self._stored -= size


def key_of(before: str, messages: list[dict], reply: str) -> str:
    """A name for a conversation up to a reply. before: of the one up to the reply before; or who talks with what."""
    said = json.dumps([before, [[m["role"], m["content"]] for m in messages], reply])
    return hashlib.sha256(said.encode("utf-8", "surrogatepass")).hexdigest()


def _size(state: State) -> int:
    return sum(part.nbytes for part in state)
