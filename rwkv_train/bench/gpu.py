"""`bench gpu`: everything that a GPU is asked for, checked and timed in one go, on a machine with torch alone.

The jobs are done one after the other by a process of its own. Where one fails in a way that spoils the device for what
comes after it, or takes too long, or crashes, its process is ended and another one goes on with the next. Each row is
written as soon as it is known.
"""

import contextlib
import gc
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict

import torch

from rwkv_train.bench.apart import PACKAGE
from rwkv_train.bench.gpu_generation import generation
from rwkv_train.bench.gpu_jobs import Job, Results, Row
from rwkv_train.bench.gpu_kernels import correctness, kernels, limits
from rwkv_train.bench.gpu_models import flat_memory, profile, training
from rwkv_train.bench.gpu_peers import peers
from rwkv_train.bench.gpu_programs import deepspeed, sanitizer, tests
from rwkv_train.bench.measure import free, need, number, one_line, table, versions, write_json
from rwkv_train.bench.settings import GpuBench

SECTIONS = (
    *(limits, correctness, kernels, training, generation, profile, peers),
    *(flat_memory, tests, sanitizer, deepspeed),
)
START = 120.0  # seconds in which a process has to begin its first job
KILLED = 10.0  # seconds in which a process that was killed has to be gone


def jobs(config: GpuBench, results: Results) -> Iterator[tuple[str, Job]]:
    """Everything in its order, with the name of its section. results: what the jobs may look up while they run."""
    for section in SECTIONS:
        for job in section(config, results):
            yield section.__name__.replace("_", " "), job


def gpu(config: GpuBench) -> int:
    """Print versions, a table for each section and a short one at the end; 1 if anything of ours is wrong or fails."""
    need(config.device)
    board = Board(config)
    plan, first = list(jobs(config, board.results)), 0
    while first < len(plan) and not board.over:
        first = _watch(plan, first, board)
    board.close(plan[first:])
    return int(board.wrong)


class Board:
    """What is known so far: printed by section, and written to the file at once."""

    def __init__(self, config: GpuBench):
        self.config, self.end = config, time.monotonic() + config.minutes * 60
        self.results: Results = {}
        self.short: list[dict[str, str]] = []
        self.section, self.wrong, self.no_process = "", False, ""
        self.versions = versions(config.device)
        print("\n".join(f"{name}: {found}" for name, found in self.versions.items()), flush=True)
        self._write()

    @property
    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()

    @property
    def over(self) -> str:
        """Why nothing more is begun; empty while there is time."""
        return self.no_process or (f"{self.config.minutes:g} minutes are over" if self.left <= 0 else "")

    def add(self, section: str, row: Row) -> None:
        self.enter(section)
        if row.cells:
            self.results.setdefault(section, []).append(dict(row.cells))
        if row.what:
            self.short.append({"what": row.what, "found": row.found})
        self.wrong |= not row.good
        self._write()

    def enter(self, section: str) -> None:
        """Print the table of the section before."""
        if section != self.section and self.results.get(self.section):
            seconds = self.config.minutes * 60 - self.left
            rows = [
                {name: _text(x) for name, x in row.items() if not isinstance(x, bool)}
                for row in self.results[self.section]
            ]
            print(f"\n{self.section}, until {seconds:.0f} s\n{table(rows)}", flush=True)
        self.section = section

    def close(self, left_out: list[tuple[str, Job]]) -> None:
        """Print the last tables. left_out: jobs that have not begun."""
        self.enter("")
        for section, count in Counter(section for section, _ in left_out).items():
            self.short.append({"what": section, "found": f"{count} jobs left out: {self.over}"})
        self._write()
        print(f"\n{table(self.short)}", flush=True)

    def _write(self) -> None:
        results = {"versions": self.versions, "sections": self.results, "short": self.short}
        write_json(self.config.json, "gpu", self.config, results, self.config.device)


def _text(x: object) -> str:
    if isinstance(x, list):  # the file has all of it
        return " and ".join([*map(str, x[:1]), *([f"{len(x) - 1} more"] if len(x) > 1 else [])])
    return number(x) if isinstance(x, float) else "-" if x is None else str(x)


def _watch(plan: list[tuple[str, Job]], first: int, board: Board) -> int:
    """Have a process do the jobs from `first` on, as long as it can; the number of the first that has not begun."""
    current, limit, begun = None, START, time.monotonic()
    worker = Worker(board.config, first, board.results)
    try:
        while True:
            event = worker.next(min(board.left, begun + limit - time.monotonic()))
            if event is None:
                why = board.over or f"it took over {limit:g} s"
                break
            if "row" in event:
                board.add(plan[current][0], Row(**event["row"]))
            elif "job" in event:
                current, (section, job) = event["job"], plan[event["job"]]
                assert job.what == event["what"], "both processes list the same jobs"
                limit, begun = job.limit, time.monotonic()
                board.enter(section)
            elif "next" in event:
                return event["next"]
            else:
                why = f"its process ended with status {event['status']}"
                break
    finally:
        worker.end()
    if current is None:
        board.no_process = board.over or f"no process begins to work ({why})"
        board.wrong |= board.left > 0
        return first
    section, job = plan[current]
    board.add(section, job.ended(why) if board.over else job.failed(why))
    return current + 1


class Worker:
    """A process that does jobs, in a session of its own, so that what it starts ends with it."""

    command = (sys.executable, "-m", __name__)

    def __init__(self, config: GpuBench, first: int, results: Results):
        path = os.pathsep.join(filter(None, [str(PACKAGE), os.environ.get("PYTHONPATH")]))
        self.process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,
            text=True,
        )
        self.events: queue.Queue[dict] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()
        given = {"config": asdict(config), "first": first, "results": results}
        with contextlib.suppress(BrokenPipeError):  # it has ended, as _listen tells
            self.process.stdin.write(json.dumps(given) + "\n")
            self.process.stdin.flush()

    def _listen(self) -> None:
        with contextlib.suppress(json.JSONDecodeError):  # a line that its end has cut off
            for line in self.process.stdout:
                self.events.put(json.loads(line))
        self.events.put({"status": self.process.wait()})

    def next(self, seconds: float) -> dict | None:
        """What the process tells next; None if that takes longer."""
        try:
            return self.events.get(timeout=max(0.0, seconds))
        except queue.Empty:
            return None

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # the driver may hold a process whose kernel does not end
            self.process.wait(KILLED)
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()


def work(config: GpuBench, first: int, results: Results, tell: Callable[[Mapping], None]) -> None:
    """Do the jobs from `first` on, until all are done or the device no longer works; tell of each row at once."""
    number = first
    gc.freeze()  # `free` need not look through the objects of all packages each time
    for number, (section, job) in enumerate(jobs(config, results)):
        if number < first:
            continue
        tell({"job": number, "what": job.what})
        try:
            free(config.device)  # whatever the job before has left
            for row in job.run():
                if row.cells:
                    results.setdefault(section, []).append(dict(row.cells))
                tell({"row": asdict(row)})
        except Exception as error:  # the jobs after it are still worth their time
            print(f"{section}: {job.what}", file=sys.stderr)
            traceback.print_exc(file=sys.stderr)
            tell({"row": asdict(job.failed(one_line(error)))})
        if not _works(config.device):
            break
    tell({"next": number + 1})


def _works(device: str) -> bool:
    """Whether a GPU still answers: after some errors every later call of the process fails, too."""
    try:
        return torch.ones(1, device=device).item() == 1
    except Exception:  # torch's own or the driver's
        return False


def main() -> None:
    """The worker: settings come on standard input, and it ends with the process that holds the other end of it."""
    given = json.loads(sys.stdin.readline())

    def follow() -> None:
        while os.read(0, 1):  # nothing more comes; and a thread that reads sys.stdin would spoil the exit
            pass
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=follow, daemon=True).start()
    told = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what anything else prints is none of ours

    def tell(event: Mapping) -> None:
        print(json.dumps(event), file=told, flush=True)

    work(GpuBench(**given["config"]), given["first"], given["results"], tell)


if __name__ == "__main__":
    main()
