"""Raw records to tokens and masks, in this process or in several, always in order."""

import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import numpy as np

from rwkv_train.data.render import Columns, Rendered, render
from rwkv_train.data.sources import Raw
from rwkv_train.data.templates import Template
from rwkv_train.files import parse_json
from rwkv_train.tokenizer import Tokenizer, to_utf8

BATCH_BYTES, BATCH_RECORDS = 1 << 20, 2048  # what one worker gets at a time
SMALL = 8  # inputs of up to this many batches are not worth the start of other processes


@dataclass(frozen=True)
class Encoded:
    """A record's tokens (int32 [n], without the end of document), or what is wrong with it.

    mask is bool [n], or one bool for all; ends is None inside a document, else whether its end is trained. about:
    what the record was, without its text.
    """

    raw: Raw  # without its data
    error: str | None = None
    ids: np.ndarray | None = None
    mask: np.ndarray | bool = True
    text_bytes: int = 0
    ends: bool | None = None
    about: Rendered | None = None


@dataclass(frozen=True)
class Encoder:
    """Raw records to text to tokens. Pickled once to every worker."""

    tokenizer: Tokenizer | None
    kind: str
    template: Template
    columns: Columns

    def text(self, raw: Raw) -> str:
        """The whole record as text; ValueError says what is wrong with it."""
        text = "".join(text for text, _ in self._rendered(raw).segments)
        to_utf8(text)
        return text

    def _rendered(self, raw: Raw) -> Rendered:
        if raw.form == "bad":
            raise ValueError(raw.data)
        if raw.form == "record":
            return render(raw.data, self.kind, self.template, self.columns)
        try:
            text = raw.data.decode("utf-8")
        except UnicodeDecodeError:
            raise ValueError("invalid UTF-8") from None
        if raw.form == "text":
            if raw.first and raw.last and not text.strip():
                raise ValueError("the text is empty")
            return Rendered([(text, True)], "file")
        return render(parse_json(text), self.kind, self.template, self.columns)

    def __call__(self, raw: Raw) -> Encoded:
        bare = Raw(raw.where, raw.form, None, raw.size, raw.first, raw.last)
        try:
            rendered = self._rendered(raw)
            segments = rendered.segments
            pieces = [self.tokenizer.encode(text) for text, _ in segments]
        except ValueError as error:
            return Encoded(bare, error=str(error))
        ids = np.fromiter(itertools.chain.from_iterable(pieces), np.int32)
        trained = [trained for _, trained in segments]
        mask = True if all(trained) else np.repeat(trained, [len(piece) for piece in pieces])
        text_bytes = sum(len(text.encode("utf-8")) for text, _ in segments)
        about = rendered._replace(segments=[])
        return Encoded(bare, None, ids, mask, text_bytes, trained[-1] if raw.last else None, about)


def encode(encoder: Encoder, records: Iterable[Raw], workers: int = 0) -> Iterator[Encoded]:
    """Encode `records` in order with that many processes (0 = one a core); small inputs stay in this one.

    The results do not depend on `workers`. At most two batches a worker are in memory at once. Closing the
    generator ends the processes. Raises ValueError if one of them dies.
    """
    workers = workers or _cores()
    batches = _batches(records)
    head = list(itertools.islice(batches, SMALL + 1)) if workers > 1 else []
    batches = itertools.chain(head, batches)
    if len(head) <= SMALL:
        for batch in batches:
            yield from map(encoder, batch)
    else:
        yield from _encode_parallel(encoder, batches, workers)


def _encode_parallel(encoder: Encoder, batches: Iterable[list[Raw]], workers: int) -> Iterator[Encoded]:
    # Spawned, not forked: forking a process with threads (torch, tokenizers) can deadlock.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(encoder,))
    pending: deque = deque()
    try:
        for batch in batches:
            pending.append(pool.submit(_work, batch))
            if len(pending) >= 2 * workers:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()
    except BrokenProcessPool:
        hint = "It may have run out of memory: try fewer --workers, or --workers 1."
        raise ValueError(f"A worker process of prepare died. {hint}") from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_encoder: Encoder | None = None  # a worker's own


def _start_worker(encoder: Encoder) -> None:
    global _encoder
    _encoder = encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the main process, which ends the workers
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    """A killed main process cannot end its workers, and they would wait for the next batch for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _work(batch: list[Raw]) -> list[Encoded]:
    return [_encoder(raw) for raw in batch]


def _batches(records: Iterable[Raw]) -> Iterator[list[Raw]]:
    batch: list[Raw] = []
    size = 0
    for raw in records:
        batch.append(raw)
        size += raw.size
        if size >= BATCH_BYTES or len(batch) == BATCH_RECORDS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
