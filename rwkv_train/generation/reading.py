"""Reading one token of each lane: called, and on a CPU soon run again from a tape, which is kept for the next texts."""

from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from rwkv_train.models.base import RWKV
from rwkv_train.models.state import State
from rwkv_train.ops import tape
from rwkv_train.ops.cache import say_once

CALLED = 3  # tokens, before it is worth recording one


def read(model: RWKV, token: Tensor, state: State, into: State | None) -> tuple[Tensor, State]:
    """Read a token [N] of each lane: (logits [N,V], state after it). into: as of `RWKV.hidden`."""
    x, state = model.hidden(token[:, None], state, into=into)
    return model.head(x[:, -1]), state


class Taped:
    """The token of some lanes that was recorded, over tensors that stay. It reads the weights where they lay then."""

    def __init__(self, model: RWKV, token: Tensor, state: State):
        with torch.inference_mode(False), torch.no_grad():  # whose tensors could not be used outside of it
            self.token, self.state = token.clone(), state.clone()
            self.run = tape.capture(lambda: self._read(model))
        self.training, self.weights = model.training, list(model.parameters())
        self.addresses = [p.data_ptr() for p in self.weights]

    def _read(self, model: RWKV) -> None:
        self.logits = read(model, self.token, self.state, self.state)[0]

    def again(self, token: Tensor) -> Tensor:
        self.token.copy_(token)
        self.run()
        return self.logits

    def is_good(self, model: RWKV) -> bool:
        return self.training == model.training and self.addresses == [p.data_ptr() for p in self.weights]

    def is_of(self, model: RWKV) -> bool:
        """The same after any time: layers may have been replaced."""
        return list(map(id, self.weights)) == list(map(id, model.parameters())) and self.is_good(model)


_KEPT: WeakKeyDictionary[RWKV, Taped] = WeakKeyDictionary()  # the one that was used last and is free


class Reader:
    """Reads tokens as `read` does, for lanes that go on from what it returned.

    Of several lanes, and from a tape, the state is changed in place: a new one is new memory. The next tokens' logits
    come in the same memory, too. A tape is made anew where weights have moved; there is none with hooks, autocast, or
    weights that compute for themselves. While it is in use no layer may be replaced.
    """

    def __init__(self, state: State):
        self.own = state.clone() if len(state.shift) > 1 else None
        self.state, self.count, self.taped = self.own or state, 0, None

    def __call__(self, model: RWKV, token: Tensor) -> Tensor:
        """The logits [N,V] of what follows."""
        if self.taped and not self.taped.is_good(model):
            self.taped, self.count = None, 0
        self.count += 1
        if self.count == 1:
            self._find(model)
        elif self.count == CALLED + 1 and not self.taped and _can_be_recorded(model) and self._record(model, token):
            return self.taped.logits
        if self.taped:
            return self.taped.again(token)
        logits, self.state = read(model, token, self.state, self.own)
        return logits

    def give_back(self, model: RWKV) -> None:
        """Let the next text have the tape."""
        if self.taped:
            _KEPT[model], self.taped = self.taped, None

    def _find(self, model: RWKV) -> None:
        kept = _KEPT.pop(model, None)  # another thread must not find it; what does not fit is let go
        if kept and len(kept.token) == len(self.state.shift) and kept.is_of(model) and _can_be_recorded(model):
            begin = self.state
            self._use(kept)
            for ours, part in zip(self.state, begin, strict=True):
                ours.copy_(part)

    def _use(self, taped: Taped) -> None:
        self.taped, self.own, self.state = taped, taped.state, taped.state

    def _record(self, model: RWKV, token: Tensor) -> bool:
        """Read the token, and keep how; False, with nothing changed, where that cannot be kept."""
        try:
            self._use(Taped(model, token, self.state))
        except Exception as error:  # torch's or our own: calls do the same
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
            say_once(f"a token could not be recorded ({reason}); generation calls operation by operation.")
        return self.taped is not None


def _can_be_recorded(model: RWKV) -> bool:
    if model.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return False
    hooked = any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    return not hooked and all(type(p) is nn.Parameter for p in model.parameters())
