"""What a plan knows of a GPU's speed: of a card that `bench gpu` has measured, of this machine's, or assumed.

A step's time is that of its matrix products, which --speed gives, and of the bytes that it moves between them, at the
bandwidth of a copy; or a multiple of the products' time, where a step like it has been measured.
"""

import json
import time
from dataclasses import dataclass
from math import log
from pathlib import Path

from rwkv_train.plan.settings import PlanConfig
from rwkv_train.plan.sizes import Sizes
from rwkv_train.program import HERE

MEASURED = HERE.parent / "data" / "benchmarks" / "gpu.json"  # by `bench gpu`; a wheel has none
BANDWIDTH = 3.0e12  # bytes/s that an H100 copies, read and written counted: assumed
OF_A_STEP = ("step", "generation", "precision", "channels", "tokens", "over them")  # what a measured one tells
SPEED = 620e12  # operations/s of its bfloat16 products of 2048 channels: assumed


@dataclass(frozen=True)
class Card:
    """Of one GPU: bandwidth of a copy in bytes/s; `over`, a measured step's time over its matrix products'; those
    products' operations/s where they were measured; and where all that is from, for people."""

    bandwidth: float = BANDWIDTH
    over: float | None = None
    speed: float | None = None
    source: str = "estimated from counts, not measured on a card"


def find_card(config: PlanConfig, sizes: Sizes, here: bool) -> Card:
    """What is told or known, the best of it. here: a GPU of this machine may be measured."""
    report = read_report(MEASURED)
    bandwidth = report.get("bandwidth")
    speed = report.get("speed") if config.train.precision == "bf16" else None
    if config.bandwidth:
        return Card(config.bandwidth * 1e12, speed=speed)
    tokens = config.data.lanes * config.data.chunk_len // (config.train.devices * config.train.nodes)
    if step := nearest_step(report.get("steps", []), sizes.name, config.train.precision, sizes.n_embd, tokens):
        source = f"measured on {report['gpu']} ({step['step'].removeprefix('step ')})"
        return Card(over=step["over them"], speed=speed, source=source)
    if here:
        return Card(_measure_copy())
    if bandwidth:
        source = f"estimated from counts and a copy's bandwidth on {report['gpu']}, no such step measured on a card"
        return Card(bandwidth, speed=speed, source=source)
    return Card()


def read_report(path: Path) -> dict:
    """Of what `bench gpu` wrote the card's name `gpu`, its `bandwidth` and `speed`, and the measured `steps`; {} where
    there is no such file, or it was written without a GPU. ValueError for a file of something else."""
    if not path.is_file():
        return {}
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        if "gpu" not in report["machine"]:
            return {}
        sections = report["results"]["sections"]
        limits = {row.get("limit"): row.get("found") for row in sections.get("limits", [])}  # not of those that failed
        steps = [row for row in sections.get("training", []) if all(row.get(name) is not None for name in OF_A_STEP)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no report of `bench gpu` ({error}); write it again, or move it away") from None
    bandwidth, speed = limits.get("copy, bytes/s"), limits.get("bf16 products, FLOP/s")
    return {"gpu": report["machine"]["gpu"], "bandwidth": bandwidth, "speed": speed, "steps": steps}


def nearest_step(steps: list[dict], generation: str, precision: str, channels: int, tokens: int) -> dict | None:
    """Of that generation and precision the one nearest in channels, and then in tokens."""
    of = [s for s in steps if (s["generation"], s["precision"]) == (generation, precision)]
    distance = lambda s: (abs(log(s["channels"] / channels)), abs(log(s["tokens"] / tokens)))  # noqa: E731
    return min(of, key=distance, default=None)


def _measure_copy() -> float:
    """Bytes/s that the GPU here copies: the best of repeats."""
    import torch

    source = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    goal, best = torch.empty_like(source), float("inf")
    for _ in range(10):
        torch.cuda.synchronize()
        began = time.perf_counter()
        goal.copy_(source)
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return 2 * source.nbytes / best


def measure_speed(config: PlanConfig, sizes: Sizes, device: str) -> float:
    """Operations/s of the channel mix's matrix product, as this run would take it: the best of repeats in 0.5 s."""
    import torch

    rows = min(config.data.lanes // config.train.devices * config.data.chunk_len, 4096)
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    x = torch.randn(rows, sizes.n_embd, device=device, dtype=dtype)
    weight = torch.randn(sizes.n_ffn, sizes.n_embd, device=device, dtype=dtype)
    best, until = float("inf"), time.perf_counter() + 0.5
    while time.perf_counter() < until:
        began = time.perf_counter()
        y = torch.nn.functional.linear(x, weight)
        float(y[0, 0])  # waits for a GPU
        best = min(best, time.perf_counter() - began)
    return 2 * rows * weight.numel() / best
