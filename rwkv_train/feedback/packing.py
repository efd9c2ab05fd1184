"""Short texts share lanes, with a reset between them."""

from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

WIDTHS = range(1, 5)  # of lanes, in lengths of the longest text: the one that wastes least is taken


@dataclass(frozen=True)
class Packed:
    """Texts in lanes: tokens [B,T], reset [B,T] where another text begins, positions [N] of all their tokens in turn.

    firsts: the text that each lane begins with. lengths: of the texts.
    """

    tokens: Tensor
    reset: Tensor
    positions: Tensor
    firsts: list[int]
    lengths: list[int]

    def real(self, x: Tensor) -> Tensor:
        """What [B,T,...] is at the texts' tokens [N,...], text by text."""
        return x.flatten(0, 1)[self.positions]

    def last(self, counts: list[int]) -> "Packed":
        """The same with the positions of only so many last tokens of each text."""
        positions = self.positions.split(self.lengths)
        return replace(self, positions=torch.cat([p[-n:] for p, n in zip(positions, counts, strict=True)]))


def pack(texts: list[list[int]], alone: list[bool], device: torch.device) -> Packed:
    """Put texts into lanes that waste few positions. alone: a text has to be the first of its lane."""
    longest = max(map(len, texts))
    tried = [_lanes(texts, alone, times * longest) for times in WIDTHS]
    lengths = [max(sum(len(texts[i]) for i in lane) for lane in lanes) for lanes in tried]
    width, lanes = min(zip(lengths, tried, strict=True), key=lambda pair: pair[0] * len(pair[1]))
    begins = {}
    for n, lane in enumerate(lanes):
        begins |= zip(lane, accumulate((len(texts[i]) for i in lane), initial=n * width), strict=False)
    positions = torch.cat([torch.arange(begins[i], begins[i] + len(text)) for i, text in enumerate(texts)])
    tokens, reset = torch.zeros(len(lanes), width, dtype=torch.long), torch.zeros(len(lanes), width, dtype=torch.bool)
    tokens.view(-1)[positions] = torch.tensor([token for text in texts for token in text])
    reset.view(-1)[[at for at in begins.values() if at % width]] = True
    return Packed(
        tokens.to(device), reset.to(device), positions.to(device), [lane[0] for lane in lanes], list(map(len, texts))
    )


def _lanes(texts: list[list[int]], alone: list[bool], width: int) -> list[list[int]]:
    """Which texts share a lane of at most `width` tokens, the longest first."""
    lanes: list[list[int]] = []
    for i in sorted(range(len(texts)), key=lambda i: (not alone[i], -len(texts[i]))):
        room = width - len(texts[i])
        fits = (lane for lane in lanes if sum(len(texts[j]) for j in lane) <= room)
        lane = None if alone[i] else next(fits, None)
        if lane is None:
            lanes.append([i])
        else:
            lane.append(i)
    return lanes
