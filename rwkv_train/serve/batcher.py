"""Many replies at once: one thread owns the computing, and replies join and leave between two tokens.

A model of another version has lanes of its own until those that began with the old one have ended, so a reply is by one
version from its first token to its last.
"""

import queue
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from rwkv_train.feedback.background import half_the_threads, in_a_line
from rwkv_train.generation.decoder import Decoder, Scores
from rwkv_train.generation.prefill import prefill
from rwkv_train.generation.reply import Reply
from rwkv_train.generation.sampling import random_numbers
from rwkv_train.models.base import RWKV
from rwkv_train.models.finite import NotFinite
from rwkv_train.models.state import State
from rwkv_train.serve.jobs import Bound, End, Full, Job, Piece, Reason
from rwkv_train.tokenizer import Tokenizer

PIECE = 64  # tokens of prompts that are read between two tokens of the replies
AGAIN = 512  # tokens of a turn, at most, that are read again at its end, to have its state without the thought


@dataclass(eq=False)
class _Choice:
    job: Job
    number: int
    reply: Reply
    bound: Bound | None
    count: int = 0


@dataclass
class Load:
    """What the batcher does now and has done. lanes, waiting: replies; written, read: tokens, of prompts those read."""

    lanes: int = 0
    waiting: int = 0
    written: int = 0
    read: int = 0
    observers: list[Callable[[float], None]] = field(default_factory=list)  # each is told a step's seconds


class Batcher:
    """Writes the replies that are submitted, up to `lanes` side by side; `waiting` more may wait.

    A reply is what it would be alone: it has its own seed, and its prompt is cut where it would be cut alone. (Of lanes
    side by side a model's sums may be in another order: the logits differ by rounding.) flush(): called after every
    step, for those who gather events.
    """

    def __init__(
        self, tokenizer: Tokenizer, lanes: int = 64, waiting: int = 256, flush: Callable[[], None] = lambda: None
    ):
        self.tokenizer, self.lanes, self.waiting, self._flush = tokenizer, lanes, waiting, flush
        self.load, self._stop = Load(), frozenset([tokenizer.eod])
        self._asked: queue.Queue[tuple[str, Job | None]] = queue.Queue()
        self._line: list[tuple[float, Job]] = []  # until when, and what has no lane yet
        self._decoders: dict[RWKV, Decoder] = {}
        self._running: dict[tuple[RWKV, int], _Choice] = {}
        self._until: dict[Job, float] = {}
        self._lock, self._count = threading.Lock(), 0  # replies submitted and not ended
        self._ending = False
        self._thread = threading.Thread(target=self._work, name="batcher", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Take a job, from any thread. Raises Full, and ValueError for more choices than there are lanes."""
        if len(job.seeds) > self.lanes:
            raise ValueError(f"this server writes {self.lanes} replies side by side, so n must be at most that")
        with self._lock:
            if self._ending:
                raise Full("the server is stopping")
            if self._count + len(job.seeds) > self.lanes + self.waiting:
                raise Full(f"{self._count} replies are being written or wait")
            self._count += len(job.seeds)
        self._asked.put(("add", job))

    def cancel(self, job: Job) -> None:
        """Break a job off, from any thread; its choices end with what was shown. Nothing, where it has ended."""
        self._asked.put(("drop", job))

    def end(self) -> None:
        """Break everything off, and take nothing more."""
        with self._lock:
            self._ending = True
        self._asked.put(("end", None))

    def close(self) -> None:
        """Break everything off, and end the thread."""
        self._asked.put(("close", None))
        self._thread.join()

    def _work(self) -> None:
        with half_the_threads():
            going = True
            while going:
                try:
                    going = self._round()
                except Exception as error:  # a mistake of ours: nobody must wait for ever
                    traceback.print_exception(error)
                    self._fail(in_a_line(error))
                self._flush()

    def _round(self) -> bool:
        """Take in what was asked, and write a token of every reply. False: it is closed."""
        if not self._take():
            return False
        self._admit()
        begun, busy = time.monotonic(), list(self._decoders.items())
        for model, decoder in busy:
            self._step(model, decoder)
        self._out_of_time(time.monotonic())
        self.load.lanes, self.load.waiting = len(self._running), sum(len(job.seeds) for _, job in self._line)
        for observe in self.load.observers if busy else ():
            observe(time.monotonic() - begun)
        return True

    def _fail(self, error: str) -> None:
        """End everything."""
        for decoder in self._decoders.values():
            decoder.close()
        self._decoders.clear()
        for key in list(self._running):
            self._end(key, "error", None, error)
        for _, job in self._line:
            for number in range(len(job.seeds)):
                self._ended(job, End(number, "error", "", "", [], None, False, 0, error))
        self._line = []

    def _take(self) -> bool:
        """Take in what was asked, waiting for it where nothing else is to be done. False: close."""
        block = not (self._decoders or self._line)
        with suppress(queue.Empty):
            while True:
                what, job = self._asked.get(block)
                block = False
                if what == "add":
                    self._line.append((time.monotonic() + job.seconds, job))
                elif what == "drop":
                    self._drop(job, "cancelled")
                else:
                    for each in {c.job for c in self._running.values()} | {job for _, job in self._line}:
                        self._drop(each, "cancelled")
                if what == "close":
                    return False
        return True

    def _admit(self) -> None:
        """Give lanes to those that wait, in their order."""
        while self._line and len(self._running) + len(self._line[0][1].seeds) <= self.lanes:
            until, job = self._line[0]
            bounds = [self._bound(job) for _ in job.seeds]
            del self._line[0]
            self._until[job], first = until, 0
            decoder = self._decoders.setdefault(job.model, Decoder(job.model, piece=PIECE))
            for number, (seed, bound) in enumerate(zip(job.seeds, bounds, strict=True)):
                if number:
                    lane = decoder.beside(first, random_numbers(seed), bound)
                else:
                    more = self._stop, job.max_new_tokens, job.state, bound, job.likeliest
                    lane = first = decoder.add(job.prompt, job.sampling, random_numbers(seed), *more)
                reply = Reply(self.tokenizer, job.template, stop=job.stop)
                self._running[job.model, lane] = _Choice(job, number, reply, bound)
            self.load.read += len(job.prompt)

    def _bound(self, job: Job) -> Bound | None:
        constraint = job.constraint and job.constraint()
        return constraint and Bound(constraint, job.model.config.vocab_size, self.tokenizer.eod)

    def _step(self, model: RWKV, decoder: Decoder) -> None:
        try:
            for lane, token, state, scores in decoder.step():
                self._written(decoder, lane, token, state, scores)
        except Exception as error:  # of the model or its kernels: the replies that it writes end, others go on
            decoder.close()
            for key in [key for key in self._running if key[0] is model]:
                self._end(key, "error", None, in_a_line(error))
        if not len(decoder):
            del self._decoders[model]

    def _written(
        self, decoder: Decoder, lane: int, token: int | None, state: State | None, scores: Scores | None
    ) -> None:
        key = decoder.model, lane
        choice = self._running[key]
        if token is None:
            error = choice.bound.error if choice.bound else ""
            self._end(key, "error" if error else "stop", state, error)
            return
        choice.count += 1
        self.load.written += 1
        now = (lambda: decoder.state(lane)) if state is None else lambda: state
        following = decoder.following(lane) if state is None else None
        thought = len(choice.reply.thought)
        text = choice.reply.push(token, now, following)
        choice.job.tell(Piece(choice.number, token, text, scores, choice.reply.thought[thought:]))
        if choice.reply.done:
            ended = now()
            decoder.drop(lane)
            self._end(key, "stop", ended)
        elif state is not None:
            self._end(key, "length", state)

    def _drop(self, job: Job, reason: Reason) -> None:
        if any(job is waiting for _, waiting in self._line):
            self._line = [(until, waiting) for until, waiting in self._line if waiting is not job]
            for number in range(len(job.seeds)):
                self._ended(job, End(number, reason, "", "", [], None, False, 0))
        for key in [key for key, choice in self._running.items() if choice.job is job]:
            model, lane = key
            decoder, choice = self._decoders[model], self._running[key]
            state = decoder.state(lane) if choice.count else None
            decoder.drop(lane)
            self._end(key, reason, state)
            if not len(decoder):
                del self._decoders[model]

    def _out_of_time(self, now: float) -> None:
        late = [job for job, until in self._until.items() if until < now] + [j for u, j in self._line if u < now]
        for job in late:
            self._drop(job, "time")

    def _end(self, key: tuple[RWKV, int], reason: Reason, state: State | None, error: str = "") -> None:
        """A choice ends; state: after its last token, None if it has none."""
        choice = self._running.pop(key)
        reply, text = choice.reply, ""
        ids: list[int] = []
        if state is not None:
            text = reply.finish()
            ids, rest, state = reply.settle(state)
            more = self.tokenizer.encode(rest)
            if reply.apart:  # of what the model has read: question and reply are read again, if they are short
                again = [*choice.job.history, *more]
                state = self._after(key[0], again, choice.job.state) if len(again) <= AGAIN else None
            elif more:
                state = state and self._after(key[0], more, state)
            ids += more
        end = End(choice.number, reason, text, reply.shown, ids, state, reply.ended, choice.count, error, reply.thought)
        self._ended(choice.job, end)

    def _after(self, model: RWKV, ids: list[int], state: State | None) -> State | None:
        """The state after some more ids; None where the model gives none."""
        try:
            return prefill(model, ids, state)[1]
        except NotFinite:
            return None

    def _ended(self, job: Job, end: End) -> None:
        with self._lock:
            self._count -= 1
        if not any(choice.job is job for choice in self._running.values()):
            self._until.pop(job, None)
        job.tell(end)
