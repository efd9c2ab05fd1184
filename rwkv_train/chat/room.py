"""A live room: which of many people's messages are answered, and in which order. Knows no clock, no files, no model."""

import random
from collections import deque
from dataclasses import dataclass
from typing import Literal

Pick = Literal["fifo", "random", "newest"]
MINUTE = 60.0
JOINERS = "\u200c\u200d"  # unseen, and part of how Persian, Indic languages and emoji are written


@dataclass(frozen=True)
class Message:
    """What a user said, without the prefix. command: an operator's slash command."""

    user: str
    text: str
    command: bool = False


class Room:
    """A queue of messages that wait for their answer. Memory is bounded by the limits.

    Args:
        prefix: only messages that begin with it are taken; "" takes all
        pick: which waiting message is next: the oldest, any, or the newest
        queue: messages that wait at most; to a full queue `newest` still takes one and drops the oldest instead
        per_user: messages of one user that wait at most
        rate: messages of one user that are taken in any minute, at most
        longest: characters of a message, at most
        operators: users whose messages may be commands ("!/help"); those wait in a line of their own, go first,
            and only `queue` limits them. Names are as the room gives them, so it must not let people choose freely.
        seed: for picking at random
    """

    def __init__(
        self,
        prefix: str = "!",
        pick: Pick = "fifo",
        queue: int = 50,
        per_user: int = 3,
        rate: int = 10,
        longest: int = 500,
        operators: frozenset[str] = frozenset(),
        seed: int = 0,
    ):
        for name, value in (("queue", queue), ("per_user", per_user), ("rate", rate), ("longest", longest)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, found {value}")
        self.prefix, self.pick_policy, self.operators = prefix, pick, operators
        self.queue, self.per_user, self.rate, self.longest = queue, per_user, rate, longest
        self._rng = random.Random(seed)
        self._waiting: list[Message] = []
        self._commands: deque[Message] = deque()
        self._taken: deque[tuple[float, str]] = deque()  # when and whose, of the last minute

    def __len__(self) -> int:
        return len(self._waiting) + len(self._commands)

    def offer(self, line: str, now: float) -> str:
        """Take a line "user: text" that came at `now` (seconds); returns "taken", or why it is not."""
        message = self._parse(line)
        if isinstance(message, str):
            return message
        if message.command:
            if len(self._commands) >= self.queue:
                return "queue full"
            self._commands.append(message)
            return "taken"
        while self._taken and self._taken[0][0] <= now - MINUTE:
            self._taken.popleft()
        if sum(user == message.user for _, user in self._taken) >= self.rate:
            return "too many this minute"
        if sum(other.user == message.user for other in self._waiting) >= self.per_user:
            return "too many waiting"
        if len(self._waiting) >= self.queue:
            if self.pick_policy != "newest":
                return "queue full"
            del self._waiting[0]
        self._waiting.append(message)
        self._taken.append((now, message.user))
        return "taken"

    def pick(self) -> Message | None:
        """The message to answer next, which then waits no more; None if there is none."""
        if self._commands:
            return self._commands.popleft()
        if not self._waiting:
            return None
        last = len(self._waiting) - 1
        return self._waiting.pop({"fifo": 0, "newest": last, "random": self._rng.randint(0, last)}[self.pick_policy])

    def _parse(self, line: str) -> Message | str:
        # Only printable characters: a message must not move the reader's cursor, or a name look like another one.
        user, colon, text = line.partition(":")
        user, text = _printable(user).strip(), _printable(text, JOINERS).strip()
        if not (user and colon and text.startswith(self.prefix)):
            return "not for us"
        text = text.removeprefix(self.prefix).strip()
        if not text:
            return "empty"
        if len(text) > self.longest:
            return "too long"
        command = text.startswith("/") and not text.startswith("//")
        if command and user not in self.operators:
            return "not an operator"
        return Message(user, text, command)


def _printable(text: str, besides: str = "") -> str:
    """The same with other white space as spaces, and without what cannot be seen."""
    return "".join(c if c.isprintable() or c in besides else " " * c.isspace() for c in text)
