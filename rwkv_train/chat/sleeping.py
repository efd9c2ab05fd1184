"""Sleep in a chat: asked for, or by itself while nobody types."""

import threading
import time
from collections.abc import Callable

from rwkv_train.chat.session import Chat
from rwkv_train.feedback import Learner, Slept
from rwkv_train.feedback.background import Background, in_a_line

LOOK = 5.0  # seconds between looks at whether the chat is idle


class Sleeper:
    """Lets a chat's learner sleep, until somebody types.

    background: the thread in which it sleeps. tell(text): says something that is no answer.
    """

    def __init__(self, chat: Chat, learner: Learner, background: Background, tell: Callable[[str], None]):
        self.chat, self.learner, self._background, self._tell = chat, learner, background, tell
        self._ending = threading.Event()
        self._busy = False  # it was sent to sleep by itself
        self._failed = 0  # records of the journal when that went wrong
        threading.Thread(target=self._watch, daemon=True).start()

    def sleep(self) -> str:
        """Sleep now, in the thread that calls; what it came to. A line that is typed meanwhile ends it."""
        lines = self.chat.lines
        slept = self.learner.sleep(lambda: self.chat.lines != lines or self._ending.is_set())
        return told_slept(slept) if slept else "woken up, nothing was changed; /sleep goes on where it was left"

    def due(self, now: float) -> bool:
        """Whether it should sleep by itself. now: in seconds of time.monotonic()."""
        minutes, journal = self.learner.config.sleep_after, self.learner.journal
        idle = minutes > 0 and now - self.chat.typed >= 60 * minutes
        work = journal.ledger.tired and len(self.learner.learnt()) > 1 and not self.learner.waiting()
        return idle and work and not self._busy and len(journal.records) != self._failed

    def close(self) -> None:
        """Wake up, and do not sleep again."""
        self._ending.set()

    def look(self, now: float) -> None:
        """Send it to sleep if that is due."""
        if self.due(now):
            self._busy = True
            self._background.submit(self._by_itself)

    def _watch(self) -> None:
        while not self._ending.wait(LOOK):
            self.look(time.monotonic())

    def _by_itself(self) -> None:
        try:
            self._tell(self.sleep())
        except Exception as error:
            self._failed = len(self.learner.journal.records)
            self._tell(f"sleep failed, nothing was changed: {in_a_line(error)}")
        finally:
            self._busy = False


def told_slept(s: Slept) -> str:
    """What a sleep came to, in a line or two."""
    begin = f"{len(s.of)} corrections were learnt together" if s.accepted else f"slept, nothing was changed: {s.why}"
    best = f"best after epoch {s.epochs}, " if s.epochs else ""  # there are none where texts alone were read
    lines = [
        f"{begin} ({best}{s.seconds:.1f} s)",
        f"right answers {s.right_before} -> {s.right_after} of {s.count}, "
        f"drift elsewhere {s.drift_before:.2g} -> {s.drift_after:.2g} nats a token",
    ]
    if s.lost:
        lines.append(f"no longer right: {', '.join(map(str, s.lost))}")
    return "\n".join(lines)
