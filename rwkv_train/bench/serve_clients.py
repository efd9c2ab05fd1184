"""A server in a process of its own, and clients of it that take little of the processor: plain streams, no library."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from urllib.parse import urlsplit

from rwkv_train.bench.apart import PACKAGE

CALL = "from rwkv_train.cli import main; main()"
STARTING = 300.0  # seconds in which a server must be there
ENDING = 120.0  # seconds in which one must end, after which it is killed
DEAD = 300.0  # seconds without a byte, after which a request has failed


class Failed(Exception):
    """A request that was not answered as it should be, or broke off."""


@contextlib.contextmanager
def process(command: list[str], folder: Path, announce: str = "http://") -> Iterator[tuple[str, int]]:
    """(the address that a server prints behind `announce`, its process). ValueError where it does not come up."""
    path = os.pathsep.join(filter(None, [str(PACKAGE), os.environ.get("PYTHONPATH")]))
    log = folder / "server.log"
    with log.open("w") as out:
        child = subprocess.Popen(command, stdout=out, stderr=out, env={**os.environ, "PYTHONPATH": path})
    try:
        begun = time.monotonic()
        while announce not in (said := log.read_text(encoding="utf-8", errors="replace")):
            if child.poll() is not None or time.monotonic() - begun > STARTING:
                last = said.strip().splitlines() or ["it said nothing"]
                raise ValueError(f"the server did not come up: {last[-1][:300]}")
            time.sleep(0.05)
        while "\n" not in (line := log.read_text(encoding="utf-8").partition(announce)[2]):
            time.sleep(0.01)
        yield "http://" + line.split()[0].partition("://")[2] if "://" in line.split()[0] else f"http://{line.split()[0]}", child.pid
    finally:
        child.send_signal(signal.SIGINT)
        try:
            child.wait(ENDING)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
