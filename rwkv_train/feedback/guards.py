"""Guard rows: text on which a corrected model must go on as before.

Neighbours (rows that share words with the correction) catch answers that spread to similar questions, unrelated rows
catch drift everywhere else. The right continuation of a guard row is whatever the base model thinks of it, so any
text will do.
"""

import torch
from torch import Tensor

from rwkv_train.models.common import RWKV


class Guards:
    """A pool of token rows, and the base model's logits on those that were drawn, kept for the next time.

    rows: lists of token ids, without the end-of-document token that is put in front of each.
    """

    def __init__(self, base: RWKV, rows: list[list[int]], eod: int, longest: int = 64):
        rows = [[eod, *row[: longest - 1]] for row in rows if row]
        if not rows:
            raise ValueError("the guard text is empty; give some text that the model should go on knowing")
        self._base, self._rows = base, rows
        self._words = [frozenset(row[1:]) for row in rows]
        self._logits: dict[int, Tensor] = {}

    @classmethod
    @torch.no_grad()
    def of_model(cls, base: RWKV, begin: list[int], eod: int, count: int = 512, length: int = 48) -> "Guards":
        """What a model says by itself after `begin`: it covers what the model knows, and needs no data set.

        The same model gives the same `count` rows of `length` tokens.
        """
        rng = torch.Generator().manual_seed(0)
        tokens = torch.tensor([[eod, *begin]]).expand(count, -1)
        rows, state = [tokens[:, 1:]], None
        for _ in range(length):
            x, state = base.hidden(tokens, state)
            tokens = torch.multinomial(base.head(x[:, -1]).float().softmax(-1), 1, generator=rng)
            rows.append(tokens)
        return cls(base, torch.cat(rows, 1).tolist(), eod)

    def __len__(self) -> int:
        return len(self._rows)

    def near(self, tokens: list[int], most: int = 64) -> list[int]:
        """Indices of the rows that share most of their tokens with `tokens`, nearest first."""
        words = frozenset(tokens)
        shared = [len(words & w) / len(words | w) for w in self._words]
        return sorted(range(len(shared)), key=lambda i: -shared[i])[:most]

    def draw(self, indices: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """(tokens [R,T] int64, base log probabilities [R,T,V], real [R,T] bool) of some rows, padded at the end."""
        rows = [self._rows[i] for i in indices]
        tokens, real = pad(rows)
        for i, row in zip(indices, rows, strict=True):
            if i not in self._logits:
                with torch.no_grad():
                    self._logits[i] = self._base(torch.tensor([row]))[0][0].float().log_softmax(-1)
        width, vocabulary = tokens.shape[1], self._logits[indices[0]].shape[-1]
        logits = torch.zeros(len(rows), width, vocabulary)
        for r, i in enumerate(indices):
            logits[r, : len(rows[r])] = self._logits[i]
        return tokens, logits, real


def pad(rows: list[list[int]], fill: int = 0) -> tuple[Tensor, Tensor]:
    """Rows of different lengths as one tensor [R,T] int64, and where it holds them [R,T] bool."""
    width = max(map(len, rows))
    tokens = torch.tensor([row + [fill] * (width - len(row)) for row in rows])
    real = torch.arange(width) < torch.tensor([[len(row)] for row in rows])
    return tokens, real
