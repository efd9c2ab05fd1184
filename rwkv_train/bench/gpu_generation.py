"""The section of `bench gpu` about generation: tokens a second in bf16, of one text and of several at once."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from rwkv_train.bench.gpu_jobs import Job, Results, Row, row_of
from rwkv_train.bench.gpu_kernels import COPY
from rwkv_train.bench.gpu_models import with_lanes
from rwkv_train.bench.measure import agreement, race
from rwkv_train.bench.models import random_model, random_text, size_of
from rwkv_train.bench.settings import GpuBench
from rwkv_train.generate import Sampling, prefill, random_numbers
from rwkv_train.generation.decoder import Decoder
from rwkv_train.models.base import RWKV
from rwkv_train.models.state import State

ALLOWED = 0.05  # relative error of the state after some tokens, on which the ways have to agree
GREEDY = Sampling(0)


@dataclass(frozen=True)
class Way:
    """How many texts are written at once, with CUDA graphs or without, how tokens are chosen, and after how many of
    them its state is that of the plain way: with sums in another order, soon another token is chosen."""

    lanes: int = 1
    graphs: bool = True
    sampling: Sampling = GREEDY
    checked: int = 8


WAYS = {
    "kernel by kernel": Way(graphs=False),
    "CUDA graph": Way(),
    "CUDA graph, sampling": Way(sampling=Sampling(0.8, 0.5), checked=1),
    "CUDA graph, 16 lanes": Way(16, checked=1),
}


def generation(config: GpuBench, results: Results) -> Iterator[Job]:
    """Tokens a second in bf16, launched kernel by kernel and as a CUDA graph."""
    for name, _ in map(with_lanes, config.models):
        yield Job(f"generation {name}", partial(_generation, name, config, results))


def _generation(name: str, config: GpuBench, results: Results) -> Iterator[Row]:
    model = random_model(size_of(name), device=config.device).bfloat16().eval()
    start = prefill(model, random_text(model.config, 1, 64)[0][0].tolist())
    verdicts, calls, why_not = {}, {}, {}
    for how, way in WAYS.items():
        plain = replace(way, lanes=1, graphs=False)
        expected = written(model, *start, plain, way.checked)[0]._asdict()
        verdicts[how] = agreement(lambda w=way: written(model, *start, w, w.checked)[0]._asdict(), expected, ALLOWED)
        if not verdicts[how].near:
            why_not[how] = f"not run: {verdicts[how]}"
        elif way.graphs and not written(model, *start, way, 1)[1]:
            why_not[how] = "not run: no CUDA graph"
        else:
            calls[how] = partial(written, model, *start, way, config.generated)
    failed: dict[str, str] = {}
    timed = race(calls, config.repeats, config.device, 5.0, failed=failed)
    bandwidth = row_of(results, ("limits",), limit=COPY).get("found")
    weights = sum(p.nbytes for p in model.parameters()) - model.emb.weight.nbytes
    for how, way in WAYS.items():
        rate = found = why_not.get(how) or failed.get(how)
        cells = {"model": name, "launched": how, "error": str(verdicts[how])}
        if how in timed:
            rate = way.lanes * config.generated / timed[how].median
            found = f"{rate:,.1f}"
            if bandwidth:
                cells["of a copy"] = config.generated / timed[how].median * weights / bandwidth
                found += f", the weights at {cells['of a copy']:.0%} of a copy"
        good = verdicts[how].good and how not in failed
        yield Row(cells | {"tokens/s": rate}, f"generation {name}, {how}, tokens/s", found, good=good)


def written(model: RWKV, logits: Tensor, state: State, way: Way, count: int) -> tuple[State, bool]:
    """The state of the first text after `count` more tokens, and whether a CUDA graph wrote them."""
    decoder = Decoder(model, way.graphs)
    for seed in range(way.lanes):
        decoder.go_on(logits, state, way.sampling, random_numbers(seed), max_new_tokens=count)
    last, is_recorded = [], False
    while len(decoder):
        last, is_recorded = decoder.step(), is_recorded or decoder.is_recorded
    return last[0].state, is_recorded
