"""Texts of a correction, as what is trained of a model reads them.

Every step reads the same texts, so whatever no step changes is computed once: text beyond the gradients' reach, the
blocks below the first trained matrix, and that one's own inputs. Short texts share lanes, with a reset between them.
"""

import copy
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor, nn

from rwkv_train.bptt import chunked_loss
from rwkv_train.generate import prefill
from rwkv_train.models.base import RWKV
from rwkv_train.models.finite import finite
from rwkv_train.models.loss import IGNORE_INDEX
from rwkv_train.models.state import State

CHUNK = 512  # tokens of a correction whose activations are in memory at once
WIDTHS = range(1, 5)  # of lanes, in lengths of the longest text: the one that wastes least is taken

Scope = Literal["upper", "full", "localised", "lora", "state"]


@dataclass(frozen=True)
class Row:
    """A correction as tokens: a document that begins with the context, of which the last `answer` ids are trained.

    context: ids at the beginning that no gradient flows through. bad: the answer is to be avoided.
    """

    ids: list[int]
    answer: int
    context: int = 0
    bad: bool = False


@dataclass(frozen=True)
class Packed:
    """Texts in lanes: tokens [B,T], reset [B,T] where another text begins, places [N] of all their tokens in turn.

    firsts: the text that each lane begins with.
    """

    tokens: Tensor
    reset: Tensor
    places: Tensor
    firsts: list[int]

    def real(self, x: Tensor) -> Tensor:
        """What [B,T,...] is at the texts' tokens [N,...], text by text."""
        return x.flatten(0, 1)[self.places]


def pack(texts: list[list[int]], alone: list[bool], device: torch.device) -> Packed:
    """Put texts into lanes that waste few places. alone: a text has to be the first of its lane."""
    longest = max(map(len, texts))
    tried = [_lanes(texts, alone, times * longest) for times in WIDTHS]
    lengths = [max(sum(len(texts[i]) for i in lane) for lane in lanes) for lanes in tried]
    width, lanes = min(zip(lengths, tried, strict=True), key=lambda pair: pair[0] * len(pair[1]))
    begins = {}
    for n, lane in enumerate(lanes):
        begins |= zip(lane, accumulate((len(texts[i]) for i in lane), initial=n * width), strict=False)
    places = torch.cat([torch.arange(begins[i], begins[i] + len(text)) for i, text in enumerate(texts)])
    tokens, reset = torch.zeros(len(lanes), width, dtype=torch.long), torch.zeros(len(lanes), width, dtype=torch.bool)
    tokens.view(-1)[places] = torch.tensor([token for text in texts for token in text])
    reset.view(-1)[[at for at in begins.values() if at % width]] = True
    return Packed(tokens.to(device), reset.to(device), places.to(device), [lane[0] for lane in lanes])


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


@dataclass(frozen=True)
class Batch:
    """Rows as some model reads them: the whole one, or what is above its first trained matrix."""

    model: RWKV
    tokens: Tensor
    targets: Tensor
    reset: Tensor
    state: State | None
    rows: int
    bad: bool

    def loss(self) -> Tensor:
        """Mean loss in nats a token; of an answer to be avoided, minus the log probability of any other."""
        total, count, _ = chunked_loss(self.model, self.tokens, self.targets, self.state, self.reset, CHUNK)
        return -torch.log(-torch.expm1(-total - 1e-4)) if self.bad else total / count

    @torch.no_grad()
    def right(self) -> bool:
        """Whether greedy decoding would write every answer, or not write the one to be avoided."""
        trained = self.targets != IGNORE_INDEX
        best = self.model.head(self.model.hidden(self.tokens, self.state, self.reset)[0][trained]).argmax(-1)
        return bool((best == self.targets[trained]).all()) != self.bad


def batches(model: RWKV, rows: list[Row], scope: Scope, reach: int) -> list[Batch]:
    """All answers that are to be learnt together, each that is to be avoided on its own."""
    good, bad = [r for r in rows if not r.bad], [r for r in rows if r.bad]
    return [batch(model, group, scope, reach) for group in ([good] if good else []) + [[r] for r in bad]]


def batch(model: RWKV, rows: list[Row], scope: Scope, reach: int) -> Batch:
    """Rows for a model of which only what `scope` says will change."""
    cuts = [0 if scope == "state" else max(row.context, len(row.ids) - row.answer - reach) for row in rows]
    befores = [tuple(row.ids[:cut]) for row, cut in zip(rows, cuts, strict=True)]
    states = {before: prefill(model, list(before))[1] if before else model.empty_state(1) for before in befores}
    texts = [row.ids[cut:-1] for row, cut in zip(rows, cuts, strict=True)]
    packed = pack(texts, [bool(before) or model.initial_wkv is not None for before in befores], model.device)
    state = State(*(torch.cat(parts) for parts in zip(*(states[befores[i]] for i in packed.firsts), strict=True)))
    wanted = [
        [IGNORE_INDEX] * (len(t) - row.answer) + row.ids[-row.answer :] for t, row in zip(texts, rows, strict=True)
    ]
    targets = torch.full_like(packed.tokens, IGNORE_INDEX)
    targets.view(-1)[packed.places] = torch.tensor([target for row in wanted for target in row], device=model.device)
    upper, tokens, state = _upper(model, packed, state, scope, _entered(model, packed, state, scope))
    if scope == "state":
        state = None  # the one in which the model begins, anew at every step
    return Batch(upper, tokens, targets, packed.reset, state, len(rows), rows[0].bad)


@dataclass(frozen=True)
class Kept:
    """Texts of which the predictions of another model are kept: probabilities [N,V] after each of their N tokens.

    same: they are those of the model as it was before the first step. entropy: their sum, in nats.
    """

    model: RWKV
    tokens: Tensor
    packed: Packed
    state: State
    before: Tensor
    entropy: float
    same: bool

    def divergence(self) -> Tensor:
        """KL(before || now) summed over tokens, in nats."""
        with quickly(self.before.device):
            now = _said(self.model, self.tokens, self.packed, self.state)
        return -torch.dot(self.before.flatten(), now.flatten()) - self.entropy


def kept(twin: RWKV, start: RWKV, rows: list[tuple[list[int], RWKV]], scope: Scope) -> list[Kept]:
    """Rows by the model whose predictions on them are kept. twin: what is trained, still as `start` is."""
    found = []
    for other in {id(m): m for _, m in rows}.values():
        texts = [ids for ids, m in rows if m is other]
        packed = pack(texts, [twin.initial_wkv is not None] * len(texts), twin.device)
        state = twin.empty_state(len(packed.tokens))
        entered = _entered(twin, packed, state, scope)
        upper, tokens, upper_state = _upper(twin, packed, state, scope, entered)
        reader = upper if other is start else None
        if reader is None and entered is not None and _share_lower(twin, other):
            reader = _upper(other, packed, state, scope, entered)[0]
        with torch.no_grad(), quickly(twin.device):
            before = predictions(other, texts) if reader is None else _said(reader, tokens, packed, upper_state)
        entropy = -float((before.exp() * before).sum(dtype=torch.float64))
        found.append(Kept(upper, tokens, packed, upper_state, before.exp_(), entropy, other is start))
    return found


@torch.no_grad()
def predictions(model: RWKV, rows: list[list[int]], last: list[int] | None = None) -> Tensor:
    """Log probabilities [N,V] after each of the N tokens of some documents, or only of so many `last` ones of each.

    Raises NotFinite, a ValueError, if the model gives no finite number.
    """
    packed = pack(rows, [model.initial_wkv is not None] * len(rows), model.device)
    if last is not None:
        places = packed.places.split([len(row) for row in rows])
        packed = replace(packed, places=torch.cat([p[-count:] for p, count in zip(places, last, strict=True)]))
    return finite(_said(model, packed.tokens, packed, model.empty_state(len(packed.tokens))), model)


def _said(model: RWKV, tokens: Tensor, packed: Packed, state: State) -> Tensor:
    logits = model.head(packed.real(model.hidden(tokens, state, packed.reset)[0]))
    return logits.log_softmax(-1, torch.promote_types(logits.dtype, torch.float32))


def quickly(device: torch.device) -> torch.autocast:
    """Steps need no fine rounding: bfloat16 where the processor multiplies it, several times as fast."""
    there = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return torch.autocast(device.type, torch.bfloat16, enabled=there)


def divergence(before: Tensor, now: Tensor) -> Tensor:
    """Mean KL(before || now) of log probabilities [N,V], in nats a token."""
    return (before.exp() * (before - now)).sum(-1).mean()


@torch.no_grad()
def answer_loss(model: RWKV, row: Row) -> float:
    """A row's loss as it is trained, in nats a token."""
    return float(batch(model, [row], "full", len(row.ids)).loss())


@torch.no_grad()
def _entered(model: RWKV, packed: Packed, state: State, scope: Scope) -> tuple[Tensor, Tensor | None] | None:
    """What the lower half of a model's blocks makes of texts, x [B,T,C] and carry; None where it is trained."""
    if scope in ("full", "state"):
        return None
    x, carry = model.enter(packed.tokens)
    for i, block in enumerate(model.blocks[: len(model.blocks) // 2]):
        x, _, _, carry = block(x, state.shift[:, i], state.wkv[:, i], packed.reset, carry)
    return x, carry


def _share_lower(a: RWKV, b: RWKV) -> bool:
    lower = [[m.emb, *m.blocks[: len(m.blocks) // 2]] for m in (a, b)]
    pairs = zip(*(nn.ModuleList(modules).parameters() for modules in lower), strict=True)
    return all(p is q for p, q in pairs)


def _upper(
    model: RWKV, packed: Packed, state: State, scope: Scope, entered: tuple[Tensor, Tensor | None] | None
) -> tuple[RWKV, Tensor, State]:
    """(model, tokens, state) that give what these do, from the first trained matrix on.

    The tokens that remain are places in what comes before it.
    """
    if entered is None:
        return model, packed.tokens, state
    first = len(model.blocks) // 2
    state = State(*(part[:, first:] for part in state))
    if scope == "upper":
        x, carry = (None if part is None else part.flatten(0, 1) for part in entered)
        upper = with_children(model, blocks=model.blocks[first:])
        upper.enter = lambda places: (x[places], None if carry is None else carry[places])
    else:
        begun = _Begun(model.blocks[first], *entered, state, packed.reset)
        upper = with_children(model, blocks=nn.ModuleList([begun, *model.blocks[first + 1 :]]))
        upper.enter = lambda places: (places, None)
    return upper, torch.arange(packed.tokens.numel(), device=model.device).view_as(packed.tokens), state


class _Begun(nn.Module):
    """A block of which only the channel mix's value matrix is left to do: at places [B,T] of known texts."""

    def __init__(self, block: nn.Module, x: Tensor, carry: Tensor | None, state: State, reset: Tensor):
        super().__init__()
        self.value, probe = block.ffn.value, _Probe(x.shape[-1])
        block = with_children(block, ffn=with_children(block.ffn, value=probe))
        with torch.enable_grad():
            x, _, _, carry = block(x, state.shift[:, 0], state.wkv[:, 0], reset, carry)
        # Whatever a generation does with the matrix's output, it is linear: the slope is all there is to know.
        (gate,) = torch.autograd.grad(x.sum(), probe.output)
        self.x, self.gate, self.hidden = (part.detach().flatten(0, 1) for part in (x, gate, probe.hidden))
        self.carry = None if carry is None else carry.detach().flatten(0, 1)

    def forward(self, places: Tensor, shift: Tensor, wkv: Tensor, reset: Tensor | None, carry: None):
        carry = None if self.carry is None else self.carry[places]
        return self.x[places] + self.gate[places] * self.value(self.hidden[places]), shift, wkv, carry


class _Probe(nn.Module):
    """Gives zeros for a matrix's output, and remembers its input."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width

    def forward(self, hidden: Tensor) -> Tensor:
        self.hidden, self.output = hidden, hidden.new_zeros(*hidden.shape[:-1], self.width, requires_grad=True)
        return self.output


def with_children(module: nn.Module, **children: nn.Module) -> nn.Module:
    """A module with some other children; it shares everything else."""
    twin = copy.copy(module)
    twin._modules = {**module._modules, **children}
    return twin


def opened(module: nn.Module) -> nn.Module:
    """A module in which layers and weights can be replaced; until then it shares them all, and itself it is new."""
    twin = with_children(module, **{name: opened(child) for name, child in module.named_children()})
    twin._parameters = dict(module._parameters)
    return twin
