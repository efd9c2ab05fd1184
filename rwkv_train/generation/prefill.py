"""Reading prompts: what comes before the first token that is chosen."""

import torch
from torch import Tensor

from rwkv_train.models.base import RWKV
from rwkv_train.models.finite import finite
from rwkv_train.models.state import State

PREFILL = 1024  # tokens of prompts read at once


def prefill(model: RWKV, tokens: list[int], state: State | None = None) -> tuple[Tensor, State]:
    """Read a prompt of at least one token: (logits [V] of what follows, state after it).

    Raises NotFinite, a ValueError, if the model gives no finite number.
    """
    logits, state = prefill_all(model, [tokens], [state])
    return logits[0], state


@torch.no_grad()
def prefill_all(model: RWKV, prompts: list[list[int]], states: list[State | None]) -> tuple[Tensor, State]:
    """Read prompts of any lengths side by side: (logits [N,V] of what follows each, states after them, N lanes).

    states: of one lane each, None for a document's beginning. A prompt that ends leaves the others, so nothing is
    padded. Raises ValueError for a prompt without tokens, NotFinite, another, if the model gives no finite number.
    """
    if not all(prompts):
        raise ValueError("a prompt needs at least one token")
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    going, read, logits, ends = [prompts[i] for i in order], 0, [], []
    begun = [states[i] or model.empty_state(1) for i in order] if any(states) else [model.empty_state(len(order))]
    state = joined(begun)
    while going:
        width = min(len(going[0]) - read, max(1, PREFILL // len(going)))
        x, state = model.hidden(torch.tensor([p[read : read + width] for p in going], device=model.device), state)
        read += width
        ended = sum(len(p) == read for p in going)
        if ended:
            logits.append(model.head(x[:ended, -1]))
            ends.append(state if ended == len(going) else state.select(slice(ended)))
            going, state = going[ended:], state.select(slice(ended, None))
    logits, state = torch.cat(logits), joined(ends)
    if len(order) > 1:
        back = sorted(range(len(order)), key=order.__getitem__)
        logits, state = logits[back], state.select(back)
    return finite(logits, model), state


def joined(states: list[State]) -> State:
    """The lanes of some states, one after another."""
    return states[0] if len(states) == 1 else State(*map(torch.cat, zip(*states, strict=True)))
