"""What the batcher is asked for, and what it tells."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from rwkv_train.data.templates import Template
from rwkv_train.generation.decoder import Constraint, Scores
from rwkv_train.generation.sampling import Sampling
from rwkv_train.models.base import RWKV
from rwkv_train.models.state import State

T = TypeVar("T")
Reason = Literal["stop", "length", "cancelled", "time", "error"]


class Full(Exception):
    """As many replies wait as may."""


class Piece(NamedTuple):
    """What a token brought. text: what can be shown now, perhaps nothing; scores: of the token, where asked for;
    thought: what is new of what goes before the reply."""

    choice: int
    token: int
    text: str
    scores: Scores | None
    thought: str = ""


class End(NamedTuple):
    """A choice's end.

    text: its last piece; shown: all of it. ids: the tokens that hold exactly that; state: after them, of one lane, or
    None where nobody knows it. ended: the model wrote the end of the turn. count: tokens written. error: what went
    wrong, in a line. thought: what went before the reply; the tokens and the state are without it.
    """

    choice: int
    reason: Reason
    text: str
    shown: str
    ids: list[int]
    state: State | None
    ended: bool
    count: int
    error: str = ""
    thought: str = ""


Event = Piece | End


@dataclass(eq=False)
class Job:
    """A prompt, and the replies to it that are asked for.

    prompt: ids, read after `state` (of one lane; None: a document's beginning); history: these without what is written
    of the reply for the model. seeds: one for each choice. tell(event): called in the batcher's thread. template: as
    which replies are written; None if they are no turns of a chat. stop: texts before which they end. constraint: makes
    a choice's. likeliest: as of `Decoder.add`. seconds: after which it is broken off.
    """

    model: RWKV
    prompt: list[int]
    state: State | None
    sampling: Sampling
    seeds: list[int]
    max_new_tokens: int
    tell: Callable[[Event], None]
    template: Template | None = None
    history: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    constraint: Callable[[], Constraint] | None = None
    likeliest: int | None = None
    seconds: float = float("inf")


class Bound:
    """A constraint that ends its text, and no other one, where it cannot be followed any further."""

    def __init__(self, constraint: Constraint, vocab_size: int, eod: int):
        self._constraint, self._only_eod, self.error = constraint, torch.arange(vocab_size) == eod, ""

    def mask(self) -> Tensor:
        return self._only_eod if self.error else self._tried(self._constraint.mask, self._only_eod)

    def accept(self, token: int) -> None:
        if not self.error:
            self._tried(lambda: self._constraint.accept(token), None)

    def _tried(self, call: Callable[[], T], otherwise: T) -> T:
        try:
            return call()
        except ValueError as error:
            self.error = str(error)
            return otherwise
