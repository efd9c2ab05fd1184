"""Greedy decoding of many prompts at once."""

from itertools import groupby

import torch
from torch import Tensor

from rwkv_train.models.common import RWKV
from rwkv_train.state import State
from rwkv_train.tokenizer import Tokenizer

END = "\n\n"  # ends a reply


@torch.no_grad()
def greedy(
    model: RWKV, tokenizer: Tokenizer, prompts: list[list[int]], state: State | None = None, most: int = 48
) -> list[str]:
    """The greedy reply to each prompt, up to a blank line, the end of the document, or `most` tokens.

    prompts: token ids, at least one each. state: of one lane, from which every prompt goes on; None is empty.
    """
    replies = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for _, group in groupby(order, key=lambda i: len(prompts[i])):
        rows = list(group)
        for row, ids in zip(rows, _decode(model, tokenizer, [prompts[i] for i in rows], state, most), strict=True):
            replies[row] = tokenizer.decode(ids).split(END)[0].strip()
    return replies


def _decode(model, tokenizer, prompts, state, most) -> list[list[int]]:
    """Replies to prompts of one length, as ids; each may go on past its end."""
    if state is not None:
        state = state.select([0] * len(prompts))
    tokens = torch.tensor(prompts)
    ids: list[list[int]] = [[] for _ in prompts]
    open_rows = set(range(len(prompts)))
    for _ in range(most):
        x, state = model.hidden(tokens, state)
        best: Tensor = model.head(x[:, -1]).argmax(-1)
        for row in list(open_rows):
            token = int(best[row])
            if token != tokenizer.eod:
                ids[row].append(token)
            if token == tokenizer.eod or END in tokenizer.decode(ids[row][-8:]):
                open_rows.discard(row)
        if not open_rows:
            break
        tokens = best[:, None]
    return ids
