"""How `fit` gets on beside other busy processes, by how OpenMP's threads wait: python tests/tools/beside.py [--help]

Each way of waiting is a run of its own with a thread a core, and they take turns: the others are stopped (SIGSTOP).
A turn is alone, or beside `--busy` processes of one thread that never wait. Two measures, both 1 where all is fair:

share       With T threads of the run and P others on T cores each thread should get T / (T + P) of a core, and the run
            as much of its speed alone: with two others on two cores half of it. The speed beside over the speed alone,
            over that. Both are from quiet turns only, in which anything else took at most `--others` of the cores.
by CPU time What T threads would do in the time that a busy process gets in the same turn, if they neither waited nor
            spun: the speed beside, over T times that, times the least CPU time a token of all ways. From all turns, for
            whatever else runs takes from both.

Medians. Linux only.
"""

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import yaml
from plan_check import case, config_of

ROOT = Path(__file__).parents[2]
WAITS = {
    "the library's own": {"GOMP_SPINCOUNT": "300000"},
    "spin 10,000": {"GOMP_SPINCOUNT": "10000"},
    "spin 1000": {"GOMP_SPINCOUNT": "1000"},
    "spin 300": {"GOMP_SPINCOUNT": "300"},
    "passive": {"OMP_WAIT_POLICY": "passive"},
    "passive + 300": {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "300"},  # the program's, beside others
}
BUSY = [sys.executable, "-c", "while True: pass"]
LOOK = 0.2  # seconds of quiet before a turn
TICK = 1 / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Turn:
    """What came of it: speed in tokens/s; cores that the run took, that each busy process took, and anything else."""

    speed: float
    cores: float
    each: float
    others: float


class Run:
    """A training run in a process of its own, of which single turns are timed."""

    def __init__(self, config, folder: Path, waits: dict[str, str], processes: list):
        config = replace(config, runs=str(folder / "runs"))
        folder.mkdir()
        (folder / "config.yaml").write_text(yaml.safe_dump(asdict(config)))
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "KMP_"))}
        argv = [sys.executable, "train.py", "fit", "--config", str(folder / "config.yaml")]
        self.process = subprocess.Popen(
            argv, cwd=ROOT, env=inherited | waits, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        processes.append(self.process)
        self.metrics = folder / "runs" / "run" / "metrics.jsonl"
        while len(self.steps()) < 3:
            assert self.process.poll() is None, f"{' '.join(argv)} has ended"
            time.sleep(0.1)
        self.process.send_signal(signal.SIGSTOP)

    def steps(self) -> list[dict]:
        lines = self.metrics.read_text().split("\n")[:-1] if self.metrics.exists() else []
        return [json.loads(line) for line in lines]

    def turn(self, seconds: float, beside: list[subprocess.Popen]) -> Turn:
        """Some seconds of it. With fewer than three steps the speed is 0: nobody knows it."""
        everyone, before = [self.process, *beside], len(self.steps())
        for process in everyone:
            process.send_signal(signal.SIGCONT)
        began, all_before, before_each = time.monotonic(), used_by_all(), [used(p) for p in everyone]
        time.sleep(seconds)
        span, all_used = time.monotonic() - began, used_by_all() - all_before
        ours, *each = (used(p) - was for p, was in zip(everyone, before_each, strict=True))
        for process in everyone:
            process.send_signal(signal.SIGSTOP)
        whole = self.steps()[before:]  # the first of them was begun before
        tokens, took = (whole[-1][n] - whole[0][n] for n in ("tokens", "seconds")) if len(whole) > 2 else (0, 1)
        others = all_used - ours - sum(each)
        return Turn(tokens / took, ours / span, sum(each) / max(1, len(each)) / span, others / span)


def used_by_all() -> float:
    """Seconds that the cores have worked so far, those that a hypervisor took from them among them."""
    user, nice, system, _, _, *interrupts = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:9])
    return (user + nice + system + sum(interrupts)) * TICK


def used(process: subprocess.Popen) -> float:
    """Seconds of all threads of a process so far."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * TICK


def take_turns(runs: dict[str, Run], busy: list, args) -> dict[tuple[str, bool], list[Turn]]:
    """By way of waiting and whether the turn was beside others. Where it is not quiet only those beside are taken."""
    found = {(name, beside): [] for beside in (False, True) for name in runs}
    until = time.monotonic() + args.limit
    while time.monotonic() < until:
        before = used_by_all()
        time.sleep(LOOK)
        quiet = used_by_all() - before <= args.others * LOOK + 2 * TICK
        counts = {k: len(quiet_turns(turns, args) if quiet else turns) for k, turns in found.items() if quiet or k[1]}
        cell = min(counts, key=counts.__getitem__)
        if counts[cell] < args.repeats:
            found[cell].append(runs[cell[0]].turn(args.seconds, busy if cell[1] else []))
        elif quiet:
            break
    return found


def quiet_turns(turns: list[Turn], args) -> list[Turn]:
    return [turn for turn in turns if turn.others <= args.others]


def show(found: dict[tuple[str, bool], list[Turn]], args) -> None:
    cores = os.cpu_count()
    fair = cores / (cores + args.busy)
    known = {name: [t for t in found[name, True] if t.speed] for name in args.waits}
    least = min((middle(t.cores / t.speed for t in turns) for turns in known.values() if turns), default=math.nan)
    first = middle(t.speed for t in quiet_turns(found[args.waits[0], False], args))
    print(f"{'tokens/s in quiet turns':<24}{'alone':>8}{'over first':>12}{'beside':>8}{'share':>7}", end="")
    print(f"{'turns':>8}{'by CPU time (range), turns':>30}")
    for name in args.waits:
        quiet = [quiet_turns(found[name, beside], args) for beside in (False, True)]
        alone, beside = (middle(t.speed for t in turns) for turns in quiet)
        fairness = [t.speed * least / (cores * t.each) for t in found[name, True] if t.each]
        spread = (
            f"{middle(fairness):.2f} ({min(fairness):.2f}-{max(fairness):.2f}), {len(fairness)}" if fairness else ""
        )
        print(f"{name:<24}{alone:>8,.0f}{alone / first:>12.3f}{beside:>8,.0f}{beside / alone / fair:>7.2f}", end="")
        print(f"{len(quiet[0]):>5}+{len(quiet[1]):<2}{spread:>30}")


def middle(values) -> float:
    values = list(values)
    return median(values) if values else math.nan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", default="256x4", help="channels x layers")
    parser.add_argument("--architecture", default="rwkv4", choices=["rwkv4", "rwkv7"])
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--tokens", type=int, default=128, help="of a step")
    parser.add_argument("--busy", type=int, default=2, help="other processes")
    parser.add_argument("--seconds", type=float, default=1.0, help="of a turn")
    parser.add_argument("--repeats", type=int, default=7, help="turns of each kind")
    parser.add_argument("--others", type=float, default=0.1, help="cores that anything else may take in a quiet turn")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds after which no further turn begins")
    parser.add_argument("--waits", nargs="+", default=list(WAITS), choices=list(WAITS))
    args = parser.parse_args()
    n_embd, n_layer = map(int, args.size.split("x"))
    settings = case(n_embd, n_layer, 1, args.tokens, architecture=args.architecture, precision=args.precision)
    settings["train"] = replace(settings["train"], steps=1_000_000, save_every=1_000_000)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # no run is left behind
    processes = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            config, runs = config_of(settings, Path(folder)), {}
            for i, name in enumerate(args.waits):
                runs[name] = Run(config, Path(folder) / str(i), WAITS[name], processes)
            busy = [subprocess.Popen(BUSY) for _ in range(args.busy)]
            processes += busy
            for process in busy:
                process.send_signal(signal.SIGSTOP)
            show(take_turns(runs, busy, args), args)
        finally:
            for process in processes:
                process.kill()
                process.wait()


if __name__ == "__main__":
    main()
