"""The corrective steps themselves: from a model, a correction and what must not change to new weights.

Recipe (design note feedback.md): train only the channel mix's `value` matrices of the upper half of the layers, by
normalised gradient steps (Adam's per-weight scaling turns a tiny gradient into movement everywhere), on the new
answer, a replay of earlier ones, and a strong pull of guard rows to the base model's predictions.
"""

import copy
import random
from dataclasses import dataclass

import torch
from torch import Tensor

from rwkv_train.bptt import chunked_loss
from rwkv_train.feedback.guards import Guards, pad
from rwkv_train.loss import IGNORE
from rwkv_train.models.common import RWKV
from rwkv_train.state import State

CHUNK = 512  # tokens of a correction whose activations are in memory at once


@dataclass
class FeedbackConfig:
    """How a correction is learnt.

    Args:
        rate: length of a full gradient step, over all trained weights together
        steps: most gradient steps of one correction
        loss: the new answer's mean loss, in nats a token, below which it counts as learnt
        extra: steps taken after it is learnt
        replay: earlier corrections trained along
        near: guard rows a step that resemble the correction
        unrelated: guard rows a step from everywhere else
        pull: weight of the guards' divergence from the base model
        budget: largest mean divergence on guard rows, in nats a token, that is accepted
        reach: tokens of the dialogue before a correction that gradients flow through
    """

    rate: float = 0.6
    steps: int = 25
    loss: float = 0.05
    extra: int = 2
    replay: int = 16
    near: int = 4
    unrelated: int = 12
    pull: float = 10.0
    budget: float = 0.05
    reach: int = 64

    def __post_init__(self):
        for name, value in vars(self).items():
            if value < 0:
                raise ValueError(f"{name} must not be negative, found {value}")


@dataclass(frozen=True)
class Row:
    """A correction as tokens: context before it, then ids of which the last `answer` are trained."""

    ids: list[int]
    answer: int
    context: tuple[int, ...] = ()


def trained_names(model: RWKV) -> list[str]:
    """The matrices that corrections change."""
    half = len(model.blocks) // 2
    return [f"blocks.{i}.ffn.value.weight" for i in range(half, len(model.blocks))]


def with_weights(model: RWKV, weights: dict[str, Tensor]) -> RWKV:
    """A model that has these weights of its own and shares all others with `model`; nothing requires gradients."""
    shared = {id(p): p for name, p in model.named_parameters() if name not in weights}
    twin = copy.deepcopy(model, shared)
    twin.load_state_dict(weights, strict=False)
    return twin.requires_grad_(False)


def weights_of(model: RWKV) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    return {name: parameters[name].detach().clone() for name in trained_names(model)}


class Diverged(ValueError):
    """A loss or gradient that is not a finite number."""


def learn(
    model: RWKV, new: Row, earlier: list[Row], guards: Guards, config: FeedbackConfig, eod: int, seed: int, tick
) -> tuple[RWKV, int]:
    """(corrected twin of `model`, steps taken). The same arguments give the same weights; `model` is not changed.

    tick(step, loss) is called after every step. Raises Diverged.
    """
    twin = with_weights(model, weights_of(model))
    parameters = [p for name, p in twin.named_parameters() if name in trained_names(twin)]
    for p in parameters:
        p.requires_grad_(True)
    rng = random.Random(seed)
    near = guards.near(new.ids)
    bare = Row(new.ids, new.answer)
    news = [bare, new] if new.context else [bare]
    left = None  # steps still to take once learnt
    for step in range(1, config.steps + 1):
        replayed = rng.sample(earlier, min(config.replay, len(earlier)))
        loss = torch.stack([answer_loss(twin, row, config.reach, eod) for row in news]).mean()
        total = loss + _replay_loss(twin, replayed, eod) if replayed else loss
        if left is None and loss.item() <= config.loss and all(is_right(twin, row, eod) for row in [bare, *replayed]):
            left = config.extra
        if left == 0:
            return twin.requires_grad_(False), step - 1
        left = None if left is None else left - 1
        if config.pull:
            rows = rng.sample(near, min(config.near, len(near)))
            rows += rng.sample(range(len(guards)), min(config.unrelated, len(guards)))
            total = total + config.pull * divergence(twin, guards, rows)
        gradients = torch.autograd.grad(total, parameters)
        norm = torch.nn.utils.get_total_norm(gradients)
        if not (total.isfinite() and norm.isfinite()):
            raise Diverged(f"the loss became {total.item()} at step {step}; a smaller rate may help")
        size = config.rate * min(1.0, total.item() / 0.5)
        with torch.no_grad():
            for p, g in zip(parameters, gradients, strict=True):
                p -= size * g / norm.clamp(min=1e-12)
        tick(step, loss.item())
    return twin.requires_grad_(False), config.steps


def answer_loss(model: RWKV, row: Row, reach: int, eod: int) -> Tensor:
    """Mean loss of a row's answer, in nats a token, after its context."""
    context = [eod, *row.context]
    seen, reached = context[: max(1, len(context) - reach)], context[max(1, len(context) - reach) :]
    state = _read(model, seen[:-1])
    ids = [seen[-1], *reached, *row.ids]
    targets = [IGNORE] * (len(ids) - 1 - row.answer) + row.ids[-row.answer :]
    loss, count, _ = chunked_loss(model, torch.tensor([ids[:-1]]), torch.tensor([targets]), state, None, CHUNK)
    return loss / count


@torch.no_grad()
def _read(model: RWKV, ids: list[int]) -> State | None:
    state = None
    for i in range(0, len(ids), CHUNK):
        state = model.hidden(torch.tensor([ids[i : i + CHUNK]]), state)[1]
    return state


def _replay_loss(model: RWKV, rows: list[Row], eod: int) -> Tensor:
    tokens, _ = pad([[eod, *row.ids[:-1]] for row in rows])
    targets, _ = pad([[IGNORE] * (len(r.ids) - r.answer) + r.ids[-r.answer :] for r in rows], IGNORE)
    loss, count, _ = chunked_loss(model, tokens, targets, None, None, CHUNK)
    return loss / count


@torch.no_grad()
def is_right(model: RWKV, row: Row, eod: int) -> bool:
    """Whether greedy decoding would give the answer, token by token, without a context."""
    x, _ = model.hidden(torch.tensor([[eod, *row.ids[:-1]]]))
    return model.head(x[0, -row.answer :]).argmax(-1).tolist() == row.ids[-row.answer :]


def divergence(model: RWKV, guards: Guards, indices: list[int]) -> Tensor:
    """Mean KL(base || model) over all tokens of some guard rows, in nats."""
    tokens, base, real = guards.draw(indices)
    ours = model(tokens)[0].float().log_softmax(-1)
    return ((base.exp() * (base - ours)).sum(-1) * real).sum() / real.sum()
