"""How corrections are learnt: the settings, and their names of before."""

from dataclasses import dataclass, fields
from functools import wraps
from math import inf
from typing import get_args

from rwkv_train.feedback.trainable import Trainable

RENAMED = {  # old names, still read in journals, in a chat and from Python
    "scope": "trainable",
    "rate": "step_factor",
    "loss": "target_loss",
    "wordings": "paraphrases",
    "strangers": "random_prefixes",
    "neighbours": "contrasts",
    "guards": "rehearsed",
    "talks": "free_running",
    "pull": "kl_weight",
    "budget": "max_kl",
    "reach": "truncation",
}


def renamed(settings: dict) -> dict:
    """Settings with the names of today. ValueError where one is given under both its names."""
    for old in settings.keys() & RENAMED.keys():
        if RENAMED[old] in settings:
            raise ValueError(f"{old} is the old name of {RENAMED[old]}, and both are given; drop {old}")
    return {RENAMED.get(name, name): value for name, value in settings.items()}


@dataclass(kw_only=True)
class FeedbackConfig:
    """How a correction is learnt. Old names are taken, too; ValueError for unknown ones and for what makes no sense."""

    trainable: Trainable = "upper"
    """what is trained: upper, the matrices of the upper half of the layers and the head, avoiding what their inputs
    have in common; full, all weights, which takes longer; localised, the channel mix's value matrices of the upper
    half, along the model's curvature, which needs less memory; lora, low-rank changes of the same; pissa, those which
    begin as their principal components; miss, one small matrix repeated along the inputs of each; state, only the state
    in which a dialogue begins"""

    step_factor: float = 0.9
    """share of the loss that one step should take away, going by its gradient: the factor of Polyak's step"""

    steps: int = 25
    """most gradient steps of one correction"""

    target_loss: float = 0.05
    """mean loss of the answer, in nats a token, below which it counts as learnt"""

    extra: int = 1
    """steps taken after it is learnt"""

    paraphrases: int = 6
    """other wordings of the question that are taught along: by rule, and as far as the model knows some"""

    random_prefixes: int = 3
    """times that the question is also taught after dialogues that have nothing to do with it"""

    replay: int = 16
    """earlier corrections trained along"""

    contrasts: int = 20
    """questions with another word in the place of one of the question's, whose answers are kept"""

    rehearsed: int = 6
    """dialogues of the rehearsal set that are kept, a third of them the nearest to the correction"""

    free_running: int = 2
    """free-running samples, of those that random prefixes are drawn from, that are kept"""

    kl_weight: float = 8.0
    """weight of what is kept: of its divergence from the model before; it grows if that stays large"""

    max_kl: float = 0.05
    """largest mean divergence on the rehearsal set, in nats a token, that is accepted"""

    avoidance: float = 3.0
    """how much a step avoids what contrasts share with the question, beside all other text; for trainable upper"""

    truncation: int = 64
    """tokens before an answer that gradients flow through"""

    learn_rate: float = 1e-2
    """of /learn, in root mean squares of the gradient"""

    learn_decay: float = 1e-3
    """of /learn: share of the way back to the weights before it that every step goes"""

    layers: int = 0
    """uppermost layers that upper, localised, lora, pissa and miss train; 0 is the upper half of them, which is the
    most"""

    rank: int = 8
    """of the changes that lora, pissa and miss train"""

    sleep_after: float = 0.0
    """minutes without a line typed after which all corrections are learnt together, as by /sleep; 0 is never"""

    def __post_init__(self):
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name == "trainable":
                if value not in get_args(Trainable):
                    raise ValueError(f"trainable must be one of {', '.join(get_args(Trainable))}, found {value!r}")
            elif f.name == "rank" and value < 1:
                raise ValueError(f"rank must be at least 1, found {value}")
            elif not value >= 0:
                raise ValueError(f"{f.name} must not be negative, found {value}")
            elif value == inf and f.name != "max_kl":  # without a limit, the gate accepts any drift
                raise ValueError(f"{f.name} must be finite, found {value}")


def _taking_old_names(init):
    @wraps(init)
    def taking(self, **settings) -> None:
        settings = renamed(settings)
        known = [f.name for f in fields(self)]
        if unknown := sorted(settings.keys() - set(known)):
            raise ValueError(f"there is no setting {unknown[0]} of corrections; there are: {', '.join(known)}")
        init(self, **settings)

    return taking


FeedbackConfig.__init__ = _taking_old_names(FeedbackConfig.__init__)
