"""Texts of a correction, as what is trained of a model reads them.

Every step reads the same texts, so whatever no step changes is computed once: text that no gradient reaches, and what
the lower blocks make of the rest (lower.py).
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rwkv_train.feedback.lower import Lower
from rwkv_train.feedback.packing import Packed, pack
from rwkv_train.feedback.trainable import Trainable
from rwkv_train.generate import prefill
from rwkv_train.generation.prefill import joined
from rwkv_train.models.base import RWKV
from rwkv_train.models.finite import finite
from rwkv_train.models.loss import IGNORE_INDEX, head_loss, token_nll
from rwkv_train.models.state import State

CHUNK = 512  # tokens of a correction whose activations are in memory at once
LARGE = 1 << 15  # channels of all layers from which on activations inside the blocks are computed again
SURE = 0.35  # nats that a token costs at most if the model is sure of it: a probability of 0.7
TOGETHER = 8  # answers that are looked at at once
ROWS = 256  # of predictions that are compared at once


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
class Batch:
    """Examples as some model reads them: the whole one, or what is above its first trained matrix."""

    model: RWKV
    tokens: Tensor
    targets: Tensor
    reset: Tensor
    state: State | None
    examples: int
    negative: bool

    def read(self) -> "Answers":
        """The answers as the model predicts them by now. Activations of one chunk are in memory at a time."""
        large, state = is_large(self.model), self.state
        state, parts = self.model.empty_state(len(self.tokens)) if state is None else state, []
        whole = self.tokens.shape[1] <= CHUNK
        for i in range(0, self.tokens.shape[1], CHUNK):
            cut = self.tokens[:, i : i + CHUNK], State(*state), self.reset[:, i : i + CHUNK], large
            x, state = self.model.hidden(*cut) if whole else checkpoint(self.model.hidden, *cut, use_reentrant=False)
            parts.append(x)
        trained = self.targets != IGNORE_INDEX
        return Answers(torch.cat(parts, 1)[trained], self.targets[trained], self)


@dataclass(frozen=True)
class Answers:
    """What a model makes of a batch's answers: before the head x [N,C], and the N tokens that are to come."""

    x: Tensor
    targets: Tensor
    batch: Batch

    def loss(self) -> Tensor:
        """Mean loss in nats a token; of an answer to be avoided, minus the log probability of any other."""
        total = head_loss(self.x, self.batch.model.head.weight, self.targets)
        return -torch.log(-torch.expm1(-total - 1e-4)) if self.batch.negative else total / len(self.targets)

    @torch.no_grad()
    def right(self) -> bool:
        """Whether greedy decoding would write every answer, or not write the one to be avoided."""
        best = self.batch.model.head(self.x).argmax(-1)
        return bool((best == self.targets).all()) != self.batch.negative

    def unsure(self) -> "Answers | None":
        """The same with only those tokens of the answers that are not sure yet; None if there are none."""
        if self.batch.negative:
            return None if self.right() else self
        unsure = token_nll(self.x, self.batch.model.head.weight, self.targets) > SURE
        return replace(self, x=self.x[unsure], targets=self.targets[unsure]) if unsure.any() else None


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
    upper, tokens, state = Lower(model, packed, state, trainable).upper(model, state)
    if trainable == "state":
        state = None  # the one in which the model begins, anew at every step
    return Batch(upper, tokens, targets, packed.reset, state, len(examples), examples[0].negative)


@dataclass(frozen=True)
class Read:
    """Texts as what is trained of a model reads them; `packed` has N positions, of the tokens that count."""

    model: RWKV
    tokens: Tensor
    packed: Packed
    state: State

    def last_hidden(self) -> Tensor:
        """What the head is given [N,C]."""
        x = self.model.hidden(self.tokens, self.state, self.packed.reset, is_large(self.model))[0]
        return self.packed.real(x)

    def log_probs(self) -> Tensor:
        """Log probabilities [N,V] of the tokens that follow."""
        logits = self.model.head(self.last_hidden())
        return logits.log_softmax(-1, torch.promote_types(logits.dtype, torch.float32))


def read(
    twin: RWKV, texts: list[Anchored], trainable: Trainable, other: RWKV | None = None
) -> tuple[Read, Read | None]:
    """Texts as a twin reads them, at those tokens after which predictions are kept, and as `other` does.

    None in its place if it does not share the twin's lower blocks.
    """
    befores = [tuple(text.ids[: _cut(text, trainable)]) for text in texts]
    alone = [bool(before) or twin.initial_wkv is not None for before in befores]
    packed = pack([text.ids[_cut(text, trainable) :] for text in texts], alone, twin.device)
    packed = packed.last(_counts(texts, trainable))
    state = _states_after(twin, befores, packed)
    lower = Lower(twin, packed, state, trainable)
    ours, tokens, its_state = lower.upper(twin, state)
    mine = Read(ours, tokens, packed, its_state)
    if other is None or not lower.shared_by(other):
        return mine, None
    theirs, _, its_state = lower.upper(other, _states_after(other, befores, packed))
    return mine, Read(theirs, tokens, packed, its_state)


@dataclass(frozen=True)
class KLAnchor:
    """Texts of which the predictions of another model are kept: probabilities [N,V] after N of their tokens.

    same: they are those of the model as it was before the first step. entropy: their sum, in nats.
    """

    texts: Read
    before: Tensor
    entropy: float
    same: bool

    def divergence(self) -> Tensor:
        """KL(before || now) summed over tokens, in nats."""
        with bf16_autocast(self.before.device):
            now = self.texts.log_probs()
        return -torch.dot(self.before.flatten(), now.flatten()) - self.entropy


def kl_anchors(twin: RWKV, start: RWKV, anchored: list[Anchored], trainable: Trainable) -> list[KLAnchor]:
    """Texts by the model whose predictions on them are kept. twin: what is trained, still as `start` is."""
    anchors = []
    for other in {id(text.model): text.model for text in anchored}.values():
        texts = [text for text in anchored if text.model is other]
        ours, theirs = read(twin, texts, trainable, None if other is start else other)
        with torch.no_grad(), bf16_autocast(twin.device):
            if other is start:
                before = ours.log_probs()
            elif theirs is not None:
                before = theirs.log_probs()
            else:
                before = log_probs(other, [text.ids for text in texts], _counts(texts, trainable))
        entropy = -float((before.exp() * before).sum(dtype=torch.float64))
        anchors.append(KLAnchor(ours, before.exp_(), entropy, other is start))
    return anchors


def _cut(text: Anchored, trainable: Trainable) -> int:
    """Tokens of a text that no gradient flows through. A state that is trained comes before all of them."""
    return 0 if trainable == "state" else text.context


def _counts(texts: list[Anchored], trainable: Trainable) -> list[int]:
    """After how many tokens of each text predictions are kept."""
    return [len(text.ids) - _cut(text, trainable) if text.last is None else text.last for text in texts]


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
    return finite(_on_their_own(model, documents, last).log_probs(), model)


def _on_their_own(model: RWKV, documents: list[list[int]], last: list[int] | None) -> Read:
    packed = pack(documents, [model.initial_wkv is not None] * len(documents), model.device)
    if last is not None:
        packed = packed.last(last)
    return Read(model, packed.tokens, packed, model.empty_state(len(packed.tokens)))


@torch.no_grad()
def wrong(model: RWKV, examples: list[Example]) -> list[Example]:
    """Those whose answers a model would not write by greedy decoding, or would write though they are to be avoided."""
    found = []
    for some in (examples[i : i + TOGETHER] for i in range(0, len(examples), TOGETHER)):
        counts = [e.answer for e in some]
        hidden = _on_their_own(model, [e.ids[:-1] for e in some], counts).last_hidden()
        best = torch.cat([model.head(part).argmax(-1) for part in hidden.split(ROWS)]).cpu().split(counts)
        said = [b.tolist() == e.ids[-e.answer :] for b, e in zip(best, some, strict=True)]
        found += [e for e, same in zip(some, said, strict=True) if same == e.negative]
    return found


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
    return float(batch(model, [example], "full", len(example.ids)).read().loss())
