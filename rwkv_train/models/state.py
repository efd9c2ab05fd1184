"""The recurrent state: a value that goes into a model call and comes out of it.

Nothing remembers a state but the caller. Tensors are float32 (float64 in a float64 model), whatever the weights are.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class State(NamedTuple):
    """What a model carries from one token to the next.

    shift: [B, L, 2, C]  last input of each layer's time mix (0) and channel mix (1), for the token shift
    wkv:   [B, L, 3, A]  RWKV-4: numerator, denominator and largest exponent of each attention channel
           [B, L, H, N, N]  RWKV-7: a matrix of each head, indexed [value, key]
    """

    shift: Tensor
    wkv: Tensor

    def detach(self) -> "State":
        """The same numbers, with no gradient path to where they came from."""
        return State(*(t.detach() for t in self))

    def clone(self) -> "State":
        """The same numbers in memory of their own, layer after layer, as a model reads them."""
        return State(*(t.transpose(0, 1).clone(memory_format=torch.contiguous_format).transpose(0, 1) for t in self))

    def select(self, lanes) -> "State":
        """The state of some lanes: an index, slice, list or tensor over B (an int keeps the axis)."""
        lanes = [lanes] if isinstance(lanes, int) else lanes
        return State(*(t[lanes] for t in self))

    def to(self, *args, **kwargs) -> "State":
        """Moved to another device; see `torch.Tensor.to`."""
        return State(*(t.to(*args, **kwargs) for t in self))
