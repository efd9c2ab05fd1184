"""The sections of `bench gpu` about whole models in training: steps, where their time goes, and memory."""

from collections.abc import Callable, Iterator
from functools import cache, partial

import torch

from rwkv_train.bench.apart import peak_mb
from rwkv_train.bench.gpu_jobs import Job, Results, Row
from rwkv_train.bench.measure import Agreement, free, race, synchronize
from rwkv_train.bench.models import random_model, random_text, size_of, training_step, truncated_step
from rwkv_train.bench.settings import GpuBench, TrainBench
from rwkv_train.bench.train import check, times, wkv_share
from rwkv_train.models.base import RWKV

STEP, PRODUCTS = "ours bf16", "products bf16"
OPERATIONS = 40  # that a profile shows
KINDS = ("exact", "truncated")  # gradients of a long text


def with_lanes(text: str) -> tuple[str, int]:
    """The name and lanes of a model in the settings, as 169M:8."""
    name, _, lanes = text.partition(":")
    return name, int(lanes or 1)


def training(config: GpuBench, results: Results) -> Iterator[Job]:
    """A step's forward and backward in bf16 over its bare matrix products; gradients checked on a short text."""
    for name, lanes in map(with_lanes, config.models):
        settings = TrainBench(
            precisions=["bf16"], lanes=lanes, repeats=config.repeats, budget=5.0, device=config.device
        )
        subject = cache(partial(_checked, name, settings))  # made by the first job that needs it
        for tokens in config.chunk_lens:
            what = f"step {name}, {lanes} x {tokens}"
            yield Job(what, partial(_step, what, subject, tokens, settings))


def _checked(name: str, settings: TrainBench) -> tuple[RWKV, Agreement]:
    model = random_model(size_of(name), device=settings.device)
    return model, check(model, settings)[STEP]


def _step(what: str, subject: Callable[[], tuple[RWKV, Agreement]], tokens: int, settings: TrainBench) -> Iterator[Row]:
    model, verdict = subject()
    free(settings.device)
    failed: dict[str, str] = {}
    timed = times(model, None, {STEP: verdict}, tokens, settings, failed=failed)
    cells = {"step": what, "error": str(verdict)}
    # `plan` finds a measured step by these
    found_by = {"generation": type(model).__name__.replace("RWKV", "RWKV-"), "precision": "bf16"}
    found_by |= {"channels": model.config.n_embd, "tokens": settings.lanes * tokens}
    if STEP not in timed:
        reason = failed.get(STEP, f"refused: {verdict}")
        full = reason.startswith("OutOfMemoryError")  # a size that is too large is no mistake
        yield Row(cells | {"tokens/s": "out of memory" if full else reason}, what, reason, good=full)
        return
    rate = settings.lanes * tokens / timed[STEP].median
    cells |= {"tokens/s": rate, "step s": timed[STEP].median}
    found = f"{rate:,.0f} tokens/s"
    if PRODUCTS in timed:
        ratio = timed[STEP].median / timed[PRODUCTS].median
        cells |= {"products s": timed[PRODUCTS].median, "over them": ratio}
        found += f", {ratio:.2f} x its matrix products"
    cells["WKV's share"] = wkv_share(timed, model.config.n_layer, "bf16")
    if failed:
        cells["failed"] = "; ".join(f"{who}: {reason}" for who, reason in failed.items())
    flag = "" if verdict.good else f" ({verdict})"
    yield Row(cells | found_by, what, found + flag, good=verdict.good and not failed)


def profile(config: GpuBench, results: Results) -> Iterator[Job]:
    """Where the time of one training step goes: the largest operations, and on a GPU the largest kernels."""
    names = [name for name, _ in map(with_lanes, config.models)]
    name = next((name for name in names if name.startswith("rwkv7-")), names[0])
    lanes = dict(map(with_lanes, config.models))[name]
    tokens = config.chunk_lens[0]
    yield Job(f"profile of {name}, {lanes} x {tokens}", lambda: _profile(name, lanes, tokens, config.device))


def _profile(name: str, lanes: int, tokens: int, device: str) -> Iterator[Row]:
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity

    model = random_model(size_of(name), device=device)
    step = training_step(model, random_text(model.config, lanes, tokens, device), "bf16")
    step()  # builds kernels, fills caches
    synchronize(device)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    with torch.profiler.profile(activities=activities) as seen:
        step()
        synchronize(device)
    kinds = {"operation": DeviceType.CPU} | ({"kernel": DeviceType.CUDA} if device == "cuda" else {})
    for kind, place in kinds.items():
        events = [
            (e.key, e.self_device_time_total if device == "cuda" else e.self_cpu_time_total, e.count)
            for e in seen.key_averages()
            if e.device_type == place
        ]
        total = sum(us for _, us, _ in events)
        for key, us, calls in sorted(events, key=lambda event: -event[1])[:OPERATIONS]:
            yield Row({"kind": kind, "name": key[:100], "us": us, "share": us / total if total else 0, "calls": calls})
        largest = max(events, key=lambda event: event[1], default=("nothing", 0, 0))
        yield Row(
            what=f"profile of {name}, {lanes} x {tokens}: {kind}s",
            found=f"{total / 1e3:.3g} ms in {sum(calls for *_, calls in events)} calls, most in {largest[0][:60]}",
            good=total > 0,
        )


def flat_memory(config: GpuBench, results: Results) -> Iterator[Job]:
    """The peak of a step over long texts in chunks, exact and truncated."""
    name, chunk_len = config.memory_model, config.chunk_lens[0]
    model = cache(lambda: random_model(size_of(name), device=config.device))
    for kind in KINDS:
        what = f"{name}, {kind}: peak MB at {config.lengths}"
        yield Job(what, partial(_peaks, what, name, kind, model, chunk_len, config), limit=120)


def _peaks(
    what: str, name: str, kind: str, model: Callable[[], RWKV], chunk_len: int, config: GpuBench
) -> Iterator[Row]:
    model, device, peaks = model(), config.device, []
    for tokens in config.lengths:
        text = random_text(model.config, 1, tokens, device)
        steps = {
            "exact": training_step(model, text, "bf16", chunk_len),
            "truncated": truncated_step(model, text, chunk_len, "bf16"),
        }
        model.zero_grad(set_to_none=True)
        free(device)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = race({kind: steps[kind]}, 1, device, least=0)[kind].median
        peaks.append(torch.cuda.max_memory_allocated() / 1e6 if device == "cuda" else peak_mb())
        cells = {"model": name, "gradient": kind, "tokens": tokens}
        yield Row(cells | {"peak MB": peaks[-1], "tokens/s": tokens / seconds})
    yield Row(what=what, found=" -> ".join(f"{mb:.0f}" for mb in peaks))
