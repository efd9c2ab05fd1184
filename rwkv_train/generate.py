"""Sampling from a state: constant memory and time per token, however long the text before."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rwkv_train.models.common import RWKV
from rwkv_train.state import State
from rwkv_train.tokenizer import StreamDecoder, Tokenizer

PREFILL = 1024  # tokens of a prompt read at once


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from the logits.

    Args:
        temperature: below 1 is safer, above 1 bolder, 0 always takes the likeliest token
        top_p: sample from the likeliest tokens that make up this much probability
        top_k: sample from this many of the likeliest tokens; 0 is all
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self):
        if self.temperature < 0:
            raise ValueError(f"temperature must not be negative, found {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, found {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k must not be negative, found {self.top_k}")

    def __call__(self, logits: Tensor, rng: torch.Generator | None = None) -> int:
        """One token id from logits [V]."""
        if self.temperature == 0:
            return int(logits.argmax())
        values, ids = (logits.float() / self.temperature).sort(descending=True)
        p = values.softmax(-1)
        if self.top_k:
            p[self.top_k :] = 0
        p[p.cumsum(-1) - p >= self.top_p] = 0  # the likeliest token always stays
        return int(ids[torch.multinomial(p.cpu(), 1, generator=rng)])


@torch.no_grad()
def prefill(model: RWKV, tokens: list[int], state: State | None = None) -> tuple[Tensor, State]:
    """Read a prompt of at least one token: (logits [V] of what follows, state after it)."""
    if not tokens:
        raise ValueError("a prompt needs at least one token")
    for i in range(0, len(tokens), PREFILL):
        x, state = model.hidden(torch.tensor([tokens[i : i + PREFILL]], device=model.device), state)
    return model.head(x[0, -1]), state


def stream(
    model: RWKV,
    logits: Tensor,
    state: State,
    sampling: Sampling,
    most: int,
    stop: frozenset[int] = frozenset(),
    rng: torch.Generator | None = None,
) -> Iterator[int]:
    """Up to `most` tokens sampled from `logits` and what follows; ends before a token in `stop`."""
    for _ in range(most):
        token = sampling(logits, rng)
        if token in stop:
            return
        yield token
        logits, state = prefill(model, [token], state)


def generate_text(
    model: RWKV, tokenizer: Tokenizer, prompt: str, sampling: Sampling, most: int, seed: int = 0
) -> Iterator[str]:
    """The continuation of a prompt, piece by piece, never breaking inside a character; ends at a document's end.

    As in training, a text starts after the end-of-document token.
    """
    logits, state = prefill(model, [tokenizer.eod, *tokenizer.encode(prompt)])
    rng, decoder = torch.Generator().manual_seed(seed), StreamDecoder(tokenizer)
    for token in stream(model, logits, state, sampling, most, frozenset([tokenizer.eod]), rng):
        if piece := decoder.push(token):
            yield piece
    if piece := decoder.flush():
        yield piece
