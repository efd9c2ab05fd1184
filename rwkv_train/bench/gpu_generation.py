"""The section of `bench gpu` about generation: tokens a second in bf16, one by one."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from rwkv_train.bench.gpu_jobs import Job, Results, Row
from rwkv_train.bench.gpu_models import with_lanes
from rwkv_train.bench.measure import agreement, graphed, race
from rwkv_train.bench.models import random_model, random_text, size_of
from rwkv_train.bench.settings import GpuBench
from rwkv_train.generate import prefill
from rwkv_train.models.base import RWKV
from rwkv_train.models.state import State

CHECKED, ALLOWED = 8, 0.05  # tokens, and relative error of the logits, on which a graph has to agree


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


def generation(config: GpuBench, results: Results) -> Iterator[Job]:
    """Tokens a second in bf16, one by one, launched kernel by kernel and as a CUDA graph."""
    for name, _ in map(with_lanes, config.models):
        yield Job(f"generation {name}", partial(_generation, name, config))


def _generation(name: str, config: GpuBench) -> Iterator[Row]:
    model = random_model(size_of(name), device=config.device).bfloat16().eval()
    state = prefill(model, random_text(model.config, 1, 64)[0][0].tolist())[1]
    step = GraphedStep(model, state)
    expected = {"logits": eager(model, state, CHECKED)}
    verdict = agreement(lambda: {"logits": replayed(step, state, CHECKED)}, expected, ALLOWED)
    calls: dict[str, Callable] = {"kernel by kernel": lambda: eager(model, state, config.generated)}
    if verdict.near and step.how == "graph":
        calls["CUDA graph"] = lambda: replayed(step, state, config.generated)
    failed: dict[str, str] = {}
    timed = race(calls, config.repeats, config.device, 5.0, failed=failed)
    for how in ("kernel by kernel", "CUDA graph"):
        why_not = failed.get(how) or f"not run: {step.how if verdict.near else verdict}"
        rate = config.generated / timed[how].median if how in timed else why_not
        found = f"{rate:,.1f}" if how in timed else rate
        cells = {"model": name, "launched": how, "error": str(verdict), "tokens/s": rate}
        yield Row(cells, f"generation {name}, {how}, tokens/s", found, good=verdict.good and how not in failed)


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
