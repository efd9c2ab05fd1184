"""One token of some lanes at a time: what they are between two tokens, and the step from one to the next.

The step is the same code everywhere. On a CPU what the model does in it is soon run from a tape (reading.py). On a GPU
the step is recorded once as a CUDA graph over tensors that stay, for a power of two of lanes, because its hundreds of
small kernels take longer to launch than to run; the graphs of a model are kept for the next texts.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from rwkv_train.generation.prefill import joined
from rwkv_train.generation.reading import Reader, read
from rwkv_train.generation.sampling import Needs, Sampling, choose
from rwkv_train.models.base import RWKV
from rwkv_train.models.finite import finite
from rwkv_train.models.state import State
from rwkv_train.ops.cache import say_once
from rwkv_train.ops.graph import capture

FADED = 1e-37  # a count is never less: a token that was written stays one for the presence penalty
Recorder = Callable[[Callable[[], object]], Callable[[], object]]


class Lanes(NamedTuple):
    """Of N lanes, on the model's device:

    token: [N] int64  chosen and not yet read
    state: of N lanes, before it
    settings: [N,7] float32, as `choose` takes them
    counts: [N,V] float32 how often a lane has written a token, faded, or None where no penalty asks for it
    """

    token: Tensor
    state: State
    settings: Tensor
    counts: Tensor | None

    def select(self, lanes: list[int]) -> "Lanes":
        counts = None if self.counts is None else self.counts[lanes]
        return Lanes(self.token[lanes], self.state.select(lanes), self.settings[lanes], counts)

    def join(self, others: "Lanes") -> "Lanes":
        """These lanes and, behind them, others; both have counts or neither."""
        state = joined([self.state, others.state])
        counts = None if self.counts is None else torch.cat([self.counts, others.counts])
        return Lanes(torch.cat([self.token, others.token]), state, torch.cat([self.settings, others.settings]), counts)


@torch.no_grad()
def advance(
    lanes: Lanes,
    uniform: Tensor,
    needs: Needs,
    read: Callable[[Tensor], tuple[Tensor, State]],
    allowed: Tensor | None = None,
) -> tuple[Lanes, Tensor]:
    """Read each lane's token and choose its next: (the lanes after it, logits [N,V]). Counts are changed in place.

    uniform [N] float64 in [0,1): what chooses. read: of the tokens [N] the logits and the state after them. allowed:
    as of `choose`.
    """
    if needs.decayed:
        faded = lanes.counts.clamp(max=FADED)
        torch.maximum(lanes.counts.mul_(lanes.settings[:, -1:]), faded, out=lanes.counts)
    if needs.penalised:
        lanes.counts.scatter_add_(1, lanes.token[:, None], torch.ones_like(lanes.settings[:, :1]))
    logits, state = read(lanes.token)
    token = choose(logits, lanes.settings, uniform, needs, lanes.counts, allowed)
    return lanes._replace(token=token, state=state), logits


class Eager:
    """Steps of some lanes, each a call; a `Reader` sees to what the model does."""

    def __init__(self, lanes: Lanes, needs: Needs):
        self.reader, self.lanes, self.needs = Reader(lanes.state), lanes, needs

    def step(self, model: RWKV, uniform: Tensor, allowed: Tensor | None = None) -> list[int]:
        """Read each lane's token: the next ones. NotFinite, a ValueError, if the model gives no finite number.

        allowed: as of `choose`. `logits` [N,V] are those that chose, until the next step.
        """
        read = lambda token: (self.reader(model, token), self.reader.state)  # noqa: E731
        self.lanes, self.logits = advance(self.lanes, uniform.to(model.device), self.needs, read, allowed)
        finite(self.logits, model)
        return self.lanes.token.tolist()

    def state(self, lane: int) -> State:
        """The state of one lane, which stays as it is."""
        return self.lanes.state if self.reader.own is None else self.reader.own.select(lane)


class Recorded:
    """The same steps over tensors that stay, for up to `size` lanes; rows beyond those write for nobody.

    free: where it waits for the next lanes, with those that read the same weights.
    """

    def __init__(self, model: RWKV, size: int, needs: Needs, record: Recorder, free: list["Recorded"]):
        like = {"device": model.device}
        counts = torch.zeros(size, model.config.vocab_size, **like) if needs.penalised else None
        settings = torch.tensor([Sampling(0).numbers] * size, **like)
        token, state = torch.zeros(size, dtype=torch.int64, **like), model.zero_state(size).clone()
        self.room, self.needs, self.used = Lanes(token, state, settings, counts), needs, 0
        self.uniform, self.free = torch.zeros(size, dtype=torch.float64, **like), free
        self.replay = record(lambda: self._run(model))

    def _run(self, model: RWKV) -> None:
        into = self.room.state
        after, self.logits = advance(self.room, self.uniform, self.needs, lambda token: read(model, token, into, into))
        self.told = torch.stack([after.token, self.logits.sum(-1, dtype=torch.float32).isfinite().long()])
        self.room.token.copy_(after.token)

    def place(self, lanes: Lanes) -> "Recorded":
        """Go on with these."""
        self.used = len(lanes.token)
        for ours, new in zip(_tensors(self.room), _tensors(lanes), strict=True):
            ours[: self.used].copy_(new)
        return self

    @property
    def lanes(self) -> Lanes:
        """As they are until the next step."""
        token, shift, wkv, settings, *counts = (t[: self.used] for t in _tensors(self.room))
        return Lanes(token, State(shift, wkv), settings, *counts or [None])

    def step(self, model: RWKV, uniform: Tensor, allowed: None = None) -> list[int]:
        """As `Eager.step`; the model is the one that was recorded, and all tokens are allowed."""
        assert allowed is None
        self.uniform[: self.used].copy_(uniform)
        self.replay()
        tokens, are_finite = self.told[:, : self.used].tolist()
        if not all(are_finite):
            finite(self.logits[: self.used], model)
        return tokens

    def state(self, lane: int) -> State:
        """The state of one lane, which stays as it is."""
        return State(*(t[lane : lane + 1].clone() for t in self.room.state))


def _tensors(lanes: Lanes) -> list[Tensor]:
    counts = [] if lanes.counts is None else [lanes.counts]
    return [lanes.token, *lanes.state, lanes.settings, *counts]


class _Graphs:
    """The recordings of a model that nobody uses now. failed: there is no recording here, and it was said."""

    def __init__(self, weights: list[int]):
        self.weights, self.failed = weights, False
        self.free: dict[tuple[int, Needs], list[Recorded]] = defaultdict(list)


_GRAPHS: WeakKeyDictionary[RWKV, _Graphs] = WeakKeyDictionary()


def recorder(device: torch.device) -> Recorder | None:
    """What makes a recording on a device; None where calls are as fast."""

    def record(call: Callable[[], object]) -> Callable[[], object]:
        with torch.cuda.device(device):
            return capture(call)

    return record if device.type == "cuda" else None


def take(model: RWKV, lanes: Lanes, needs: Needs, graphs: bool = True) -> Eager | Recorded:
    """What runs the steps of some lanes; `give_back` it. graphs: with a CUDA graph where there can be one."""
    record = recorder(model.device) if graphs and not needs.masked else None
    if record is None or (kept := _graphs(model)).failed:
        return Eager(lanes, needs)
    size = 1 << (len(lanes.token) - 1).bit_length()
    free = kept.free[size, needs]
    try:
        with torch.inference_mode(False):  # whose tensors could not be used outside of it
            found = free.pop() if free else Recorded(model, size, needs, record, free)
    except Exception as error:  # torch's, the driver's or the kernels' own: calls do the same
        kept.failed = True
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        say_once(f"a token could not be recorded as a CUDA graph ({reason}); generation launches kernel by kernel.")
        return Eager(lanes, needs)
    return found.place(lanes)


def give_back(runner: Eager | Recorded, model: RWKV) -> None:
    """Let others use it."""
    if isinstance(runner, Recorded):
        runner.free.append(runner)
    else:
        runner.reader.give_back(model)


def _graphs(model: RWKV) -> _Graphs:
    """Those of a model's weights where they are now: recordings read no others."""
    addresses = (p.data_ptr() if type(p) is nn.Parameter else id(p) for p in model.parameters())
    weights = [model.training, *addresses]
    if model not in _GRAPHS or _GRAPHS[model].weights != weights:
        _GRAPHS[model] = _Graphs(weights)
    return _GRAPHS[model]
