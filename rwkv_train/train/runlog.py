"""What a person sees of a run, and the same as data: the progress line and metrics.jsonl."""

import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path

import torch
import yaml
from filelock import FileLock, Timeout
from tqdm import tqdm

from rwkv_train.files import replace_file
from rwkv_train.program import command, peak_bytes
from rwkv_train.run_config import whole_paths

QUIET = 10.0  # seconds between lines where there is no terminal to draw a bar on


def new_run(runs: str, name: str) -> Path:
    """Make the folder runs/NAME, or runs/NAME-2, -3, ... where that is taken."""
    number = 1
    while True:
        path = Path(runs) / (name if number == 1 else f"{name}-{number}")
        try:
            path.mkdir(parents=True)
        except FileExistsError as error:
            if not Path(runs).is_dir():
                raise ValueError(
                    f"the folder {runs} cannot be made ({error}); give another place with --runs"
                ) from None
            number += 1
        except OSError as error:
            raise ValueError(
                f"the run's folder {path} cannot be made ({error}); give another place with --runs"
            ) from None
        else:
            (path / "checkpoints").mkdir()
            return path


@contextmanager
def only_writer(run: Path) -> Iterator[None]:
    """Keep other processes from writing into a run's folder. The system ends that with the process, even on SIGKILL."""
    lock = FileLock(run / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"the run {run} is in use by another process; wait for its end, or stop it first") from None
    try:
        yield
    finally:
        lock.release()


def write_config(path: Path, config: dict) -> None:
    """runs/NAME/config.yaml, which `fit --config` reads again."""
    header = f"# The settings of this run. Continue it with: {command('fit', '--config', path, '--resume')}\n"
    text = header + yaml.safe_dump(whole_paths(config), sort_keys=False, allow_unicode=True)
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def peak_memory_mb(device: torch.device) -> float:
    """Most memory held so far: of the process, or of the GPU if that is where the model is."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return peak_bytes() / 2**20


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s"


class RunLog:
    """Appends records to metrics.jsonl and keeps one line on the terminal up to date.

    Where stderr is no terminal, a plain line is printed every few seconds instead.
    """

    def __init__(self, path: Path, name: str, steps: int):
        self.steps, self._path = steps, path
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115
        self._bar = tqdm(
            total=steps,
            desc=name,
            unit="step",
            dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
            bar_format="{desc} {percentage:3.0f}%|{bar:12}| {n}/{total}{postfix} [{elapsed}<{remaining}]",
        )
        self._printed = time.monotonic() - QUIET  # the first record is printed at once

    def start_at(self, step: int) -> None:
        """Go on from a checkpoint: what an earlier try recorded after it is about to happen again."""
        lines = self._path.read_bytes().splitlines(keepends=True)
        self._file.truncate(sum(map(len, takewhile(lambda line: step and _step(line) <= step, lines))))
        self._bar.n = self._bar.last_print_n = self._bar.initial = step

    def train(self, record: dict) -> None:
        """One training record: step, loss, perplexity, lr, tokens_per_s, memory_mb, eta_s and more."""
        self._write(record)
        loss = f"loss {record['loss']:.3f}, ppl {record['perplexity']:.1f}"
        line = (
            f"{'no loss: nothing was trained' if math.isnan(record['loss']) else loss}, lr {record['lr']:.2g}, "
            f"{record['tokens_per_s']:,.0f} tok/s, {record['memory_mb']:,.0f} MB"
        )
        if not self._bar.disable:
            self._bar.set_postfix_str(line, refresh=False)
            self._bar.n = record["step"]
            self._bar.refresh()
        elif time.monotonic() - self._printed >= QUIET or record["step"] == self.steps:
            self._printed = time.monotonic()
            self.say(f"step {record['step']}/{self.steps}: {line}, {duration(record['eta_s'])} left")

    def step(self) -> None:
        """One optimizer step done."""
        self._bar.update()

    def validation(self, record: dict) -> None:
        self._write(record)
        bpb = record["val_bits_per_byte"]
        bits = "" if bpb is None else f", {bpb:.3f} bits per byte"
        self.say(
            f"step {record['step']}/{self.steps}: validation loss {record['val_loss']:.4f}, "
            f"perplexity {record['val_perplexity']:.2f}{bits}"
        )

    def say(self, line: str) -> None:
        """A line above the progress line."""
        self._bar.write(line, file=sys.stderr)

    def close(self) -> None:
        self._bar.close()
        self._file.close()

    def _write(self, record: dict) -> None:
        self._file.write(json.dumps({k: _rounded(v) for k, v in record.items()}) + "\n")
        self._file.flush()


def read_metrics(path: Path) -> list[dict]:
    """The records of a metrics.jsonl, without a line that a crash left unfinished."""
    return [json.loads(line) for line in path.read_bytes().splitlines() if _step(line) < math.inf]


def _step(line: bytes) -> float:
    """The step of a record; infinite for a line that a crash left unfinished."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


def _rounded(value):
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else str(value)
    return value
