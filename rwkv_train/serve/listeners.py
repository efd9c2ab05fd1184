"""Those who listen to what becomes of corrections."""

import asyncio
from collections.abc import AsyncGenerator

LATE = 256  # corrections whose events are kept for whoever comes late
BACKLOG = 1000  # events that a listener may be behind, before it is let go

News = tuple[str, int | None, str, dict]  # (profile, number of the correction or None, event, data)


class Listeners:
    """Gives each event to all. Used in the event loop alone."""

    def __init__(self):
        self._past: dict[tuple[str, int], list[tuple[str, dict]]] = {}
        self._queues: set[asyncio.Queue[News | None]] = set()

    def past(self, profile: str, number: int) -> list[tuple[str, dict]]:
        """(event, data) of a correction so far, as far as they are kept."""
        return list(self._past.get((profile, number), ()))

    def listen(self) -> AsyncGenerator[News]:
        """All events from now on; close it. It ends for one who is far behind."""
        events: asyncio.Queue[News | None] = asyncio.Queue(BACKLOG)
        self._queues.add(events)
        return self._heard(events)

    def tell(self, profile: str, number: int | None, event: str, data: dict) -> None:
        if number is not None:
            known = self._past.setdefault((profile, number), [])
            if event == "watch" and known and known[-1][0] == "watch":
                known.pop()  # of progress the last counts
            known.append((event, data))
            while len(self._past) > LATE:
                del self._past[next(iter(self._past))]
        for events in list(self._queues):
            if events.full():
                self._let_go(events)
            else:
                events.put_nowait((profile, number, event, data))

    def end(self) -> None:
        """Let all go."""
        for events in list(self._queues):
            self._let_go(events)

    async def _heard(self, events: asyncio.Queue[News | None]) -> AsyncGenerator[News]:
        try:
            while (event := await events.get()) is not None:
                yield event
        finally:
            self._queues.discard(events)

    def _let_go(self, events: asyncio.Queue[News | None]) -> None:
        self._queues.discard(events)
        if events.full():
            events.get_nowait()
        events.put_nowait(None)
