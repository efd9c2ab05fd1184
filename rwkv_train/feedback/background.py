"""Learning while the chat goes on: one thread, one thing after the other."""

import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress

import torch
from tqdm import tqdm

THREADS = max(1, (os.cpu_count() or 1) // 2)  # for learning, and as many for replies that stream meanwhile

Watch = Callable[[str, Sequence], Iterable]


def on_standard_error(what: str, items: Sequence) -> Iterable:
    """The items, with a bar on standard error if they take long."""
    return tqdm(items, desc=what, delay=2, leave=False)


class Background:
    """Runs jobs in the order they came. `close` finishes what was submitted.

    failed(error) is called in the thread for whatever a job raises; the next job runs all the same.
    """

    def __init__(self, failed: Callable[[Exception], None]):
        self._failed = failed
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
            except Exception as error:
                with suppress(Exception):  # nobody is left who could be told
                    self._failed(error)
            finally:
                self._jobs.task_done()


def in_a_line(error: Exception) -> str:
    """What went wrong, also where the error itself has no words; its kind is named unless it was written for people."""
    said = " ".join(str(error).split())
    return said if said and isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {said}".rstrip(": ")


@contextmanager
def half_the_threads() -> Iterator[None]:
    """Compute on half of the processor: room for another thread, and always the same rounding.

    The number belongs to the thread that sets it (OpenMP's and MKL's are thread local); others keep theirs, and only a
    thread that has not computed yet begins with the number set last, by whomever.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        yield
    finally:
        torch.set_num_threads(before)
