"""Printing that outlives the terminal: a run goes on, and saves, when nobody can read it any more."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class LastingStream:
    """A text stream that writes to nowhere once its terminal, or the program that read from it, is gone."""

    def __init__(self, stream):
        self._stream = stream

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except OSError as error:
            self._gone(error)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._gone(error)

    def _gone(self, error: OSError) -> None:
        if error.errno not in (errno.EIO, errno.EPIPE):
            raise error
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)


@contextmanager
def lasting_output() -> Iterator[None]:
    """Standard output and standard error, so, for a while."""
    old = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(LastingStream, old)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = old
