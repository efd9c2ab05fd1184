"""The sections of `bench gpu` that start other programs: the tests on a GPU, the sanitizer, a run with DeepSpeed."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from rwkv_train.bench import elementwise_cases
from rwkv_train.bench.apart import PACKAGE, apart
from rwkv_train.bench.gpu_jobs import Job, Results, Row
from rwkv_train.bench.measure import DTYPES, installed
from rwkv_train.bench.settings import GpuBench
from rwkv_train.bench.wkv_operators import OPERATORS, Case
from rwkv_train.files import read_lines

TESTS_LIMIT, SANITIZER_LIMIT, FIT_LIMIT = 240.0, 120.0, 150.0  # seconds
SANITIZER = "compute-sanitizer"
TOOLKIT = "/usr/local/cuda/bin:/usr/local/cuda/compute-sanitizer"  # where it lies on machines whose PATH lacks it
SMALL = {"wkv4": (2, 301, 66), "wkv7": (2, 131, 128)}  # B, T, C: every kernel, the hand-over of states among blocks


def tests(config: GpuBench, results: Results) -> Iterator[Job]:
    """With --tests: the tests of the kernels on a GPU, by pytest."""
    if config.tests:
        yield Job("tests of the kernels", _tests, limit=TESTS_LIMIT)


def _tests() -> Iterator[Row]:
    what, files = "tests of the kernels", sorted((PACKAGE / "tests" / "ops").glob("test_*_gpu.py"))
    if not files or not installed("pytest"):
        yield Row({"tests": what, "found": "not run"}, what, "not run: they lie in a clone, and need pytest")
        return
    options = ["-q", "-o", "addopts=", "-p", "no:cacheprovider"]  # those of the suite ask for packages that may lack
    status, lines = _run([sys.executable, "-m", "pytest", *options, "--tb=short", "--maxfail=10", *map(str, files)])
    last = next((line for line in reversed(lines) if line), f"exit status {status}")
    yield Row({"tests": " ".join(f.name for f in files), "found": last}, what, last, good=status == 0)


def _run(command: list[str]) -> tuple[int, list[str]]:
    """(exit status, lines that it printed). They go to standard error, too, as they come: its job may be ended."""
    path = os.pathsep.join(filter(None, [str(PACKAGE), os.environ.get("PYTHONPATH")]))
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    lines = []
    with subprocess.Popen(command, cwd=PACKAGE, env={**os.environ, "PYTHONPATH": path}, **how) as child:
        for line in child.stdout:
            print(line, end="", file=sys.stderr, flush=True)
            lines.append(line.strip())
    return child.returncode, lines


def sanitizer(config: GpuBench, results: Results) -> Iterator[Job]:
    """One small call of each kernel under compute-sanitizer: reads and writes out of bounds, races."""
    for tool in ("memcheck", "racecheck"):
        yield Job(f"{SANITIZER} {tool}", partial(_sanitizer, tool, config.device), limit=SANITIZER_LIMIT)


def _sanitizer(tool: str, device: str) -> Iterator[Row]:
    what, program = f"{SANITIZER} {tool}", shutil.which(SANITIZER) or shutil.which(SANITIZER, path=TOOLKIT)
    if device != "cuda" or not program:
        reason = "not run: it needs a GPU" if device != "cuda" else f"not run: {SANITIZER} is not found"
        yield Row({"tool": tool, "found": reason}, what, reason)
        return
    code = f"from {__name__} import small; small('cuda')"
    status, lines = _run([program, f"--tool={tool}", "--error-exitcode=9", sys.executable, "-c", code])
    found = next((line.strip("= ") for line in reversed(lines) if "SUMMARY" in line), f"exit status {status}")
    yield Row({"tool": tool, "found": found}, what, found, good=status == 0)


def small(device: str) -> None:
    """Each kernel once, forward and backward, in 16 and in 32 bits."""
    for dtype in ("bf16", "fp32"):
        for operator, shape in SMALL.items():
            Case.draw(operator, shape, DTYPES[dtype], device, resets=True).results(OPERATORS[operator].run)
        for name in elementwise_cases.CASES:
            elementwise_cases.run_small(name, DTYPES[dtype], device)


def deepspeed(config: GpuBench, results: Results) -> Iterator[Job]:
    """A short `fit` with deepspeed_stage_2, in a process of its own."""
    yield Job("fit with deepspeed_stage_2", lambda: _deepspeed(config), limit=FIT_LIMIT + 20)


def _deepspeed(config: GpuBench) -> Iterator[Row]:
    what = f"fit with deepspeed_stage_2, {config.deepspeed_steps} steps"
    missing = [package for package in ("lightning", "deepspeed") if not installed(package)]
    if missing:
        reason = f"not run: {' and '.join(missing)} not installed"
        yield Row({"strategy": "deepspeed_stage_2", "found": reason}, what, reason)
        return
    strategy, steps = "deepspeed_stage_2" if config.device == "cuda" else "auto", config.deepspeed_steps
    done = apart(f"{__name__}:fit", 1000, FIT_LIMIT, strategy=strategy, device=config.device, steps=steps)
    if done.why_not:
        raise RuntimeError(done.why_not)
    first, last, count = done.result[0], done.result[-1], len(done.result)
    cells = {"strategy": strategy, "steps": count, "first loss": first, "last loss": last, "s": done.seconds}
    good = count == steps and last < first
    yield Row(cells, what, f"loss {first:.3f} -> {last:.3f} in {done.seconds:.0f} s", good)


def fit(strategy: str, device: str, steps: int) -> list[float]:
    """Train a small model on a text that repeats itself: the loss of each step."""
    import numpy as np

    from rwkv_train.config import DataConfig, FitConfig, ModelConfig, OptimConfig, SampleConfig, TrainConfig
    from rwkv_train.data.binidx import write_index
    from rwkv_train.train.fit import fit as run

    with tempfile.TemporaryDirectory() as folder:
        tokens = np.tile(np.arange(1, 200, dtype="<u2"), 200)
        tokens.tofile(f"{folder}/text.bin")
        with Path(f"{folder}/text.idx").open("wb") as file:
            write_index(file, np.array([len(tokens)]), tokens.dtype)
        config = FitConfig(
            name="bench",
            runs=folder,
            model=ModelConfig(n_layer=4, n_embd=256, vocab_size=256),
            data=DataConfig(path=f"{folder}/text", val_share=0, lanes=4, chunk_len=128),
            optim=OptimConfig(lr=1e-3, warmup=0),
            train=TrainConfig(steps=steps, precision="bf16", device=device, strategy=strategy, log_every=1),
            samples=SampleConfig(prompts=[]),
        )
        run(config)
        lines = [line for _, line in read_lines(f"{folder}/bench/metrics.jsonl")]
    return [record["loss"] for record in map(json.loads, lines) if "loss" in record]
