"""`bench gpu`: everything that a GPU is asked for, checked and timed in one go, on a machine with torch alone."""

import gc
import itertools
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from rwkv_train.bench.apart import apart, peak_mb
from rwkv_train.bench.limits import copy_bandwidth
from rwkv_train.bench.measure import (
    about,
    agreement,
    graphed,
    installed,
    machine,
    need,
    one_line,
    race,
    table,
    write_json,
)
from rwkv_train.bench.models import random_model, random_text, size_of, training_step, truncated_step
from rwkv_train.bench.settings import GpuBench, TrainBench
from rwkv_train.bench.train import check as check_step
from rwkv_train.bench.train import times as step_times
from rwkv_train.bench.wkv import OPERATORS, backends, check, dtypes_of, measured, peers, shown
from rwkv_train.files import read_lines
from rwkv_train.generate import prefill
from rwkv_train.models.base import RWKV
from rwkv_train.models.state import State

Rows = list[dict[str, object]]
STEP = "ours bf16"
CHECKED, ALLOWED = 8, 0.05  # tokens, and relative error of the logits, on which a graph has to agree
FIT_LIMIT = 150  # seconds for the run with DeepSpeed


def gpu(config: GpuBench, device: str = "cuda") -> int:
    """Print a table for each section and a short one at the end; 1 if anything is wrong or failed.

    device: "cpu" runs the same sections there, which says whether they run at all.
    """
    need(device)
    print(about(machine(device)))
    begun, short, results, wrong = time.monotonic(), [], {}, False
    for section in (limits, correctness, kernels, training, flat_memory, generation, deepspeed):
        name = section.__name__.replace("_", " ")
        if time.monotonic() - begun > config.minutes * 60:
            short.append({"what": name, "found": f"left out: {config.minutes:g} minutes are over"})
        else:
            try:
                free(device)  # whatever the section before left, also where it failed
                rows, summary, good = section(config, device, results)
            except Exception as error:  # the sections after it are still worth their time
                traceback.print_exc(file=sys.stderr)
                rows, summary, good = [], [{"what": name, "found": f"failed: {one_line(error)}"}], False
            results[name] = rows
            short += summary
            wrong |= not good
            print(f"\n{name}, {time.monotonic() - begun:.0f} s\n{table([_text(row) for row in rows])}", flush=True)
        write_json(config.json, "gpu", config, {"sections": results, "short": short}, device)
    print(f"\n{table(short)}")
    return int(wrong)


def _text(row: Mapping) -> dict[str, str]:
    return {name: f"{x:.3g}" if isinstance(x, float) else str(x) for name, x in row.items()}


def free(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def limits(config: GpuBench, device: str, results: Mapping) -> tuple[Rows, Rows, bool]:
    """What the machine can do: bytes copied and products of bfloat16 a second."""
    bandwidth = copy_bandwidth(device, config.copy_mb)
    a, b = (torch.randn(config.square, config.square, device=device).bfloat16() for _ in range(2))
    product = race({"product": lambda: a @ b}, config.repeats, device)["product"].median
    flops = 2 * config.square**3 / product
    rows = [{"limit": "copy, bytes/s", "found": bandwidth}, {"limit": "bf16 products, FLOP/s", "found": flops}]
    short = [
        {"what": "a copy", "found": f"{bandwidth / 1e12:.3g} TB/s"},
        {"what": f"bf16 products of {config.square}", "found": f"{flops / 1e12:.3g} TFLOP/s"},
    ]
    return rows, short, True


def correctness(config: GpuBench, device: str, results: Mapping) -> tuple[Rows, Rows, bool]:
    """Every backend against the specification in float64: odd sizes, resets, carried state, all gradients."""
    rows, wrong, good = [], [], True
    for operator in OPERATORS:
        for name, backend in (backends(operator, device) | peers(operator, device)).items():
            for dtype in dtypes_of(backend):
                verdict = check(operator, backend, dtype, device)
                good &= verdict.good or not backend.ours
                wrong += [] if verdict.good else [f"{operator} {name} {dtype}"]
                row = {"operator": operator, "backend": name, "dtype": dtype}
                rows.append(row | {"error": verdict, "allowed": verdict.allowed})
    short = [{"what": "WKV against float64", "found": f"wrong: {', '.join(wrong)}" if wrong else "all agree"}]
    return rows, short, good


def kernels(config: GpuBench, device: str, results: Mapping) -> tuple[Rows, Rows, bool]:
    """Forward and backward of the operators, as a share of the time to copy the bytes that have to be moved."""
    bandwidth, rows, short = results["limits"][0]["found"], [], []
    for operator, size, dtype in itertools.product(OPERATORS, config.shapes, config.dtypes):
        ours, theirs = backends(operator, device), peers(operator, device)
        of = [r for r in results["correctness"] if r["operator"] == operator and r["dtype"] == dtype]
        checked = {r["backend"]: r["error"] for r in of}
        shape, limits = tuple(map(int, size.split("x"))), (device, config.repeats, 5.0, bandwidth)
        for row in measured(operator, ours | theirs, checked, shape, dtype, *limits):
            rows.append(shown(row, "us") | {"started as": str(row.get("started as", "-"))})
            if "forward" in row and row["backend"] in {next(iter(ours)), *theirs}:
                us = " / ".join(f"{row[kind].median * 1e6:.0f}" for kind in ("forward", "backward"))
                share = " / ".join(f"{s:.0%}" for s in row["copy share"])
                what = f"{operator} {size} {dtype}, {row['backend']}: forward / backward"
                short.append({"what": what, "found": f"{us} us, {share} of a copy"})
        free(device)
    return rows, short, True


def training(config: GpuBench, device: str, results: Mapping) -> tuple[Rows, Rows, bool]:
    """A step's forward and backward in bf16 over its bare matrix products; gradients checked on a short text."""
    rows, short, good = [], [], True
    for name, lanes in map(_with_lanes, config.models):
        settings = TrainBench(precisions=["bf16"], lanes=lanes, repeats=config.repeats, budget=5.0, device=device)
        model = random_model(size_of(name), device=device)
        kind = {"generation": type(model).__name__.replace("RWKV", "RWKV-"), "precision": "bf16"}
        kind["channels"] = model.config.n_embd  # `plan` finds a step by these
        checked = check_step(model, None, settings)
        good &= checked[STEP].good
        free(device)
        for tokens in config.chunk_lens:
            what = f"step {name}, {lanes} x {tokens}"
            try:
                timed = step_times(model, None, checked, tokens, settings)
            except torch.OutOfMemoryError:
                rows.append({"step": what, "error": checked[STEP], "tokens/s": "out of memory"})
                continue
            finally:
                free(device)
            if STEP not in timed:
                rows.append({"step": what, "error": checked[STEP], "tokens/s": "refused"})
                continue
            ratio = timed[STEP].median / timed["products bf16"].median
            wkv = model.config.n_layer * sum(timed[f"WKV {k} bf16"].median for k in ("forward", "backward"))
            row = {"step": what, "error": checked[STEP], "tokens/s": timed[STEP].rate(lanes * tokens)}
            row |= {"a step": timed[STEP].shown(), "matrix products": timed["products bf16"].shown()}
            row |= {"over them": ratio, "WKV's share": wkv / timed[STEP].median}
            rows.append(row | kind | {"tokens": lanes * tokens})
            short.append({"what": what, "found": f"{row['tokens/s']} tokens/s, {ratio:.2f} x its matrix products"})
        del model
    return rows, short, good


def _with_lanes(text: str) -> tuple[str, int]:
    name, _, lanes = text.partition(":")
    return name, int(lanes or 1)


def flat_memory(config: GpuBench, device: str, results: Mapping) -> tuple[Rows, Rows, bool]:
    """The peak of a step over long texts in chunks, exact and truncated."""
    name, chunk_len = _with_lanes(config.models[0])[0], config.chunk_lens[0]
    model = random_model(size_of(name), device=device)
    rows, peaks = [], {"exact": [], "truncated": []}
    for tokens in config.lengths:
        text = random_text(model.config, 1, tokens, device)
        steps = {
            "exact": training_step(model, text, "bf16", chunk_len),
            "truncated": truncated_step(model, text, chunk_len, "bf16"),
        }
        for kind, step in steps.items():
            model.zero_grad(set_to_none=True)
            free(device)
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            seconds = race({kind: step}, 1, device, least=0)[kind].median
            peaks[kind].append(torch.cuda.max_memory_allocated() / 1e6 if device == "cuda" else peak_mb())
            rows.append({"gradient": kind, "tokens": tokens, "peak MB": peaks[kind][-1], "tokens/s": tokens / seconds})
    short = [
        {"what": f"{name}, {kind}: peak MB at {config.lengths}", "found": " -> ".join(f"{mb:.0f}" for mb in found)}
        for kind, found in peaks.items()
    ]
    return rows, short, True


class GraphedStep:
    """One token of generation as a CUDA graph: its hundreds of small kernels are launched at once.

    Takes the likeliest token each time; calling it returns the id. `how`: "graph", or why it is none.
    """

    def __init__(self, model: RWKV, state: State):
        self.model, self.logits = model, None
        self.token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
        self.state = State(*(s.clone() for s in state))
        self.replay, self.how = graphed(self._step, model.device.type)

    def begin(self, token: int, state: State) -> None:
        """Go on from another place."""
        self.token.fill_(token)
        for mine, new in zip(self.state, state, strict=True):
            mine.copy_(new)

    @torch.no_grad()
    def _step(self) -> None:
        x, after = self.model.hidden(self.token, self.state)
        self.logits = self.model.head(x[0, -1])
        for mine, new in zip(self.state, after, strict=True):
            mine.copy_(new)
        self.token.copy_(self.logits.argmax().view(1, 1))

    def __call__(self) -> int:
        self.replay()
        return int(self.token)


def generation(config: GpuBench, device: str, results: Mapping) -> tuple[Rows, Rows, bool]:
    """Tokens a second in bf16, one by one, launched kernel by kernel and as a CUDA graph."""
    rows, short, good = [], [], True
    for name, _ in map(_with_lanes, config.models):
        model = random_model(size_of(name), device=device).bfloat16().eval()
        state = prefill(model, random_text(model.config, 1, 64)[0][0].tolist())[1]
        step = GraphedStep(model, state)
        expected = {"logits": eager(model, state, CHECKED)}
        verdict = agreement(lambda s=state, g=step: {"logits": replayed(g, s, CHECKED)}, expected, ALLOWED)
        good &= verdict.good
        calls: dict[str, Callable] = {"kernel by kernel": lambda m=model, s=state: eager(m, s, config.generated)}
        if verdict.good and step.how == "graph":
            calls["CUDA graph"] = lambda s=state, g=step: replayed(g, s, config.generated)
        timed = race(calls, config.repeats, device, 20.0)
        for how in ("kernel by kernel", "CUDA graph"):
            why_not = f"not run: {step.how if verdict.good else verdict}"
            rate = timed[how].rate(config.generated) if how in timed else why_not
            rows.append({"model": name, "launched": how, "tokens/s": rate})
            short.append({"what": f"generation {name}, {how}, tokens/s", "found": rate})
        del model, calls, step, expected
        free(device)
    return rows, short, good


@torch.no_grad()
def eager(model: RWKV, state: State, count: int) -> Tensor:
    """Logits [V] after `count` tokens: token 0, and then the likeliest each time."""
    logits, token = None, 0
    for _ in range(count):
        logits, state = prefill(model, [token], state)
        token = int(logits.argmax())
    return logits


def replayed(step: GraphedStep, state: State, count: int) -> Tensor:
    """The same by a graph."""
    step.begin(0, state)
    for _ in range(count):
        step()
    return step.logits


def deepspeed(config: GpuBench, device: str, results: Mapping) -> tuple[Rows, Rows, bool]:
    """A short `fit` with deepspeed_stage_2, in a process of its own."""
    what = f"fit with deepspeed_stage_2, {config.deepspeed_steps} steps"
    missing = [package for package in ("lightning", "deepspeed") if not installed(package)]
    if missing:
        return [], [{"what": what, "found": f"not run: {' and '.join(missing)} not installed"}], True
    strategy = "deepspeed_stage_2" if device == "cuda" else "auto"
    done = apart(f"{__name__}:fit", 1000, FIT_LIMIT, strategy=strategy, device=device, steps=config.deepspeed_steps)
    if done.why_not:
        return [], [{"what": what, "found": f"failed: {done.why_not}"}], False
    first, last = done.result[0], done.result[-1]
    row = {"strategy": strategy, "steps": len(done.result), "first loss": first, "last loss": last, "s": done.seconds}
    good = len(done.result) == config.deepspeed_steps and last < first
    return [row], [{"what": what, "found": f"loss {first:.3f} -> {last:.3f} in {done.seconds:.0f} s"}], good


def fit(strategy: str, device: str, steps: int) -> list[float]:
    """Train a small model on a text that repeats itself: the loss of each step."""
    import json

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
