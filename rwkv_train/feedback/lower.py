"""The blocks below the first trained matrix, and what comes into it: no step changes it, so it is computed once."""

import torch
from torch import Tensor, nn

from rwkv_train.feedback.packing import Packed
from rwkv_train.feedback.trainable import Trainable, with_children
from rwkv_train.models.base import RWKV
from rwkv_train.models.state import State


class Lower:
    """The blocks of a model below the first one that is trained, and what they make of packed texts.

    Where these are trained too, which is with trainable full and state, there are none.
    """

    @torch.no_grad()
    def __init__(self, model: RWKV, packed: Packed, state: State, trainable: Trainable):
        """state: in which the lanes begin."""
        trained = [i for i, block in enumerate(model.blocks) if any(p.requires_grad for p in block.parameters())]
        self._first, self._packed, self._trainable = min(trained, default=len(model.blocks) - 1), packed, trainable
        self._layers, self._made = [model.emb, *model.blocks[: self._first]], None
        if trainable not in ("full", "state"):
            x, carry = model.enter(packed.tokens)
            for i, block in enumerate(model.blocks[: self._first]):
                x, _, _, carry = block(x, state.shift[:, i], state.wkv[:, i], packed.reset, carry)
            self._made = x, carry

    def shared_by(self, other: RWKV) -> bool:
        """Whether another model has the same ones, so that all they make of the texts is the same."""
        pairs = zip(self._layers, [other.emb, *other.blocks[: self._first]], strict=True)
        same = (p is q for a, b in pairs for p, q in zip(a.parameters(), b.parameters(), strict=True))
        return self._made is not None and all(same)

    def upper(self, model: RWKV, state: State) -> tuple[RWKV, Tensor, State]:
        """(model, tokens, state) that give what a model that shares these blocks does of the texts.

        The tokens are positions in what these blocks made; they pass the embedding as they are.
        """
        if self._made is None:
            return model, self._packed.tokens, state
        state = State(*(part[:, self._first :] for part in state))
        if self._trainable == "upper":
            begins = _Entered(model.blocks[self._first], *self._made)
        else:
            begins = _Begun(model.blocks[self._first], *self._made, state, self._packed.reset)
        blocks = nn.ModuleList([begins, *model.blocks[self._first + 1 :]])
        upper = with_children(model, emb=nn.Identity(), blocks=blocks)
        # Texts of a model that begins in a state have lanes of their own: all begin in the state given here.
        upper._parameters = model._parameters | {"initial_shift": None, "initial_wkv": None}
        tokens = self._packed.tokens
        return upper, torch.arange(tokens.numel(), device=tokens.device).view_as(tokens), state


class _Entered(nn.Module):
    """A block that is given positions [B,T] of known texts instead of what comes into it there."""

    def __init__(self, block: nn.Module, x: Tensor, carry: Tensor | None):
        super().__init__()
        self.training = False
        self.block, self.x = block, x.flatten(0, 1)
        self.carry = None if carry is None else carry.flatten(0, 1)

    def forward(self, positions: Tensor, shift: Tensor, wkv: Tensor, reset: Tensor | None, carry: None):
        carry = None if self.carry is None else self.carry[positions]
        return self.block(self.x[positions], shift, wkv, reset, carry)


class _Begun(nn.Module):
    """A block of which only the channel mix's value matrix is left to do: at positions [B,T] of known texts."""

    def __init__(self, block: nn.Module, x: Tensor, carry: Tensor | None, state: State, reset: Tensor):
        super().__init__()
        self.training = False
        self.value, probe = block.ffn.value, _Probe(x.shape[-1])
        block = with_children(block, ffn=with_children(block.ffn, value=probe))
        with torch.enable_grad():
            x, _, _, carry = block(x, state.shift[:, 0], state.wkv[:, 0], reset, carry)
        # Whatever a generation does with the matrix's output, it is linear: the slope is all there is to know.
        (gate,) = torch.autograd.grad(x.sum(), probe.output)
        self.x, self.gate, self.hidden = (part.detach().flatten(0, 1) for part in (x, gate, probe.hidden))
        self.carry = None if carry is None else carry.detach().flatten(0, 1)

    def forward(self, positions: Tensor, shift: Tensor, wkv: Tensor, reset: Tensor | None, carry: None):
        carry = None if self.carry is None else self.carry[positions]
        return self.x[positions] + self.gate[positions] * self.value(self.hidden[positions]), shift, wkv, carry


class _Probe(nn.Module):
    """Gives zeros for a matrix's output, and remembers its input."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width

    def forward(self, hidden: Tensor) -> Tensor:
        self.hidden, self.output = hidden, hidden.new_zeros(*hidden.shape[:-1], self.width, requires_grad=True)
        return self.output
