"""Validation: loss, perplexity, bits per byte, and loss by position in the document."""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from rwkv_train.models.base import RWKV
from rwkv_train.models.loss import IGNORE_INDEX, token_nll
from rwkv_train.models.state import State
from rwkv_train.tokenizer import Tokenizer

FIRST = 16  # positions 0..15 share the first bucket; each next bucket is twice as wide
BUCKETS = 40


def perplexity(loss: float) -> float:
    """exp of a loss in nats, finite also for a hopeless one; nan for no loss."""
    return math.exp(min(loss, 700))


def byte_lengths(tokenizer: Tokenizer | None, vocab_size: int) -> np.ndarray | None:
    """Bytes of text each token of a model's vocabulary stands for, int64 [vocab_size]; None without tokenizer."""
    if tokenizer is None:
        return None
    lengths = tokenizer.byte_lengths()
    return np.pad(lengths, (0, max(0, vocab_size - len(lengths))))


@dataclass
class Score:
    """What a text cost: sums [BUCKETS] of nats and counts [BUCKETS] of trained tokens by position, and its bytes."""

    nats: Tensor
    counts: Tensor
    bytes: int | None = None

    @cached_property
    def tokens(self) -> int:
        return int(self.counts.sum())

    @property
    def loss(self) -> float:
        """Mean nats a token; nan where no token was scored, which is not a good result but none."""
        return float(self.nats.sum()) / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self) -> float:
        return perplexity(self.loss)

    @property
    def bits_per_byte(self) -> float | None:
        """Comparable between tokenizers; None where the tokenizer is not known, or no text was scored."""
        return float(self.nats.sum()) / math.log(2) / self.bytes if self.bytes else None

    def by_position(self) -> list[tuple[int, int, float, int]]:
        """(first position, last position, mean nats, tokens) of each bucket that has tokens."""
        rows = []
        for i, (nats, count) in enumerate(zip(self.nats.tolist(), self.counts.tolist(), strict=True)):
            if count:
                first = 0 if i == 0 else FIRST << (i - 1)
                rows.append((first, (FIRST << i) - 1, nats / count, int(count)))
        return rows


class Scorer:
    """Reads batches of lanes in order, carrying their state, and adds up a Score.

    byte_lengths [V]: bytes of text each token stands for, for bits per byte.
    forget: start every batch from the empty state, to see what the carried state buys.
    """

    def __init__(self, model: RWKV, byte_lengths: np.ndarray | None = None, forget: bool = False):
        self.model, self.forget = model, forget
        self.byte_lengths = None if byte_lengths is None else torch.from_numpy(byte_lengths).to(model.device)
        self.nats = torch.zeros(BUCKETS, dtype=torch.float64, device=model.device)
        self.counts = torch.zeros(BUCKETS, dtype=torch.float64, device=model.device)
        self.bytes = torch.zeros((), dtype=torch.int64, device=model.device)
        self.state: State | None = None

    @torch.no_grad()
    def add(self, batch: dict[str, Tensor]) -> None:
        """Score one batch of `LaneBatches`; the next one must continue its rows."""
        state = None if self.forget else self.state
        x, self.state = self.model.hidden(batch["tokens"], state, batch["reset"])
        targets = batch["targets"]
        trained = targets != IGNORE_INDEX
        nll = token_nll(x, self.model.head.weight, targets).double()
        position = batch["position"][trained]
        bucket = (torch.log2((position // FIRST).clamp(min=1).double()).floor().long() + 1) * (position >= FIRST)
        self.nats.index_add_(0, bucket, nll)
        self.counts.index_add_(0, bucket, torch.ones_like(nll))
        if self.byte_lengths is not None:
            self.bytes += self.byte_lengths[targets[trained]].sum()

    def score(self, reduce=lambda t: t) -> Score:
        """The sums so far; reduce adds a tensor up over the ranks."""
        n_bytes = None if self.byte_lengths is None else int(reduce(self.bytes))
        return Score(reduce(self.nats).cpu(), reduce(self.counts).cpu(), n_bytes)


def position_table(score: Score, forgotten: Score | None = None, chunk_len: int = 0) -> str:
    """Loss by position as lines of text, beside that of a model that forgets at every chunk if given."""
    lines = ["position in document      tokens    loss" + (f"   state dropped every {chunk_len}" if forgotten else "")]
    other = {row[0]: row[2] for row in forgotten.by_position()} if forgotten else {}
    for first, last, loss, count in score.by_position():
        line = f"{first:>9} to {last:<9} {count:>9} {loss:>7.3f}"
        lines.append(line + (f"   {other[first]:.3f} ({other[first] - loss:+.3f})" if forgotten else ""))
    return "\n".join(lines)
