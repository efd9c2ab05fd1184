"""The section of `bench gpu` about other programs, where they are installed. What fails in them is told, not ours."""

import itertools
from collections.abc import Iterator
from functools import partial

import torch

from rwkv_train.bench.gpu_jobs import Job, Results, Row
from rwkv_train.bench.gpu_kernels import checked, timed
from rwkv_train.bench.gpu_models import with_lanes
from rwkv_train.bench.measure import agreement, installed, race
from rwkv_train.bench.models import in_transformers, random_model, random_text, size_of, transformers_step
from rwkv_train.bench.settings import GpuBench, TrainBench
from rwkv_train.bench.train import check_peer
from rwkv_train.bench.wkv_operators import LONGEST, LOOPS, OPERATORS
from rwkv_train.bench.wkv_operators import peers as operators_of
from rwkv_train.models.rwkv4 import RWKV4Config

ALLOWED = 0.05  # relative error of the logits in bf16
LIMIT = 150.0  # seconds of a job: Triton compiles and tries its variants first


def peers(config: GpuBench, results: Results) -> Iterator[Job]:
    """WKV by fla-core, RWKV-4 in transformers: the same checks and clocks as ours."""
    for package in ("fla-core", "transformers"):
        if not installed(package):
            yield Job(package, partial(_missing, package), ours=False)
    for operator in OPERATORS:
        for name, backend in operators_of(operator, config.device).items():
            for dtype in config.dtypes:
                what = f"{operator} {name} {dtype} is right"
                yield Job(what, partial(checked, operator, name, backend, dtype, config.device), LIMIT, ours=False)
            for size, dtype in itertools.product(config.shapes, config.dtypes):
                if name not in LOOPS or int(size.split("x")[1]) <= LONGEST:
                    run = partial(timed, operator, name, backend, size, dtype, config, results, True)
                    yield Job(f"{operator} {size} {dtype} {name}", run, LIMIT, ours=False)
    for name, lanes in map(with_lanes, config.models):
        if installed("transformers") and isinstance(size_of(name), RWKV4Config):
            tokens = min(config.chunk_lens)
            if tokens <= LONGEST:
                what = f"step {name}, {lanes} x {tokens}, transformers"
                yield Job(what, partial(_step, what, name, lanes, tokens, config), LIMIT, ours=False)
            what = f"generation {name}, transformers, tokens/s"
            yield Job(what, partial(_generation, what, name, config), LIMIT, ours=False)


def _missing(package: str) -> Iterator[Row]:
    yield Row(what=package, found="not run: not installed")


def _step(what: str, name: str, lanes: int, tokens: int, config: GpuBench) -> Iterator[Row]:
    settings = TrainBench(lanes=lanes, device=config.device)
    model = random_model(size_of(name), device=config.device)
    theirs, verdict = check_peer(model, settings, "bf16")
    cells = {"peer": "transformers", "step": f"{name}, {lanes} x {tokens}", "error": str(verdict)}
    if theirs is None or not verdict.near:
        yield Row(cells, what, f"refused: {verdict}")
        return
    step = transformers_step(theirs, random_text(model.config, lanes, tokens, config.device)[0], "bf16")
    found = race({what: step}, 2, config.device, 10.0)[what].median
    flag = "" if verdict.good else f" ({verdict})"
    yield Row(cells | {"tokens/s": lanes * tokens / found}, what, f"{lanes * tokens / found:,.0f} tokens/s{flag}")


@torch.inference_mode()
def _generation(what: str, name: str, config: GpuBench) -> Iterator[Row]:
    model = random_model(size_of(name), device=config.device).eval()
    text = random_text(model.config, 1, 8, config.device)[0]
    expected = {"logits": model(text)[0]}
    theirs = in_transformers(model).to(config.device, torch.bfloat16).eval()
    verdict = agreement(lambda: {"logits": theirs(text).logits}, expected, ALLOWED)
    cells = {"peer": "transformers", "step": f"{name}, generation", "error": str(verdict)}
    if not verdict.near:
        yield Row(cells, what, f"refused: {verdict}")
        return

    def generate() -> None:
        token, state = text[:, :1], None
        for _ in range(config.generated):
            out = theirs(token, state=state, use_cache=True)
            token, state = out.logits[:, -1:].argmax(-1), out.state

    found = config.generated / race({what: generate}, config.repeats, config.device, 5.0)[what].median
    flag = "" if verdict.good else f" ({verdict})"
    yield Row(cells | {"tokens/s": found}, what, f"{found:,.1f}{flag}")
