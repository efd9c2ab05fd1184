"""Sampling from a state: constant memory and time per token, however long the text before."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from rwkv_train.models.base import RWKV
from rwkv_train.models.finite import finite
from rwkv_train.models.state import State
from rwkv_train.tokenizer import StreamDecoder, Tokenizer

PREFILL = 1024  # tokens of a prompt read at once
COLDEST = 1e-6  # a temperature below it is 0: logits over it could be no number any more
LARGEST = 1e30  # of a setting


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from the logits.

    Args:
        temperature: below 1 is safer, above 1 bolder, 0 always takes the likeliest token
        top_p: sample from the likeliest tokens that make up this much probability
        top_k: sample from this many of the likeliest tokens; 0 is all
        presence_penalty: taken from the logit of every token that the reply so far holds; below 0 invites repeats
        frequency_penalty: the same, once for each time the token is in the reply
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    def __post_init__(self):
        for f in fields(self):
            if not abs(getattr(self, f.name)) <= LARGEST:
                raise ValueError(f"{f.name} must be a number up to {LARGEST:g}, found {getattr(self, f.name)}")
        if self.temperature < 0:
            raise ValueError(f"temperature must not be negative, found {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, found {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k must not be negative, found {self.top_k}")

    def __call__(
        self, logits: Tensor, rng: torch.Generator | None = None, used: Mapping[int, int] | None = None
    ) -> int:
        """One token id from logits [V]; used: how often each token is in the reply so far, for the penalties."""
        if used and (self.presence_penalty or self.frequency_penalty):
            logits = logits.to(torch.float32, copy=True)
            counts = torch.tensor(list(used.values()), device=logits.device)
            logits[list(used)] -= self.presence_penalty + self.frequency_penalty * counts
        if self.temperature < COLDEST:
            return int(logits.argmax())
        p = (logits.float() / self.temperature).softmax(-1).cpu()
        if self.top_k or self.top_p < 1:
            values = torch.from_numpy(np.sort(p.numpy())).flip(0)[: self.top_k or None]  # torch's sort is 20x slower
            likely = values[values.cumsum(-1) - values < self.top_p]  # the likeliest token always stays
            p[p < likely[-1]] = 0
        return int(torch.multinomial(p, 1, generator=rng))


def random_numbers(seed: int) -> torch.Generator:
    """A row of random numbers. ValueError for a seed that torch cannot take as it is."""
    if not 0 <= seed < 2**63:
        raise ValueError(f"a seed must be at least 0 and below 2**63, found {seed}")
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def prefill(model: RWKV, tokens: list[int], state: State | None = None) -> tuple[Tensor, State]:
    """Read a prompt of at least one token: (logits [V] of what follows, state after it).

    Raises NotFinite, a ValueError, if the model gives no finite number.
    """
    if not tokens:
        raise ValueError("a prompt needs at least one token")
    for i in range(0, len(tokens), PREFILL):
        x, state = model.hidden(torch.tensor([tokens[i : i + PREFILL]], device=model.device), state)
    return finite(model.head(x[0, -1]), model), state


def stream_tokens(
    model: RWKV,
    logits: Tensor,
    state: State,
    sampling: Sampling,
    max_new_tokens: int,
    stop: frozenset[int] = frozenset(),
    rng: torch.Generator | None = None,
) -> Iterator[tuple[int, State]]:
    """Up to `max_new_tokens` tokens sampled from `logits` and what follows, each with the state after it.

    Ends before a token in `stop`. The penalties count the tokens of this call.
    """
    used: Counter[int] = Counter()
    for _ in range(max_new_tokens):
        token = sampling(logits, rng, used)
        if token in stop:
            return
        used[token] += 1
        logits, state = prefill(model, [token], state)
        yield token, state


def generate_text(
    model: RWKV, tokenizer: Tokenizer, prompt: str, sampling: Sampling, max_new_tokens: int, seed: int = 0
) -> Iterator[str]:
    """The continuation of a prompt, piece by piece, never breaking inside a character; ends at a document's end.

    As in training, a text starts after the end-of-document token.
    """
    logits, state = prefill(model, [tokenizer.eod, *tokenizer.encode(prompt)])
    rng, decoder = random_numbers(seed), StreamDecoder(tokenizer)
    for token, _ in stream_tokens(model, logits, state, sampling, max_new_tokens, frozenset([tokenizer.eod]), rng):
        if piece := decoder.push(token):
            yield piece
    if piece := decoder.flush():
        yield piece
