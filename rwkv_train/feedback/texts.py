"""Texts of a correction, as what is trained of a model reads them.

Every step reads the same texts, so whatever no step changes is computed once: text that no gradient reaches, the
blocks below the first trained matrix, and that one's own inputs. Short texts share lanes, with a reset between them.
"""

from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor, nn

from rwkv_train.bptt import chunked_loss
from rwkv_train.feedback.trainable import Trainable, with_children
from rwkv_train.generate import prefill
from rwkv_train.generation.prefill import joined
from rwkv_train.models.base import RWKV
from rwkv_train.models.finite import finite
from rwkv_train.models.loss import IGNORE_INDEX, token_nll
from rwkv_train.models.state import State

CHUNK = 512  # tokens of a correction whose activations are in memory at once
LARGE = 1 << 15  # channels of all layers from which on activations inside the blocks are computed again
SURE = 0.35  # nats that a token costs at most if the model is sure of it: a probability of 0.7
ROWS = 256  # of predictions that are compared at once
WIDTHS = range(1, 5)  # of lanes, in lengths of the longest text: the one that wastes least is taken


@dataclass(frozen=True)
class Example:
    """A correction as tokens: a document that begins with the context, of which the last `answer` ids are trained.

    context: ids at the beginning that no gradient flows through. negative: the answer is to be avoided.
    """

    ids: list[int]
    answer: int
    context: int = 0
    negative: bool = False


@dataclass(frozen=True)
class Anchored:
    """A text as tokens, of which the predictions of a model are kept: after each of its `last` tokens, None for all.

    context: ids at the beginning that no gradient flows through.
    """

    ids: list[int]
    model: RWKV
    last: int | None = None
    context: int = 0


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


def _last(packed: Packed, counts: list[int]) -> Packed:
    """Of packed texts, only so many last tokens of each."""
    positions = packed.positions.split(packed.lengths)
    return replace(packed, positions=torch.cat([p[-n:] for p, n in zip(positions, counts, strict=True)]))


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
    """Examples as some model reads them: the whole one, or what is above its first trained matrix."""

    model: RWKV
    tokens: Tensor
    targets: Tensor
    reset: Tensor
    state: State | None
    examples: int
    negative: bool

    def loss(self) -> Tensor:
        """Mean loss in nats a token; of an answer to be avoided, minus the log probability of any other."""
        inputs, large = (self.tokens, self.targets, self.state, self.reset), is_large(self.model)
        total, count, _ = chunked_loss(self.model, *inputs, CHUNK, checkpoint_blocks=large)
        return -torch.log(-torch.expm1(-total - 1e-4)) if self.negative else total / count

    @torch.no_grad()
    def right(self) -> bool:
        """Whether greedy decoding would write every answer, or not write the one to be avoided."""
        trained = self.targets != IGNORE_INDEX
        best = self.model.head(self.model.hidden(self.tokens, self.state, self.reset)[0][trained]).argmax(-1)
        return bool((best == self.targets[trained]).all()) != self.negative

    @torch.no_grad()
    def unsure(self) -> "Batch | None":
        """The same with only those tokens of the answers that are not sure yet; None if there are none."""
        if self.negative:
            return None if self.right() else self
        x = self.model.hidden(self.tokens, self.state, self.reset)[0]
        trained = self.targets != IGNORE_INDEX
        unsure = token_nll(x, self.model.head.weight, self.targets) > SURE
        kept = self.targets.masked_fill(~trained.masked_scatter(trained, unsure), IGNORE_INDEX)
        return replace(self, targets=kept) if unsure.any() else None


def batches(model: RWKV, examples: list[Example], trainable: Trainable, truncation: int) -> list[Batch]:
    """All answers that are to be learnt together, each that is to be avoided on its own."""
    positive = [e for e in examples if not e.negative]
    groups = ([positive] if positive else []) + [[e] for e in examples if e.negative]
    return [batch(model, group, trainable, truncation) for group in groups]


def batch(model: RWKV, examples: list[Example], trainable: Trainable, truncation: int) -> Batch:
    """Examples for a model of which only what `trainable` says will change."""
    cuts = [0 if trainable == "state" else max(e.context, len(e.ids) - e.answer - truncation) for e in examples]
    befores = [tuple(e.ids[:cut]) for e, cut in zip(examples, cuts, strict=True)]
    texts = [e.ids[cut:-1] for e, cut in zip(examples, cuts, strict=True)]
    packed = pack(texts, [bool(before) or model.initial_wkv is not None for before in befores], model.device)
    state = _states_after(model, befores, packed)
    wanted = [[IGNORE_INDEX] * (len(t) - e.answer) + e.ids[-e.answer :] for t, e in zip(texts, examples, strict=True)]
    targets = torch.full_like(packed.tokens, IGNORE_INDEX)
    targets.view(-1)[packed.positions] = torch.tensor([token for ids in wanted for token in ids], device=model.device)
    first = _first_trained(model)
    entered = _entered(model, packed, state, trainable, first)
    upper, tokens, state = _upper(model, packed, state, trainable, entered, first)
    if trainable == "state":
        state = None  # the one in which the model begins, anew at every step
    return Batch(upper, tokens, targets, packed.reset, state, len(examples), examples[0].negative)


@dataclass(frozen=True)
class KLAnchor:
    """Texts of which the predictions of another model are kept: probabilities [N,V] after N of their tokens.

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
        with bf16_autocast(self.before.device):
            now = _log_probs(self.model, self.tokens, self.packed, self.state)
        return -torch.dot(self.before.flatten(), now.flatten()) - self.entropy


def kl_anchors(twin: RWKV, start: RWKV, anchored: list[Anchored], trainable: Trainable) -> list[KLAnchor]:
    """Texts by the model whose predictions on them are kept. twin: what is trained, still as `start` is."""
    anchors, first = [], _first_trained(twin)
    for other in {id(text.model): text.model for text in anchored}.values():
        texts = [text for text in anchored if text.model is other]
        cuts = [0 if trainable == "state" else text.context for text in texts]
        befores = [tuple(text.ids[:cut]) for text, cut in zip(texts, cuts, strict=True)]
        counts = [
            len(text.ids) - cut if text.last is None else text.last for text, cut in zip(texts, cuts, strict=True)
        ]
        alone = [bool(before) or twin.initial_wkv is not None for before in befores]
        packed = _last(pack([t.ids[cut:] for t, cut in zip(texts, cuts, strict=True)], alone, twin.device), counts)
        state = _states_after(twin, befores, packed)
        entered = _entered(twin, packed, state, trainable, first)
        upper, tokens, upper_state = _upper(twin, packed, state, trainable, entered, first)
        reader, its_state = (upper, upper_state) if other is start else (None, None)
        if reader is None and entered is not None and _share_lower(twin, other, first):
            its_state = _states_after(other, befores, packed)
            reader, _, its_state = _upper(other, packed, its_state, trainable, entered, first)
        with torch.no_grad(), bf16_autocast(twin.device):
            if reader is None:
                before = log_probs(other, [text.ids for text in texts], counts)
            else:
                before = _log_probs(reader, tokens, packed, its_state)
        entropy = -float((before.exp() * before).sum(dtype=torch.float64))
        anchors.append(KLAnchor(upper, tokens, packed, upper_state, before.exp_(), entropy, other is start))
    return anchors


def _states_after(model: RWKV, befores: list[tuple[int, ...]], packed: Packed) -> State:
    """The states in which the lanes of packed texts begin, some of which have tokens before them."""
    firsts = [befores[i] for i in packed.firsts]
    if not any(firsts):
        return model.empty_state(len(firsts))
    states = {ids: prefill(model, list(ids))[1] if ids else model.empty_state(1) for ids in dict.fromkeys(firsts)}
    return joined([states[ids] for ids in firsts])


@torch.no_grad()
def log_probs(model: RWKV, documents: list[list[int]], last: list[int] | None = None) -> Tensor:
    """Log probabilities [N,V] after each of the N tokens of some documents, or only of so many `last` ones of each.

    Raises NotFinite, a ValueError, if the model gives no finite number.
    """
    packed = pack(documents, [model.initial_wkv is not None] * len(documents), model.device)
    if last is not None:
        packed = _last(packed, last)
    return finite(_log_probs(model, packed.tokens, packed, model.empty_state(len(packed.tokens))), model)


def _log_probs(model: RWKV, tokens: Tensor, packed: Packed, state: State) -> Tensor:
    logits = model.head(packed.real(model.hidden(tokens, state, packed.reset, is_large(model))[0]))
    return logits.log_softmax(-1, torch.promote_types(logits.dtype, torch.float32))


def bf16_autocast(device: torch.device) -> torch.autocast:
    """Steps need no fine rounding: bfloat16 where the processor multiplies it, several times as fast."""
    there = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return torch.autocast(device.type, torch.bfloat16, enabled=there)


def divergence(before: Tensor, now: Tensor) -> Tensor:
    """Mean KL(before || now) of log probabilities [N,V], in nats a token."""
    pairs = zip(before.split(ROWS), now.split(ROWS), strict=True)
    return torch.cat([(b.exp() * (b - n)).sum(-1) for b, n in pairs]).mean()


def is_large(model: RWKV) -> bool:
    """Whether memory is dearer than time."""
    return model.config.n_layer * model.config.n_embd >= LARGE


@torch.no_grad()
def answer_loss(model: RWKV, example: Example) -> float:
    """An example's loss as it is trained, in nats a token."""
    return float(batch(model, [example], "full", len(example.ids)).loss())


def _first_trained(model: RWKV) -> int:
    """The first block of which something is trained; all that comes before it stays as it is."""
    trained = [i for i, block in enumerate(model.blocks) if any(p.requires_grad for p in block.parameters())]
    return min(trained, default=len(model.blocks) - 1)


@torch.no_grad()
def _entered(
    model: RWKV, packed: Packed, state: State, trainable: Trainable, first: int
) -> tuple[Tensor, Tensor | None] | None:
    """What a model's blocks below the first make of texts, x [B,T,C] and carry; None where these are trained, too."""
    if trainable in ("full", "state"):
        return None
    x, carry = model.enter(packed.tokens)
    for i, block in enumerate(model.blocks[:first]):
        x, _, _, carry = block(x, state.shift[:, i], state.wkv[:, i], packed.reset, carry)
    return x, carry


def _share_lower(a: RWKV, b: RWKV, first: int) -> bool:
    lower = [[m.emb, *m.blocks[:first]] for m in (a, b)]
    pairs = zip(*(nn.ModuleList(modules).parameters() for modules in lower), strict=True)
    return all(p is q for p, q in pairs)


def _upper(
    model: RWKV,
    packed: Packed,
    state: State,
    trainable: Trainable,
    entered: tuple[Tensor, Tensor | None] | None,
    first: int,
) -> tuple[RWKV, Tensor, State]:
    """(model, tokens, state) that give what these do, from the first trained block on.

    The tokens that remain are positions in what comes before it; they pass the embedding as they are.
    """
    if entered is None:
        return model, packed.tokens, state
    state = State(*(part[:, first:] for part in state))
    if trainable == "upper":
        begins = _Entered(model.blocks[first], *entered)
    else:
        begins = _Begun(model.blocks[first], *entered, state, packed.reset)
    upper = with_children(model, emb=nn.Identity(), blocks=nn.ModuleList([begins, *model.blocks[first + 1 :]]))
    return upper, torch.arange(packed.tokens.numel(), device=model.device).view_as(packed.tokens), state


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
