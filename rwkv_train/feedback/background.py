"""Learning while the chat goes on: one thread, one thing after the other."""

import os
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

THREADS = max(1, (os.cpu_count() or 1) // 2)  # for learning, and as many for replies that stream meanwhile


class Background:
    """Runs jobs in the order they came. `close` finishes what was submitted."""

    def __init__(self):
        self._jobs: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def submit(self, job: Callable[[], None]) -> None:
        self._jobs.put(job)

    def wait(self) -> None:
        """Until everything submitted so far is done."""
        self._jobs.join()

    def close(self) -> None:
        self._jobs.put(None)
        self._thread.join()

    def _work(self) -> None:
        while True:
            job = self._jobs.get()
            try:
                if job is None:
                    return
                job()
            finally:
                self._jobs.task_done()


@contextmanager
def half_the_threads() -> Iterator[None]:
    """Compute on half of the processor: room for another thread, and always the same rounding."""
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        yield
    finally:
        torch.set_num_threads(before)
