"""Documents -> lanes -> batches. The batch of step n is a pure function of n.

A batch row is a lane: an endless stream of documents laid end to end. Lanes take documents from one queue (the
documents of epoch 0 in a random order, then those of epoch 1, ...): whichever lane runs out first takes the next.
Row b of step n+1 continues row b of step n, so no row is ever padded and every rank has the same work to do.
"""

from array import array
from bisect import bisect_right
from dataclasses import dataclass
from heapq import heapify, heapreplace

import numpy as np
import torch
from torch.utils.data import Dataset

from rwkv_train.data.store import Store
from rwkv_train.models.loss import IGNORE_INDEX


@dataclass(frozen=True)
class Documents:
    """Some of a store's documents, or pieces of them: starts [D] and lengths [D] int64, in tokens of the store."""

    starts: np.ndarray
    lengths: np.ndarray

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum())

    def some(self, which: np.ndarray) -> "Documents":
        """Those at these places, or where this is true."""
        return Documents(self.starts[which], self.lengths[which])

    def cut(self, longest: int) -> "Documents":
        """The same text with documents over `longest` tokens cut into equal pieces, each a document of its own."""
        counts = -(-self.lengths // longest)
        which = np.repeat(np.arange(len(self)), counts)
        piece = np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)
        edges = [self.lengths[which] * (piece + i) // counts[which] for i in (0, 1)]
        return Documents(self.starts[which] + edges[0], edges[1] - edges[0])


def split(store: Store, held_out: float) -> tuple[Documents, Documents]:
    """(training, validation) documents: about this share of the trained tokens is held out, the same in every run.

    Whole documents are drawn at random, this share of them. Where those do not have half to twice the share of the
    trained tokens, as many are drawn as come closest to it, none of them larger than it; where whole documents cannot
    come near it, the end of the one that is trained most is held out.
    """
    if not 0 <= held_out < 1:
        raise ValueError(f"the held-out share must be at least 0 and below 1, found {held_out}")
    lengths = np.asarray(store.lengths, np.int64)
    documents = Documents(np.asarray(store.offsets, np.int64), lengths).some(lengths > 0)
    if not len(documents):
        raise ValueError(f"{store.path} holds no tokens; prepare it again from text that has some")
    if held_out == 0:
        return documents, documents.some(np.zeros(0, int))
    total = _all_trained(store)
    wanted = max(1.0, held_out * total)
    count = round(held_out * len(documents))
    order = np.random.default_rng(0).permutation(len(documents))
    drawn = order[:count]
    if count and not _near(trained_tokens(store, documents.some(drawn)).sum(), wanted, total):
        drawn = _draw(trained_tokens(store, documents), order, wanted, total)
    if not len(drawn):
        return _cut_end(store, documents, wanted)
    val = np.zeros(len(documents), bool)
    val[drawn] = True
    return documents.some(~val), documents.some(val)


def trained_tokens(store: Store, documents: Documents) -> np.ndarray:
    """How many tokens of each document are trained, int64 [D]."""
    if store.mask is None:
        return documents.lengths
    places = zip(documents.starts.tolist(), documents.lengths.tolist(), strict=True)
    return np.fromiter((np.count_nonzero(store.mask[s : s + n]) for s, n in places), np.int64, len(documents))


def _all_trained(store: Store) -> int:
    if store.mask is None:
        return len(store.tokens)
    return store.manifest["trained_tokens"] if store.manifest else int(np.count_nonzero(store.mask))


def any_trained(store: Store, documents: Documents) -> bool:
    """Whether there is anything to learn or to score."""
    if store.mask is None:
        return documents.tokens > 0
    places = zip(documents.starts.tolist(), documents.lengths.tolist(), strict=True)
    return any(store.mask[s : s + n].any() for s, n in places)


def _near(found: int, wanted: float, total: int) -> bool:
    """Whether so many held-out tokens are about as many as wanted, and leave some to train on."""
    return wanted / 2 <= found <= 2 * wanted and found < total


def _draw(counts: np.ndarray, order: np.ndarray, wanted: float, total: int) -> np.ndarray:
    """The first documents in this order, without those of more than `wanted` trained tokens, that come closest to it;
    none if all of them come to less than half."""
    order = order[counts[order] <= wanted]
    sums = np.cumsum(counts[order])
    sums = sums[sums < total]
    count = int(np.abs(sums - wanted).argmin()) + 1 if len(sums) else 0
    return order[:count] if count and _near(sums[count - 1], wanted, total) else order[:0]


def _cut_end(store: Store, documents: Documents, wanted: float) -> tuple[Documents, Documents]:
    """Hold out the end of the document with most trained tokens, at most half of these."""
    counts = trained_tokens(store, documents)
    longest = int(counts.argmax())
    start, length = int(documents.starts[longest]), int(documents.lengths[longest])
    tail = min(max(1, round(wanted)), int(counts[longest]) // 2)
    if not tail:
        raise ValueError(
            f"nothing can be held out of {store.path}: no document has two trained tokens; set the held-out share "
            "(data.val_share) to 0, or give it more text"
        )
    if store.mask is not None:  # as many tokens as hold that many trained ones
        tail = length - int(np.flatnonzero(store.mask[start : start + length])[-tail])
    lengths = documents.lengths.copy()
    lengths[longest] -= tail
    return Documents(documents.starts, lengths), Documents(np.array([start + length - tail]), np.array([tail]))


class Schedule:
    """Which document stands where in which lane: a pure function of (lengths, lanes, seed, epochs).

    epochs: None is endless; with a number, lanes end once all documents have been dealt out that often.
    """

    def __init__(self, lengths: np.ndarray, lanes: int, seed: int | None, epochs: int | None = None):
        self.lengths, self.seed, self.epochs = lengths, seed, epochs
        self.begins = [array("q") for _ in range(lanes)]  # position in the lane where each of its documents begins
        self.documents = [array("q") for _ in range(lanes)]
        self._ends = [(0, lane) for lane in range(lanes)]  # a heap: the lane that runs out first, first
        heapify(self._ends)
        self._queue = self._deal()

    def _deal(self):
        """The queue. seed None: longest first, which leaves lanes that end as even as can be."""
        epoch = 0
        while self.epochs is None or epoch < self.epochs:
            if self.seed is None:
                yield from np.argsort(-self.lengths, kind="stable").tolist()
            else:
                yield from np.random.default_rng((self.seed, epoch)).permutation(len(self.lengths)).tolist()
            epoch += 1

    def extend(self, position: int) -> None:
        """Deal documents until every lane reaches `position` (or, with epochs, until none are left)."""
        while self._ends[0][0] < position:
            document = next(self._queue, None)
            if document is None:
                return
            end, lane = self._ends[0]
            self.begins[lane].append(end)
            self.documents[lane].append(document)
            heapreplace(self._ends, (end + int(self.lengths[document]), lane))

    def length(self) -> int:
        """Tokens of the longest lane; only with epochs."""
        assert self.epochs is not None, "an endless schedule has no length"
        self.extend(1 << 62)
        return max(end for end, _ in self._ends)

    def window(self, lane: int, begin: int, end: int):
        """Stretches of lane positions [begin, end): (place in the window, document, offset in it, tokens)."""
        self.extend(end)
        begins, documents = self.begins[lane], self.documents[lane]
        i = max(bisect_right(begins, begin) - 1, 0)
        while i < len(begins) and begins[i] < end:
            first = max(begin, begins[i])
            last = min(end, begins[i] + int(self.lengths[documents[i]]))
            if last > first:
                yield first - begin, documents[i], first - begins[i], last - first
            i += 1


class LaneBatches(Dataset):
    """Item n is the batch of step n: all lanes, or after `take` one rank's share of them.

    A document of n tokens fills n positions: inputs are the end-of-document token followed by its tokens but the
    last, targets are its tokens, so that the first token is predicted too and masks apply to targets as they are.
    An item is a dict: tokens, targets, position [lanes, T] int64 (targets -100 where not trained; position counts
    from the document's start), reset [lanes, T] bool, and step_tokens, the number of trained tokens in the whole
    optimizer step, over all ranks and all `accumulate` batches of it.
    """

    def __init__(
        self,
        store: Store,
        documents: Documents,
        *,
        tokens_per_row: int,
        lanes: int,
        seed: int = 0,
        accumulate: int = 1,
        steps: int | None = None,
        vocab_size: int | None = None,
    ):
        """steps None: one pass over the documents, longest first, rows that have run out padded with -100.

        Raises ValueError for documents that train no token: there would be nothing to learn, and nothing to score.
        """
        if not documents.tokens:
            raise ValueError(f"no documents to read in this part of {store.path}; give it more text")
        if not any_trained(store, documents):
            raise ValueError(
                f"nothing to {'score' if steps is None else 'train on'} in this part of {store.path}: none of its "
                f"{documents.tokens:,} tokens is trained; give it more text whose answers are trained"
            )
        self.store, self.documents, self.width = store, documents, tokens_per_row
        self.all_lanes, self.first, self.lanes = lanes, 0, lanes
        self.accumulate, self.vocab_size = accumulate, vocab_size
        endless = steps is not None
        self.schedule = Schedule(documents.lengths, lanes, seed if endless else None, None if endless else 1)
        self.steps = steps if endless else -(-self.schedule.length() // self.width)

    def take(self, rank: int, ranks: int) -> None:
        """Keep only the rows of one of several ranks."""
        if self.all_lanes % ranks:
            raise ValueError(f"{self.all_lanes} lanes cannot be shared evenly by {ranks} ranks; change data.lanes")
        self.lanes = self.all_lanes // ranks
        self.first = rank * self.lanes

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, n: int) -> dict[str, torch.Tensor]:
        if not 0 <= n < self.steps:
            raise IndexError(n)
        shape = (self.lanes, self.width)
        tokens = np.full(shape, self.store.eod, np.int64)
        targets = np.full(shape, IGNORE_INDEX, np.int64)
        position = np.zeros(shape, np.int64)
        for row in range(self.lanes):
            for at, start, offset, count in self.stretches(self.first + row, n):
                self.store.check(start - bool(offset), count + bool(offset))
                text = self.store.tokens[start : start + count].astype(np.int64)
                self._check(text, start)
                here = slice(at, at + count)
                tokens[row, at] = self.store.tokens[start - 1] if offset else self.store.eod
                tokens[row, at + 1 : at + count] = text[:-1]
                targets[row, here] = text
                position[row, here] = np.arange(offset, offset + count)
                if self.store.mask is not None:
                    targets[row, here][self.store.mask[start : start + count] == 0] = IGNORE_INDEX
        batch = {"tokens": tokens, "targets": targets, "position": position, "reset": position == 0}
        return {k: torch.from_numpy(v) for k, v in batch.items()} | {"step_tokens": torch.tensor(self._trained(n))}

    def documents_in(self, n: int) -> list[int]:
        """Numbers, in the store, of the documents that batch n reads, over all ranks."""
        starts = [start for lane in range(self.all_lanes) for _, start, _, _ in self.stretches(lane, n)]
        return sorted({self.store.document_at(start) for start in starts})

    def stretches(self, lane: int, n: int):
        """(place in the row, first token in the store, offset in the document, tokens) of a row of step n."""
        for at, document, offset, count in self.schedule.window(lane, n * self.width, (n + 1) * self.width):
            yield at, int(self.documents.starts[document]) + offset, offset, count

    def _trained(self, n: int) -> int:
        """Trained tokens of the optimizer step that batch n belongs to."""
        mask, group = self.store.mask, n - n % self.accumulate
        return sum(
            count if mask is None else int(np.count_nonzero(mask[start : start + count]))
            for step in range(group, min(group + self.accumulate, self.steps))
            for lane in range(self.all_lanes)
            for _, start, _, count in self.stretches(lane, step)
        )

    def _check(self, text: np.ndarray, start: int) -> None:
        if self.vocab_size is not None and text.max() >= self.vocab_size:
            raise ValueError(
                f"{self.store.path}: token {text.max()} near position {start} does not fit the model's vocabulary "
                f"of {self.vocab_size}; prepare the text with the model's own tokenizer"
            )
