"""What every benchmark shares: turns of repeats, agreement before speed, tables, and JSON that names the machine."""

import gc
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from rwkv_train.files import replace_file
from rwkv_train.ops.graph import capture

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NEAR = 4  # times the allowed error: so far a result may be off and is timed all the same, with a word beside it
LEAST = 0.02  # seconds that one repeat lasts at least: what is faster is called several times in it


@dataclass(frozen=True)
class Times:
    """Seconds of a call, one for each repeat."""

    seconds: list[float]

    @property
    def median(self) -> float:
        return median(self.seconds)

    def shown(self, count: int = 1, unit: str = "ms") -> str:
        """Median and, in brackets, the range, divided by `count`."""
        scale = {"s": 1, "ms": 1e3, "us": 1e6, "ns": 1e9}[unit] / count
        low, high = min(self.seconds) * scale, max(self.seconds) * scale
        return f"{number(self.median * scale)} {unit} ({number(low)}-{number(high)})"

    def rate(self, count: int) -> str:
        """`count` a second: of the median and, in brackets, of the range."""
        low, high = count / max(self.seconds), count / min(self.seconds)
        return f"{number(count / self.median)} ({number(low)}-{number(high)})"


def number(x: float) -> str:
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def race(
    contestants: Mapping[str, Callable[[], object]],
    repeats: int,
    device: str = "cpu",
    budget: float = 60.0,
    least: float = LEAST,
    failed: dict[str, str] | None = None,
) -> dict[str, Times]:
    """Time calls against each other: after a warm-up, in turns whose order rotates, so that all meet the same machine.

    budget: seconds of one contestant's repeats; one that is slower gets fewer of them, but one.
    failed: where the reason of a contestant that raises is put, which then has no times; without it the error comes
    through.
    """
    plans: dict[str, tuple[int, int]] = {}
    measured: dict[str, list[float]] = {}

    def run(name: str, seconds_of: Callable[[], float]) -> float | None:
        """None where that failed: the contestant is out."""
        try:
            return seconds_of()
        except Exception as error:
            if failed is None:
                raise
            failed[name] = one_line(error)
            plans.pop(name, None), measured.pop(name, None)
        free(device)  # here, where the error no longer holds the memory of what failed
        return None

    for name, call in contestants.items():
        seconds = run(name, lambda call=call: _warm(call, device))
        if seconds is not None:
            inner = max(1, round(least / max(seconds, 1e-7)))
            plans[name] = inner, max(1, min(repeats, int(budget / (seconds * inner))))
            measured[name] = []
    names = list(plans)
    for turn in range(repeats):
        shift = turn % max(1, len(names))
        for name in names[shift:] + names[:shift]:
            inner, most = plans.get(name, (0, 0))
            if turn < most:
                seconds = run(name, lambda name=name, inner=inner: _timed(contestants[name], inner, device))
                if seconds is not None:
                    measured[name].append(seconds)
    return {name: Times(seconds) for name, seconds in measured.items()}


def _warm(call: Callable[[], object], device: str) -> float:
    seconds = _timed(call, 1, device)
    return _timed(call, 1, device) if seconds < 1 else seconds  # the first call also allocates


def _timed(call: Callable[[], object], inner: int, device: str) -> float:
    synchronize(device)
    begun = time.perf_counter()
    for _ in range(inner):
        call()
    synchronize(device)
    return (time.perf_counter() - begun) / inner


def need(device: str) -> None:
    """ValueError where a device is not there."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("torch sees no GPU here; run this on a machine with one, and with torch built for it")


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def free(device: str) -> None:
    """Give a GPU's unused memory back; a CPU's goes back by itself."""
    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def graphed(call: Callable[[], object], device: str) -> tuple[Callable[[], object], str]:
    """The call as a CUDA graph, so that a short kernel is not timed as its launch; and how it runs.

    As it is where there are no graphs or the capture fails.
    """
    if device != "cuda":
        return call, "calls"
    try:
        replay = capture(call)
        replay()
        torch.cuda.synchronize()
    except Exception as error:  # torch's or the kernels' own
        torch.cuda.synchronize()
        return call, f"calls; no graph: {one_line(error)}"
    return replay, "graph"


def one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:160]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected| in the 2-norm; infinite for a wrong shape or what is no finite number."""
    if actual.shape != expected.shape:
        return float("inf")
    actual, expected = actual.detach().double(), expected.detach().double().to(actual.device)
    error, norm = (actual - expected).norm().item(), expected.norm().item()
    error = error / norm if norm > 0 else error
    return error if error == error else float("inf")


@dataclass(frozen=True)
class Agreement:
    """How far a contestant is from the reference, and where it is farthest; or how it failed."""

    error: float
    allowed: float
    where: str = ""
    failed: str = ""

    @property
    def good(self) -> bool:
        return self.error <= self.allowed

    @property
    def near(self) -> bool:
        """Good, or off by so little that its speed is worth knowing."""
        return self.error <= NEAR * self.allowed

    def __str__(self) -> str:
        if self.failed:
            return f"failed: {self.failed}"
        if self.near and not self.good:
            return f"off: {self.error:.2g} > {self.allowed:g}, {self.where}"
        return f"{self.error:.1e}" if self.good else f"disagrees: {self.where} is off by {self.error:.1e}"


def agreement(run: Callable[[], Mapping[str, Tensor]], expected: Mapping[str, Tensor], allowed: float) -> Agreement:
    """Compare what a contestant computes with the reference, tensor by tensor; an exception is no agreement."""
    try:
        actual = run()
    except Exception as error:  # a peer may fail in any way; that is its result
        return Agreement(float("inf"), allowed, failed=one_line(error))
    errors = {name: relative_error(actual[name], t) if name in actual else float("inf") for name, t in expected.items()}
    worst = max(errors, key=errors.__getitem__)
    return Agreement(errors[worst], allowed, worst)


def table(rows: list[Mapping[str, str]]) -> str:
    """A table in Markdown; the columns are the keys of the rows, and what a row lacks is a dash."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names, ["---"] * len(names), *[[str(row.get(name, "-")) for name in names] for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(names))]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in cells)


def target(what: str, value: float, wanted: float | None, more: bool) -> dict[str, str]:
    """A row of the table of targets: a ratio, what it should be, and whether it is."""
    row = {"what": what, "found": number(value), "target": "-", "met": "-"}
    if wanted is None:
        return row
    met = value >= wanted if more else value <= wanted
    return row | {"target": f"{'≥' if more else '≤'} {wanted:g}", "met": "yes" if met else "no"}


def installed(package: str) -> str | None:
    """The version of an optional package, None if it is not there."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def machine(device: str = "cpu") -> dict[str, object]:
    """What the figures were measured on, and how busy it was."""
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    cpu = next((line.split(":", 1)[1].strip() for line in info.splitlines() if line.startswith("model name")), "")
    facts = {
        "cpu": cpu or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "bf16 instructions": "avx512_bf16" in info or "amx_bf16" in info,
        "load average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "packages": {p: v for p in ("torch", "transformers", "rwkv", "fla-core", "deepspeed") if (v := installed(p))},
    }
    if device == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        facts |= {"gpu": gpu.name, "gpu memory GB": gpu.total_memory / 1e9, "cuda": torch.version.cuda}
    return facts


def versions(device: str) -> dict[str, str]:
    """What a GPU's figures depend on; "-" for what is not there or does not tell."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "torch's CUDA": torch.version.cuda}
    found["driver"] = _driver()
    packages = ("cuda-core", "cuda-bindings", "nvidia-cuda-nvrtc", "triton", "transformers", "fla-core", "lightning")
    found |= {package: installed(package) for package in packages}
    found["NVRTC"] = _nvrtc()
    if device == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        found |= {"card": gpu.name, "capability": f"{gpu.major}.{gpu.minor}"}
        found |= {"memory": f"{gpu.total_memory / 1e9:.1f} GB", "multiprocessors": str(gpu.multi_processor_count)}
    found["machine"] = about(machine(device))
    return {name: x or "-" for name, x in found.items()}


def _driver() -> str | None:
    """The version of the GPU's driver."""
    try:
        ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(ask, capture_output=True, text=True, timeout=20, check=True).stdout.split("\n")[0].strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _nvrtc() -> str | None:
    """The version of the compiler that is loaded, which need not be that of the package."""
    try:
        from cuda.bindings import nvrtc

        _, major, minor = nvrtc.nvrtcVersion()
    except Exception:  # the loader's own, where the library is not there
        return None
    return f"{major}.{minor}"


def about(facts: Mapping) -> str:
    """`machine` in a line."""
    where = [facts["gpu"]] if "gpu" in facts else []
    where += [f"{facts['cpu']}, {facts['threads']} threads of {facts['cores']} cores"]
    busy = f"load average {facts['load average']:.1f}" if facts["load average"] is not None else ""
    return ", ".join(filter(None, [*where, *(f"{p} {v}" for p, v in facts["packages"].items()), busy]))


def write_json(path: str | None, benchmark: str, config, results, device: str = "cpu") -> None:
    """Figures, the settings that they were measured with, and the machine."""
    if path:
        report = {"benchmark": benchmark, "settings": asdict(config), "machine": machine(device), "results": results}
        text = json.dumps(report, indent=1, default=_plain, ensure_ascii=False) + "\n"
        replace_file(Path(path), lambda file: file.write_text(text, encoding="utf-8"))


def _plain(x) -> object:
    return {"median_s": x.median, "seconds": x.seconds} if isinstance(x, Times) else str(x)
