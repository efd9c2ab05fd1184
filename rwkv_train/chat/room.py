"""A live room: which of many people's messages are answered, and in which order. Knows no clock, no files, no model."""

import random
from collections import deque
from dataclasses import dataclass
from typing import Literal, get_args

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
        longest: characters of a message, and of a name, at most
        operators: users whose messages may be commands ("!/help"); those wait in a line of their own, go first,
            and only `queue` limits them. Names are as the room gives them, so it must not let people choose freely.
        seed: for picking at random

    Raises ValueError for a limit below 1.
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
        _check(pick, queue=queue, per_user=per_user, rate=rate, longest=longest)
        self.prefix, self.pick_policy, self.operators = prefix, pick, operators
        self.queue, self.per_user, self.rate, self.longest = queue, per_user, rate, longest
        self.muted: set[str] = set()
        self._rng = random.Random(seed)
        self._waiting: list[Message] = []
        self._commands: deque[Message] = deque()
        self._taken: deque[tuple[float, str]] = deque()  # when and whose, of the last minute

    def __len__(self) -> int:
        return len(self._waiting) + len(self._commands)

    @property
    def policy(self) -> dict:
        """What `configure` sets."""
        return {"pick": self.pick_policy, "queue": self.queue, "per_user": self.per_user, "rate": self.rate}

    def configure(
        self, pick: Pick | None = None, queue: int | None = None, per_user: int | None = None, rate: int | None = None
    ) -> None:
        """Change the rules for what comes from now on; None leaves one as it is. ValueError as at the start, changing
        nothing."""
        given = {"queue": queue, "per_user": per_user, "rate": rate}
        limits = {name: getattr(self, name) if value is None else value for name, value in given.items()}
        pick = self.pick_policy if pick is None else pick
        _check(pick, **limits)
        self.pick_policy = pick
        self.queue, self.per_user, self.rate = limits.values()

    def mute(self, user: str, on: bool = True) -> None:
        """Take nothing more of a user, and let go of what waits; or take it again. ValueError for what is no name."""
        user = name_of(user)
        if not user:
            raise ValueError("name the user; this is no name")
        (self.muted.add if on else self.muted.discard)(user)
        if on:
            self._waiting = [message for message in self._waiting if message.user != user]
            self._commands = deque(message for message in self._commands if message.user != user)

    def waiting(self) -> list[Message]:
        """What waits, next first where that is known: at random it is as it came."""
        newest = self.pick_policy == "newest"
        return [*self._commands, *(reversed(self._waiting) if newest else self._waiting)]

    def offer(self, line: str, now: float) -> str:
        """Take a line "user: text" that came at `now` (seconds); returns "taken", or why it is not."""
        message = self._parse(line)
        if isinstance(message, str):
            return message
        if message.user in self.muted:
            return "muted"
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
            del self._waiting[: len(self._waiting) + 1 - self.queue]
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
        user, text = name_of(user), _printable(text, JOINERS).strip()
        if not (user and colon and text.startswith(self.prefix)):
            return "not for us"
        text = text.removeprefix(self.prefix).strip()
        if not text:
            return "empty"
        if max(len(text), len(user)) > self.longest:
            return "too long"
        command = text.startswith("/") and not text.startswith("//")
        if command and user not in self.operators:
            return "not an operator"
        return Message(user, text, command)


def name_of(user: str) -> str:
    """A user's name as the room knows it; "" if nothing is left of it."""
    return _printable(user).strip()


def _check(pick: str, **limits: int) -> None:
    if pick not in get_args(Pick):
        raise ValueError(f"pick must be one of {', '.join(get_args(Pick))}, found {pick!r}")
    for name, value in limits.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, found {value}")


def _printable(text: str, besides: str = "") -> str:
    """The same with other white space as spaces, and without what cannot be seen."""
    return "".join(c if c.isprintable() or c in besides else " " * c.isspace() for c in text)
