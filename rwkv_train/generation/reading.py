"""Reading one token of each lane: called, and on a CPU soon run again from a tape, which is kept for the next texts.

A tape is for so many lanes, and serves fewer as well: where texts come and go, one of about the size is mostly there.
"""

from collections import Counter, OrderedDict
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from rwkv_train.models.base import RWKV
from rwkv_train.models.state import State
from rwkv_train.ops import tape
from rwkv_train.ops.cache import say_once

CALLED = 3  # tokens of a size, before it is worth recording one
KEPT = 1 << 28  # bytes of the states of the tapes of a model that are kept, or one tape


def read(model: RWKV, token: Tensor, state: State, into: State | None) -> tuple[Tensor, State]:
    """Read a token [N] of each lane: (logits [N,V], state after it). into: as of `RWKV.hidden`."""
    x, state = model.hidden(token[:, None], state, into=into)
    return model.head(x[:, -1]), state


def size_for(lanes: int) -> int:
    """Lanes of the tape that serves so many: a power of two, or three of the half."""
    power = 1 << (lanes - 1).bit_length()
    return 3 * power // 4 if lanes <= 3 * power // 4 and power > 2 else power


class Taped:
    """A token of `size` lanes that was recorded, over tensors that stay. It reads the weights where they lay then.

    Of the lanes the first are used; the others read some token and write for nobody.
    """

    def __init__(self, model: RWKV, token: Tensor, state: State):
        self.size = size_for(len(token))
        with torch.inference_mode(False), torch.no_grad():  # whose tensors could not be used outside of it
            self.token, self.state = token.new_zeros(self.size), model.zero_state(self.size).clone()
            self.begin(state)
            self.token[: len(token)] = token
            self.run = tape.capture(lambda: self._read(model))
        self.training, self.weights = model.training, list(model.parameters())
        self.addresses = [p.data_ptr() for p in self.weights]

    def begin(self, state: State) -> State:
        """Go on from a state; the part of the tape's own that is now its lanes'."""
        used = self.state.select(slice(len(state.shift)))
        for ours, part in zip(used, state, strict=True):
            ours.copy_(part)
        return used

    def _read(self, model: RWKV) -> None:
        self.logits = read(model, self.token, self.state, self.state)[0]

    def again(self, token: Tensor) -> Tensor:
        self.token[: len(token)] = token
        self.run()
        return self.logits[: len(token)]

    def is_good(self, model: RWKV) -> bool:
        return self.training == model.training and self.addresses == [p.data_ptr() for p in self.weights]

    def is_of(self, model: RWKV) -> bool:
        """The same after any time: layers may have been replaced."""
        return list(map(id, self.weights)) == list(map(id, model.parameters())) and self.is_good(model)


class _Tapes:
    """Of a model, by size, those that are free, the one used last at the end; called: tokens read without one."""

    def __init__(self):
        self.free: OrderedDict[int, Taped] = OrderedDict()
        self.called: Counter[int] = Counter()

    def add(self, taped: Taped) -> None:
        self.free[taped.size] = taped
        self.free.move_to_end(taped.size)
        while len(self.free) > 1 and sum(part.nbytes for t in self.free.values() for part in t.state) > KEPT:
            self.free.popitem(last=False)


_KEPT: WeakKeyDictionary[RWKV, _Tapes] = WeakKeyDictionary()


class Reader:
    """Reads tokens as `read` does, for lanes that go on from what it returned.

    Of several lanes, and from a tape, the state is changed in place: a new one is new memory. The next tokens' logits
    come in the same memory, too. A tape is made anew where weights have moved; there is none with hooks, autocast, or
    weights that compute for themselves. While it is in use no layer may be replaced.
    """

    def __init__(self, state: State):
        self.own = state.clone() if len(state.shift) > 1 else None
        self.state, self.begun, self.taped = self.own or state, False, None

    def __call__(self, model: RWKV, token: Tensor) -> Tensor:
        """The logits [N,V] of what follows."""
        if self.taped and not self.taped.is_good(model):
            self.taped, self.begun = None, False
        if not self.begun:
            self.begun = True
            self._find(model)
        if not self.taped and self._pays(model) and _can_be_recorded(model) and self._record(model, token):
            return self.taped.logits[: len(token)]
        if self.taped:
            return self.taped.again(token)
        logits, self.state = read(model, token, self.state, self.own)
        return logits

    def give_back(self, model: RWKV) -> None:
        """Let the next text have the tape."""
        if self.taped:
            _KEPT.setdefault(model, _Tapes()).add(self.taped)
            self.taped = None

    def _find(self, model: RWKV) -> None:
        tapes, size = _KEPT.setdefault(model, _Tapes()), size_for(len(self.state.shift))
        kept = tapes.free.pop(size, None)  # another thread must not find it
        if kept and kept.is_of(model):
            if _can_be_recorded(model):
                self._use(kept)
        elif kept:  # what does not fit is let go
            tapes.free.clear()
            tapes.called.clear()

    def _pays(self, model: RWKV) -> bool:
        """Whether it is worth recording this token; it is counted."""
        called, size = _KEPT.setdefault(model, _Tapes()).called, size_for(len(self.state.shift))
        called[size] += 1
        return called[size] > CALLED

    def _use(self, taped: Taped) -> None:
        self.taped, self.own = taped, taped.begin(self.state)
        self.state = self.own

    def _record(self, model: RWKV, token: Tensor) -> bool:
        """Read the token, and keep how; False, with nothing changed, where that cannot be kept."""
        try:
            self.taped = Taped(model, token, self.state)
            self.own = self.state = self.taped.state.select(slice(len(token)))
        except Exception as error:  # torch's or our own: calls do the same
            _KEPT[model].called.clear()
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
            say_once(f"a token could not be recorded ({reason}); generation calls operation by operation.")
        return self.taped is not None


def _can_be_recorded(model: RWKV) -> bool:
    if model.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return False
    hooked = any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    return not hooked and all(type(p) is nn.Parameter for p in model.parameters())
