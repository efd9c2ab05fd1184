"""A function in a process of its own, its peak of memory, and limits that end it."""

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from rwkv_train.program import peak_bytes

PACKAGE = Path(__file__).parents[2]  # what holds rwkv_train: the child imports the same code
POLL = 0.05  # seconds between looks at a running child


@dataclass(frozen=True)
class Apart:
    """What became of a call: its result and peak of resident memory in MB, or why there is none."""

    result: object = None
    peak_mb: float | None = None
    seconds: float = 0.0
    why_not: str = ""


def apart(function: str, limit_gb: float, limit_s: float, **arguments) -> Apart:
    """Call "module:function" with arguments that JSON can carry. Over a limit the process is ended.

    The memory limit needs Linux's /proc.
    """
    code = [sys.executable, "-m", __name__, function, json.dumps(arguments)]
    path = os.pathsep.join(filter(None, [str(PACKAGE), os.environ.get("PYTHONPATH")]))
    begun, why_not = time.perf_counter(), ""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = subprocess.Popen(code, stdout=out, stderr=err, env={**os.environ, "PYTHONPATH": path})
        try:
            while child.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(POLL)
                seconds = time.perf_counter() - begun
                if (_status(child.pid, "VmRSS") or 0) > limit_gb * 1000:
                    why_not = f"over {limit_gb:g} GB"
                elif seconds > limit_s:
                    why_not = f"over {limit_s:g} s"
                if why_not:
                    break
        finally:
            child.kill()
            child.wait()
        seconds = time.perf_counter() - begun
        for file in (out, err):
            file.seek(0)
        if why_not:
            return Apart(seconds=seconds, why_not=why_not)
        if child.returncode:
            lines = err.read().strip().splitlines() or [f"exit status {child.returncode}"]
            return Apart(seconds=seconds, why_not=lines[-1][:200])
        answer = json.loads(out.read().splitlines()[-1])
    return Apart(answer["result"], answer["peak_mb"], seconds)


def _status(pid: int | str, field: str) -> float | None:
    """A size from /proc/PID/status, in MB of 10^6 bytes; None where there is none."""
    try:
        line = re.search(rf"{field}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return None
    return int(line[1]) * 1024 / 1e6 if line else None


def peak_mb() -> float:
    """The largest resident memory of this process so far, MB."""
    return peak_bytes() / 1e6


def main() -> None:
    """The child: python -m rwkv_train.bench.apart MODULE:FUNCTION '{"argument": ...}'."""
    module, _, name = sys.argv[1].partition(":")
    result = getattr(import_module(module), name)(**json.loads(sys.argv[2]))
    print(json.dumps({"result": result, "peak_mb": peak_mb()}))


if __name__ == "__main__":
    main()
