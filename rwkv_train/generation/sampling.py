"""The choice of the next tokens from logits, of many lanes at once, on the device that they are on.

Chance is one number in [0,1) for each token, drawn from the lane's own generator on the host. It picks the token by the
cumulative probabilities of those that the settings leave, in the order of the vocabulary. So what a lane writes does
not depend on the lanes beside it, and a device chooses as another would.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

COLDEST = 1e-6  # a temperature below it is 0: logits over it could be no number any more
LARGEST = 1e30  # of a setting
FEW, BLOCK = 128, 64  # the likeliest that a CPU looks at first, and tokens that it looks at together


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from the logits.

    Args:
        temperature: below 1 is safer, above 1 bolder, 0 always takes the likeliest token
        top_p: sample from the likeliest tokens that make up this much probability
        top_k: sample from this many of the likeliest tokens; 0 is all
        min_p: leave out tokens that are less likely than the likeliest one times this; 0 leaves out none
        presence_penalty: taken from the logit of every token that the reply so far holds; below 0 invites repeats
        frequency_penalty: the same, once for each time the token is in the reply
        penalty_decay: what frequency_penalty counts shrinks by this factor with each token; 1 forgets nothing

    The logits lose the penalties, then are divided by the temperature; top_p, top_k and min_p all look at the
    probabilities that this gives, and a token is left where all three leave it. Those as likely as the least likely of
    them are left, too.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    penalty_decay: float = 1.0

    def __post_init__(self):
        for f in fields(self):
            if not abs(getattr(self, f.name)) <= LARGEST:
                raise ValueError(f"{f.name} must be a number up to {LARGEST:g}, found {getattr(self, f.name)}")
        if self.temperature < 0:
            raise ValueError(f"temperature must not be negative, found {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, found {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k must not be negative, found {self.top_k}")
        for name in ("min_p", "penalty_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, found {getattr(self, name)}")

    @property
    def greedy(self) -> bool:
        return self.temperature < COLDEST

    @property
    def numbers(self) -> list[float]:
        """As `choose` takes them: 0 for a greedy lane's temperature, and what cuts nothing where nothing is cut."""
        top_p, top_k = self.top_p if self.top_p < 1 else torch.inf, self.top_k or torch.inf
        penalties = [self.presence_penalty, self.frequency_penalty, self.penalty_decay]
        return [0 if self.greedy else self.temperature, top_p, top_k, self.min_p, *penalties]


class Needs(NamedTuple):
    """What has to be done to choose the tokens of some lanes: whether one of them is greedy, one is not, ...

    masked: only some tokens are allowed in one of them.
    """

    greedy: bool
    drawn: bool
    cut: bool
    penalised: bool
    decayed: bool
    masked: bool

    @classmethod
    def of(cls, lanes: Iterable[Sampling], masked: bool = False) -> "Needs":
        lanes = list(lanes)
        drawn = [s for s in lanes if not s.greedy]
        cut = any(s.top_p < 1 or s.top_k or s.min_p for s in drawn)
        penalised = any(s.presence_penalty or s.frequency_penalty for s in lanes)
        decayed = penalised and any(s.penalty_decay < 1 for s in lanes)
        return cls(len(drawn) < len(lanes), bool(drawn), cut, penalised, decayed, masked)


@torch.no_grad()
def choose(
    logits: Tensor,
    settings: Tensor,
    uniform: Tensor,
    needs: Needs,
    counts: Tensor | None = None,
    allowed: Tensor | None = None,
) -> Tensor:
    """A token [N] int64 of each lane.

    logits [N,V] finite; settings [N,7] float32, rows of `Sampling.numbers`; uniform [N] float64, in [0,1);
    needs: of these lanes or of more; counts [N,V] float32, how often a lane has written a token, for the penalties;
    allowed [N,V] bool: the tokens that may be chosen, at least one a lane; None is all.
    """
    temperature, top_p, top_k, min_p, presence, frequency, _ = settings[:, :, None].unbind(1)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if needs.penalised:
        logits = logits - (counts > 0) * presence - counts * frequency
    if allowed is not None:
        logits = logits.masked_fill(~allowed, -torch.inf)
    if not needs.drawn:
        return argmax(logits)
    p = (logits / torch.where(temperature > 0, temperature, 1)).softmax(-1)
    drawn = _cut(p, uniform, top_p, top_k, min_p) if needs.cut else pick(p, uniform)
    return torch.where(temperature[:, 0] > 0, drawn, argmax(logits)) if needs.greedy else drawn


def argmax(x: Tensor) -> Tensor:
    """The place [N] of the first of the largest numbers of each row of x [N,V]."""
    if x.device.type != "cpu":
        return x.argmax(-1)
    blocks = _blocks(x)  # torch's looks at one number after another
    best = blocks.amax(-1).argmax(-1)
    return best * BLOCK + blocks[torch.arange(len(x)), best].argmax(-1)


def _blocks(x: Tensor) -> Tensor:
    """x [N,V] as [N,V/BLOCK,BLOCK], with the lowest of numbers behind where V is no multiple."""
    return F.pad(x, (0, -x.shape[1] % BLOCK), value=-torch.inf).unflatten(1, (-1, BLOCK))


def _cut(p: Tensor, uniform: Tensor, *limits: Tensor) -> Tensor:
    """A token [N] of the likeliest. On a CPU the few at the top mostly tell; sorting all takes longer by far.

    limits: as of `_least`.
    """
    if p.device.type != "cpu" or p.shape[1] < FEW * BLOCK:
        return _cut_sorted(p, uniform, *limits)
    blocks = _blocks(p)
    places = blocks.amax(-1).topk(FEW, sorted=False).indices  # the FEW largest of all are in them
    found, inside = blocks.gather(1, places[:, :, None].expand(-1, -1, BLOCK)).flatten(1).topk(FEW)
    least = _least(found.flip(-1), *limits)
    ids, order = (places.gather(1, inside // BLOCK) * BLOCK + inside % BLOCK).sort()
    chosen = pick((found * (found >= least)).gather(1, order), uniform)
    tokens = ids.gather(1, chosen[:, None])[:, 0]
    more = found[:, -1] >= least[:, 0]  # what is left of these is perhaps not all among the few
    if more.any():
        tokens[more] = _cut_sorted(p[more], uniform[more], *(limit[more] for limit in limits))
    return tokens


def _cut_sorted(p: Tensor, uniform: Tensor, *limits: Tensor) -> Tensor:
    # On a CPU, torch's takes 20 times as long.
    rising = torch.from_numpy(np.sort(p.numpy())) if p.device.type == "cpu" else p.sort(-1).values
    left = torch.ge(p, _least(rising, *limits), out=torch.empty_like(p))  # as 1 and 0: a CPU multiplies quicker
    return pick(left.mul_(p), uniform)


def _least(rising: Tensor, top_p: Tensor, top_k: Tensor, min_p: Tensor) -> Tensor:
    """The smallest of rising probabilities [N,M] that is left, [N,1]: those above it make up less than top_p [N,1] and
    are less than top_k [N,1], and it is at least min_p [N,1] of the largest. The likeliest always stays."""
    sums, count = rising.cumsum(-1), rising.shape[1]
    first = torch.searchsorted(sums, sums[:, -1:] - top_p, right=True)
    least = rising.gather(1, torch.maximum(first, count - top_k).clamp(max=count - 1).long())
    return torch.maximum(least, min_p * rising[:, -1:])


def pick(weights: Tensor, uniform: Tensor) -> Tensor:
    """The place [N] in each row of weights [N,M] at which a share `uniform` [N] of their sum is passed."""
    sums = weights.cumsum(-1)
    total = sums[:, -1:].contiguous()
    places = torch.searchsorted(sums, (uniform[:, None] * total).to(sums.dtype), right=True)
    return torch.minimum(places, torch.searchsorted(sums, total))[:, 0]  # a share may round up to all


def random_numbers(seed: int) -> torch.Generator:
    """A row of random numbers. ValueError for a seed that torch cannot take as it is."""
    if not 0 <= seed < 2**63:
        raise ValueError(f"a seed must be at least 0 and below 2**63, found {seed}")
    return torch.Generator().manual_seed(seed)
