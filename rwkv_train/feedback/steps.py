"""The corrective steps themselves: from a model and a lesson to new weights.

Recipe: plain gradient steps (Adam's per-weight scaling turns a tiny gradient into movement everywhere) whose length
follows from the loss (Polyak's rule), in directions that move everything else little (curvature.py), on the new answer,
other wordings of its question and a replay of earlier answers, with a pull of guard rows to what the model said before.
"""

from dataclasses import dataclass, field, fields
from typing import get_args

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from rwkv_train.bptt import chunked_loss
from rwkv_train.feedback.curvature import Curvature
from rwkv_train.feedback.texts import CHUNK, Batch, Row, Scope, batches, kept, opened, quickly
from rwkv_train.models.base import RWKV

RANK = 8  # of the factors of scope lora
FOLLOWED = 128  # tokens of one step of /learn


@dataclass
class FeedbackConfig:
    """How a correction is learnt.

    Args:
        scope: what is trained: upper, the matrices of the upper half of the layers and the head, avoiding what their
            inputs have in common; full, all weights, which takes longer; localised, the channel mix's value matrices
            of the upper half, along the model's curvature, which needs less memory; lora, low-rank changes of the
            same; state, only the state in which a dialogue begins
        rate: share of the loss that one step should take away, going by its gradient
        steps: most gradient steps of one correction
        loss: mean loss of the answer, in nats a token, below which it counts as learnt
        extra: steps taken after it is learnt
        wordings: other wordings of the question that are taught along, as far as the model knows some
        strangers: times that the question is also taught after dialogues that have nothing to do with it
        replay: earlier corrections trained along
        neighbours: other subjects of which the question is asked to keep the answers, and as many other questions
            about its subject
        guards: rows of the guard pool that are kept, a third of them the nearest to the correction
        talks: texts that go on and on, of those strangers are drawn from, that are kept
        pull: weight of what is kept: of its divergence from the model before
        budget: largest mean divergence on guard rows, in nats a token, that is accepted
        reach: tokens before an answer that gradients flow through
        learn_rate: of /learn, in root mean squares of the gradient
        learn_decay: of /learn: share of the way back to the weights before it that every step goes
    """

    scope: Scope = "upper"
    rate: float = 0.9
    steps: int = 25
    loss: float = 0.05
    extra: int = 1
    wordings: int = 6
    strangers: int = 3
    replay: int = 16
    neighbours: int = 5
    guards: int = 3
    talks: int = 1
    pull: float = 4.0
    budget: float = 0.05
    reach: int = 64
    learn_rate: float = 1e-2
    learn_decay: float = 1e-3

    def __post_init__(self):
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name == "scope":
                if value not in get_args(Scope):
                    raise ValueError(f"scope must be one of {', '.join(get_args(Scope))}, found {value!r}")
            elif not value >= 0:
                raise ValueError(f"{f.name} must not be negative, found {value}")


@dataclass(frozen=True)
class Lesson:
    """What one correction trains and what it keeps.

    new: rows of the correction. replayed: of earlier ones. kept: token rows, each with the model whose predictions
    on it are kept.
    """

    new: list[Row]
    replayed: list[Row] = field(default_factory=list)
    kept: list[tuple[list[int], RWKV]] = field(default_factory=list)


class Diverged(ValueError):
    """A loss or gradient that is not a finite number."""


def localised_names(model: RWKV) -> list[str]:
    """The matrices that scope localised trains: late channel mixes' values."""
    half = len(model.blocks) // 2
    return [f"blocks.{i}.ffn.value.weight" for i in range(half, len(model.blocks))]


def upper_names(model: RWKV) -> list[str]:
    """The matrices that scope upper trains: those of the upper half of the layers, and the head."""
    below = tuple(f"blocks.{i}." for i in range(len(model.blocks) // 2))
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return [f"{name}.weight" for name in linear if not name.startswith(below)]


def changed(model: RWKV, base: RWKV) -> dict[str, Tensor]:
    """The weights of a corrected model that are not its base's."""
    ours = dict(base.named_parameters())
    return {name: p.detach() for name, p in model.named_parameters() if p is not ours.get(name)}


def with_weights(model: RWKV, weights: dict[str, Tensor]) -> RWKV:
    """A model that has these weights of its own and shares all others with `model`; nothing requires gradients."""
    twin = opened(model)
    for name, weight in weights.items():
        module, _, leaf = name.rpartition(".")
        setattr(twin.get_submodule(module), leaf, nn.Parameter(weight.clone(), requires_grad=False))
    return twin.requires_grad_(False)


def between(before: RWKV, after: RWKV, share: float) -> RWKV:
    """`before` with a share of the way to `after`."""
    start = dict(before.named_parameters())
    ends = changed(after, before)
    return with_weights(
        after, {n: torch.lerp(start[n], w, share) if n in start else w * share for n, w in ends.items()}
    )


def learn(
    model: RWKV, lesson: Lesson, curvature: Curvature | None, config: FeedbackConfig, tick=lambda step, loss: None
) -> tuple[RWKV, int]:
    """(corrected twin of `model`, steps taken). The same arguments give the same weights; `model` is not changed.

    curvature: of the matrices that scopes upper and localised train. tick(step, loss) is called after every step.
    Raises Diverged.
    """
    twin, parameters = _trainable(model, config.scope)
    new = batches(twin, lesson.new, config.scope, config.reach)
    replayed = batches(twin, lesson.replayed, config.scope, config.reach)
    others = kept(twin, model, lesson.kept, config.scope) if config.pull else []
    places = sum(len(other.before) for other in others)
    left = None  # steps still to take once learnt
    for step in range(config.steps + 1):
        with quickly(model.device):
            loss = _mean(new)
            total = loss + _mean(replayed) if replayed else loss
        learnt = loss.item() <= config.loss and all(batch.right() for batch in new + replayed)
        left = None if not learnt else config.extra if left is None else left - 1
        if left == 0 or step == config.steps:
            break
        moved = [other.divergence() for other in others if step or not other.same]
        if moved:
            total = total + config.pull * torch.stack(moved).sum() / places
        gradients = dict(zip(parameters, torch.autograd.grad(total, list(parameters.values())), strict=True))
        ways = gradients
        if curvature is not None and config.scope == "upper":
            ways = curvature.avoid(gradients)
        elif curvature is not None and config.scope == "localised":
            ways = curvature.flatten(gradients)
        gain = sum(torch.dot(gradients[name].flatten(), ways[name].flatten()) for name in ways)
        if not (total.isfinite() and gain.isfinite()):
            raise Diverged(f"the loss became {total.item()} at step {step + 1}; a smaller rate may help")
        with torch.no_grad():
            size = float(config.rate * total / gain.clamp(min=1e-12))
            for name, p in parameters.items():
                p.sub_(ways[name], alpha=size)
            if config.scope == "state":
                twin.repair_initial_state()
        tick(step + 1, loss.item())
    return _finished(twin, config.scope), step


def _trainable(model: RWKV, scope: Scope) -> tuple[RWKV, dict[str, nn.Parameter]]:
    """A twin of a model, and what of it is trained, by name."""
    names, own = localised_names(model), dict(model.named_parameters())
    if scope == "state":
        names = ["initial_shift", "initial_wkv"]
        own = dict(zip(names, model.trainable_state(), strict=True)) | own
    elif scope == "full":
        names = list(own)
    elif scope == "upper":
        names = upper_names(model)
    twin = with_weights(model, {name: own[name].detach() for name in names})
    if scope == "lora":
        rng = torch.Generator().manual_seed(0)
        for name in names:
            layer = twin.get_submodule(name.removesuffix(".weight"))
            parametrize.register_parametrization(layer, "weight", _LowRank(layer.weight, rng))
        names = [n for n, _ in twin.named_parameters() if n.endswith((".up", ".down"))]
    parameters = {name: p.requires_grad_(True) for name, p in twin.named_parameters() if name in names}
    return twin, parameters


def _finished(twin: RWKV, scope: Scope) -> RWKV:
    if scope == "lora":
        for name in localised_names(twin):
            parametrize.remove_parametrizations(twin.get_submodule(name.removesuffix(".weight")), "weight")
    return twin.requires_grad_(False)


class _LowRank(nn.Module):
    """A weight [out,in] plus up [out,r] down [r,in]."""

    def __init__(self, weight: Tensor, rng: torch.Generator):
        super().__init__()
        outer, inner = weight.shape
        self.up = nn.Parameter(weight.new_zeros(outer, RANK))
        self.down = nn.Parameter((torch.randn(RANK, inner, generator=rng) / inner**0.5).to(weight))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.up @ self.down


def _mean(some: list[Batch]) -> Tensor:
    return torch.stack([b.rows * b.loss() for b in some]).sum() / sum(b.rows for b in some)


def follow(
    model: RWKV, ids: list[int], curvature: Curvature, config: FeedbackConfig, tick=lambda step, loss: None
) -> tuple[RWKV, int]:
    """(twin of `model` adapted to a running text, steps taken): dynamic evaluation (Krause et al. 2018).

    A step for each chunk, the state carried on and detached: gradients over their root mean square on guard text, and
    a decay towards the weights before the text. ids: a document. Raises Diverged.
    """
    start = dict(model.named_parameters())
    twin, parameters = _trainable(model, "localised")
    state = None
    for step, i in enumerate(range(0, len(ids) - 1, FOLLOWED), 1):
        tokens = torch.tensor([ids[i : i + FOLLOWED + 1]], device=model.device)
        total, count, state = chunked_loss(twin, tokens[:, :-1], tokens[:, 1:], state, None, CHUNK)
        loss, state = total / count, state.detach()
        gradients = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
        if not all(g.isfinite().all() for g in gradients.values()):
            raise Diverged(f"the loss became {loss.item()} in chunk {step}; a smaller learn_rate may help")
        with torch.no_grad():
            for name, way in curvature.even(gradients).items():
                p = parameters[name]
                p += config.learn_decay * (start[name] - p) - config.learn_rate * way
        tick(step, loss.item())
    return twin.requires_grad_(False), step
