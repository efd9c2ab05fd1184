"""Many texts at once: each token of all of them is one step, and texts join and leave between two steps."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rwkv_train.generation.lanes import Lanes, Recorded, give_back, take
from rwkv_train.generation.prefill import joined, prefill_all
from rwkv_train.generation.sampling import Needs, Sampling, choose
from rwkv_train.models.base import RWKV
from rwkv_train.models.state import State


class Written(NamedTuple):
    """What a step wrote in a lane.

    token: None where the lane met a token at which it stops
    state: of one lane after its last token, if that was its end; otherwise None, and `Decoder.state` has it
    """

    lane: int
    token: int | None
    state: State | None


@dataclass(eq=False)
class _Text:
    lane: int
    sampling: Sampling
    rng: torch.Generator | None
    stop: frozenset[int]
    left: int  # tokens that it may still get
    next: int = -1  # its next token, chosen and not yet read

    def uniform(self) -> float:
        """The number that chooses its next token; none is drawn where it is not asked for."""
        asked = self.left > 0 and not self.sampling.greedy
        return float(torch.rand((), generator=self.rng, dtype=torch.float64)) if asked else 0.0


class Decoder:
    """Texts that a model writes side by side, each as it would alone: a lane has its own state, settings and chance.

        decoder = Decoder(model)
        for prompt in prompts:
            decoder.add(prompt, Sampling(), random_numbers(seed), stop, 100)
        while len(decoder):
            for lane, token, state in decoder.step():
                ...

    What is written alone and in company differs only where a model's sums in another order choose another token.
    graphs: on a GPU a step is a CUDA graph, unless this is False; `is_recorded` says whether the last one was.
    One thread at a time; `close` it when texts are left.
    """

    def __init__(self, model: RWKV, graphs: bool = True):
        self.model, self._graphs, self._count = model, graphs, 0
        self._unread: list[tuple[_Text, list[int], State | None]] = []
        self._read: list[tuple[_Text, Tensor, State]] = []
        self._texts: list[_Text] = []  # in the order of the lanes
        self._runner, self.is_recorded = None, False

    def __len__(self) -> int:
        """Texts that have not ended."""
        return len(self._texts) + len(self._unread) + len(self._read)

    def add(
        self,
        prompt: list[int],
        sampling: Sampling,
        rng: torch.Generator | None = None,
        stop: frozenset[int] = frozenset(),
        max_new_tokens: int = 200,
        state: State | None = None,
    ) -> int:
        """A text that goes on after a prompt of at least one token, from the next step on; returns its lane's number.

        It ends before a token in `stop`, or after `max_new_tokens` (at least 1). rng: its chance, one number a token;
        None: torch's. state: of one lane, before the prompt; None: a document's beginning. The penalties count what
        the lane writes. Raises ValueError for a prompt or a number of tokens that is none.
        """
        if not prompt:
            raise ValueError("a prompt needs at least one token")
        self._unread.append((self._text(sampling, rng, stop, max_new_tokens), prompt, state))
        return self._count

    def go_on(
        self,
        logits: Tensor,
        state: State,
        sampling: Sampling,
        rng: torch.Generator | None = None,
        stop: frozenset[int] = frozenset(),
        max_new_tokens: int = 200,
    ) -> int:
        """As `add`, after a prompt that has been read: logits [V] of what follows, state of one lane after it."""
        self._read.append((self._text(sampling, rng, stop, max_new_tokens), logits[None], state))
        return self._count

    def step(self) -> list[Written]:
        """Another token of every text; those that end leave. Raises NotFinite, a ValueError, as `prefill` does."""
        if self._unread:
            texts, prompts, states = zip(*self._unread, strict=True)
            self._join(list(texts), *prefill_all(self.model, prompts, states))
            self._unread = []
        if self._read:
            texts, logits, states = zip(*self._read, strict=True)
            self._join(list(texts), torch.cat(logits), joined(states))
            self._read = []
        written = [Written(t.lane, None, self.state(t.lane)) for t in self._texts if t.next in t.stop]
        self._keep([t for t in self._texts if t.next not in t.stop])
        if not self._texts:
            return written
        read = [t.next for t in self._texts]
        for t in self._texts:
            t.left -= 1
        self.is_recorded = isinstance(self._runner, Recorded)
        self._chosen(self._texts, self._runner.step(self.model, self._uniform(self._texts)))
        for t, token in zip(self._texts, read, strict=True):
            written.append(Written(t.lane, token, None if t.left else self.state(t.lane)))
        self._keep([t for t in self._texts if t.left])
        return written

    def state(self, lane: int) -> State:
        """The state of a lane that is being written, after its last token."""
        return self._runner.state([t.lane for t in self._texts].index(lane))

    def drop(self, lane: int) -> None:
        """End a text early, or do nothing where it has ended."""
        self._unread = [waiting for waiting in self._unread if waiting[0].lane != lane]
        self._read = [waiting for waiting in self._read if waiting[0].lane != lane]
        self._keep([t for t in self._texts if t.lane != lane])

    def close(self) -> None:
        """End all texts."""
        self._unread, self._read = [], []
        self._keep([])

    def _text(self, sampling, rng, stop, max_new_tokens) -> _Text:
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, found {max_new_tokens}")
        self._count += 1
        return _Text(self._count, sampling, rng, stop, max_new_tokens)

    def _uniform(self, texts: list[_Text]) -> Tensor:
        return torch.tensor([t.uniform() for t in texts], dtype=torch.float64)

    def _chosen(self, texts: list[_Text], tokens: list[int]) -> None:
        for t, token in zip(texts, tokens, strict=True):
            t.next = token

    def _join(self, texts: list[_Text], logits: Tensor, state: State) -> None:
        """Choose the first tokens of texts whose prompts have been read, and put them behind the others."""
        device = logits.device
        needs = Needs.of(t.sampling for t in self._texts + texts)
        settings = torch.tensor([t.sampling.numbers for t in texts], device=device)
        counts = torch.zeros(logits.shape, device=device) if needs.penalised else None
        token = choose(logits, settings, self._uniform(texts).to(device), needs, counts)
        self._chosen(texts, token.tolist())
        lanes = Lanes(token, state, settings, counts)
        if self._texts:
            others = self._runner.lanes
            if needs.penalised and others.counts is None:
                others = others._replace(counts=counts.new_zeros(len(others.token), counts.shape[1]))
            lanes = (others if needs.penalised else others._replace(counts=None)).join(lanes)
        self._place(self._texts + texts, lanes, needs)

    def _keep(self, texts: list[_Text]) -> None:
        if len(texts) < len(self._texts):
            lanes = self._runner.lanes.select([i for i, t in enumerate(self._texts) if t in texts])
            self._place(texts, lanes, self._runner.needs)

    def _place(self, texts: list[_Text], lanes: Lanes, needs: Needs) -> None:
        if self._runner:
            give_back(self._runner, self.model)
        self._texts = texts
        self._runner = take(self.model, lanes, needs, self._graphs) if texts else None
