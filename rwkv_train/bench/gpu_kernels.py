"""The sections of `bench gpu` about single operations: the machine's limits, what is right, and how long it takes."""

import itertools
import math
from collections.abc import Iterator
from functools import partial

import torch

from rwkv_train.bench import elementwise_cases
from rwkv_train.bench.gpu_jobs import Job, Results, Row, row_of
from rwkv_train.bench.limits import copy_bandwidth
from rwkv_train.bench.measure import DTYPES, race
from rwkv_train.bench.settings import GpuBench
from rwkv_train.bench.wkv import times
from rwkv_train.bench.wkv_operators import LOOPS, OPERATORS, Backend, backends, check, expected_results, launches

COPY = "copy, bytes/s"
BUDGET = 5.0  # seconds of one contestant's repeats


def limits(config: GpuBench, results: Results) -> Iterator[Job]:
    """What the machine can do: bytes copied and products of bfloat16 a second."""
    yield Job("a copy", lambda: _copy(config))
    yield Job(f"bf16 products of {config.square}", lambda: _products(config))


def _copy(config: GpuBench) -> Iterator[Row]:
    found = copy_bandwidth(config.device, config.copy_mb)
    yield Row({"limit": COPY, "found": found}, "a copy", f"{found / 1e12:.3g} TB/s")


def _products(config: GpuBench) -> Iterator[Row]:
    a, b = (torch.randn(config.square, config.square, device=config.device).bfloat16() for _ in range(2))
    found = 2 * config.square**3 / race({"": lambda: a @ b}, config.repeats, config.device)[""].median
    cells = {"limit": "bf16 products, FLOP/s", "found": found}
    yield Row(cells, f"bf16 products of {config.square}", f"{found / 1e12:.3g} TFLOP/s")


def correctness(config: GpuBench, results: Results) -> Iterator[Job]:
    """Every operator against the specification in float64: odd sizes and large ones, resets, state, all gradients."""
    for operator, dtype in itertools.product(OPERATORS, DTYPES):
        for name, backend in _ours(operator, config.device).items():
            what = f"{operator} {name} {dtype} is right"
            yield Job(what, partial(checked, operator, name, backend, dtype, config.device))
    for name, kind in itertools.product(elementwise_cases.CASES, elementwise_cases.KINDS):
        yield Job(f"{name} {kind} is right", partial(_elementwise, name, kind, config.device))
    yield Job("all against float64", lambda: _agreeing(results))


def _ours(operator: str, device: str) -> dict[str, Backend]:
    return {name: backend for name, backend in backends(operator, device).items() if name not in LOOPS}


def checked(operator: str, name: str, backend: Backend, dtype: str, device: str) -> Iterator[Row]:
    with launches() as ran:
        verdict = check(operator, backend, dtype, device)
    cells = {"operation": operator, "backend": name, "dtype": dtype, "error": str(verdict), "allowed": verdict.allowed}
    cells |= {"near": verdict.near, "good": verdict.good, "ran": ran}
    told = ("", "") if verdict.good else (f"{operator} {name} {dtype} against float64", str(verdict))
    yield Row(cells, *told, good=verdict.good or not backend.ours)


def _elementwise(name: str, kind: str, device: str) -> Iterator[Row]:
    with launches() as ran:
        verdict = elementwise_cases.check(name, kind, device)
    cells = {"operation": name, "backend": "auto", "dtype": kind, "error": str(verdict), "allowed": verdict.allowed}
    cells |= {"near": verdict.near, "good": verdict.good, "ran": ran or ["torch"]}
    told = ("", "") if verdict.good else (f"{name} {kind} against float64", str(verdict))
    yield Row(cells, *told, good=verdict.good)


def _agreeing(results: Results) -> Iterator[Row]:
    expected_results.cache_clear()  # they hold memory
    found = [row.get("good", False) for row in results.get("correctness", [])]
    yield Row(what="operations against float64", found=f"{sum(found)} of {len(found)} agree")


def kernels(config: GpuBench, results: Results) -> Iterator[Job]:
    """Forward and backward of the operators, as a share of the time to copy the bytes that have to be moved."""
    for operator, size, dtype in itertools.product(OPERATORS, config.shapes, config.dtypes):
        for number, (name, backend) in enumerate(_ours(operator, config.device).items()):
            told = number == 0  # the one that "auto" takes
            run = partial(timed, operator, name, backend, size, dtype, config, results, told)
            yield Job(f"{operator} {size} {dtype} {name}", run)


def timed(
    operator: str, name: str, backend: Backend, size: str, dtype: str, config: GpuBench, results: Results, told: bool
) -> Iterator[Row]:
    """told: in the last table, too."""
    verdict = row_of(results, ("correctness", "peers"), operation=operator, backend=name, dtype=dtype)
    error = verdict.get("error", "not checked")
    cells = {"operation": operator, "B x T x C": size, "dtype": dtype, "backend": name, "error": error}
    what = f"{operator} {size} {dtype}, {name}: forward / backward"
    if not verdict.get("near", True):
        yield Row(cells | {"forward us": "refused"}, what * told, "refused")
        return
    shape = tuple(map(int, size.split("x")))
    with launches() as ran:
        found, failed, started = times(
            operator, {name: backend.run}, shape, dtype, config.device, config.repeats, BUDGET
        )
    cells |= {"started as": started, "ran": ran}
    if failed:
        yield Row(cells | {"forward us": failed[name]}, what, failed[name], good=not backend.ours)
        return
    us, bandwidth = [t.median * 1e6 for t in found[name]], row_of(results, ("limits",), limit=COPY).get("found")
    least = [streams * math.prod(shape) * 1e6 for streams in OPERATORS[operator].streams[dtype]]  # bytes, for us
    shares = [b / bandwidth / t if bandwidth else None for b, t in zip(least, us, strict=True)]
    cells |= {"forward us": us[0], "backward us": us[1], "forward share": shares[0], "backward share": shares[1]}
    of_a_copy = " / ".join("-" if share is None else f"{share:.0%}" for share in shares)
    flag = "" if verdict.get("good") else f" ({error})"
    yield Row(cells, what * told, f"{us[0]:.0f} / {us[1]:.0f} us, {of_a_copy} of a copy{flag}")
