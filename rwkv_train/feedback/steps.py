"""The gradient steps of a lesson: from a model to new weights.

Plain gradient steps (Adam's per-weight scaling turns a tiny gradient into movement everywhere) whose length follows
from the loss (Polyak's rule), in directions that move everything else little (curvature.py), with a KL anchor to what
the models before said. What is trained and what is kept is the lesson's affair (lesson.py).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from rwkv_train.bptt import chunked_loss
from rwkv_train.feedback.curvature import Curvature
from rwkv_train.feedback.lesson import Lesson
from rwkv_train.feedback.settings import FeedbackConfig
from rwkv_train.feedback.texts import CHUNK, Anchored, Answers, Read, batches, bf16_autocast, kl_anchors, read, wrong
from rwkv_train.feedback.trainable import Trainable, finished, trained_twin
from rwkv_train.models.base import RWKV
from rwkv_train.ops.products import as_wide

FEW = 10  # times the target loss, from which on few tokens are left to be learnt
TURNS = 4  # parts of what is kept: each step looks at one
HELD = 0.02  # nats a token that each of these may have moved once all is learnt; until then their weight
GROWTH = 1.5  # times itself, at most so often
REPAIRS = 5
READ_TOKENS = 128  # of one step of /learn

Tick = Callable[[int, float], None]


class Diverged(ValueError):
    """A loss or gradient that is not a finite number."""


def take_steps(
    model: RWKV,
    lesson: Lesson,
    curvature: Curvature | None,
    config: FeedbackConfig,
    tick: Tick = lambda step, loss: None,
) -> tuple[RWKV, int]:
    """(corrected twin of `model`, steps taken). The same arguments give the same weights; `model` is not changed.

    curvature: of the matrices that trainable upper and localised mean. tick(step, loss) is called after every step.
    Raises Diverged.
    """
    twin, parameters = trained_twin(model, config.trainable, config.layers, config.rank)
    new = batches(twin, lesson.new, config.trainable, config.truncation)
    replayed = batches(twin, lesson.replayed, config.trainable, config.truncation)
    watched = list(lesson.watched.values())
    avoids = curvature is not None and config.trainable == "upper" and config.avoidance > 0
    kept, weight, repairs = None, config.kl_weight, REPAIRS
    left = None  # steps still to take once learnt
    for step in range(config.steps + 1):
        # 1. The loss of the new answers and of the earlier ones; soon once more that of tokens that are not sure yet.
        with bf16_autocast(model.device):
            answers, earlier = [b.read() for b in new], [b.read() for b in replayed]
            loss = _mean(answers)
            total = loss + _mean(earlier) if earlier else loss
            few = loss.item() <= FEW * config.target_loss
            unsure = [part for a in answers + earlier if (part := a.unsure())] if few else []
            if unsure:
                total = total + _mean(unsure)
        # 2. Learnt is what greedy decoding would write, too, and has moved little of what is kept; then `extra` steps.
        learnt = loss.item() <= config.target_loss and all(part.right() for part in unsure)
        if learnt and repairs and kept and max(kept.drifts) > HELD:
            learnt, weight, repairs = False, weight * GROWTH, repairs - 1
        left = None if not learnt else config.extra if left is None else left - 1
        #    What of earlier corrections was lost on the way is trained, too.
        if left == 0 and step < config.steps and (lost := wrong(twin, watched)):
            left, watched = None, [example for example in watched if example not in lost]
            replayed += batches(twin, lost, config.trainable, config.truncation)
        if left == 0 or step == config.steps:
            break
        # 3. The KL anchor, of a part of the texts in turn. What shares its inputs with contrasts is avoided.
        if step == 0:  # not before it is known that there is one
            if weight and (texts := lesson.rehearsed + lesson.contrasted):
                kept = _Kept(twin, model, texts, config.trainable)
            if avoids and lesson.contrasted:
                theirs, _ = read(twin, lesson.contrasted, config.trainable)
                curvature = curvature.avoiding(inputs_of(twin, theirs, list(parameters)), config.avoidance)
        if kept and (drift := kept.drift(step)) is not None:
            total = total + weight * drift
        # 4. A step in the direction that leaves all else alone, as long as it takes for the loss to vanish.
        gradients = dict(zip(parameters, torch.autograd.grad(total, list(parameters.values())), strict=True))
        ways = _preconditioned(gradients, curvature, config.trainable)
        gain = sum(torch.dot(gradients[name].flatten(), ways[name].flatten()) for name in ways)
        if not (total.isfinite() and gain.isfinite()):
            raise Diverged(f"the loss became {total.item()} at step {step + 1}; a smaller step_factor may help")
        with torch.no_grad():
            size = float(config.step_factor * total / gain.clamp(min=1e-12))
            for name, p in parameters.items():
                p.sub_(ways[name], alpha=size)
            if config.trainable == "state":
                twin.repair_initial_state()
        tick(step + 1, loss.item())
    return finished(twin, config.trainable), step


class _Kept:
    """The KL anchor, of a part of some texts in turn. drifts: of each when it was last looked at, in nats a token."""

    def __init__(self, twin: RWKV, start: RWKV, texts: list[Anchored], trainable: Trainable):
        parts = [texts[i::TURNS] for i in range(min(TURNS, len(texts)))]
        self._parts = [kl_anchors(twin, start, part, trainable) for part in parts]
        self.drifts = [0.0] * len(parts)

    def drift(self, step: int) -> Tensor | None:
        """Of the part that it is the turn of, in nats a token; None if nothing of it can have moved yet."""
        turn = step % len(self._parts)
        moved = [anchor.divergence() for anchor in self._parts[turn] if step or not anchor.same]
        if not moved:
            return None
        drift = torch.stack(moved).sum() / sum(len(anchor.before) for anchor in self._parts[turn])
        self.drifts[turn] = drift.item()
        return drift


@torch.no_grad()
def inputs_of(twin: RWKV, texts: Read, names: list[str]) -> dict[str, Tensor]:
    """What the matrices of a twin are given [N,in] at N tokens of texts that it reads."""
    given: dict[str, Tensor] = {}
    hooks = []
    for name in names:
        layer = twin.get_submodule(name.removesuffix(".weight"))
        hooks.append(layer.register_forward_pre_hook(lambda _, args, name=name: given.__setitem__(name, args[0])))
    hidden = texts.last_hidden()
    for hook in hooks:
        hook.remove()
    return {name: texts.packed.real(given[name]) if name in given else hidden for name in names}


def _mean(some: list[Answers]) -> Tensor:
    return torch.stack([a.batch.examples * a.loss() for a in some]).sum() / sum(a.batch.examples for a in some)


def _preconditioned(
    gradients: dict[str, Tensor], curvature: Curvature | None, trainable: Trainable
) -> dict[str, Tensor]:
    """The directions in which to step."""
    if curvature is not None and trainable == "upper":
        return curvature.precondition_input(gradients)
    if curvature is not None and trainable == "localised":
        return curvature.precondition_kfac(gradients)
    return gradients


def dynamic_evaluation(
    model: RWKV, ids: list[int], curvature: Curvature, config: FeedbackConfig, tick: Tick = lambda step, loss: None
) -> tuple[RWKV, int]:
    """(twin of `model` adapted to a running text, steps taken), after Krause et al. 2018.

    A step for each chunk, the state carried on and detached: gradients over their root mean square on the rehearsal
    set, and a decay towards the weights before the text. ids: a document. Raises Diverged.
    """
    twin, parameters = trained_twin(model, "localised", config.layers)
    start = {name: as_wide(p) for name, p in model.named_parameters() if name in parameters}
    state = None
    for step, i in enumerate(range(0, len(ids) - 1, READ_TOKENS), 1):
        tokens = torch.tensor([ids[i : i + READ_TOKENS + 1]], device=model.device)
        total, count, state = chunked_loss(twin, tokens[:, :-1], tokens[:, 1:], state, None, CHUNK)
        loss, state = total / count, state.detach()
        gradients = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
        if not all(g.isfinite().all() for g in gradients.values()):
            raise Diverged(f"the loss became {loss.item()} in chunk {step}; a smaller learn_rate may help")
        with torch.no_grad():
            for name, way in curvature.precondition_rms(gradients).items():
                p = parameters[name]
                p += config.learn_decay * (start[name] - p) - config.learn_rate * way
        tick(step, loss.item())
    return twin.requires_grad_(False), step
