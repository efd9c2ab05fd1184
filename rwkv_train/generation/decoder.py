"""Many texts at once: each token of all of them is one step, and texts join and leave between two steps."""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from rwkv_train.generation.lanes import Lanes, Recorded, give_back, take
from rwkv_train.generation.prefill import joined, prefill, prefill_all
from rwkv_train.generation.sampling import Needs, Sampling, choose
from rwkv_train.models.base import RWKV
from rwkv_train.models.state import State


class Scores(NamedTuple):
    """Log probabilities, in nats, that a model gave a token and its likeliest ones, as [(token, ...), ...].

    They are the model's own: before temperature, penalties, and what a constraint forbids.
    """

    token: float
    likeliest: list[tuple[int, float]]


class Written(NamedTuple):
    """What a step wrote in a lane.

    token: None where the lane met a token at which it stops
    state: of one lane after its last token, if that was its end; otherwise None, and `Decoder.state` has it
    scores: of the token, where they were asked for
    """

    lane: int
    token: int | None
    state: State | None
    scores: Scores | None = None


class Constraint(Protocol):
    """What a text may be, such as JSON."""

    def mask(self) -> Tensor:
        """The tokens [V] bool that may come next, at least one."""

    def accept(self, token: int) -> None:
        """The next token is this one."""


@dataclass(eq=False)
class _Text:
    lane: int
    sampling: Sampling
    rng: torch.Generator | None
    stop: frozenset[int]
    left: int  # tokens that it may still get
    constraint: Constraint | None = None
    likeliest: int | None = None  # tokens whose log probabilities are asked for, None for no scores at all
    next: int = -1  # its next token, chosen and not yet read
    scores: Scores | None = None  # of the next token

    def uniform(self) -> float:
        """The number that chooses its next token; none is drawn where it is not asked for."""
        asked = self.left > 0 and not self.sampling.greedy
        return float(torch.rand((), generator=self.rng, dtype=torch.float64)) if asked else 0.0


@dataclass(eq=False)
class _Prompt:
    texts: list[_Text]
    ids: list[int]  # not read yet
    state: State | None


class Decoder:
    """Texts that a model writes side by side, each as it would alone: a lane has its own state, settings and chance.

        decoder = Decoder(model)
        for prompt in prompts:
            decoder.add(prompt, Sampling(), random_numbers(seed), stop, 100)
        while len(decoder):
            for lane, token, state, scores in decoder.step():
                ...

    What is written alone and in company differs only where a model's sums in another order choose another token.
    graphs: on a GPU a step is a CUDA graph, unless this is False; `is_recorded` says whether the last one was.
    piece: tokens of prompts that a step reads, so that a long one stalls nobody; each prompt is then read by itself,
    cut at multiples of it. None reads all prompts in the next step, side by side. One thread at a time; `close` it
    when texts are left.
    """

    def __init__(self, model: RWKV, graphs: bool = True, piece: int | None = None):
        self.model, self._graphs, self._piece, self._count = model, graphs, piece, 0
        self._unread: list[_Prompt] = []
        self._read: list[tuple[list[_Text], Tensor, State]] = []
        self._texts: list[_Text] = []  # in the order of the lanes
        self._runner, self.is_recorded = None, False

    def __len__(self) -> int:
        """Texts that have not ended."""
        waiting = [*(prompt.texts for prompt in self._unread), *(texts for texts, *_ in self._read)]
        return len(self._texts) + sum(map(len, waiting))

    def add(
        self,
        prompt: list[int],
        sampling: Sampling,
        rng: torch.Generator | None = None,
        stop: frozenset[int] = frozenset(),
        max_new_tokens: int = 200,
        state: State | None = None,
        constraint: Constraint | None = None,
        likeliest: int | None = None,
    ) -> int:
        """A text that goes on after a prompt of at least one token, from the next step on; returns its lane's number.

        It ends before a token in `stop`, or after `max_new_tokens` (at least 1). rng: its chance, one number a token;
        None: torch's. state: of one lane, before the prompt; None: a document's beginning. The penalties count what
        the lane writes. constraint: of this text alone; what it allows at its end must be in `stop`. likeliest: give
        scores, with so many of the likeliest tokens. Raises ValueError for a prompt or a number of tokens that is none.
        """
        if not prompt:
            raise ValueError("a prompt needs at least one token")
        text = self._text(sampling, rng, stop, max_new_tokens, constraint, likeliest)
        self._unread.append(_Prompt([text], prompt, state))
        return self._count

    def beside(self, lane: int, rng: torch.Generator | None = None, constraint: Constraint | None = None) -> int:
        """Another text after the prompt of a lane that was just added, asked for alike; the prompt is read once."""
        (prompt,) = [p for p in self._unread if p.texts[0].lane == lane]
        like = prompt.texts[0]
        prompt.texts.append(self._text(like.sampling, rng, like.stop, like.left, constraint, like.likeliest))
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
        self._read.append(([self._text(sampling, rng, stop, max_new_tokens)], logits[None], state))
        return self._count

    def step(self) -> list[Written]:
        """Another token of every text; those that end leave. Raises NotFinite, a ValueError, as `prefill` does."""
        self._read_prompts()
        if self._read:
            texts, logits, states = zip(*self._read, strict=True)
            rows = [row for row, together in enumerate(texts) for _ in together]
            self._read = []
            self._join(
                [t for together in texts for t in together], torch.cat(logits)[rows], joined(states).select(rows)
            )
        written = [Written(t.lane, None, self.state(t.lane)) for t in self._texts if t.next in t.stop]
        self._keep([t for t in self._texts if t.next not in t.stop])
        if not self._texts:
            return written
        read = [(t.next, t.scores) for t in self._texts]
        for t in self._texts:
            t.left -= 1
            if t.constraint:
                t.constraint.accept(t.next)
        self.is_recorded = isinstance(self._runner, Recorded)
        tokens = self._runner.step(self.model, self._uniform(self._texts), self._allowed(self._texts))
        self._chosen(self._texts, tokens, self._runner.logits)
        for t, (token, scores) in zip(self._texts, read, strict=True):
            written.append(Written(t.lane, token, None if t.left else self.state(t.lane), scores))
        self._keep([t for t in self._texts if t.left])
        return written

    def following(self, lane: int) -> int:
        """The token that a lane which is being written has chosen, and that the next step writes or stops at."""
        return next(t.next for t in self._texts if t.lane == lane)

    def state(self, lane: int) -> State:
        """The state of a lane that is being written, after its last token."""
        return self._runner.state([t.lane for t in self._texts].index(lane))

    def drop(self, lane: int) -> None:
        """End a text early, or do nothing where it has ended."""
        for texts in [*(prompt.texts for prompt in self._unread), *(texts for texts, *_ in self._read)]:
            texts[:] = [t for t in texts if t.lane != lane]
        self._unread = [prompt for prompt in self._unread if prompt.texts]
        self._read = [waiting for waiting in self._read if waiting[0]]
        self._keep([t for t in self._texts if t.lane != lane])

    def close(self) -> None:
        """End all texts."""
        self._unread, self._read = [], []
        self._keep([])

    def _text(self, sampling, rng, stop, max_new_tokens, constraint=None, likeliest=None) -> _Text:
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, found {max_new_tokens}")
        self._count += 1
        return _Text(self._count, sampling, rng, stop, max_new_tokens, constraint, likeliest)

    def _read_prompts(self) -> None:
        """Read what has not been read, or a piece of it: of each prompt in turn."""
        if self._unread and self._piece is None:
            logits, states = prefill_all(self.model, [p.ids for p in self._unread], [p.state for p in self._unread])
            rows = [(prompt.texts, logits[i : i + 1], states.select(i)) for i, prompt in enumerate(self._unread)]
            self._read, self._unread = rows + self._read, []
        left = self._piece or 0
        while self._unread and left > 0:
            prompt = self._unread.pop(0)
            now, prompt.ids = prompt.ids[: self._piece], prompt.ids[self._piece :]
            logits, prompt.state = prefill(self.model, now, prompt.state)
            left -= len(now)
            if prompt.ids:
                self._unread.append(prompt)
            else:
                self._read.append((prompt.texts, logits[None], prompt.state))

    def _uniform(self, texts: list[_Text]) -> Tensor:
        return torch.tensor([t.uniform() for t in texts], dtype=torch.float64)

    def _allowed(self, texts: list[_Text]) -> Tensor | None:
        """As `choose` takes it."""
        if not any(t.constraint for t in texts):
            return None
        allowed = torch.ones(len(texts), self.model.config.vocab_size, dtype=torch.bool)
        for row, t in zip(allowed, texts, strict=True):
            if t.constraint:
                row.copy_(t.constraint.mask())
        return allowed.to(self.model.device)

    def _chosen(self, texts: list[_Text], tokens: list[int], logits: Tensor) -> None:
        """tokens: the next one of each text, chosen by logits [N,V]."""
        for t, token in zip(texts, tokens, strict=True):
            t.next = token
        asked = [i for i, t in enumerate(texts) if t.likeliest is not None]
        if asked:
            scores = logits[asked].float().log_softmax(-1)
            top = scores.topk(min(max(texts[i].likeliest for i in asked), scores.shape[1]))
            for i, row, *likeliest in zip(asked, scores, top.indices.tolist(), top.values.tolist(), strict=True):
                likeliest = list(zip(*likeliest, strict=True))[: texts[i].likeliest]
                texts[i].scores = Scores(float(row[texts[i].next]), likeliest)

    def _join(self, texts: list[_Text], logits: Tensor, state: State) -> None:
        """Choose the first tokens of texts whose prompts have been read, and put them behind the others."""
        device = logits.device
        masked = any(t.constraint for t in self._texts + texts)
        needs = Needs.of((t.sampling for t in self._texts + texts), masked)
        settings = torch.tensor([t.sampling.numbers for t in texts], device=device)
        counts = torch.zeros(logits.shape, device=device) if needs.penalised else None
        token = choose(logits, settings, self._uniform(texts).to(device), needs, counts, self._allowed(texts))
        self._chosen(texts, token.tolist(), logits)
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
